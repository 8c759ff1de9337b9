"""The running Python's own documentation as a corpus: English text that every machine has.

It has the topics of `help()` (`pydoc_data.topics`) and the docstrings of the standard library, one document per
module. Files are parsed, never imported; nothing is downloaded.
"""

import ast
import functools
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inheritune_ds.data.documents.records import Cursor, Document
from inheritune_ds.errors import CorpusError

_EXCLUDED = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Documentation:
    """Topics in alphabetical order, then modules by path; `unparsed_files` of the library are not valid Python."""

    documents: tuple[str, ...]
    unparsed_files: int


def documents(start: Cursor = Cursor()) -> Iterator[Document]:  # noqa: B008 - an immutable tuple
    """Yield the documents of the running Python, always in the same order; errors as in `collect`."""
    for number, text in enumerate(running().documents[start.record :], start.record + 1):
        yield Document(text, "", Cursor(0, number))


@functools.cache
def running() -> Documentation:
    """Collect the running Python's documentation once per process; parsing takes seconds."""
    return collect()


def identity() -> dict[str, Any]:
    """Identify this documentation: the Python version and a hash of all its files."""
    digest = hashlib.sha256()
    for name, text in sorted(_topics().items()):
        digest.update(f"{name}\0{text}\0".encode())
    root = _stdlib()
    for path in _module_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {"kind": "embedded", "python": platform.python_version(), "sha256": digest.hexdigest()}


def collect(stdlib: Path | None = None, topics: Mapping[str, str] | None = None) -> Documentation:
    """Read the documentation of a standard library (default: the running Python's); raise a CorpusError without any."""
    topics = _topics() if topics is None else topics
    root = stdlib or _stdlib()
    texts = [f"{name}\n\n{inspect.cleandoc(text)}" for name, text in sorted(topics.items())]
    seen: set[str] = set()
    unparsed = 0
    for path in _module_files(root):
        tree = _parse(path)
        if tree is None:
            unparsed += 1
        elif text := _module_document(tree, _module_name(path.relative_to(root)), seen):
            texts.append(text)
    return Documentation(tuple(dict.fromkeys(texts)), unparsed)


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415, RUF100  (some Pythons come without it)
    except ImportError:
        raise CorpusError(
            f"the embedded corpus needs pydoc_data, which is missing in this Python {platform.python_version()}",
            action="install Python's complete standard library (Debian: libpython3-stdlib), "
            "or use other text: corpus.sources with kind: files",
        ) from None
    return dict(topics)


def _stdlib() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise CorpusError(
            f"the embedded corpus needs the source of the standard library, which is missing in {root}",
            action="use a Python with .py files in its library, or use other text: corpus.sources with kind: files",
        )
    return root


def _module_files(root: Path) -> list[Path]:
    """List the library's files by path, without tests and installed packages."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED and not name.startswith("test_")]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _module_name(relative: Path) -> str:
    parts = list(relative.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        # Old modules of the library have invalid escapes.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def _module_document(tree: ast.Module, module: str, seen: set[str]) -> str:
    """Join a module's docstrings that were not seen before, each below its qualified name."""
    parts: list[str] = []
    for name, docstring in _docstrings(tree, module):
        if docstring not in seen:
            seen.add(docstring)
            parts.append(f"{name}\n\n{docstring}")
    return "\n\n".join(parts)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a node and its inner definitions, in source order."""
    if isinstance(node, (ast.Module, *_DOCUMENTED)):
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip():
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, _DOCUMENTED) else name)
