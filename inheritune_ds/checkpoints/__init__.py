"""Checkpoints: the state by parameter name, saved, published, verified, kept, resharded."""
