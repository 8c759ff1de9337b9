"""Selects the files of a dataset split by the words in their paths, as `datasets` does."""

import re
from collections.abc import Sequence

from inheritune_ds.errors import CorpusError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""datasets/data_files.py, KEYWORDS_IN_PATH_NAME_BASE: the word is between punctuation marks or at an end."""


def files_of_split(names: Sequence[str], split: str, where: str) -> list[str]:
    """Select the files of a split: `train`, `validation`, `test`, or another word that appears in the paths.

    Raises:
        CorpusError: No path contains the split, and others contain another one.
    """
    splits_of = {name: _splits_in(name, split) for name in names}
    chosen = [name for name, splits in splits_of.items() if split in splits]
    if chosen:
        return chosen
    others = sorted(set().union(*splits_of.values()))
    if split == "train" and not others:
        return list(names)
    raise CorpusError(
        f"{where} has no file of the split {split!r} among the {len(names)} files that data_files matches",
        allowed=f"the splits in their paths: {', '.join(others) or 'train, because no path names one'}",
        action="correct split of this source, or remove it to read every file that data_files matches",
    )


def _splits_in(name: str, wanted: str) -> set[str]:
    words = {**_WORDS, wanted: _WORDS.get(wanted, (wanted,))}
    path = name.lower()
    return {
        split
        for split, known in words.items()
        if any(re.search(rf"(^|[^a-z0-9]){re.escape(word.lower())}($|[^a-z0-9]|[0-9])", path) for word in known)
    }
