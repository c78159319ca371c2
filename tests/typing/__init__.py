"""Code that only has to type-check; no test runs it."""
