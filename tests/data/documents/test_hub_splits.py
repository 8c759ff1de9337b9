import pytest

from inheritune_ds.data.documents.hub import files_of_split
from inheritune_ds.errors import CorpusError

NAMES = [
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/test-00000-of-00001.parquet",
    "data/validation-00000-of-00001.parquet",
    "README.md",
]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (NAMES, "train", NAMES[:2]),
        (NAMES, "test", NAMES[2:3]),
        (NAMES, "validation", NAMES[3:4]),
        (["train/chunk1/a.jsonl.zst", "dev/a.jsonl.zst"], "train", ["train/chunk1/a.jsonl.zst"]),
        (["train/chunk1/a.jsonl.zst", "dev/a.jsonl.zst"], "validation", ["dev/a.jsonl.zst"]),
        (["my_dataset_training.jsonl", "my_dataset_eval.jsonl"], "train", ["my_dataset_training.jsonl"]),
        (["Train2.jsonl", "constrained.jsonl", "latest.jsonl"], "train", ["Train2.jsonl"]),
        (["arxiv_sample.jsonl", "book_sample.jsonl"], "train", ["arxiv_sample.jsonl", "book_sample.jsonl"]),
        (["de-train.jsonl", "fr-train.jsonl"], "fr", ["fr-train.jsonl"]),
    ],
)
def test_files_of_split_uses_words_in_the_paths(names: list[str], split: str, chosen: list[str]) -> None:
    assert files_of_split(names, split, "dataset") == chosen


@pytest.mark.parametrize(
    ("names", "split", "others"),
    [(NAMES, "dev", "test, train, validation"), (["a.jsonl"], "test", "train, because no path names one")],
)
def test_files_of_split_refuses_a_split_that_no_path_names(names: list[str], split: str, others: str) -> None:
    with pytest.raises(CorpusError) as caught:
        files_of_split(names, split, "dataset a/b")
    assert f"dataset a/b has no file of the split {split!r} among the {len(names)}" in caught.value.problem
    assert others in caught.value.allowed


def test_split_words_are_those_of_datasets() -> None:
    from datasets.data_files import SPLIT_KEYWORDS

    from inheritune_ds.data.documents.hub import _SPLIT_WORDS

    found = {str(split): sorted(words) for split, words in SPLIT_KEYWORDS.items()}
    assert {split: sorted(words) for split, words in _SPLIT_WORDS.items()} == found
