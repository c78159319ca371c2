"""The process that has the pool, and serves the jobs of a machine on loopback."""
