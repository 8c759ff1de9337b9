"""Which documents are held out: decided by their content alone, so whatever the order or the copies of a corpus."""


def is_held_out(digest: bytes, ratio: float) -> bool:
    """Whether a document belongs to the validation part.

    Args:
        digest: sha256 of the document.
        ratio: Share of all documents; compared with the first 8 bytes (big-endian) as a fraction of 2**64.
    """
    return int.from_bytes(digest[:8], "big") < ratio * 2**64
