"""What supervisor and worker share: time, waiting, the wire, deadlines, errors."""
