"""What outlives the daemon, and how its successor takes it up: journal, directories, adoption."""
