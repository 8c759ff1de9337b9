"""Token files made by others, before they are read: whether they can be what they are said to be."""

from pathlib import Path

from inheritune_ds.config.corpus import TokensSource
from inheritune_ds.errors import CorpusError

ITEM_BYTES = 2
_PROBE_BYTES = 512
"""256 ids of 16 bits: no text has id 0 at every second place for so long, and every file of small 32-bit ids has."""


def token_files(source: TokensSource) -> list[Path]:
    """The file of the training part, and that of the validation part if there is one.

    Raises:
        CorpusError: A file is missing or no file of 16-bit numbers.
    """
    paths = [Path(name).expanduser() for name in (source.train, source.validation) if name is not None]
    for path in paths:
        if not path.is_file():
            raise CorpusError(
                f"token file {path} does not exist",
                allowed="a header-free file of 16-bit token ids, as nanoGPT's prepare.py writes it",
                action="correct train and validation of this source",
            )
        if not path.stat().st_size:
            raise CorpusError(
                f"token file {path} is empty", action="make or copy it again, or take it out of this source"
            )
        if path.stat().st_size % ITEM_BYTES:
            raise CorpusError(
                f"token file {path} has {path.stat().st_size} bytes, which is no whole number of 16-bit tokens",
                action="copy it again: it is cut off, or not a file of nanoGPT's",
            )
        if _has_wide_ids(path):
            raise CorpusError(
                f"token file {path} looks like one of 32-bit ids: every second 16-bit number at its beginning is 0",
                allowed="16-bit token ids, as nanoGPT's prepare.py writes them",
                action="write its ids as uint16, or name the documents themselves in corpus.sources",
            )
    return paths


def _has_wide_ids(path: Path) -> bool:
    """Whether a file holds wider numbers than it is read as; small ids leave their upper halves 0."""
    with path.open("rb") as stream:
        head = stream.read(_PROBE_BYTES)
    return len(head) == _PROBE_BYTES and not any(head[2::4]) and not any(head[3::4])


def check_ids(source: TokensSource, id_space: int) -> None:
    """Refuse files that cannot hold the ids of a tokenizer, before they are read.

    Args:
        source: The files.
        id_space: One more than the tokenizer's largest id; 0 if there is no tokenizer before the corpus is read.

    Raises:
        CorpusError: The files hold 16-bit ids, and the tokenizer is another kind.
    """
    if not 0 < id_space <= 2**16:
        known = f"has {id_space:,} ids" if id_space else "is trained on text, of which token files hold none"
        raise CorpusError(
            f"token file {source.train} holds 16-bit ids, and the tokenizer {known}",
            allowed="the tokenizer that made the file, with at most 65,536 ids",
            action="name it in corpus.tokenizer",
        )
