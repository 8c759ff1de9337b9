"""Arithmetic of a run and its text: budget, memory, hours; without torch."""
