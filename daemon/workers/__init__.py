"""Worker processes: who starts and watches them, what they are asked, and what they do."""
