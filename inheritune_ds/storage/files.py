"""Write files atomically, read JSON, hash files."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from inheritune_ds.errors import InherituneError, StorageError
from inheritune_ds.storage.redaction import redact, redact_document

CHUNK_BYTES = 1 << 22
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")
_RUST_REFUSAL = re.compile(r"\(os error (\d+)\)")


def sha256_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """sha256 of a file (hex); `advance` is called with the bytes of every hashed chunk."""
    return _hash_file(path, hashlib.sha256(), advance)


def blake3_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """BLAKE3 of a file (hex, 64 characters), several times as fast as sha256; `advance` as in `sha256_file`."""
    return _hash_file(path, blake3(), advance)


def _hash_file(path: Path, digest: Any, advance: Callable[[int], None]) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return str(digest.hexdigest())


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError from writing below `path` into a StorageError, also one inside a Rust library's error."""
    try:
        yield
    except OSError as error:
        raise _refusal(error.filename or path, error.errno, error.strerror or str(error)) from None
    except InherituneError:
        raise
    except Exception as error:
        # safetensors and tokenizers raise their own class: "... No space left on device (os error 28)"
        found = _RUST_REFUSAL.search(str(error))
        if found is None:
            raise
        raise _refusal(path, int(found.group(1)), os.strerror(int(found.group(1)))) from None


def _refusal(path: Path | str, number: int | None, reason: str) -> StorageError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        action = "free some space, then rerun the same command"
    else:
        action = "choose a folder that you may write to; the command's --help names its options"
    return StorageError(f"{path} cannot be written: {reason}", action=action)


def write_text(path: Path, text: str) -> None:
    """Replace a file by text, atomically and durably, with secrets masked; raise a StorageError if that is refused."""
    write_exact(path, redact(text))


def write_exact(path: Path, text: str) -> None:
    """Like `write_text`, but without masking: a number in a machine-written file may equal a numeric password."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed writers; no other process may be writing to the folder."""
    with storage_errors(folder):
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document, atomically, with secrets masked; NaN raises a ValueError."""
    write_exact(path, json.dumps(redact_document(document), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing, truncated or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sync_folder(folder: Path) -> None:
    """Flush every file below a folder, and the folders, to the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
