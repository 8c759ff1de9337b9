"""One record of a corpus: its text, or why it is skipped, and the cursor behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from inheritune_ds.config.corpus import FilesSource, Filters, HubSource
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.file_kind import FileKind, action_for

Skipped = Literal["", "empty", "filtered", "bad"]


class Cursor(NamedTuple):
    """A position between two records of a source: number of the file, and records of it before the position."""

    file: int = 0
    record: int = 0


class Document(NamedTuple):
    """A record that was read: its text, or why it is skipped; `cursor` is behind it, `note` is its problem, if any."""

    text: str
    skipped: Skipped
    cursor: Cursor
    note: str = ""


@dataclass(frozen=True)
class RecordRules:
    """Which records of a source are used, and where their text is (dots lead to nested fields)."""

    text_field: str
    filters: Filters
    skip_bad: bool

    @classmethod
    def of(cls, source: FilesSource | HubSource) -> "RecordRules":
        """The rules of a source."""
        return cls(source.text_field, source.filters, source.bad_records == "skip")

    def document(self, record: object, where: str, cursor: Cursor) -> Document:
        """Extract the text of a parsed JSON object or a row, `where` in messages (`a.jsonl:12`); errors as in `bad`."""
        try:
            text = text_of(record, self.text_field, where)
        except CorpusError as error:
            return self.bad(error, cursor)
        assert isinstance(record, Mapping)  # text_of has checked
        kept = all(field_of(record, field) in values for field, values in self.filters.keep.items())
        if not kept or any(field_of(record, field) in values for field, values in self.filters.drop.items()):
            return Document("", "filtered", cursor)
        return self.plain(text, cursor)

    def plain(self, text: str | None, cursor: Cursor) -> Document:
        """Apply the filters to a text without fields."""
        if not text or text.isspace():
            return Document("", "empty", cursor)
        longest = self.filters.max_characters
        if len(text) < self.filters.min_characters or (longest is not None and len(text) > longest):
            return Document("", "filtered", cursor)
        return Document(encodable(text), "", cursor)

    def bad(self, error: CorpusError, cursor: Cursor) -> Document:
        """Skip a record with the problem `error`, or raise it if bad records are refused."""
        if not self.skip_bad:
            raise error
        return Document("", "bad", cursor, error.problem)


def field_of(record: object, path: str) -> Any:
    """Value of a field, a key or keys of nested objects with dots between them; None if it does not exist."""
    if isinstance(record, Mapping):
        if path in record:
            return record[path]
        head, _, rest = path.partition(".")
        return field_of(record.get(head), rest) if rest else None
    return None


def text_of(record: object, field: str, where: str) -> str | None:
    """The text of a record, None if it is null. Raises a CorpusError without an object, its field, or text in it."""
    if not isinstance(record, Mapping):
        raise CorpusError(
            f"{where}: the record is {type(record).__name__}, not an object",
            allowed='one JSON object a line, such as {"text": "..."}',
            action="correct or remove it, or set bad_records of this source to skip",
        )
    outer, _, last = field.rpartition(".")
    holder = record if field in record or not outer else field_of(record, outer)
    name = field if field in record else last
    if not isinstance(holder, Mapping) or name not in holder:
        raise no_field(where, field, list(record))
    text = holder[name]
    if text is not None and not isinstance(text, str):
        raise no_text(where, field, type(text).__name__)
    return text


def no_field(where: str, field: str, present: Sequence[str]) -> CorpusError:
    """The error of a record or table without the field."""
    return CorpusError(
        f"{where}: there is no field {field!r}",
        allowed=f"the fields present: {', '.join(map(str, present)) or 'none'}",
        action="set text_field of this source to the one that holds the text",
    )


def no_text(where: str, field: str, kind: str) -> CorpusError:
    """The error of a field that does not hold text."""
    return CorpusError(
        f"{where}: field {field!r} holds {kind}, not text",
        allowed="a string (null counts as an empty document)",
        action="set text_field of this source to the one that holds the text",
    )


def wrong_kind(path: Path, kind: FileKind, action: str = "") -> CorpusError:
    """The error of a file whose content is of another kind than its suffix says."""
    return CorpusError(
        f"corpus file {path}: it is {kind.value}",
        action=action or action_for(kind, path) or "convert it, or remove it from corpus.sources",
    )


def encodable(text: str) -> str:
    """Replace unpaired surrogates (from broken escapes in JSON) by U+FFFD: UTF-8 cannot encode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
