# ruff: noqa: RUF001  letters that look alike are what some of these tests are about
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inheritune_ds.data.tokens import overlap
from inheritune_ds.data.tokens.overlap import MIN_WORDS, OverlapCounter, OverlapIndex
from inheritune_ds.errors import CorpusError

ITEM = "Which of these is the largest planet of the solar system, measured by its mass?"
FILLER = "Nothing in this sentence has much to do with what was asked above or will be asked below. "


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower().replace("ς", "σ"))


def naive_hits(sets: dict[str, list[str]], ngram: int, text: str) -> dict[int, list[int]]:
    """The definition, word by word."""
    words = words_of(text)
    hits: dict[int, list[int]] = {}
    for number, items in enumerate(sets.values()):
        for place, item in enumerate(map(words_of, items)):
            size = min(len(item), ngram)
            if size < min(MIN_WORDS, ngram):
                continue
            grams = {tuple(item[start : start + size]) for start in range(len(item) - size + 1)}
            if any(tuple(words[start : start + size]) in grams for start in range(len(words) - size + 1)):
                hits.setdefault(number, []).append(place)
    return hits


@pytest.mark.parametrize(
    "planted",
    [
        ITEM,
        ITEM.upper(),
        ITEM.replace(" ", "\n\n"),
        ITEM.replace(" ", " — ").replace(",", ";"),
        "“" + re.sub(r"[^\w ]", "", ITEM) + "”",
        ITEM.replace(" ", "_"),
    ],
)
def test_find_detects_an_item_in_any_typography(planted: str) -> None:
    index = OverlapIndex.build({"other": [FILLER * 2], "quiz": ["A short one?", ITEM]}, 13)
    assert index.find(f"{FILLER.upper()[:40]}\n{planted}\n{FILLER[:40]}") == {1: [1]}
    assert index.find(planted.replace("planet", "moon").replace("PLANET", "MOON")) == {}


words = st.sampled_from(["a", "b", "ab", "ba", "B", "é", "É", "Σ", "σ", "ς", "İ", "東京", "1", "a1", "\U0001d400"])
gaps = st.sampled_from([" ", ", ", "\n", "-", "'", "_", ". ", "\u00a0", "—", "\u0301"])
texts = st.lists(st.tuples(words, gaps), max_size=30).map(lambda parts: "".join(word + gap for word, gap in parts))


@settings(max_examples=300)
@given(items=st.lists(texts, min_size=1, max_size=6), text=texts, ngram=st.integers(3, 10), chunk=st.integers(1, 50))
@example(items=["a b c"], text="x" * 9 + " a b c", ngram=3, chunk=2)
@example(items=["a b ΑΣ.Β c d"], text="a b ΑΣ.Β c d", ngram=3, chunk=6)
def test_find_agrees_with_the_definition(items: list[str], text: str, ngram: int, chunk: int) -> None:
    sets = {
        "first": [*items[::2], "one two three four five six seven eight nine ten"],
        "second": [*items[1::2], "1 " * 10],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_CHUNK_CHARACTERS", max(chunk, 5))
        overlap._powers.cache_clear()
        index = OverlapIndex.build(sets, ngram)
        found = index.find(text), index.find(text + " " + items[0])
    overlap._powers.cache_clear()
    assert found == (naive_hits(sets, ngram, text), naive_hits(sets, ngram, text + " " + items[0]))


def test_a_set_with_nothing_to_compare_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"(?s)set 'quiz' has nothing.*none of its 2 items has 8 words.*text_field"):
        OverlapIndex.build({"fine": [ITEM], "quiz": ["too short", ""]}, 13)
    with pytest.raises(CorpusError, match="none of its 0 items has 3 words"):
        OverlapIndex.build({"quiz": []}, 3)


def test_hashes_are_the_same_in_every_process() -> None:
    script = f"from inheritune_ds.data.tokens.overlap import *; print(next(_word_hashes({ITEM!r})).tolist())"
    shown = [
        subprocess.run(
            [sys.executable, "-c", script.replace("import *", "import _word_hashes")],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert shown == [f"{next(overlap._word_hashes(ITEM)).tolist()}\n"] * 2


def test_hashes_of_different_words_differ(shared: Path) -> None:
    text = (shared / "corpora" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    different = sorted(set(words_of(text)))
    found = np.concatenate(list(overlap._word_hashes(" ".join(different))))
    assert len(different) > 10_000
    assert len(found) == len(set(found.tolist())) == len(different)


def test_counter_counts_documents_and_items_and_continues_from_its_state() -> None:
    index = OverlapIndex.build({"quiz": [ITEM, FILLER], "other": [FILLER, "short"]}, 13)
    counter = OverlapCounter(index)
    for text in (ITEM, FILLER, "nothing at all", ITEM + FILLER):
        counter.add(index.find(text))
        kept = json.loads(json.dumps(counter.state()))
        counter = OverlapCounter(index, kept)
        assert counter.state() == kept
    quiz = {"ngram": 13, "items": 2, "items_too_short": 0, "items_hit": 2, "documents_hit": 3}
    other = {"ngram": 13, "items": 2, "items_too_short": 1, "items_hit": 1, "documents_hit": 2}
    assert counter.as_dict() == {"quiz": quiz, "other": other}
    assert list(OverlapCounter(index).as_dict().values()) == [
        {**counts, "items_hit": 0, "documents_hit": 0} for counts in (quiz, other)
    ]
