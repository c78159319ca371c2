"""What becomes of livekit-plugins-inworld inside a job process."""
