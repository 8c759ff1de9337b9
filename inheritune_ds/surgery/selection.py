"""Which blocks of the reference are kept."""

from inheritune_ds.errors import SurgeryError
from inheritune_ds.recipe import SELECTION_PATTERN


def select_blocks(selection: str, depth: int) -> tuple[int, ...]:
    """Turn a selection into block indices of the reference, in the target's order.

    Args:
        selection: `first:n`.
        depth: Number of blocks of the reference.

    Raises:
        SurgeryError: If the reference has fewer blocks than asked for.
    """
    match = SELECTION_PATTERN.fullmatch(selection)
    if match is None:
        raise SurgeryError(f"target.select: {selection!r} is no selection", allowed="first:n, such as first:4")
    count = int(match.group(1))
    if count > depth:
        raise SurgeryError(
            f"target.select: {selection} asks for {count} blocks, but the reference has {depth}",
            allowed=f"first:1 to first:{depth}",
            action=f"set target.select=first:{depth // 2 or 1} (half of the blocks is the method's default)",
        )
    return tuple(range(count))
