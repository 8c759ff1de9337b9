"""Base class and types for the models of both documents: names, `auto`, durations."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    Tag,
)

from inheritune_ds.errors import RecipeError


def as_value_error(check: Callable[[], object]) -> None:
    """Turn the RecipeError of a check into a ValueError, which pydantic collects."""
    try:
        check()
    except RecipeError as error:
        raise ValueError(str(error)) from None


T = TypeVar("T")
AUTO: Literal["auto"] = "auto"
Auto: TypeAlias = Annotated[
    Annotated[T, Tag("value")] | Annotated[Literal["auto"], Tag(AUTO)],
    Discriminator(lambda value: AUTO if value == AUTO else "value"),
]
"""`Auto[int]`: a whole number, or "auto"."""


class ConfigModel(BaseModel):
    """Base of every model: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Allowed:
    """Annotation of a type for messages and the docs."""

    words: str = ""
    """The allowed values; empty if the type and its bounds say them."""
    refused: Any = None
    """A value that DeepSpeed accepts and this program refuses."""
    reason: str = ""
    """Why it is refused."""
    instead: Any = None
    """The accepted value that is closest to it."""


Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, StringConstraints(min_length=1)]
NAME_FORM = Allowed("a name of letters, digits, '.', '_' and '-', starting with a letter or digit")
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), NAME_FORM]

_SCALES = {None: 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Duration:
    """A length of training, such as `8 epochs`, `100_000 steps` or `250M tokens`; `text` is the original spelling."""

    amount: int
    unit: str
    text: str

    def __str__(self) -> str:
        return self.text


def _parsed(*units: str) -> PlainValidator:
    form = re.compile(rf"([0-9]+(?:_[0-9]+)*)(K|M|B)? ({'|'.join(units)})")

    def parse(value: Any) -> Duration:
        match = form.fullmatch(str(value))
        if match is None:
            raise ValueError  # without a text: `Allowed` has the words
        amount, unit = int(match[1]) * _SCALES[match[2]], match[3]
        if amount == 0:
            raise ValueError("the amount must be at least 1")
        return Duration(amount, unit, str(value))

    return PlainValidator(parse)


TrainingDuration = Annotated[
    Duration,
    _parsed("steps", "tokens", "epochs"),
    PlainSerializer(str),
    Allowed("a count and a unit: 8 epochs, 100_000 steps, 250M tokens"),
]
TokenCount = Annotated[Duration, _parsed("tokens"), PlainSerializer(str), Allowed("a count of tokens: 500M tokens")]


def is_local_path(name: str) -> bool:
    """Whether a model, dataset or tokenizer name is written as a path rather than as a hub id."""
    path = PurePath(name)
    return path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
