"""The supervisor: starts workers, keeps them up, and ends them without cutting a call."""
