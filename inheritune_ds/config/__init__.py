"""The two documents of a run: the recipe and the DeepSpeed config."""
