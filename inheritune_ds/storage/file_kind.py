"""Names what a file is by its first bytes, whatever its suffix says."""

import re
import shlex
from collections.abc import Container
from enum import Enum
from pathlib import Path

HEAD_BYTES = 512
"""Bytes that decide the kind of a file."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FileKind(Enum):
    """What a file is; the value completes a message `it is ...`."""

    EMPTY = "empty"
    LFS_POINTER = "a Git LFS pointer, not the file itself"
    HTML = "an HTML page"
    JSON_ARRAY = "one JSON array"
    JSON_LINES = "JSON lines"
    JSON_OBJECT = "one JSON object over several lines"
    MARKED = "text with a byte order mark"
    UTF_16 = "UTF-16 text"
    UTF_16LE = "UTF-16 text without a byte order mark"
    UTF_16BE = "big-endian UTF-16 text without a byte order mark"
    UTF_32 = "UTF-32 text"
    GZIP = "gzip data"
    BZIP2 = "bzip2 data"
    ZSTD = "Zstandard data"
    XZ = "xz data"
    ZIP = "a zip archive"
    PARQUET = "a parquet file"
    ARROW = "an Arrow file"
    NUMPY = "a NumPy file"
    SAFETENSORS = "a safetensors file"
    PICKLE = "a pickle"
    OLD_TORCH = "a file of torch before 1.6"
    GGUF = "a GGUF model"
    SENTENCEPIECE = "a SentencePiece model"
    TIKTOKEN = "a tiktoken vocabulary"


# The first match counts. Signatures of binary formats have bytes that no UTF-8 text has at that place.
_SIGNATURES: tuple[tuple[FileKind, bytes], ...] = (
    (FileKind.LFS_POINTER, rb"version https://(git-lfs|hawser)\.github\.com/spec/"),
    (FileKind.UTF_32, rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    (FileKind.UTF_16, rb"\xff\xfe|\xfe\xff"),
    (FileKind.GZIP, rb"\x1f\x8b"),
    (FileKind.BZIP2, rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    (FileKind.ZSTD, rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    (FileKind.XZ, rb"\xfd7zXZ\0"),
    (FileKind.ZIP, rb"PK(\x03\x04|\x05\x06)"),
    (FileKind.PARQUET, rb"PAR1[\0-\x1f]"),
    (FileKind.ARROW, rb"ARROW1\0\0|\xff\xff\xff\xff"),
    (FileKind.NUMPY, rb"\x93NUMPY"),
    (FileKind.SAFETENSORS, rb".{4}\0{4}\{"),
    (FileKind.OLD_TORCH, rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\."),
    (FileKind.PICKLE, rb"\x80[\x02-\x05]"),
    (FileKind.GGUF, rb"GGUF[\x01-\x0f]\0\0\0"),
    (FileKind.MARKED, BYTE_ORDER_MARK),
    (FileKind.HTML, rb"(?i:\s*(<!--.*?-->\s*)?<(!doctype\s+html|html\b))"),
    (FileKind.JSON_ARRAY, rb"\s*\[\s*(\{|\r?\n|\Z)"),
    (FileKind.JSON_OBJECT, rb"\s*\{[ \t]*\r?\n"),
    (FileKind.JSON_LINES, rb"\s*\{"),
    (FileKind.TIKTOKEN, rb"([A-Za-z0-9+/]+=* [0-9]+\n){2}"),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.DOTALL)) for kind, pattern in _SIGNATURES)
_TOOLS = {
    FileKind.GZIP: (".gz", "gzip -d"),
    FileKind.BZIP2: (".bz2", "bzip2 -d"),
    FileKind.ZSTD: (".zst", "zstd -d --rm"),
    FileKind.XZ: (".xz", "xz -d"),
}
_SUFFIXES = {FileKind.PARQUET: ".parquet", FileKind.ARROW: ".arrow"}
_ENCODINGS = {
    FileKind.UTF_16: "UTF-16",
    FileKind.UTF_16LE: "UTF-16LE",
    FileKind.UTF_16BE: "UTF-16BE",
    FileKind.UTF_32: "UTF-32",
}
_ACTIONS = {
    FileKind.EMPTY: "copy or download it again",
    FileKind.LFS_POINTER: "run git lfs pull in its repository, or download the file itself",
    FileKind.HTML: "download the file itself: a web page was saved in its place",
    FileKind.ZIP: "unpack it with unzip, and use the files inside",
    FileKind.SAFETENSORS: "if it holds the weights of a model, name it model.safetensors",
    FileKind.GGUF: "download the model's safetensors files, from which it was converted",
    FileKind.TIKTOKEN: "use a folder or hub id of the same model that has a tokenizer.json",
}


def kind_of(head: bytes) -> FileKind | None:
    """The kind of a file with these first `HEAD_BYTES`; None for other text and for unknown formats."""
    if not head:
        return FileKind.EMPTY
    found = next((kind for kind, pattern in _PATTERNS if pattern.match(head)), None)
    if found is None and _is_sentencepiece(head):
        return FileKind.SENTENCEPIECE
    return found or _bare_utf_16(head)


def look(path: Path) -> FileKind | None:
    """The kind of a file, as `kind_of`; raises an OSError if it cannot be read."""
    with path.open("rb") as stream:
        return kind_of(stream.read(HEAD_BYTES))


def unexpected_kind(path: Path, expected: Container[FileKind] = ()) -> FileKind | None:
    """The kind of a file if it is known and not expected; None also for a file that cannot be read."""
    try:
        kind = look(path)
    except OSError:
        return None
    return None if kind in expected else kind


def action_for(kind: FileKind, path: Path) -> str:
    """A next step for the user with a file of another kind than its place or suffix says; "" if there is none."""
    name = shlex.quote(str(path))
    if kind in _TOOLS:
        suffix, tool = _TOOLS[kind]
        packed = shlex.quote(f"{path}{suffix}")
        return f"unpack it: mv {name} {packed} && {tool} {packed}"
    if kind in _SUFFIXES:
        return f"rename it: mv {name} {shlex.quote(str(path.with_suffix(_SUFFIXES[kind])))}"
    if kind in _ENCODINGS:
        new = shlex.quote(f"{path}.utf8")
        return f"convert it: iconv -f {_ENCODINGS[kind]} -t UTF-8 {name} > {new} && mv {new} {name}"
    if kind is FileKind.MARKED:
        return rf"remove the mark: sed -i '1s/^\xEF\xBB\xBF//' {name}"
    return _ACTIONS.get(kind, "")


def _is_sentencepiece(head: bytes) -> bool:
    """Whether a protobuf message begins with a piece: its text (field 1) and its score (field 2, 32 bits)."""
    size = head[3] if len(head) > 3 else 0
    return head[:1] == b"\n" and head[2:3] == b"\n" and head[4 + size : 5 + size] == b"\x15"


def _bare_utf_16(head: bytes) -> FileKind | None:
    """UTF-16 of mostly ASCII: more than half of its 16-bit units are a printable character and a NUL."""
    for encoding, kind in (("utf-16-le", FileKind.UTF_16LE), ("utf-16-be", FileKind.UTF_16BE)):
        units = head[: len(head) // 2 * 2].decode(encoding, "replace")
        if sum(unit.isascii() and (unit.isprintable() or unit.isspace()) for unit in units) * 2 > len(units):
            return kind
    return None
