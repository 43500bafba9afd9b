"""The daemon's configuration: its file, a sample of it, and what a reload changes."""
