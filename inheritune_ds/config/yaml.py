"""Read strict YAML 1.2, without duplicate keys, and write it."""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from inheritune_ds.errors import RecipeError


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
            action="fix the file at that line",
        ) from None
    if not isinstance(document, dict):
        raise RecipeError(
            f"{origin}: the document is not a mapping of keys to values",
            allowed="lines `key: value`",
            action="start from a copy of a shipped one",
        )
    return document


def write_yaml(document: dict[str, Any]) -> str:
    """Render a document as YAML, keeping the order of its keys."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 10_000
    stream = io.StringIO()
    yaml.dump(_quoted(document), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Put text with control characters or Unicode's line ends into double quotes; YAML folds them elsewhere."""
    if isinstance(value, dict):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value
