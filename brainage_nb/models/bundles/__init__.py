"""A saved model: what is written, checked, read, and said of a scan. `models.bundle` is the way in."""
