"""The supervisor side of lastcall: runs workers and guarantees what happens when they are told to stop."""
