"""Layout of page-locked host memory in a few chunks whose sizes are powers of two.

torch rounds every page-locked allocation up to a power of two and never splits one (ATen/core/CachingHostAllocator.h),
so a buffer for each tensor may take twice its bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_ALIGNMENT = 512
"""Bytes; that of the device's allocator."""


@dataclass(frozen=True)
class ChunkLayout:
    """Chunks and what is in them.

    Attributes:
        sizes: Bytes of each chunk.
        places: Chunk number and first byte, by key.
    """

    sizes: tuple[int, ...]
    places: Mapping[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Of all chunks."""
        return sum(self.sizes)


def chunk_layout(tensor_bytes: Mapping[str, int]) -> ChunkLayout:
    """Place tensors, the largest first, each in the first chunk that has room; bytes above 0 by key.

    A new chunk is the largest power of two in the bytes that are left, or holds at least the next tensor.
    """
    aligned = {key: -(-size // _ALIGNMENT) * _ALIGNMENT for key, size in tensor_bytes.items()}
    left, sizes, filled = sum(aligned.values()), list[int](), list[int]()
    places: dict[str, tuple[int, int]] = {}
    for key, size in sorted(aligned.items(), key=lambda item: item[1], reverse=True):
        number = next((n for n, taken in enumerate(filled) if taken + size <= sizes[n]), len(sizes))
        if number == len(sizes):
            sizes.append(max(1 << left.bit_length() - 1, 1 << (size - 1).bit_length()))
            filled.append(0)
        places[key] = number, filled[number]
        filled[number] += size
        left -= size
    return ChunkLayout(tuple(sizes), places)
