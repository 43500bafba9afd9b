"""The open line to the daemon: who this process is, where the daemon is found, what is asked of a session."""
