"""What is shown of a running supervisor, and over which sockets it can be asked."""
