"""Training state on disk: save, publish, verify, keep, reshard."""
