"""The only code that touches private names of livekit-agents and multiprocessing."""
