"""The views of a running supervisor, and the sockets over which it can be asked."""
