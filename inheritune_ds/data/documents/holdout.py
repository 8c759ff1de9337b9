"""Selects held-out documents by their content alone, so that order and copies of a corpus do not matter."""


def is_held_out(digest: bytes, ratio: float) -> bool:
    """Whether a document is held out, by the first 8 bytes of its sha256 as a fraction of 2**64."""
    return int.from_bytes(digest[:8], "big") < ratio * 2**64
