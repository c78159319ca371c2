"""Points livekit-plugins-inworld at the pool, and closes its connections at the end of a job."""
