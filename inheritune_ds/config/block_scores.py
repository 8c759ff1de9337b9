"""Measured scores of blocks, for selections `by:NAME:n`."""

import json
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from inheritune_ds.errors import RecipeError
from inheritune_ds.storage.file_kind import FileKind, action_for, unexpected_kind

FORMAT = '{"NAME": [one number for each block of the reference, block 0 first; higher is kept], ...}'


def read_scores(path: str | None) -> dict[str, list[float]]:
    """Read a JSON object of lists of numbers; no scores without a file. Raises a RecipeError for any other content."""
    if path is None:
        return {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise RecipeError(f"block_scores: {path} names {duplicate!r} twice", allowed=FORMAT)
        return dict(pairs)

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        document = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        usual = (FileKind.JSON_OBJECT, FileKind.JSON_LINES, FileKind.MARKED)
        kind = unexpected_kind(Path(path).expanduser(), usual)
        reason = error.strerror if isinstance(error, OSError) else f"it is {kind.value if kind else 'not JSON'}"
        action = action_for(kind, Path(path)) if kind else ""
        raise RecipeError(f"block_scores: {path} cannot be read: {reason}", allowed=FORMAT, action=action) from None
    try:
        return TypeAdapter(dict[str, list[FiniteFloat]]).validate_python(document, strict=True)
    except ValidationError:
        raise RecipeError(f"block_scores: {path} does not hold scores", allowed=FORMAT) from None
