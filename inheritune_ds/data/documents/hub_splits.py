"""Which files of a dataset belong to a split, by the words in their paths that `datasets` goes by, too."""

import re
from collections.abc import Sequence

from inheritune_ds.errors import CorpusError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""datasets/data_files.py, KEYWORDS_IN_PATH_NAME_BASE: the word stands alone between marks or at an end."""


def files_of_split(names: Sequence[str], split: str, where: str) -> list[str]:
    """Choose the files of a split.

    Args:
        names: Paths inside the dataset.
        split: `train`, `validation`, `test`, or a word of the dataset's own that stands in the paths.
        where: How to call the dataset in a message.

    Raises:
        CorpusError: No path speaks of that split, and others speak of another.
    """
    told = {name: _splits_in(name, split) for name in names}
    chosen = [name for name, splits in told.items() if split in splits]
    if chosen:
        return chosen
    others = sorted({other for splits in told.values() for other in splits})
    if split == "train" and not others:
        return list(names)
    raise CorpusError(
        f"{where} has no file of the split {split!r} among the {len(names)} that data_files matches",
        allowed=f"the splits that their paths tell: {', '.join(others) or 'train, for no path tells of any'}",
        action="correct split of this source, or leave it out to read every file that data_files matches",
    )


def _splits_in(name: str, wanted: str) -> set[str]:
    words = {**_WORDS, wanted: _WORDS.get(wanted, (wanted,))}
    path = name.lower()
    return {
        split
        for split, known in words.items()
        if any(re.search(rf"(^|[^a-z0-9]){re.escape(word.lower())}($|[^a-z0-9]|[0-9])", path) for word in known)
    }
