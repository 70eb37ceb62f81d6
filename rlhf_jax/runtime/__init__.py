"""What a process sets up before and around the work: compiler, memory."""
