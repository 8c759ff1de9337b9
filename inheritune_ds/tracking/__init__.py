"""Metrics: their names, metrics.jsonl, Weights & Biases."""
