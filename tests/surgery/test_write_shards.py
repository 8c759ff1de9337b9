import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inheritune_ds.errors import StorageError, SurgeryError
from inheritune_ds.surgery import weight_files, write_shards
from tests.surgery import tiny
from tests.surgery.tiny import Build, SaveReference, contents, plain

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("limit", [1, 3000, 10_000])
def test_large_targets_are_written_in_shards_with_an_index(
    limit: int, folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(build(folder, to="whole", select="1,2").folder / "model.safetensors")
    monkeypatch.setattr(write_shards, "SHARD_BYTES", limit)
    built = build(folder, select="1,2")
    shards = sorted(built.folder.glob("model-*.safetensors"))
    count = len(shards)
    assert count == len(whole) if limit == 1 else 1 < count < len(whole)
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert not (built.folder / "model.safetensors").exists()
    parts = [load_file(path) for path in shards]
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(merged)
    assert merged.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in merged.items())
    index = json.loads((built.folder / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"] == {
        name: path.name for path, part in zip(shards, parts, strict=True) for name in sorted(part)
    }
    plain(built.folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_targets_of_sharded_references_are_the_same(folder: Path, build: Build, *, pickled: bool) -> None:
    whole = build(folder, to="whole", select="1,2")
    tiny.shard(folder, 3, pickled=pickled)
    built = build(folder, select="1,2")
    before, after = load_file(whole.folder / "model.safetensors"), load_file(built.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    files = {tensor["source"]["file"] for tensor in built.report["tensors"]}
    assert len(files) == 3


def test_tensors_begin_at_multiples_of_their_dtype_s_size(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("llama", dtype="float16", vocab_size=41, intermediate_size=23)
    tiny.edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))
    content = (build(folder, select="first:2").folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert ends[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] == len(content) - 8 - size
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F32": 4, "F16": 2}[entry["dtype"]] == 0


def test_a_target_that_does_not_fit_on_the_disk_is_refused(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - shutil's own is no public class
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * 10**7, 10**7, 20_000))
    with pytest.raises(StorageError) as caught:
        build(folder, select="first:2")
    assert caught.value.problem == f"{tmp_path}: the target takes 0.02 MB, but 0.02 MB are free"
    assert caught.value.action.startswith("free some space")
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_a_write_that_fails_half_way_leaves_nothing(
    folder: Path, build: Build, room: Callable[[int], None], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    room(12_000)
    with pytest.raises(StorageError) as caught:
        build(folder, select="first:3", words=None)
    assert caught.value.problem.endswith("cannot be written: File too large")
    assert contents(tmp_path) == before


def test_a_truncated_source_is_refused(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = folder / "model.safetensors"
    honest = weight_files.WeightFiles.span

    def beyond(self: weight_files.WeightFiles, name: str) -> weight_files.Span | None:
        span = honest(self, name)
        assert span is not None
        return span[0], path.stat().st_size, span[2]

    monkeypatch.setattr(weight_files.WeightFiles, "span", beyond)
    with pytest.raises(SurgeryError, match=r"model\.safetensors is cut short") as caught:
        build(folder, select="first:2")
    assert caught.value.action == "copy or download the file again"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("size", "words"), [(3 * 10**12, "3000.00 GB"), (10**7, "0.01 GB"), (9_990_000, "9.99 MB"), (20_000, "0.02 MB")]
)
def test_sizes_are_printed_in_a_fitting_unit(
    size: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - shutil's own is no public class
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * size, size + 1, size - 1))
    with pytest.raises(StorageError, match=f"the target takes {words}, but "):
        write_shards.check_space(tmp_path / "target", size)
