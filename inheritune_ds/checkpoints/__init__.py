"""Checkpoints: every rank's fragments, published by one rename, verified before use, loaded by parameter name."""
