"""Secrets stay out of everything that is written or printed.

A secret is the value of an environment variable whose name says so, the password of a URL in any variable, what has
the form of a Hugging Face token, and the user-info of a URL. Documents of the user that hold one are refused; whatever
else is written or printed has `***` in its place.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote

from inheritune_ds.errors import RecipeError

MASK = "***"
SHORTEST = 8
"""Shorter values, such as `true`, are no secrets, and masking them would spoil ordinary text."""
_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|SECRET(_KEY)?|PASSWORD)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"<>\\]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Put MASK in the place of every secret."""
    return _masked(text, sorted(_forms(environ), key=len, reverse=True))


def redact_document(document: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Mask every text in a JSON document, its keys too; numbers are left alone."""
    forms = sorted(_forms(environ), key=len, reverse=True)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return _masked(value, forms)
        if isinstance(value, Mapping):
            return {walk(key): walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return walk(document)


def _masked(text: str, forms: Iterable[str]) -> str:
    for form in forms:
        text = text.replace(form, MASK)
    return _HUB_TOKEN.sub(MASK, _USER_INFO.sub(MASK, text))


def _named(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and value of every secret in the environment."""
    for name, value in environ.items():
        found = (
            {value.strip()} if _NAME.search(name) else {info.partition(":")[2] for info in _USER_INFO.findall(value)}
        )
        yield from ((name, secret) for secret in found if len(secret) >= SHORTEST)


def _forms(environ: Mapping[str, str]) -> set[str]:
    """The secrets of the environment, as they are and as they stand in URLs, JSON and quoted by Python."""
    secrets = {secret for _, secret in _named(environ)}
    return {
        form
        for secret in secrets
        for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1])
    }


def find_secret(text: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Say which kind of secret a text holds, without repeating it; None if it holds none."""
    name = next((name for name, secret in _named(environ) if secret in text), None)
    if name is not None:
        return f"the secret of the environment variable {name}"
    if _USER_INFO.search(text):
        return "a URL with user name or password"
    return "a Hugging Face token" if _HUB_TOKEN.search(text) else None


def secret_problems(document: Any, origin: str) -> list[RecipeError]:
    """Find the secrets in a user's document.

    Args:
        document: Mappings, lists and values.
        origin: How to call it in messages.
    """
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
        allowed="what everybody may read: it is written into the run folder, the model card and the tracker",
        action="take it out; libraries find secrets in the environment (HF_TOKEN, WANDB_API_KEY, HTTPS_PROXY)",
    )


class RedactedStream:
    """A text stream that masks secrets; everything but writing is the stream's own.

    A secret that is written in pieces is not recognised.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length before masking, as callers expect."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """Mask secrets in all that Python prints from here on, tracebacks and the lines of libraries among them."""
    if not isinstance(sys.stdout, RedactedStream):
        sys.stdout = cast("TextIO", RedactedStream(sys.stdout))
    if not isinstance(sys.stderr, RedactedStream):
        sys.stderr = cast("TextIO", RedactedStream(sys.stderr))
