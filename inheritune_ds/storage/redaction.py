"""Keep secrets out of written files and printed text.

Secrets are the values of environment variables with names such as `*_TOKEN`, the passwords of URLs in any variable,
Hugging Face tokens, and the user-info of URLs. A user's document with a secret is refused; elsewhere it becomes `***`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from inheritune_ds.errors import RecipeError

MASK = "***"
SHORTEST = 8
"""Shorter values, such as `true`, are not masked: they occur in ordinary text."""
_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|SECRET(_KEY)?|PASSWORD)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"<>\\]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace every secret by MASK."""
    return str(redact_document(text, environ))


def redact_document(document: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Mask every text in a JSON document, also keys; numbers stay unchanged."""
    forms = sorted(_forms(environ), key=len, reverse=True)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            for form in forms:
                value = value.replace(form, MASK)
            return _HUB_TOKEN.sub(MASK, _USER_INFO.sub(MASK, value))
        if isinstance(value, Mapping):
            return {walk(key): walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return walk(document)


def _named(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and value of every secret in the environment."""
    for name, value in environ.items():
        found = (
            {value.strip()} if _NAME.search(name) else {info.partition(":")[2] for info in _USER_INFO.findall(value)}
        )
        yield from ((name, secret) for secret in found if len(secret) >= SHORTEST)


def _forms(environ: Mapping[str, str]) -> set[str]:
    """The secrets of the environment: plain, URL-quoted, JSON-escaped, and as Python's repr."""
    return {
        form
        for _, secret in _named(environ)
        for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1])
    }


def find_secret(text: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Describe the secret in a text without repeating it; None if it has none."""
    name = next((name for name, secret in _named(environ) if secret in text), None)
    if name is not None:
        return f"the secret of the environment variable {name}"
    if _USER_INFO.search(text):
        return "a URL with user name or password"
    return "a Hugging Face token" if _HUB_TOKEN.search(text) else None


def secret_problems(document: Any, origin: str) -> list[RecipeError]:
    """Find the secrets in a user's document; `origin` names it in messages."""
    found = ((path, find_secret(text)) for path, text in _texts(document, ""))
    return [_refusal(f"{origin}: {redact(path)}", secret) for path, secret in found if secret is not None]


def _texts(document: Any, path: str) -> Iterator[tuple[str, str]]:
    """Key path and content of every text in a document; a key is a text at its own path."""
    if isinstance(document, str):
        yield path, document
    items = document.items() if isinstance(document, Mapping) else ()
    for name, value in items:
        inner = f"{path}.{name}" if path else str(name)
        yield inner, str(name)
        yield from _texts(value, inner)
    for number, value in enumerate(document if isinstance(document, list) else ()):
        yield from _texts(value, f"{path}.{number}")


def override_problems(overrides: Iterable[str]) -> list[RecipeError]:
    """Find the secrets in `key.path=value` items."""
    found = ((override.partition("=")[0], find_secret(override)) for override in overrides)
    return [_refusal(f"override {redact(key)}", secret) for key, secret in found if secret is not None]


def _refusal(where: str, secret: str) -> RecipeError:
    return RecipeError(
        f"{where} holds {secret}",
        allowed="public text: it is written into the run folder, the model card and the tracker",
        action="remove it; libraries find secrets in the environment (HF_TOKEN, WANDB_API_KEY, HTTPS_PROXY)",
    )
