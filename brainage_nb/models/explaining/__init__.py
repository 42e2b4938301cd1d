"""Heat maps of one scan and of groups, their checks and pictures. `models.explain` is the way in."""
