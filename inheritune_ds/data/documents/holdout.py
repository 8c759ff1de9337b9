"""Selects held-out documents by their content alone, so that order and copies of a corpus do not matter."""


def is_held_out(digest: bytes, ratio: float) -> bool:
    """Whether a document belongs to the validation part.

    Args:
        digest: sha256 of the document; its first 8 bytes (big-endian) are a fraction of 2**64.
        ratio: Share of all documents that is held out.
    """
    return int.from_bytes(digest[:8], "big") < ratio * 2**64
