"""What every model of a recipe is built from: the base class, plain types and amounts such as `500M tokens`."""

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inheritune_ds.errors import RecipeError


def as_value_error(check: Callable[[], object]) -> None:
    """Let pydantic collect a problem that a grammar of its own has found."""
    try:
        check()
    except RecipeError as error:
        raise ValueError(str(error)) from None


Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

AMOUNT = r"([0-9][0-9_]*)(K|M|B)?"
_SCALES = {None: 1, "K": 10**3, "M": 10**6, "B": 10**9}


class ConfigModel(BaseModel):
    """Base of every recipe model: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def amount_and_unit(text: str) -> tuple[int, str]:
    """Read an amount such as `8 epochs`, `100_000 steps` or `250M tokens`.

    Args:
        text: `AMOUNT`, a space and a unit; the field's pattern has checked it.
    """
    match = re.fullmatch(f"{AMOUNT} ([a-z]+)", text)
    assert match is not None  # the field's pattern
    return int(match.group(1)) * _SCALES[match.group(2)], match.group(3)


def is_local_path(name: str) -> bool:
    """Whether a model, dataset or tokenizer name is written as a path rather than as a hub id."""
    path = PurePath(name)
    return path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
