"""Where documents come from: the recipe's `corpus.sources`, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inheritune_ds import hub
from inheritune_ds.corpus import EmbeddedSource, FilesSource, HubSource, Source
from inheritune_ds.data import embedded, readers
from inheritune_ds.data.progress import Meter
from inheritune_ds.errors import CorpusError, HubError
from inheritune_ds.files import sha256_file
from inheritune_ds.recipe_base import is_local_path


def identify(source: Source) -> dict[str, Any]:
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
    common = {"kind": "hub", "split": source.split, "text_field": source.text_field}
    if _is_folder(source):
        return common | {"files": _file_identities(_folder_files(source))}
    commit = hub.resolve(source.dataset, source.revision, "dataset").commit
    return common | {"dataset": source.dataset, "commit": commit, "data_files": source.data_files}


def documents(source: Source) -> Iterator[str]:
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
        texts = _hub_documents(source)
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


def _is_folder(source: HubSource) -> bool:
    return is_local_path(source.dataset) or Path(source.dataset).is_dir()


def _folder_files(source: HubSource) -> list[Path]:
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"corpus dataset {source.dataset!r} is written as a path, and there is no such folder",
            allowed="a local folder, or a hub id such as allenai/c4",
            action="correct dataset in corpus.sources",
        )
    return readers.expand([source.data_files], folder)


def _hub_documents(source: HubSource) -> Iterator[str | None]:
    """Stream the records through `datasets`, which runs no loading scripts (none exist since its version 4)."""
    from datasets import load_dataset

    revision: str | None = None
    where = source.dataset
    if _is_folder(source):
        _folder_files(source)
        name = str(Path(source.dataset).expanduser())
    else:
        repository = hub.resolve(source.dataset, source.revision, "dataset")
        if repository.offline:
            name = str(hub.snapshot(repository, [source.data_files]))
        else:
            name, revision = source.dataset, repository.commit
        where = f"{source.dataset} at {repository.commit}"
    try:
        dataset = load_dataset(
            name, data_files=source.data_files, revision=revision, split=source.split, streaming=True
        )
        for number, record in enumerate(dataset):
            yield readers.text_of(record, source.text_field, f"{where}, record {number}")
    except (CorpusError, HubError):
        raise
    except FileNotFoundError:
        raise CorpusError(
            f"dataset {where} has no file that matches {source.data_files!r}",
            action="correct data_files in corpus.sources: a pattern inside the dataset's repository",
        ) from None
    except ValueError as error:
        raise CorpusError(
            f"dataset {where}: {hub.first_line(error)}",
            action="correct split or data_files in corpus.sources",
        ) from None
    except Exception as error:  # noqa: BLE001  `datasets` passes on whatever its readers and HTTP clients raise
        raise HubError(
            f"dataset {where}: reading failed ({type(error).__name__}: {hub.first_line(error)})",
            action="run the same command again; if it fails at the same place, download the files "
            "and name them under corpus.sources with kind: files",
        ) from None
