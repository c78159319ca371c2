"""What runs inside a job process."""
