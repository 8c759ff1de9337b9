"""Metrics: the table of names, metrics.jsonl, W&B."""
