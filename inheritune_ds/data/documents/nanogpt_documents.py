"""Reads token files in nanoGPT's format (train.bin and val.bin) as documents of token ids."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inheritune_ds.config.corpus import TokensSource
from inheritune_ds.data.documents.holdout import is_held_out
from inheritune_ds.data.documents.nanogpt import token_files
from inheritune_ds.data.documents.records import Cursor
from inheritune_ds.errors import CorpusError

_ITEM = np.dtype("<u2")
_CHUNK_TOKENS = 2**22
MAX_DOCUMENT_TOKENS = 2**26
"""More tokens than this without an end-of-text token mean that the file has no such tokens."""


class TokenDocument(NamedTuple):
    """A document of a token file, its end-of-text token last; `cursor` has the token number of the next document."""

    ids: npt.NDArray[np.uint16]
    digest: bytes
    held_out: bool
    cursor: Cursor


def documents(  # noqa: PLR0913 - one argument for each setting
    source: TokensSource,
    start: Cursor,
    *,
    eos_id: int,
    id_space: int,
    ratio: float,
    wants_more: Callable[[], bool] = lambda: True,
) -> Iterator[TokenDocument]:
    """Yield the documents of a source in order.

    `ratio` is the held-out share of the documents if the source has no validation file. `wants_more` is called before
    every document of `train`; the validation file is always read whole.

    Raises:
        CorpusError: An id is not below `id_space`, or the documents have no end-of-text tokens.
    """
    paths = token_files(source)
    for number in range(start.file, len(paths)):
        at = start.record if number == start.file else 0
        for ids, end in _documents(paths[number], at, eos_id, id_space):
            if number == 0 and not wants_more():
                break
            digest = hashlib.sha256(ids.tobytes()).digest()
            held_out = is_held_out(digest, ratio) if len(paths) == 1 else number == 1
            yield TokenDocument(ids, digest, held_out, Cursor(number, end))


def _documents(path: Path, start: int, eos_id: int, id_space: int) -> Iterator[tuple[npt.NDArray[np.uint16], int]]:
    """Yield (ids, end position) of the documents of a file."""
    tokens = np.memmap(path, dtype=_ITEM, mode="r")
    reach = _CHUNK_TOKENS
    while start < len(tokens):
        part = np.array(tokens[start : start + reach])
        _check_ids(part, path, start, id_space)
        ends = np.flatnonzero(part == eos_id) + 1
        if start + len(part) == len(tokens) and (not len(ends) or ends[-1] < len(part)):
            ends = np.append(ends, len(part))  # the last document may lack its end
        if len(ends):
            for first, last in itertools.pairwise([0, *ends.tolist()]):
                yield part[first:last], start + last
            start, reach = start + int(ends[-1]), _CHUNK_TOKENS
        else:
            reach *= 2
            if reach > MAX_DOCUMENT_TOKENS:
                raise CorpusError(
                    f"token file {path} has no end-of-text token (id {eos_id}) among {len(part):,} tokens from "
                    f"position {start:,}",
                    allowed=f"documents of at most {MAX_DOCUMENT_TOKENS:,} tokens, each ending in that token",
                    action="set corpus.tokenizer to the tokenizer that made the file, or add end-of-text tokens",
                )


def _check_ids(part: npt.NDArray[np.uint16], path: Path, start: int, id_space: int) -> None:
    if len(part) and int(part.max()) >= id_space:
        place = int(np.argmax(part >= id_space))
        raise CorpusError(
            f"token file {path} has the id {int(part[place])} at token {start + place:,}, but the tokenizer has ids "
            f"up to {id_space - 1}",
            allowed="tokens made with corpus.tokenizer",
            action="set corpus.tokenizer to the tokenizer that made the file",
        )
