import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inheritune_ds.config.corpus import FilesSource
from inheritune_ds.data.documents import sources, tables, text
from inheritune_ds.data.documents.records import Cursor, Document
from inheritune_ds.errors import CorpusError

START = Cursor()
KINDS = ["parquet", "file", "stream"]
Write = Callable[..., Path]


def write(folder: Path, kind: str, columns: dict[str, Any], rows_a_batch: int = 10, **settings: Any) -> Path:
    """Write a table as parquet (row groups) or as an Arrow file or stream (batches)."""
    table = pa.table(columns)
    path = folder / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows_a_batch, **settings)
        return path
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(path, table.schema, **settings) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return path


@pytest.fixture(params=KINDS)
def table(tmp_path: Path, request: pytest.FixtureRequest) -> Write:
    """`write` of every kind."""
    return functools.partial(write, tmp_path, request.param)


def read(path: Path, start: Cursor = START, **settings: Any) -> list[Document]:
    return list(sources.documents(FilesSource(kind="files", paths=[str(path)], **settings), start))


def texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]


def test_documents_of_a_table_are_its_rows(table: Write) -> None:
    wanted = [f"text {number}" for number in range(3000)]
    path = table({"n": list(range(3001)), "content": [*wanted, None]}, rows_a_batch=1300)
    found = read(path, text_field="content")
    assert texts(found) == [*wanted, ""]
    assert found[-1] == Document("", "empty", Cursor(0, 3001))
    assert read(path, Cursor(0, 1299), text_field="content") == found[1299:]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "ü"], pa.string_view()),
        pa.array(["a", None, "ü"], pa.large_string()),
        pa.array(["a", None, "ü"]).dictionary_encode(),
        pa.array([None, None, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_documents_of_a_table_support_every_type_of_text(table: Write, column: pa.Array) -> None:
    assert texts(read(table({"text": column}))) == [value or "" for value in column.to_pylist()]


def test_documents_of_a_table_pass_filters_on_nested_fields(table: Write) -> None:
    meta = [{"set": "Book", "text": "one"}, {"set": "Code", "text": "two"}, None, {"set": "Book", "text": None}]
    path = table({"n": [1, 2, 3, 4], "meta": meta, "text": ["a", "b", "c", "d"]}, rows_a_batch=3)
    book = {"keep": {"meta.set": ["Book"]}}
    assert [(d.text, d.skipped) for d in read(path, filters=book)] == [
        ("a", ""),
        ("", "filtered"),
        ("", "filtered"),
        ("d", ""),
    ]
    assert texts(read(path, text_field="meta.text")) == ["one", "two", "", ""]
    assert texts(read(path, text_field="meta.text", filters=book)) == ["one", "", "", ""]
    assert texts(read(path, filters={"drop": {"n": [2, 3], "text": ["d"]}})) == ["a", "", "", ""]
    missing = {"meta.gone": ["x"], "gone": ["x"], "n.inner": ["x"]}
    assert texts(read(path, filters={"drop": missing})) == ["a", "b", "c", "d"]
    assert texts(read(path, filters={"keep": missing})) == [""] * 4


def test_documents_of_a_table_support_a_column_name_with_a_dot(table: Write) -> None:
    path = table({"meta.text": ["a", "b"], "meta.set": ["x", "y"]})
    assert texts(read(path, text_field="meta.text", filters={"keep": {"meta.set": ["y"]}})) == ["", "b"]


@pytest.mark.parametrize("field", ["text", "body.text", "n.text"])
def test_documents_of_a_table_name_the_fields_present(table: Write, field: str) -> None:
    path = table({"body": [{"x": "y"}], "n": [1]})
    with pytest.raises(CorpusError, match=rf"(?s)/a\.\w+: there is no field '{field}'.*body, n\n.*set text_field"):
        read(path, text_field=field, bad_records="skip")


@pytest.mark.parametrize(("column", "name"), [([1, 2], "int64"), ([b"a", b"b"], "binary"), ([["a"]], "list.*")])
def test_documents_of_a_table_refuse_other_types(table: Write, column: list[Any], name: str) -> None:
    with pytest.raises(CorpusError, match=rf"/a\.\w+: field 'text' holds {name}, not text"):
        read(table({"text": column}), bad_records="skip")


def not_utf8() -> pa.Array:
    return pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())


def test_documents_of_a_table_refuse_or_skip_a_row_that_is_not_utf8(table: Write) -> None:
    path = table({"text": not_utf8()})
    with pytest.raises(CorpusError, match=r"/a\.\w+, row 2: it is not UTF-8 text \(.* at byte 3 of the text\)"):
        read(path)
    one, bad, three = read(path, bad_records="skip")
    assert (one.text, three.text) == ("one", "three")
    assert (bad.skipped, bad.cursor) == ("bad", Cursor(0, 2))


def test_documents_of_a_table_refuse_a_filtered_field_that_is_not_utf8(table: Write) -> None:
    path = table({"text": ["a", "b", "c"], "set": not_utf8()})
    with pytest.raises(CorpusError, match=r"row of 1 to 3: it is not UTF-8.* a field that filters use"):
        read(path, filters={"keep": {"set": ["one"]}}, bad_records="skip")


def test_documents_of_a_table_refuse_or_skip_a_row_above_the_limit(
    table: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 10)
    path = table({"text": ["0123456789", "0123456789-"]})
    with pytest.raises(CorpusError, match=r"/a\.\w+, row 2: the text is longer than"):
        read(path)
    assert [document.skipped for document in read(path, bad_records="skip")] == ["", "bad"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_table_detect_every_truncation(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, {"text": [f"text {number}" for number in range(40)]})
    whole = path.read_bytes()
    for size in range(0, len(whole), 8 if kind == "stream" else 97):
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=r"(?s)it is not a valid (parquet|Arrow) file.*download it again"):
            read(path, bad_records="skip")


def test_documents_of_an_arrow_stream_refuse_bytes_behind_its_end(tmp_path: Path) -> None:
    path = write(tmp_path, "stream", {"text": ["a"]})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(CorpusError, match=r"not a valid Arrow file \(the end of its stream is missing, or somethi"):
        read(path)


@pytest.mark.parametrize("content", [b"this is nothing at all", b"ARROW1 nothing", b"PAR1 nothing", bytes(1000)])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_documents_detect_an_invalid_table(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=r"it is not a valid (parquet|Arrow) file"):
        read(tmp_path / name)


def test_documents_of_a_table_report_why_it_cannot_be_read(table: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table({"text": ["a"]})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, f"Failed to open local file {path}. Detail: [errno 13] Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    monkeypatch.setattr(pa, "memory_map", refuse)
    with pytest.raises(CorpusError, match=r"/a\.\w+: it cannot be read \(permission denied\)\n"):
        read(path)


def test_documents_of_parquet_detect_a_wrong_checksum(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"text": ["some text " * 100]}, compression="none", write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"some text some", b"some test some", 1))
    with pytest.raises(CorpusError, match=r"(?s)it is not a valid parquet file.*CRC"):
        read(path)


def test_documents_of_arrow_detect_offsets_outside_the_file(tmp_path: Path) -> None:
    offsets = pa.array([0, 5, 10], pa.int32())
    path = write(tmp_path, "stream", {"text": ["01234", "56789"]})
    content = path.read_bytes()
    right = offsets.buffers()[1].to_pybytes()
    assert content.count(right) == 1
    wrong = right[:4] + (2**30).to_bytes(4, "little") + right[8:]
    path.write_bytes(content.replace(right, wrong))
    with pytest.raises(CorpusError, match="it is not a valid Arrow file"):
        read(path)


def test_documents_of_arrow_detect_a_file_that_shrinks_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 10)
    path = write(tmp_path, "stream", {"text": [f"{number} " * 1000 for number in range(100)]}, rows_a_batch=100)
    found = sources.documents(FilesSource(kind="files", paths=[str(path)]))
    assert next(found).text
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CorpusError, match="it was changed while the corpus was read"):
        list(found)


def test_documents_of_a_table_decode_few_rows_where_they_are_long(
    table: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    taken = tables._Rows.documents

    def note(rows: Any, batch: Any, first: int) -> Any:
        sizes.append(batch.num_rows)
        return taken(rows, batch, first)

    monkeypatch.setattr(tables._Rows, "documents", note)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 100_000)
    wanted = [str(number) * 10_000 for number in range(10, 60)]
    path = table({"text": wanted}, rows_a_batch=50)
    assert texts(read(path)) == wanted
    assert max(sizes) <= 5


def test_documents_of_parquet_read_no_row_group_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    taken = pq.ParquetFile.iter_batches

    def note(table: Any, *arguments: Any, row_groups: list[int], **settings: Any) -> Any:
        asked.extend(row_groups)
        return taken(table, *arguments, row_groups=row_groups, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    path = write(tmp_path, "parquet", {"text": list("0123456789" * 5)})
    assert texts(read(path, Cursor(0, 27))) == list("789" + "0123456789" * 2)
    assert asked == [2, 3, 4]


def test_documents_of_files_saved_by_datasets(tmp_path: Path) -> None:
    from datasets import Dataset

    wanted = [f"text {number}" for number in range(2500)]
    Dataset.from_dict({"text": wanted}).save_to_disk(tmp_path / "set", num_shards=2)
    assert texts(read(tmp_path / "set" / "*.arrow")) == wanted
