from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.batches import BatchStream, Coverage, build_held_out, build_stream
from inheritune_ds.data.stream.mixture import Weights
from inheritune_ds.data.stream.order import order_seeds, shuffled_order
from inheritune_ds.data.stream.windows import TokenShards, Windows
from inheritune_ds.errors import CorpusError

NAMES = ("books", "arxiv", "web", "code")
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
SOURCE_TOKENS = 10_000

Row = tuple[int, int, int]
"""Source, epoch and place."""


def write_source(folder: Path, number: int, counts: list[int]) -> TokenShards:
    """Shards of a source; its token t is SOURCE_TOKENS * number + t, so that a row shows its origin."""
    tokens = SOURCE_TOKENS * number + np.arange(sum(counts), dtype="<u4")
    paths = [folder / f"{number}-{shard}.bin" for shard in range(len(counts))]
    for path, part in zip(paths, np.split(tokens.astype("<u4"), np.cumsum(counts)[:-1]), strict=True):
        part.tofile(path)
    return TokenShards(paths, counts, "uint32")


def sources_of(folder: Path, sizes: list[int], seq_len: int = 4) -> dict[str, Windows]:
    """Sources of so many windows, each in two shards that end in the middle of one, with a token to spare."""
    found = {}
    for number, size in enumerate(sizes):
        first = size * seq_len // 2 + 1
        shards = write_source(folder, number, [first, size * seq_len + 2 - first])
        found[NAMES[number]] = Windows(shards, seq_len)
    return found


def make_stream(
    folder: Path, sizes: list[int], batch_windows: int, *, seq_len: int = 4, seed: int = 7, **more: Any
) -> BatchStream:
    return BatchStream(sources_of(folder, sizes, seq_len), seed=seed, batch_windows=batch_windows, **more)


def rows_of(stream: BatchStream, step: int) -> list[Row]:
    sources, epochs, places = (column.tolist() for column in stream.draw(step))
    return list(zip(sources, epochs, places, strict=True))


def global_rows(stream: BatchStream, step: int, world_size: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Put the rows of all ranks together in the order (micro-batch, rank, row)."""
    per_rank = [
        list(stream.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
        for rank in range(world_size)
    ]
    accumulation = stream.batch_windows // (world_size * micro_batch_size)
    assert {len(micro_batches) for micro_batches in per_rank} == {accumulation}
    return np.concatenate([rows for micro_step in zip(*per_rank, strict=True) for rows in micro_step])


def expected_rows(drawn: list[Row], seq_len: int, stride: int) -> list[list[int]]:
    """Tokens of the rows drawn."""
    starts = [SOURCE_TOKENS * source + place * stride for source, _, place in drawn]
    return [list(range(start, start + seq_len + 1)) for start in starts]


def settings_of(data: st.DataObject, sizes: list[int]) -> dict[str, Any]:
    """Sampling, weights and their changes, of any kind."""
    sampling = data.draw(st.sampled_from(["shuffled", "random", "sequential"]))
    if data.draw(st.booleans()):
        return {"sampling": sampling}
    shares = st.lists(st.integers(0, 6), min_size=len(sizes), max_size=len(sizes)).filter(any)
    gaps = data.draw(st.lists(st.integers(1, 50), max_size=2))
    marks = [0, *np.cumsum(gaps, dtype=int).tolist()]
    return {"sampling": sampling, "weights": [Weights(mark, tuple(data.draw(shares))) for mark in marks]}


def test_one_source_has_the_order_of_the_seed(tmp_path: Path) -> None:
    for weights in (None, [Weights(0, (1,))]):
        stream = make_stream(tmp_path, [103], 24, seed=1337, weights=weights)
        positions = np.arange(24 * 9)
        _, ids = shuffled_order([103], [1337])(np.zeros_like(positions), positions)
        assert [place for step in range(9) for _, _, place in rows_of(stream, step)] == ids.tolist()
    assert stream.num_windows == 103


@given(data=st.data(), sizes=SIZES, step=st.integers(0, 30))
def test_any_number_of_ranks_and_any_accumulation_read_the_same_sequence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int], step: int
) -> None:
    more = settings_of(data, sizes)
    world_size, micro_batch_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    batch_windows = world_size * micro_batch_size * data.draw(st.integers(1, 3))
    stream = make_stream(tmp_path_factory.mktemp("stream"), sizes, batch_windows, **more)
    rows = global_rows(stream, step, world_size, micro_batch_size)
    stride = 1 if more["sampling"] == "random" else 4
    assert rows.tolist() == expected_rows(rows_of(stream, step), 4, stride)


@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 2**32 - 1))
def test_seeking_equals_walking_for_any_batch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int], seed: int
) -> None:
    folder, more = tmp_path_factory.mktemp("stream"), settings_of(data, sizes)
    batch_windows, start = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 25))
    one_by_one = make_stream(folder, sizes, 1, seed=seed, **more)
    walked = [row for step in range(batch_windows * (start + 2)) for row in rows_of(one_by_one, step)]
    again = make_stream(folder, sizes, batch_windows, seed=seed, **more)
    assert [row for step in (start, start + 1) for row in rows_of(again, step)] == walked[start * batch_windows :]
    assert walked == [row for step in range(start + 2) for row in rows_of(again, step)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    sampling=st.sampled_from(["shuffled", "sequential"]),
    stops=st.lists(st.integers(1, 40), min_size=20, max_size=20),
    worlds=st.lists(st.integers(1, 4), min_size=21, max_size=21),
)
@settings(max_examples=15, deadline=None)
def test_eight_epochs_with_twenty_stops_and_changed_worlds_read_every_window_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], sampling: Any, stops: list[int], worlds: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    total_steps = -(-8 * sum(sizes) // 12)
    step, seen, read = 0, [], []
    for stop, world_size in zip([*stops, total_steps], worlds, strict=True):
        stream = make_stream(folder, sizes, 12, sampling=sampling)  # each time from nothing but the step
        last = min(step + stop % max(1, total_steps // 10), total_steps) if stop != total_steps else total_steps
        for number in range(step, last):
            seen += rows_of(stream, number)
            read += global_rows(stream, number, world_size, 12 // world_size).tolist()
        step = last
    assert read == expected_rows(seen, 4, 4)
    undisturbed = make_stream(folder, sizes, 12, sampling=sampling)
    assert seen == [row for number in range(total_steps) for row in rows_of(undisturbed, number)]
    windows = [(source, window) for source, size in enumerate(sizes) for window in range(size)]
    for epoch in range(8):
        assert sorted((source, place) for source, when, place in seen if when == epoch) == windows


@given(data=st.data(), sizes=SIZES, end=st.integers(0, 40))
def test_seen_counts_the_windows_drawn_without_skipped_batches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int], end: int
) -> None:
    more = settings_of(data, sizes)
    stream = make_stream(tmp_path_factory.mktemp("stream"), sizes, data.draw(st.integers(1, 12)), **more)
    first, count = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 8))
    drawn = [(*row, first <= step < first + count) for step in range(end) for row in rows_of(stream, step)]
    seen = stream.seen(end, [(first, first + count)])
    assert list(seen) == list(NAMES[: len(sizes)])
    for number, (found, size) in enumerate(zip(seen.values(), sizes, strict=True)):
        own = [row for row in drawn if row[0] == number]
        read = [place for _, _, place, skipped in own if not skipped]
        # After the first epoch, a skipped window may have been read again.
        countable = more["sampling"] != "random" and (len(own) <= size or len(read) == len(own))
        assert found == Coverage(len(read), len(set(read)) if countable else None, len(read) / size)
        assert [epoch for _, epoch, _, _ in own] == [turn // size for turn in range(len(own))]
        if more["sampling"] != "random":
            assert len({(epoch, place) for _, epoch, place, _ in own}) == len(own)


def test_sources_have_separate_orders(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [30, 30], 60, seed=3)
    drawn = rows_of(stream, 0)
    first, second = ([place for source, _, place in drawn if source == number] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    seeds = order_seeds(3, NAMES[:2])
    assert first == shuffled_order([30], [seeds[0]])(np.zeros(30, dtype=np.int64), np.arange(30))[1].tolist()


def test_random_sampling_draws_the_places_of_nanogpt(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [5], 400, sampling="random")  # 22 tokens
    places = {place for _, _, place in rows_of(stream, 0)}
    # torch.randint(len(data) - block_size, ...): the last target is the last token.
    assert places == set(range(22 - 4))
    rows = next(stream.micro_batches(0, rank=0, world_size=1, micro_batch_size=400))
    assert rows.max() == 21


def test_stream_names_a_source_without_a_window(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, [20, 3])
    sources["arxiv"] = Windows(write_source(tmp_path, 1, [3]), 4)
    with pytest.raises(CorpusError) as caught:
        BatchStream(sources, seed=1, batch_windows=4)
    assert caught.value.problem == (
        "the training part of source 'arxiv' has 3 tokens, fewer than one window of training.seq_len = 4"
    )
    assert "remove it from corpus.sources or lower training.seq_len" in caught.value.action


def recipe_of(corpus: Mapping[str, Any], **training: Any) -> Recipe:
    document = load_recipe("quickstart").model_dump(mode="json")
    document["corpus"] = {**document["corpus"], **corpus}
    document["training"] |= {"seq_len": 4, "global_batch_tokens": 32, "duration": "100 steps", **training}
    return Recipe.model_validate(document)


def test_build_stream_follows_the_recipe(tmp_path: Path) -> None:
    files = {"kind": "files", "paths": ["x"]}
    recipe = recipe_of(
        {
            "sources": [{**files, "name": "books", "weight": 0.75}, {**files, "name": "arxiv", "weight": 0.25}],
            "weight_changes": [{"at": "30 tokens", "weights": {"books": 1, "arxiv": 1}}],
        },
        sampling="sequential",
    )
    shards = {"arxiv": write_source(tmp_path, 1, [41]), "books": write_source(tmp_path, 0, [20, 21])}
    stream = build_stream(recipe, shards)
    assert stream.batch_windows == 8
    # 30 tokens are 8 windows: two rounds of 3 and 1, then turn by turn.
    sources = [source for step in range(2) for source, _, _ in rows_of(stream, step)]
    assert Counter(sources[:8]) == {0: 6, 1: 2}
    assert sources[8:] == [0, 1] * 4
    assert stream.seen(2) == {"books": Coverage(10, 10, 1.0), "arxiv": Coverage(6, 6, 0.6)}
    limited = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"max_tokens": 8 * 4 + 3})})
    held = build_held_out(limited, shards, eos_id=0)
    assert held.used == {"books": 6, "arxiv": 2}


def test_build_stream_concatenates_sources_without_weights(tmp_path: Path) -> None:
    files = {"kind": "files", "paths": ["x"]}
    recipe = recipe_of({"sources": [{**files, "name": "books"}, {**files, "name": "arxiv"}]})
    shards = {"books": write_source(tmp_path, 0, [41]), "arxiv": write_source(tmp_path, 1, [121])}
    stream = build_stream(recipe, shards)
    assert stream.num_windows == 40
    assert stream.seen(5) == {"books": Coverage(10, 10, 1.0), "arxiv": Coverage(30, 30, 1.0)}
    limited = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"max_tokens": 8 * 4})})
    assert build_held_out(limited, shards, eos_id=0).used == {"books": 2, "arxiv": 6}
