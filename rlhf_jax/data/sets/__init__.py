"""Data sets as they are distributed: pinned archives and HH-RLHF."""
