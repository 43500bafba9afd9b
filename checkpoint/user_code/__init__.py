"""Users' own planners and storage writers: handed over, and run by one process for all ranks."""
