"""`train_by_import.py` is a program, run by a test on the installed wheel; nothing to collect."""

collect_ignore = ["train_by_import.py"]
