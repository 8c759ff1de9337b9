"""Load recipes and studies: strict YAML 1.2, `key.path=value` overrides, all problems at once."""

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from inheritune_ds.config.messages import check, nearest, short
from inheritune_ds.config.overrides import apply
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml, write_yaml
from inheritune_ds.errors import RecipeError
from inheritune_ds.storage.file_kind import FileKind, action_for, unexpected_kind
from inheritune_ds.storage.redaction import override_problems, secret_problems

DEFAULT_RECIPE = "openllama-3b-13l"


def shipped_names(folder: str = "recipes") -> list[str]:
    """Names of the package's recipes (or `studies`, `corpora`), sorted."""
    files = resources.files("inheritune_ds") / folder
    return sorted(item.name.removesuffix(".yaml") for item in files.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), *, beside: Path | None = None) -> Recipe:
    """Load a recipe by shipped name or path (relative to `beside`) and apply overrides, of which a later one wins.

    Raises:
        RecipeError: With every problem found; only with secrets if there are any, since other messages show values.
    """
    text, origin = read_document(name, "recipes", beside=beside)
    document = parse_yaml(text, origin)
    if secrets := [*secret_problems(document, origin), *override_problems(overrides)]:
        raise RecipeError.of(secrets)
    _expand_preset(document, origin)
    problems: list[RecipeError] = []
    for override in overrides:
        try:
            apply(document, override)
            if override.startswith("corpus.preset="):
                document["corpus"].pop("sources", None)
                _expand_preset(document, f"override {override.partition('=')[0]}")
        except RecipeError as error:
            problems.append(error)
    recipe, found = check(Recipe, document, origin)
    problems += found
    if recipe is None or problems:
        raise RecipeError.of(problems)
    return recipe


def _expand_preset(document: dict[str, Any], origin: str) -> None:
    """Replace `corpus.preset` by the sources of the shipped corpus, so that the resolved recipe names them."""
    corpus = document.get("corpus")
    if not isinstance(corpus, dict) or "preset" not in corpus:
        return
    name, names = corpus.pop("preset"), shipped_names("corpora")
    if "sources" in corpus:
        raise RecipeError(
            f"{origin}: corpus.preset and corpus.sources are both set",
            allowed="one of them",
            action=f"remove one; to change {name}, copy its sources from inheritune_ds/corpora/",
        )
    if name not in names:
        hint = nearest(str(name), names)
        raise RecipeError(
            f"{origin}: corpus.preset {short(name)} is unknown",
            allowed=", ".join(names),
            action=f"did you mean {hint}?" if hint else "use one of these, or write corpus.sources",
        )
    text = (resources.files("inheritune_ds") / "corpora" / f"{name}.yaml").read_text(encoding="utf-8")
    corpus["sources"] = YAML(typ="safe", pure=True).load(text)


_KINDS = {
    "recipes": ("recipe", "`inheritune-ds recipes` lists the shipped ones"),
    "studies": ("study", "give a shipped study's name, or the path of a study file"),
}


def read_document(name: str, folder: str, *, beside: Path | None = None) -> tuple[str, str]:
    """Return the text of a shipped document or a file, and its name in messages."""
    shipped = resources.files("inheritune_ds") / folder / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped.read_text(encoding="utf-8"), name
    path = (beside or Path()) / Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        names, (kind, advice) = shipped_names(folder), _KINDS[folder]
        hint = nearest(name, names)
        found = unexpected_kind(path, (FileKind.MARKED,))
        reason = (error.strerror or "unreadable").lower() if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"{kind} {name!r} cannot be read: {f'it is {found.value}' if found else reason}",
            allowed=f"a YAML file, or one of {', '.join(names)}",
            action=(action_for(found, path) if found else "") or (f"did you mean {hint}?" if hint else advice),
        ) from None


def dump_recipe(recipe: Recipe) -> str:
    """Render a recipe with all defaults; `load_recipe` reads it back equal."""
    return write_yaml(recipe.model_dump(mode="json"))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key.path: old -> new` for every value in which two nested documents differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = _numbered(old.get(key)), _numbered(new.get(key))
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after and not (_is_nan(before) and _is_nan(after)):
            lines.append(f"{prefix}{key}: {short(old.get(key))} -> {short(new.get(key))}")
    return lines


def _numbered(value: Any) -> Any:
    """Turn a list of mappings into a mapping by position; return other values unchanged."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
