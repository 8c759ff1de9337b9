"""Reads records of tables: parquet files, and Arrow files and streams as `datasets` writes them.

Only the needed columns are decoded, about 16 MiB of text at a time. A parquet page is decompressed as a whole,
usually the text of 1,024 rows, which is little unless the rows are books.
"""

import contextlib
import io
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from inheritune_ds.data.documents import text as text_files
from inheritune_ds.data.documents.change_check import FileMark
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules, no_field, no_text
from inheritune_ds.errors import CorpusError

_BATCH_BYTES = 2**24
_BATCH_ROWS = 1024
_REWRITE = "write the table again with that text in UTF-8"
_ARROW_FILE_MAGIC = b"ARROW1"
# The end of an Arrow stream (Arrow columnar format, "IPC Streaming Format"): a stream that is truncated between two
# batches lacks only this.
_ARROW_STREAM_END = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")


def parquet(
    path: Path,
    rules: RecordRules,
    start: Cursor,
    on_bytes: Callable[[int], None],
    file: io.RawIOBase | None = None,
) -> Generator[Document, None, int]:
    """Yield the rows of a parquet file after the first `start.record`, whose row groups are not read; returns its rows.

    If `file` is given (open, such as one on another machine), `path` is only its name. `on_bytes` receives about the
    bytes of every row group that is done.

    Raises:
        CorpusError: The file is damaged, has no text in that field, or has a bad row and these are refused.
        OSError: The file cannot be read.
    """
    import pyarrow.parquet as pq

    size = path.stat().st_size if file is None else file.seek(0, io.SEEK_END)
    with (
        _readable(path, "parquet"),
        # pre_buffer would read a row group as a whole.
        pq.ParquetFile(
            path if file is None else file, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
        ) as table,
    ):
        rows = _Rows(path, rules, table.schema_arrow, start.file)
        total = int(table.metadata.num_rows)
        first = 0
        for number in range(table.metadata.num_row_groups):
            group = table.metadata.row_group(number)
            if first + group.num_rows > start.record:
                row = first
                columns = map(group.column, range(group.num_columns))
                text_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == rules.text_field)
                for batch in table.iter_batches(
                    batch_size=_rows_at_once(text_bytes, group.num_rows),
                    row_groups=[number],
                    columns=rows.columns,
                    use_threads=False,
                ):
                    passed = min(max(start.record - row, 0), batch.num_rows)
                    yield from rows.documents(batch.slice(passed), row + passed)
                    row += batch.num_rows
            first += group.num_rows
            on_bytes(size * group.num_rows // total if total else 0)
        return total


def arrow(
    path: Path, rules: RecordRules, start: Cursor, on_bytes: Callable[[int], None]
) -> Generator[Document, None, int]:
    """Yield the rows of an Arrow file or stream as `parquet` does; skipped batches are mapped and not decoded."""
    import pyarrow as pa

    mark = FileMark.of(path)
    with _readable(path, "Arrow"), pa.memory_map(str(path)) as file:
        schema, batches = _open_arrow(file, path)
        rows = _Rows(path, rules, schema, start.file)
        first = reported = 0
        for batch, read in batches:
            passed = min(max(start.record - first, 0), batch.num_rows)
            chosen = batch.select(rows.tops)
            step = _rows_at_once(chosen.nbytes, chosen.num_rows)
            for row in range(passed, batch.num_rows, step):
                # Reading past the end of a mapped file would kill the process.
                mark.check()
                yield from rows.documents(chosen.slice(row, step), first + row)
            first += batch.num_rows
            on_bytes(read - reported)
            reported = read
        return first


def _open_arrow(file: Any, path: Path) -> tuple[Any, Iterator[tuple[Any, int]]]:
    """Returns the schema and an iterator of (batch, bytes of the file up to its end)."""
    import pyarrow as pa

    if file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC:
        table = pa.ipc.open_file(file)
        count = table.num_record_batches
        return table.schema, ((table.get_batch(i), file.size() * (i + 1) // count) for i in range(count))
    file.seek(0)
    stream = pa.ipc.open_stream(file)

    def batches() -> Iterator[tuple[Any, int]]:
        for batch in stream:
            yield batch, file.tell()
        end = file.tell()
        file.seek(max(0, end - 8))
        if end != file.size() or not file.read(8).endswith(_ARROW_STREAM_END):
            raise _unreadable(path, "Arrow", "the end of its stream is missing, or something follows it")

    return stream.schema, batches()


def _rows_at_once(size: int, rows: int) -> int:
    """Rows to decode together, out of `rows` with `size` bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


class _Rows:
    """Turns batches of a table into documents; `columns` are paths of the needed fields, `tops` their columns."""

    def __init__(self, path: Path, rules: RecordRules, schema: Any, file: int) -> None:
        self._path = path
        self._rules = rules
        self._file = file
        names = list(schema.names)
        kind = _kind_of(schema, rules.text_field)
        if kind is None:
            raise no_field(str(path), rules.text_field, names)
        if not _is_text(kind):
            raise no_text(str(path), rules.text_field, str(kind))
        asked = {*rules.filters.keep, *rules.filters.drop}
        # A field that the table lacks counts as null, as in JSON.
        present = sorted(field for field in asked if _kind_of(schema, field) is not None)
        self._asked_tops = [name for name in names if name in {_top(schema, field) for field in present}]
        self.columns = list(dict.fromkeys([rules.text_field, *present]))
        text_top = _top(schema, rules.text_field)
        self.tops = [name for name in names if name == text_top or name in self._asked_tops]

    def documents(self, batch: Any, first: int) -> Iterator[Document]:
        """Yield the rows of a batch that begins at row `first` of the file."""
        import pyarrow as pa

        # As bytes: pyarrow does not check UTF-8, and one invalid row fails the whole batch.
        values = _column(batch, self._rules.text_field).cast(pa.large_binary())
        # Wrong offsets of a damaged file would read outside its memory.
        values.validate(full=True)
        try:
            others = batch.select(self._asked_tops).to_pylist() if self._asked_tops else [{}] * batch.num_rows
        except UnicodeDecodeError as error:
            where = f"{self._path}, a row of {first + 1} to {first + batch.num_rows}"
            place = f"byte {error.start} of a field that filters use"
            raise text_files.not_utf8(where, error, place, _REWRITE) from None
        for row, (value, other) in enumerate(zip(values.to_pylist(), others, strict=True), first + 1):
            yield self._document(value, other, row)

    def _document(self, value: bytes | None, other: dict[str, Any], row: int) -> Document:
        where, cursor = f"{self._path}, row {row}", Cursor(self._file, row)
        if value is not None and len(value) > text_files.MAX_DOCUMENT_BYTES:
            return self._rules.bad(text_files.too_long(f"{where}: the text", "cut it into several rows"), cursor)
        try:
            text = None if value is None else value.decode()
        except UnicodeDecodeError as error:
            action = f"{_REWRITE}, or set bad_records of this source to skip"
            return self._rules.bad(text_files.not_utf8(where, error, f"byte {error.start} of the text", action), cursor)
        return self._rules.document({**other, self._rules.text_field: text}, where, cursor)


def _top(schema: Any, field: str) -> str:
    """The column that contains a field."""
    return field if field in schema.names else field.partition(".")[0]


def _kind_of(schema: Any, field: str) -> Any:
    """Type of a field, nested or not; None if it does not exist."""
    import pyarrow as pa

    if field in schema.names:
        return schema.field(field).type
    top, *inner = field.split(".")
    kind = schema.field(top).type if top in schema.names else None
    for name in inner:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _column(batch: Any, field: str) -> Any:
    """Values of a field; null where an outer field is null."""
    import pyarrow.compute as pc

    if field in batch.schema.names:
        return batch.column(field)
    top, *inner = field.split(".")
    return pc.struct_field(batch.column(top), inner)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(plain) for check in checks)


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file into a CorpusError; some are an OSError without errno."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise _unreadable(path, kind, str(error).splitlines()[0]) from None


def _unreadable(path: Path, kind: str, reason: str) -> CorpusError:
    return CorpusError(
        f"corpus file {path}: it is not a valid {kind} file ({reason})",
        action="copy or download it again, then compare its size with the original",
    )
