"""The checkpoint daemon: service loop, supervisor, workers, metrics, HTTP and command line."""
