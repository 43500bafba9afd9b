"""How clients reach the daemon: the attach socket, the message socket, sessions, and arenas admitted for them."""
