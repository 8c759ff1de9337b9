"""Both documents: the recipe (YAML) and the DeepSpeed config (JSON). Needs no torch."""
