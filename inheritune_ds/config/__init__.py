"""Recipe (YAML) and DeepSpeed config (JSON), both checked; no torch."""
