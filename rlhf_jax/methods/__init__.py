"""What each method is: its configuration, its loss on a batch, one iteration of it."""
