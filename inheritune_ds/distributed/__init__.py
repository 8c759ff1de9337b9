"""Ranks: world, process group, signals, work on rank 0, watchdog."""
