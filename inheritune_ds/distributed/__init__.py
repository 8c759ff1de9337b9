"""Ranks: who they are, how they agree, how they end."""
