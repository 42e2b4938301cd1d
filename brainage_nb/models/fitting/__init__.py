"""Training, from one step to the folds and seeds of a run. `models.training` is the way in."""
