"""Where a program runs: devices, processes, memory, logs."""
