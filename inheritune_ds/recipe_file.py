"""Reading recipes and studies: strict YAML 1.2, `key.path=value` overrides, all problems at once."""

import difflib
import io
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from inheritune_ds.errors import RecipeError
from inheritune_ds.recipe import Recipe
from inheritune_ds.redaction import override_problems, secret_problems

DEFAULT_RECIPE = "openllama-3b-13l"
Model = TypeVar("Model", bound=BaseModel)


def shipped_names(folder: str = "recipes") -> list[str]:
    """Names of the recipes (or `studies`) that come with the package, sorted."""
    files = resources.files("inheritune_ds") / folder
    return sorted(item.name.removesuffix(".yaml") for item in files.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), *, beside: Path | None = None) -> Recipe:
    """Load a recipe by shipped name or path and apply overrides.

    Args:
        name: A shipped name, or the path of a YAML file (`beside` is its start when relative).
        overrides: Items such as `training.duration=200 steps`; a later one wins.
        beside: Folder that relative recipe paths start from; the current one when left out.

    Raises:
        RecipeError: With every problem found; with the secrets alone if it holds any, since other messages show values.
    """
    text, origin = read_document(name, "recipes", beside=beside)
    document = parse_yaml(text, origin)
    if secrets := [*secret_problems(document, origin), *override_problems(overrides)]:
        raise RecipeError.of(secrets)
    _expand_preset(document, origin)
    problems: list[RecipeError] = []
    for override in overrides:
        try:
            _apply(document, override)
            if override.startswith("corpus.preset="):
                document["corpus"].pop("sources", None)
                _expand_preset(document, f"override {override.partition('=')[0]}")
        except RecipeError as error:
            problems.append(error)
    recipe, found = _check(Recipe, document, origin)
    problems += found
    if recipe is None or problems:
        raise RecipeError.of(problems)
    return recipe


def _expand_preset(document: dict[str, Any], origin: str) -> None:
    """Put the sources of a shipped corpus in the place of `corpus.preset`, so that the resolved recipe names them."""
    corpus = document.get("corpus")
    if not isinstance(corpus, dict) or "preset" not in corpus:
        return
    name, names = corpus.pop("preset"), shipped_names("corpora")
    if "sources" in corpus:
        raise RecipeError(
            f"{origin}: corpus.preset and corpus.sources stand side by side",
            allowed="one of them",
            action=f"remove one; to change {name}, copy its sources from inheritune_ds/corpora/",
        )
    if name not in names:
        hint = _nearest(str(name), names)
        raise RecipeError(
            f"{origin}: corpus.preset {_short(name)} is unknown",
            allowed=", ".join(names),
            action=f"did you mean {hint}?" if hint else "take one of these, or write corpus.sources",
        )
    text = (resources.files("inheritune_ds") / "corpora" / f"{name}.yaml").read_text(encoding="utf-8")
    corpus["sources"] = YAML(typ="safe", pure=True).load(text)


_SHIPPED = {
    "recipes": "`inheritune-ds recipes` lists what is shipped",
    "studies": "give a shipped study's name, or the path of a study file",
}


def read_document(name: str, folder: str, *, beside: Path | None = None) -> tuple[str, str]:
    """Return the text of a shipped document or a file, and how to call it in a message."""
    shipped = resources.files("inheritune_ds") / folder / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped.read_text(encoding="utf-8"), name
    path = (beside or Path()) / Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        names = shipped_names(folder)
        hint = _nearest(name, names)
        raise RecipeError(
            f"{folder[:-1] if folder != 'studies' else 'study'} {name!r} cannot be read: {_reason(error)}",
            allowed=f"a YAML file, or one of {', '.join(names)}",
            action=f"did you mean {hint}?" if hint else _SHIPPED[folder],
        ) from None


def _reason(error: Exception) -> str:
    return (error.strerror or "unreadable").lower() if isinstance(error, OSError) else "it is not UTF-8 text"


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML 1.2 into a dict; a duplicate key or anything but a mapping is a RecipeError."""
    try:
        document = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        raise RecipeError(
            f"{where}: {getattr(error, 'problem', None) or 'not valid YAML'}",
            allowed="YAML 1.2, each key once",
            action="mend the file at that line",
        ) from None
    if not isinstance(document, dict):
        raise RecipeError(
            f"{origin}: the document is not a mapping of keys to values",
            allowed="lines `key: value`",
            action="start from a copy of a shipped one",
        )
    return document


def write_yaml(document: dict[str, Any]) -> str:
    """Render a document as YAML with its keys in the order given."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 10_000
    stream = io.StringIO()
    yaml.dump(_quoted(document), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Put text with control characters or Unicode's own line ends into double quotes; YAML folds them elsewhere."""
    if isinstance(value, dict):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value


def dump_recipe(recipe: Recipe) -> str:
    """Render a recipe with every default written out; `load_recipe` reads it back equal."""
    return write_yaml(recipe.model_dump(mode="json"))


def _apply(document: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise RecipeError(
            f"override {override!r} is not of the form key.path=value",
            allowed="for instance training.seq_len=512",
            action="quote a value with spaces: 'training.duration=200 steps'",
        )
    value = parse_yaml(f"value: {text}", f"override {path}")["value"]
    node: Any = document
    for depth, key in enumerate(keys[:-1], 1):
        child = node[int(key)] if isinstance(node, list) and _is_index(key, node) else None
        if child is None and isinstance(node, dict):
            child = node.get(key)
            if child is None:
                child = node[key] = _made_for(keys[:depth], keys[depth])
        if not isinstance(child, dict | list):
            raise RecipeError(
                f"override {path}: {'.'.join(keys[:depth])} holds {child!r}, which has no keys inside",
                allowed=f"{'.'.join(keys[:depth])}=value",
                action=f"override {'.'.join(keys[:depth])} itself",
            )
        node = child
    last = keys[-1]
    if isinstance(node, dict):
        node[last] = value
    elif _is_index(last, node):
        node[int(last)] = value
    else:
        raise RecipeError(
            f"override {path}: {last!r} is no position in a list of {len(node)}",
            allowed=f"0 to {len(node) - 1}" if node else "no position: the list is empty",
            action=f"override {'.'.join(keys[:-1])} itself",
        )


def _made_for(path: Sequence[str], inner: str) -> dict[str, Any] | list[Any]:
    """What an override makes of a key that the document leaves out: its default, if a position in a list is meant."""
    _, models = _locate(Recipe, path[:-1])
    defaults = [model.model_fields[path[-1]].default for model in models if path[-1] in model.model_fields]
    lists = [list(default) for default in defaults if isinstance(default, list | tuple)]
    return lists[0] if lists and inner.isdecimal() else {}


def _is_index(key: str, items: list[Any]) -> bool:
    return key.isdecimal() and int(key) < len(items)


def validate(model: type[Model], document: dict[str, Any], origin: str) -> Model:
    """Build a pydantic model; every problem becomes a line with path, value and what is allowed."""
    built, problems = _check(model, document, origin)
    if built is None:
        raise RecipeError.of(problems)
    return built


def _check(model: type[Model], document: dict[str, Any], origin: str) -> tuple[Model | None, list[RecipeError]]:
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
        return isinstance(value, dict) or (isinstance(value, list) and not _locate(model, loc)[1])
    if item["type"] == "list_type" and str(loc[-1]).startswith("list["):
        return not isinstance(value, dict)
    return bool(item["type"] == "model_type" and loc[-1:] == (item["ctx"]["class_name"],))


def _describe(model: type[BaseModel], item: Any, origin: str) -> RecipeError:
    path, models = _locate(model, item["loc"])
    key = ".".join(path)
    where = f"{origin}: {key}" if key else origin
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted(_keys_of(_locate(model, item["loc"][:-1])[1]))
        hint = _nearest(path[-1], known)
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
    return RecipeError(f"{where}: {_short(value)} is not accepted", allowed=allowed, action=f"change {key}")


def _expected(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """What the field at a location takes, in the words of a YAML file."""
    _, parents = _locate(model, loc[:-1])
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
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
            models = [inner for annotation in fields for inner in _models_in(annotation)]
            at_union = any(_is_union(annotation) for annotation in fields)
    return path, models


def _keys_of(models: Sequence[type[BaseModel]]) -> set[str]:
    return {name for model in models for name in model.model_fields}


def _tag(model: type[BaseModel]) -> str | None:
    """The value of `kind` by which a source's model is chosen."""
    kind = model.model_fields.get("kind")
    return next(iter(get_args(kind.annotation)), None) if kind else None


def _is_union(annotation: Any) -> bool:
    """Whether one of several types, None not counted, can stand there or in the list there."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and len(parts) > 1:
        return True
    return any(_is_union(part) for part in parts)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _nearest(word: str, known: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key.path: old -> new` for every value in which two nested documents differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif _numbered(before) and _numbered(after):
            lines += differences(_numbered(before), _numbered(after), f"{prefix}{key}.")
        elif before != after and not (_is_nan(before) and _is_nan(after)):
            lines.append(f"{prefix}{key}: {_short(before)} -> {_short(after)}")
    return lines


def _numbered(value: Any) -> dict[str, Any]:
    """A list of mappings by position; empty for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return {}
    return {str(number): item for number, item in enumerate(value)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
