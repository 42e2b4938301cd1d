"""What: from a scan on disk to the array a model sees, and the store that keeps it."""
