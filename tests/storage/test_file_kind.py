"""A file is named by its first bytes."""

import bz2
import gzip
import io
import lzma
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.numpy import save

from inheritune_ds.storage.file_kind import HEAD_BYTES, FileKind, action_for, kind_of, look, unexpected_kind

TEXT = "A river, a hill and a café.\n" * 3
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 9876\n"
TABLE = pa.table({"text": ["a", "b"]})


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def file_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def archive(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", TEXT)


KINDS = [
    (b"", FileKind.EMPTY),
    (POINTER.encode(), FileKind.LFS_POINTER),
    (POINTER[:43].encode(), FileKind.LFS_POINTER),
    (b"version https://hawser.github.com/spec/v1\n", FileKind.LFS_POINTER),
    (b"\n <!DOCTYPE html>\n<html>", FileKind.HTML),
    (b"<!-- saved -->\n<html lang='en'>", FileKind.HTML),
    (b'[{"text": "a"}]', FileKind.JSON_ARRAY),
    (b'[\r\n  {"text": "a"}\r\n]', FileKind.JSON_ARRAY),
    (b'{\n  "text": "a"\n}', FileKind.JSON_OBJECT),
    (b'{"text": "a"}\n', FileKind.JSON_LINES),
    (TEXT.encode("utf-8-sig"), FileKind.MARKED),
    (TEXT.encode("utf-16"), FileKind.UTF_16),
    (b"\xfe\xff" + TEXT.encode("utf-16-be"), FileKind.UTF_16),
    (TEXT.encode("utf-16-le"), FileKind.UTF_16LE),
    (TEXT.encode("utf-16-be"), FileKind.UTF_16BE),
    (TEXT.encode("utf-32"), FileKind.UTF_32),
    (gzip.compress(TEXT.encode(), mtime=0), FileKind.GZIP),
    (bz2.compress(TEXT.encode()), FileKind.BZIP2),
    (bz2.compress(b""), FileKind.BZIP2),
    (zstandard.compress(TEXT.encode()), FileKind.ZSTD),
    (lzma.compress(TEXT.encode()), FileKind.XZ),
    (written(archive), FileKind.ZIP),
    (written(lambda buffer: torch.save({"a": torch.ones(2)}, buffer)), FileKind.ZIP),
    (written(lambda buffer: pq.write_table(TABLE, buffer)), FileKind.PARQUET),
    (file_of(TABLE), FileKind.ARROW),
    (stream_of(TABLE), FileKind.ARROW),
    (written(lambda buffer: np.save(buffer, np.arange(9, dtype="<u2"))), FileKind.NUMPY),
    (save({"a": np.ones(3, np.float32)}), FileKind.SAFETENSORS),
    (pickle.dumps({"a": 1}), FileKind.PICKLE),
    (
        written(lambda buffer: torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)),
        FileKind.OLD_TORCH,
    ),
    (b"GGUF\x03\0\0\0\x01\0\0\0", FileKind.GGUF),
    (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", FileKind.SENTENCEPIECE),
    (b"IQ== 0\nIg== 1\nIw== 2\n", FileKind.TIKTOKEN),
]
PLAIN = [
    *(text.encode() for text in (TEXT, "PAR1 is a name.", "BZh1 too", "PK is short", "[1, 2]", "GGUF is a format")),
    *("東京".encode(), b"\n\x0aA line.", b"\0\0\0\0", bytes(range(256)), b"version https://example.org", b"<p>a</p>"),
    np.array([300, 5, 6, 7, 800], "<u2").tobytes(),
]


@pytest.mark.parametrize(("content", "kind"), KINDS, ids=[f"{kind.name}-{n}" for n, (_, kind) in enumerate(KINDS)])
def test_kind_of_names_a_file_by_its_first_bytes(content: bytes, kind: FileKind, tmp_path: Path) -> None:
    assert kind_of(content[:HEAD_BYTES]) is kind
    (tmp_path / "file").write_bytes(content)
    assert look(tmp_path / "file") is kind
    assert unexpected_kind(tmp_path / "file") is kind
    assert unexpected_kind(tmp_path / "file", (kind,)) is None


@pytest.mark.parametrize("content", PLAIN)
def test_kind_of_knows_nothing_about_other_content(content: bytes) -> None:
    assert kind_of(content) is None


def test_unexpected_kind_of_a_missing_file_is_none(tmp_path: Path) -> None:
    assert unexpected_kind(tmp_path / "gone") is None


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(TEXT.encode(), mtime=0),
        bz2.compress(TEXT.encode()),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-8-sig"),
    ],
)
def test_action_for_makes_plain_text_where_it_is_followed(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a text's.txt"
    path.write_bytes(packed)
    kind = look(path)
    assert kind is not None
    subprocess.run(["bash", "-c", action_for(kind, path).partition(": ")[2]], check=True)
    assert path.read_text(encoding="utf-8") == TEXT
    assert [*tmp_path.iterdir()] == [path]


def test_action_for_renames_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(file_of(TABLE))
    assert action_for(FileKind.ARROW, path) == f"rename it: mv {path} {tmp_path / 'a.arrow'}"
    assert action_for(FileKind.PARQUET, path) == f"rename it: mv {path} {tmp_path / 'a.parquet'}"
