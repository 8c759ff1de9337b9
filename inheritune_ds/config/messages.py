"""Validate a document against a pydantic model; report all problems at once, with the nearest key."""

import difflib
import math
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from inheritune_ds.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], document: dict[str, Any], origin: str) -> Model:
    """Build a pydantic model; every problem becomes a line with path, value and what is allowed."""
    built, problems = check(model, document, origin)
    if built is None:
        raise RecipeError.of(problems)
    return built


def check(model: type[Model], document: dict[str, Any], origin: str) -> tuple[Model | None, list[RecipeError]]:
    """Build a pydantic model, or list every problem of its document."""
    try:
        return model.model_validate(document), []
    except ValidationError as error:
        items = [item for item in error.errors(include_url=False) if not _is_other_branch(model, item)]
        return None, [_describe(model, item, origin) for item in items]


_TEXT_BRANCH = "constrained-str"


def _is_other_branch(model: type[BaseModel], item: Any) -> bool:
    """Whether pydantic complains about the branch of `text | mapping` or `text | list` that the user did not take."""
    loc, value = item["loc"], item["input"]
    if _TEXT_BRANCH in loc:
        return isinstance(value, dict) or (isinstance(value, list) and not locate(model, loc)[1])
    if item["type"] == "list_type" and str(loc[-1]).startswith("list["):
        return not isinstance(value, dict)
    return bool(item["type"] == "model_type" and loc[-1:] == (item["ctx"]["class_name"],))


def _describe(model: type[BaseModel], item: Any, origin: str) -> RecipeError:
    path, models = locate(model, item["loc"])
    key = ".".join(path)
    where = f"{origin}: {key}" if key else origin
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted(_keys_of(locate(model, item["loc"][:-1])[1]))
        hint = nearest(path[-1], known)
        return RecipeError(
            f"{where}: unknown key",
            allowed=", ".join(known),
            action=f"did you mean {'.'.join([*path[:-1], hint])}?" if hint else "remove it",
        )
    if kind == "missing":
        return RecipeError(
            f"{where}: required key is missing", allowed=_expected(model, item["loc"]), action=f"add {key}"
        )
    if kind == "value_error":
        return RecipeError(f"{where}: {context['error']}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        wrong = f"{context['tag']!r} is unknown" if "tag" in context else "required key is missing"
        kinds = "files or hub" if path[-2:-1] == ["overlap_with"] else "embedded, files, hub or nanogpt"
        return RecipeError(f"{where}.kind: {wrong}", allowed=kinds, action=f"set {key}.kind")
    if kind == "string_pattern_mismatch":
        problem = f"{where}: {value!r} is not of the right form"
        return RecipeError(problem, allowed=_form(context["pattern"]), action=f"change {key}")
    allowed = _ALLOWED.get(kind, item["msg"].removeprefix("Input should be "))
    if _TEXT_BRANCH in item["loc"]:
        allowed += f", or a mapping of {', '.join(sorted(_keys_of(models)))}" if models else ", or a list of text"
    elif kind == "string_type":
        allowed = _expected(model, item["loc"]) or allowed
    return RecipeError(f"{where}: {short(value)} is not accepted", allowed=allowed, action=f"change {key}")


def _expected(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """What the field at a location takes, in the words of a YAML file."""
    _, parents = locate(model, loc[:-1])
    field = next((parent.model_fields[str(loc[-1])] for parent in parents if loc[-1] in parent.model_fields), None)
    if field is None:  # an item of a list
        return ""
    pattern = next((found for item in field.metadata if (found := getattr(item, "pattern", None))), None)
    if pattern:
        return _form(pattern)
    kind: Any = get_origin(field.annotation) or field.annotation
    if kind is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping of {', '.join(kind.model_fields)}"
    return {int: "a whole number", float: "a number", list: "a list"}.get(kind, "text")


_MAPPING = "a mapping of keys to values"
_ALLOWED = {
    "dict_type": _MAPPING,
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": _MAPPING,
    "model_type": _MAPPING,
    "string_too_short": "text of at least one character",
    "string_type": "text",
    "too_short": "a list with at least one item",
    "tuple_type": "a list",
}
"""What a kind of pydantic's error allows, in the words of a YAML file."""


_FORMS = {
    "steps": "a count and a unit: 8 epochs, 100_000 steps, 250M tokens",
    " tokens$": "a count of tokens: 500M tokens",
    "A-Za": "letters, digits, '.', '_' and '-', starting with a letter or digit",
}


def _form(pattern: str) -> str:
    return next((form for mark, form in _FORMS.items() if mark in pattern), pattern)


def short(value: Any) -> str:
    """A value as Python writes it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """Turn pydantic's location into a key path, and find the models that stand there.

    pydantic puts the branch of a union into the location (`embedded`, `constrained-str`); a reader knows only keys.
    """
    path: list[str] = []
    models, at_union = [model], False
    for part in loc:
        if at_union and isinstance(part, str):
            models = [at for at in models if part in (at.__name__, _tag(at))] or models
            at_union = False
            continue
        path.append(str(part))
        if isinstance(part, str):
            fields = [at.model_fields[part].annotation for at in models if part in at.model_fields]
            models = [inner for annotation in fields for inner in models_in(annotation)]
            at_union = any(is_union(annotation) for annotation in fields)
    return path, models


def _keys_of(models: Sequence[type[BaseModel]]) -> set[str]:
    return {name for model in models for name in model.model_fields}


def _tag(model: type[BaseModel]) -> str | None:
    """The value of `kind` by which a source's model is chosen."""
    kind = model.model_fields.get("kind")
    return next(iter(get_args(kind.annotation)), None) if kind else None


def is_union(annotation: Any) -> bool:
    """Whether one of several types, None not counted, can stand there or in the list there."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and len(parts) > 1:
        return True
    return any(is_union(part) for part in parts)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models of an annotation, through unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is most like a word; None if none is close."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def is_nan(value: Any) -> bool:
    """Whether a value is a float NaN."""
    return isinstance(value, float) and math.isnan(value)
