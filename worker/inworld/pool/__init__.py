"""The pool of Inworld connections: decisions, contexts, connections, and the close."""
