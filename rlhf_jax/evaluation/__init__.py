"""What a policy's responses are worth: statistics, judges, comparisons, reports."""
