"""Checks token files in nanoGPT's format (train.bin and val.bin) before they are read."""

from pathlib import Path

from inheritune_ds.config.corpus import TokensSource
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.file_kind import FileKind, action_for, kind_of

ITEM_BYTES = 2
_PROBE_BYTES = 512
"""256 ids of 16 bits: every second one is 0 in each file of small 32-bit ids, and in no text."""
_NO_TOKENS = {FileKind.LFS_POINTER, FileKind.HTML, FileKind.NUMPY, FileKind.ZIP, FileKind.XZ}
"""Kinds with a signature too long to be a few ids by chance."""


def token_files(source: TokensSource) -> list[Path]:
    """List the training file, and any validation file; raise a CorpusError if one is missing, empty or not 16-bit."""
    paths = [Path(name).expanduser() for name in (source.train, source.validation) if name is not None]
    for path in paths:
        if not path.is_file():
            raise CorpusError(
                f"token file {path} does not exist",
                allowed="a header-free file of 16-bit token ids, as nanoGPT's prepare.py writes it",
                action="correct train and validation of this source",
            )
        if not path.stat().st_size:
            raise CorpusError(f"token file {path} is empty", action="recreate it, or remove it from this source")
        if path.stat().st_size % ITEM_BYTES:
            raise CorpusError(
                f"token file {path} has {path.stat().st_size} bytes, not a whole number of 16-bit tokens",
                action="copy it again: it is truncated, or not a nanoGPT token file",
            )
        with path.open("rb") as stream:
            head = stream.read(_PROBE_BYTES)
        if (kind := kind_of(head)) in _NO_TOKENS:
            raise CorpusError(
                f"token file {path} is {kind.value}",
                allowed="a header-free file of 16-bit token ids, as nanoGPT's prepare.py writes it",
                action=action_for(kind, path) or "write its ids with numpy's tofile",
            )
        if len(head) == _PROBE_BYTES and not any(head[2::4]) and not any(head[3::4]):  # the upper halves of small ids
            raise CorpusError(
                f"token file {path} seems to hold 32-bit ids: every second 16-bit number at its beginning is 0",
                allowed="16-bit token ids, as nanoGPT's prepare.py writes them",
                action="write its ids as uint16, or use the documents themselves in corpus.sources",
            )
    return paths


def check_ids(source: TokensSource, id_space: int) -> None:
    """Raise a CorpusError for token files that the tokenizer cannot have made: it has over 65,536 ids, or none yet.

    `id_space` is the tokenizer's largest id plus 1; 0 if the tokenizer is trained on the corpus.
    """
    if not 0 < id_space <= 2**16:
        known = f"has {id_space:,} ids" if id_space else "is trained on text, which token files do not hold"
        raise CorpusError(
            f"token file {source.train} holds 16-bit ids, but the tokenizer {known}",
            allowed="the tokenizer that made the file, with at most 65,536 ids",
            action="set corpus.tokenizer to it",
        )
