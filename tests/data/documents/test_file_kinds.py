"""Corpus files are judged by their content, and the advice does not turn text into noise."""

import bz2
import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from inheritune_ds.config.corpus import FilesSource, TokensSource
from inheritune_ds.data.documents import nanogpt, sources
from inheritune_ds.errors import CorpusError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'9' * 64}\nsize 77\n".encode()
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
RECORDS = [{"text": f"Text {number} of a café."} for number in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def source_of(*paths: Path, **settings: object) -> FilesSource:
    return FilesSource.model_validate({"kind": "files", "paths": [str(path) for path in paths], **settings})


def texts(source: FilesSource) -> list[str]:
    return [document.text for document in sources.documents(source)]


def refused(path: Path, content: bytes, **settings: object) -> CorpusError:
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        texts(source_of(path, **settings))
    return caught.value


def table(path: Path) -> bytes:
    pq.write_table(pa.table({"text": ["a"]}), path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize("bad_records", ["refuse", "skip"])
def test_a_git_lfs_pointer_is_named_under_every_suffix(tmp_path: Path, name: str, bad_records: str) -> None:
    error = refused(tmp_path / name, POINTER, bad_records=bad_records)
    assert error.problem == f"corpus file {tmp_path / name}: it is a Git LFS pointer, not the file itself"
    assert error.action == "run git lfs pull in its repository, or download the file itself"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", gzip.compress(b"text", mtime=0), "gzip data"),
        ("a.jsonl", bz2.compress(b"text"), "bzip2 data"),
        ("a.txt", zstandard.compress(b"text"), "Zstandard data"),
        ("a.json.gz", zstandard.compress(b"text"), "Zstandard data"),
        ("a.txt.zst", gzip.compress(b"text", mtime=0), "gzip data"),
        ("a.jsonl", PAGE, "an HTML page"),
        ("a.parquet", PAGE, "an HTML page"),
        ("a.arrow", b'{"text": "a"}\n', "JSON lines"),
        ("a.txt", LINES.encode("utf-16"), "UTF-16 text"),
        ("a.jsonl", LINES.encode("utf-16-be"), "big-endian UTF-16 text without a byte order mark"),
        ("a.jsonl.gz", gzip.compress(LINES.encode("utf-16"), mtime=0), "UTF-16 text"),
        ("a.json", LINES.encode("utf-32"), "UTF-32 text"),
    ],
)
def test_content_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    error = refused(tmp_path / name, content, bad_records="skip")
    assert error.problem == f"corpus file {tmp_path / name}: it is {what}"
    assert error.action
    assert "iconv" not in error.action or "UTF-" in what


def test_a_table_with_the_suffix_of_a_text_is_read_where_the_advice_is_followed(tmp_path: Path) -> None:
    error = refused(tmp_path / "a.txt", table(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").unlink()
    subprocess.run(["bash", "-c", error.action.removeprefix("rename it: ")], check=True)
    assert texts(source_of(tmp_path / "a.parquet")) == ["a"]


def test_text_of_html_or_json_is_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", PAGE), ("b.txt", b'[{"text": "a"}]'), ("c.txt", b"IQ== 0\nIg== 1\n")):
        (tmp_path / name).write_bytes(content)
        assert texts(source_of(tmp_path / name)) == [content.decode()]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.json", bytes), ("a.jsonl", bytes), ("a b.json.gz", gzip.compress), ("a.json.bz2", bz2.compress)],
)
@pytest.mark.parametrize(
    ("document", "what"),
    [
        (json.dumps(RECORDS).encode(), "one JSON array"),
        (json.dumps(RECORDS, indent=2).encode(), "one JSON array"),
        (json.dumps(RECORDS, indent=1).encode("utf-8-sig"), "one JSON array"),
        (json.dumps(RECORDS[0], indent=4).encode(), "one JSON object over several lines"),
    ],
)
def test_json_that_is_not_in_lines_is_named(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], document: bytes, what: str
) -> None:
    error = refused(tmp_path / name, pack(document), bad_records="skip")
    assert error.problem == f"corpus file {tmp_path / name}: it is {what}"
    assert ("jq -c '.[]'" if "array" in what else "jq -c .") in error.action
    assert f"{name.split('.', maxsplit=1)[0]}-lines.jsonl" in error.action


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("“Curly” quotes and a dash", "cp1252"), ("一条河流和一座山", "gb18030"), ("Größe", "latin1")],
)
def test_text_in_another_encoding_gets_no_conversion_that_may_be_wrong(
    tmp_path: Path, text: str, encoding: str
) -> None:
    for name in ("a.txt", "a.jsonl"):
        error = refused(tmp_path / name, json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
        assert "it is not UTF-8 text" in error.problem
        assert "iconv -f ENCODING -t UTF-8" in error.action
        assert "LATIN1" not in error.action


def test_utf_8_with_a_damaged_byte_is_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    error = refused(path, "Größe über Ströme".encode() + b" \xff end")
    command = error.action.rpartition("with ")[2].replace("OLD", str(path)).replace("NEW", f"{path}.new.txt")
    subprocess.run(["bash", "-c", command], check=False)  # iconv -c exits with 1 if it has dropped a byte
    assert texts(source_of(Path(f"{path}.new.txt"))) == ["Größe über Ströme  end"]


def test_binary_data_is_not_converted(tmp_path: Path) -> None:
    error = refused(tmp_path / "a.txt", b"\xff\xd8\xff\xe0\0\x10JFIF")
    assert "iconv" not in error.action
    assert "remove the file from corpus.sources" in error.action


def test_a_table_with_bytes_that_are_not_utf_8_gets_no_iconv(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError) as caught:
        texts(source_of(tmp_path / "a.parquet"))
    assert caught.value.action == (
        "write the table again with that text in UTF-8, or set bad_records of this source to skip"
    )


@pytest.mark.parametrize("content", [POINTER + b"\n" * (len(POINTER) % 2), PAGE + b"\n" * (len(PAGE) % 2)])
def test_token_files_of_another_kind_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    source = TokensSource(kind="nanogpt", train=str(tmp_path / "train.bin"))
    with pytest.raises(CorpusError, match=r"token file .*train\.bin is an? (Git LFS pointer|HTML page)"):
        nanogpt.token_files(source)


def test_a_folder_saved_by_datasets_is_read_without_its_cache(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    Dataset.from_dict({"text": ["cached"]}).save_to_disk(tmp_path / "other")
    cached = next((tmp_path / "other").glob("*.arrow"))
    cached.rename(tmp_path / "saved" / "cache-0a1b2c.arrow")
    source = source_of(tmp_path / "saved")
    assert texts(source) == ["a", "b", "c"]
    assert sources.skipped_files(source) == []


def test_one_split_of_a_saved_dataset_is_to_be_named(tmp_path: Path) -> None:
    parts = {"test": Dataset.from_dict({"text": ["t"]}), "train": Dataset.from_dict({"text": ["a"]})}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError) as caught:
        texts(source_of(tmp_path / "saved"))
    assert "a dataset with the splits test, train" in caught.value.problem
    assert caught.value.action.endswith(f"such as {tmp_path / 'saved' / 'train'}")
    assert texts(source_of(tmp_path / "saved" / "train")) == ["a"]
    DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "alone")
    assert texts(source_of(tmp_path / "alone")) == ["a"]


def test_a_saved_dataset_without_its_list_of_files_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"state\.json does not list data files"):
        texts(source_of(tmp_path / "saved"))
