"""People's judgements: what is judged, by whom, the file that keeps it, the page, the export."""
