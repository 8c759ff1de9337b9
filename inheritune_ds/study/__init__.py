"""Several runs in order, and their comparison."""
