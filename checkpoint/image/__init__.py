"""One rank's image: its byte order, and how it is written and hashed."""
