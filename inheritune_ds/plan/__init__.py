"""The arithmetic of a run and its text. Needs no torch."""
