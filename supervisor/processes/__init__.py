"""One edge of the operating system each: children, their output, their descendants, their end."""
