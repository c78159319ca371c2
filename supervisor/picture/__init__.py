"""A stop as a picture: read from its receipt, laid out on one scale of time, and drawn."""
