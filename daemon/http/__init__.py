"""The HTTP endpoint: status, events, metrics, health and the page. It reads and never changes anything."""
