"""Errors of a document: every problem with its key path, value, allowed values and action."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError, create_model
from pydantic.fields import FieldInfo

from inheritune_ds.config.fields import Allowed, ConfigModel
from inheritune_ds.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], document: dict[str, Any], origin: str) -> Model:
    """Build a model of a parsed document, `origin` in messages; raise one RecipeError with every problem found."""
    built, problems = check(model, document, origin)
    if built is None:
        raise RecipeError.of(problems)
    return built


def check(model: type[Model], document: dict[str, Any], origin: str) -> tuple[Model | None, list[RecipeError]]:
    """Build a model like `validate`, or return the problems."""
    try:
        return model.model_validate(document), []
    except ValidationError as error:
        return None, [_describe(model, item, origin) for item in error.errors(include_url=False)]


def _describe(model: type[BaseModel], item: Any, origin: str) -> RecipeError:
    path, field, inner = _locate(model, item["loc"])
    key = ".".join(path)
    where = f"{origin}: {key}" if key else origin
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        known = sorted({key for at in models_at(model, item["loc"][:-1]) for key in at.model_fields})
        hint = nearest(path[-1], known, least=0.75)  # a name less similar may be another feature
        action = f"did you mean {'.'.join([*path[:-1], hint])}?" if hint else f"remove {key}"
        return RecipeError(f"{where}: unknown key", allowed=", ".join(known), action=action)
    if kind == "value_error" and str(context["error"]):
        return RecipeError(f"{where}: {context['error']}")
    if kind == "missing":
        return RecipeError(f"{where}: required key is missing", allowed=words(*field), action=f"add {key}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        problem = f"{context['tag']!r} is unknown" if "tag" in context else "required key is missing"
        kinds = _any_of([kind for at, _ in inner for kind in _kinds(at)])
        return RecipeError(f"{where}.kind: {problem}", allowed=kinds, action=f"set {key}.kind")
    allowed = words(*field).replace(*_CLOSER.get(kind, ("", "")))
    reason, action = _reason(inner, value), _action(key, field, inner, value)
    return RecipeError(f"{where}: {short(value)} is not accepted{reason}", allowed=allowed, action=action)


_CLOSER = {
    "finite_number": ("a number", "a finite number"),
    "string_too_short": ("text", "text of at least one character"),
}
"""Words of a type and more precise ones, by the kind of pydantic's error."""


def _reason(branches: "Sequence[_Type]", value: Any) -> str:
    """The reason for refusing a value that DeepSpeed accepts, in parentheses."""
    return next((f" ({mark.reason})" for mark in _refusing(branches, value)), "")


def _refusing(branches: "Sequence[_Type]", value: Any) -> Iterator[Allowed]:
    """The marks of types that refuse just this value, with a reason."""
    for mark in (mark for _, metadata in branches for mark in metadata if isinstance(mark, Allowed)):
        if mark.reason and type(mark.refused) is type(value) and mark.refused == value:
            yield mark


_SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _action(key: str, field: "_Type", branches: "Sequence[_Type]", value: Any) -> str:
    """Ask for the accepted value that was meant; without one, for another value or none."""
    known = [mark.instead for mark in _refusing(branches, value)]
    choices = [name for annotation, _ in branches for name in _choices(annotation)]
    meant = next((other for other in [*known, *_spellings(value, choices)] if _accepts(field, other)), None)
    if meant is not None:
        bare = " without quotes" if isinstance(value, str) and isinstance(meant, int | float) else ""
        return f"write {json.dumps(meant)}{bare}"
    may_be_missing = value is None and words(*field).endswith('"auto"')
    return f"remove {key}" if may_be_missing else f"change {key}"


def _choices(annotation: Any) -> Sequence[Any]:
    origin: Any = get_origin(annotation)
    return get_args(annotation) if origin is Literal else ()


def _spellings(value: Any, choices: Sequence[Any]) -> Iterator[Any]:
    """Values that a refused one may stand for: without quotes, in other letters, as a whole number, in its block."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _SWITCH_WORDS:
            yield _SWITCH_WORDS[text.lower()]
        for kind in (int, float):
            with suppress(ValueError):
                yield kind(text)
        yield from (name for name in choices if str(name).lower() == text.lower())
        yield {"device": text.lower()}
    elif isinstance(value, bool):
        yield {"enabled": value}
    elif isinstance(value, int | float):
        if value in (0, 1):
            yield bool(value)
        if float(value).is_integer():
            yield int(value)


def _accepts(field: "_Type", value: Any) -> bool:
    """Whether a type with its metadata accepts a value."""
    annotation, metadata = field
    marked: Any = Annotated
    kind = marked[(annotation, *metadata)] if metadata else annotation
    try:
        create_model("One", __base__=ConfigModel, value=(kind, ...)).model_validate({"value": value})
    except ValidationError:
        return False
    return True


def short(value: Any) -> str:
    """A value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, known: Sequence[str], *, least: float = 0.6) -> str | None:
    """The known word that is closest to a mistyped one; None if none has the least similarity (of 1)."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=least)), None)


_Type = tuple[Any, Sequence[Any]]
"""A type and its metadata: bounds and marks of `Annotated` or of a field."""


def words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The allowed values of a type with its metadata, in the words of a document."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(parts[0], [*parts[1:], *metadata])
    stated = next((mark.words for mark in metadata if isinstance(mark, Allowed) and mark.words), None)
    if stated:
        return stated
    if origin in (Union, UnionType):
        kinds = [kind for part in parts for kind in _kinds(part)]
        of_each = [words(part) for part in parts if part is not NoneType]
        return f"a mapping of kind {_any_of(kinds)}" if len(kinds) > 1 else ", or ".join(of_each)
    return _plain(annotation, metadata)


def _plain(annotation: Any, metadata: Sequence[Any]) -> str:
    """The allowed values of a type that is not a union."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return '"auto"' if parts == ("auto",) else _any_of(parts)
    if origin in (list, tuple):
        items = "a list of text" if words(parts[0]) == "text" else "a list"
        return items + " with at least one item" * any(hasattr(mark, "min_length") for mark in metadata)
    if origin is dict:
        return "a mapping of keys to values"
    if issubclass(annotation, BaseModel):
        return f"a mapping of {', '.join(sorted(annotation.model_fields))}"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[annotation]
    return name if annotation is str else name + "".join(_bounds(metadata))


def _any_of(items: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    forms = {"ge": ", {} or more", "gt": " above {}", "le": ", at most {}", "lt": ", below {}"}
    for mark in metadata:
        for bound in mark.metadata if isinstance(mark, FieldInfo) else [mark]:
            for name, form in forms.items():
                value = getattr(bound, name, None)
                if value is not None:
                    yield form.format(f"{value:g}" if isinstance(value, float) else value)


def models_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that may be at a location: keys and positions, with or without pydantic's branches of unions."""
    return [at for at, _ in _locate(model, loc)[2] if isinstance(at, type) and issubclass(at, BaseModel)]


def _locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], _Type, list[_Type]]:
    """Find a location: its key path, the type there, and pydantic's branches of that type.

    pydantic's location includes branches of unions (`embedded`, `value`), the key path does not.
    """
    path: list[str] = []
    field: _Type = (model, ())
    branches = [field]
    for part in loc:
        taken = [branch for branch in branches if part in _tags(branch)] if len(branches) > 1 else []
        if taken:
            branches = taken
            continue
        path.append(str(part))
        found = [inner for branch in branches for inner in _inside(branch, part)]
        field = found[0] if found else field
        branches = [branch for inner in found for branch in _branches(*inner)]
    return path, field, branches


def _inside(outer: _Type, part: int | str) -> list[_Type]:
    """The type of a key of a model or a mapping, or of an item of a list."""
    annotation: Any = outer[0]
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return [(field.annotation, field.metadata)] if field else []
    return [(parts[-1], ())] if origin in (list, tuple, dict) else []


def _branches(annotation: Any, metadata: Sequence[Any]) -> Iterator[_Type]:
    """The types of a union without None; another type itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _branches(parts[0], [*parts[1:], *metadata])
    elif origin in (Union, UnionType):
        for part in parts:
            if part is not NoneType:
                yield from _branches(part, metadata)
    else:
        yield annotation, metadata


def _tags(branch: _Type) -> list[Any]:
    """Pydantic's names of a branch: its tag, the `kind` of a source, or the name of the type."""
    annotation, metadata = branch
    tags = [mark.tag for mark in metadata if isinstance(mark, Tag)]
    return tags or _kinds(annotation) or [getattr(annotation, "__name__", "")]


def _kinds(annotation: Any) -> list[str]:
    """The values of `kind` by which pydantic selects a model of a union."""
    if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
        return []
    kind = annotation.model_fields.get("kind")
    return list(get_args(kind.annotation)) if kind else []
