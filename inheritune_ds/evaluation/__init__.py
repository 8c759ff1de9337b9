"""The loss of the reference on the validation windows of a run."""
