"""`key.path=value` overrides of a recipe."""

from collections.abc import Sequence
from typing import Any

from inheritune_ds.config.messages import models_at
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import RecipeError


def apply(document: dict[str, Any], override: str) -> None:
    """Set one key of a document, in place."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise RecipeError(
            f"override {override!r} does not have the form key.path=value",
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
                child = node[key] = _default(keys[:depth], keys[depth])
        if not isinstance(child, dict | list):
            parent = ".".join(keys[:depth])
            raise RecipeError(
                f"override {path}: {parent} holds {child!r}, which has no keys",
                allowed=f"{parent}=value",
                action=f"override {parent} itself",
            )
        node = child
    last = keys[-1]
    if isinstance(node, dict):
        node[last] = value
    elif _is_index(last, node):
        node[int(last)] = value
    else:
        raise RecipeError(
            f"override {path}: {last!r} is not a position in a list of {len(node)}",
            allowed=f"0 to {len(node) - 1}" if node else "no position: the list is empty",
            action=f"override {'.'.join(keys[:-1])} itself",
        )


def _default(path: Sequence[str], inner: str) -> dict[str, Any] | list[Any]:
    """The container for a key inside a missing one: its default list if the inner key is a position, or a mapping."""
    fields = [model.model_fields for model in models_at(Recipe, path[:-1])]
    defaults = [known[path[-1]].default for known in fields if path[-1] in known]
    lists = [list(default) for default in defaults if isinstance(default, list | tuple)]
    return lists[0] if lists and inner.isdecimal() else {}


def _is_index(key: str, items: list[Any]) -> bool:
    return key.isdecimal() and int(key) < len(items)
