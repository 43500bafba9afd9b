"""What is told of a daemon while it works: metrics, timelines, room on the volumes, and what the page shows."""
