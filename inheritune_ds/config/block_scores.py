"""Measured scores of blocks, for selections `by:NAME:n`."""

import json
import math
from pathlib import Path
from typing import Any

from inheritune_ds.errors import RecipeError

FORMAT = '{"NAME": [one number for each block of the reference, block 0 first; higher is kept], ...}'


def read_scores(path: str | None) -> dict[str, list[float]]:
    """Read a JSON object of lists of numbers; no scores without a file.

    Raises:
        RecipeError: If the file cannot be read, or has another content.
    """
    if path is None:
        return {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise RecipeError(f"block_scores: {path} names {duplicate!r} twice", allowed=FORMAT)
        return dict(pairs)

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        document = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise RecipeError(f"block_scores: {path} cannot be read: {reason}", allowed=FORMAT) from None
    if not isinstance(document, dict) or not all(_is_scores(values) for values in document.values()):
        raise RecipeError(f"block_scores: {path} does not hold scores", allowed=FORMAT)
    return {name: [float(value) for value in values] for name, values in document.items()}


def _is_scores(values: object) -> bool:
    if not isinstance(values, list):
        return False
    try:
        return all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
        )
    except OverflowError:  # a whole number beyond the range of floats
        return False
