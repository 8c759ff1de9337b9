import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.data.tokens.shards import ShardWriter
from inheritune_ds.errors import CorpusError, StorageError
from tests.data.prepared import names_in


def ids(*values: int) -> Any:
    return np.array(values, np.uint32)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_shard_is_closed_with_the_document_that_fills_it(tmp_path: Path, dtype: str) -> None:
    writer = ShardWriter(tmp_path / "books", "train", dtype, (), shard_tokens=4)
    assert [writer.append(ids(*range(length))) for length in (3, 3, 1, 3, 2)] == [False, True, False, True, False]
    writer.close()
    assert writer.state() == [
        {"file": "train-00000.bin", "tokens": 6, "documents": 2},
        {"file": "train-00001.bin", "tokens": 4, "documents": 2},
        {"file": "train-00002.bin", "tokens": 2, "documents": 1},
    ]
    assert (writer.tokens, writer.documents) == (12, 5)
    read = [
        np.fromfile(path, f"<{dtype[0]}{np.dtype(dtype).itemsize}").tolist()
        for path in sorted((tmp_path / "books").iterdir())
    ]
    assert read == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2], [0, 1]]


def test_a_part_without_documents_has_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "books", "validation", "uint16", ())
    writer.close()
    assert writer.state() == []
    assert names_in(tmp_path / "books") == []


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    kept=st.integers(0, 20),
    shard_tokens=st.integers(1, 12),
    tidy=st.booleans(),
)
def test_writer_resumes_from_any_state_with_identical_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], kept: int, shard_tokens: int, tidy: object
) -> None:
    documents = [ids(*range(number, number + length)) for number, length in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("shards")

    def write(name: str, state: Any, part: list[Any]) -> ShardWriter:
        writer = ShardWriter(folder / name, "train", "uint16", state, shard_tokens)
        for document in part:
            writer.append(document)
        return writer

    whole = write("whole", (), documents)
    whole.close()
    first = write("parts", (), documents[:kept])
    state = first.state()
    for document in documents[kept:]:
        first.append(document)
    first.close() if tidy else first.abandon()
    second = write("parts", state, documents[kept:])
    second.close()
    assert second.state() == whole.state()
    for shard in whole.state():
        name = shard["file"]
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert names_in(folder / "parts") == names_in(folder / "whole")


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in ("train-00000.bin", "validation-00000.bin", "train.txt"):
        (tmp_path / "books" / name).touch()
    ShardWriter(tmp_path / "books", "train", "uint16", ())
    assert names_in(tmp_path / "books") == ["train.txt", "validation-00000.bin"]


def test_state_is_on_the_disk_before_it_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    writer = ShardWriter(tmp_path / "books", "train", "uint16", ())
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    writer.append(ids(1, 2, 3))
    assert synced == []
    writer.state()
    assert synced == [6]
    writer.abandon()


def test_writer_names_a_file_that_cannot_be_created(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "books", "train", "uint16", ())
    (tmp_path / "books").rmdir()
    with pytest.raises(StorageError, match=r"train-00000\.bin cannot be written: No such file or directory"):
        writer.append(ids(1))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("left", [None, 2])
def test_writer_refuses_a_shard_shorter_than_its_state(tmp_path: Path, number: int, left: int | None) -> None:
    writer = ShardWriter(tmp_path / "books", "train", "uint16", (), shard_tokens=4)
    for _ in range(3):
        writer.append(ids(7, 8, 9))
    kept = writer.state()
    writer.close()
    path = tmp_path / "books" / f"train-0000{number}.bin"
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    with pytest.raises(
        CorpusError, match=rf"{path.name} has {left or 0} bytes, but .*it was truncated during"
    ) as caught:
        ShardWriter(tmp_path / "books", "train", "uint16", kept, shard_tokens=4)
    assert caught.value.action.startswith(f"remove the folder {tmp_path} and")
