"""Documents of a dataset on the Hugging Face hub, or of a folder with a copy of one."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from inheritune_ds import hub
from inheritune_ds.corpus import HubSource
from inheritune_ds.data import readers
from inheritune_ds.data.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError, HubError
from inheritune_ds.recipe_base import is_local_path


def is_folder(source: HubSource) -> bool:
    """Whether `dataset` means a folder of this machine and not a name of the hub."""
    return is_local_path(source.dataset) or Path(source.dataset).is_dir()


def folder_files(source: HubSource) -> list[Path]:
    """Files of a local dataset, sorted.

    Raises:
        CorpusError: There is no such folder, or nothing in it matches `data_files`.
    """
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"corpus dataset {source.dataset!r} is written as a path, and there is no such folder",
            allowed="a local folder, or a hub id such as allenai/c4",
            action="correct dataset in corpus.sources",
        )
    return readers.expand([source.data_files], folder)


def settings(source: HubSource) -> dict[str, Any]:
    """What of the identity of a source its recipe says, wherever the files lie."""
    return {"kind": "hub", "split": source.split, "text_field": source.text_field}


def identify(source: HubSource) -> dict[str, Any]:
    """Say exactly which data a dataset of the hub means, with and without a network.

    Raises:
        HubError: The hub cannot be reached, or has no such dataset.
    """
    commit = hub.resolve(source.dataset, source.revision, "dataset").commit
    return settings(source) | {"dataset": source.dataset, "commit": commit, "data_files": source.data_files}


def documents(
    source: HubSource,
    start: Cursor = Cursor(),  # noqa: B008 - an immutable tuple
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[Document]:
    """Stream the records through `datasets`, which runs no loading scripts (none exist since its version 4).

    Args:
        source: The dataset.
        start: Where to begin; the cursor of a document read earlier.
        on_bytes: Told the size of what was read, in bytes of text.

    Raises:
        CorpusError: No such file or split, or a record without text.
        HubError: The hub cannot be reached, or has no such dataset.
    """
    from datasets import load_dataset

    rules = RecordRules.of(source)
    revision: str | None = None
    where = source.dataset
    if is_folder(source):
        folder_files(source)
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
        for number, record in islice(enumerate(dataset), start.record, None):
            document = rules.document(record, f"{where}, record {number}", Cursor(0, number + 1))
            on_bytes(len(document.text))
            yield document
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
