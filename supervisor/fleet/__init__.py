"""All workers: what state each is in, how each is stopped, and when one is replaced."""
