"""Where documents come from: the recipe's `corpus.sources`, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inheritune_ds.corpus import EmbeddedSource, FilesSource, TextSource
from inheritune_ds.data import embedded, hub_documents, readers
from inheritune_ds.data.progress import Meter
from inheritune_ds.errors import CorpusError
from inheritune_ds.files import sha256_file


def identify(source: TextSource) -> dict[str, Any]:
    """Say exactly which data a source means, so that changed data is never taken for the old.

    Returns:
        For files, name, size (bytes) and sha256 of each; for the hub, the full commit; for the
        embedded corpus, the Python version and a hash; with the settings that decide the documents.

    Raises:
        CorpusError: A file is missing.
        HubError: The hub cannot be reached, or has no such dataset.
    """
    if isinstance(source, EmbeddedSource):
        return embedded.identity()
    if isinstance(source, FilesSource):
        return {
            "kind": "files",
            "text_field": source.text_field,
            "document_separator": source.document_separator,
            "files": _file_identities(readers.expand(source.paths)),
        }
    if hub_documents.is_folder(source):
        return hub_documents.settings(source) | {"files": _file_identities(hub_documents.folder_files(source))}
    return hub_documents.identify(source)


def documents(source: TextSource) -> Iterator[str]:
    """Yield the documents of a source in their order; a document without text comes as "".

    Raises:
        CorpusError: A file is missing or damaged, or a record has no text.
        HubError: The hub cannot be reached, or has no such dataset.
    """
    if isinstance(source, EmbeddedSource):
        texts: Iterator[str | None] = embedded.documents()
    elif isinstance(source, FilesSource):
        texts = readers.documents(source)
    else:
        texts = (document.text for document in hub_documents.documents(source))
    for text in texts:
        yield _encodable(text) if text and not text.isspace() else ""


def _encodable(text: str) -> str:
    """Replace halves of surrogate pairs (a broken escape in JSON) by U+FFFD: UTF-8 has no form for them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _file_identities(paths: list[Path]) -> list[dict[str, Any]]:
    try:
        with Meter("hashing corpus files", "bytes", sum(path.stat().st_size for path in paths)) as meter:
            return [
                {"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path, meter.advance)}
                for path in paths
            ]
    except OSError as error:
        raise CorpusError(
            f"corpus file {error.filename}: it cannot be read ({(error.strerror or 'unreadable').lower()})",
            action="check that it exists and that this user may read it",
        ) from None
