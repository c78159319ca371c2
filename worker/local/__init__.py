"""Local stand-ins for the servers a worker talks to: for the demo, for development and for tests."""
