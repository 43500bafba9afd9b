"""The daemon as a service: notification, watchdog, and the unit files that are installed."""
