import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inheritune_ds.errors import RecipeError, SurgeryError
from inheritune_ds.surgery.weight_files import WeightFiles, weight_files
from tests.surgery import tiny

INDEX = "model.safetensors.index.json"


def refused(folder: Path) -> SurgeryError:
    """The error for a folder."""
    with pytest.raises(SurgeryError) as caught:
        WeightFiles(folder, "it")
    return caught.value


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the weight map."""
    path = folder / INDEX
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document["weight_map"])
    path.write_text(json.dumps(document), encoding="utf-8")


def test_weight_files_prefers_safetensors_and_one_file(tmp_path: Path) -> None:
    for stem, suffix in (("pytorch_model", "bin"), ("model", "safetensors")):
        for number in (2, 1):
            (tmp_path / f"{stem}-{number}.{suffix}").touch()
    with pytest.raises(RecipeError) as caught:
        weight_files(tmp_path, "it")
    assert caught.value.problem == "reference.model: it holds no weights"
    assert caught.value.allowed == (
        "model.safetensors or model.safetensors.index.json with its shards (or pytorch_model.bin, "
        "pytorch_model.bin.index.json) beside config.json"
    )
    found = []
    for stem, suffix in (("pytorch_model", "bin"), ("model", "safetensors")):
        weight_map = {"a": f"{stem}-2.{suffix}", "b": f"{stem}-1.{suffix}", "c": f"{stem}-2.{suffix}"}
        for name in (f"{stem}.{suffix}.index.json", f"{stem}.{suffix}"):
            (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
            found.append([path.name for path in weight_files(tmp_path, "it")])
    assert found == [
        ["pytorch_model-1.bin", "pytorch_model-2.bin"],
        ["pytorch_model.bin"],
        ["model-1.safetensors", "model-2.safetensors"],
        ["model.safetensors"],
    ]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_from_every_kind_of_file(folder: Path, shards: int, *, pickled: bool) -> None:
    expected = load_file(folder / "model.safetensors")
    if shards > 1:
        tiny.shard(folder, shards, pickled=pickled)
    elif pickled:
        torch.save(expected, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    files = WeightFiles(folder, "it")
    assert (files.is_pickle, len(files)) == (pickled, len(expected))
    assert set(files) == expected.keys()
    assert len(set(files.file_of.values())) == shards
    for name, tensor in expected.items():
        assert torch.equal(files.tensor(name), tensor)
        meta = files.meta(name)
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", tensor.shape, tensor.dtype)


def test_span_is_the_place_of_the_bytes(folder: Path) -> None:
    files = WeightFiles(folder, "it")
    for name in files:
        span = files.span(name)
        assert span is not None
        path, offset, size = span
        content = path.read_bytes()[offset : offset + size]
        assert content == files.tensor(name).numpy().tobytes()
    tiny.shard(folder, 2, pickled=True)
    assert WeightFiles(folder, "it").span("model.norm.weight") is None


def test_a_missing_shard_is_named(folder: Path) -> None:
    lost = tiny.shard(folder)[1]
    lost.unlink()
    error = refused(folder)
    assert error.problem == f"{lost} is missing; {INDEX} names it"
    assert error.action == "complete the folder: download the missing file, or the whole model again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: files.update({"model.gone.weight": "model-00001-of-00002.safetensors"}),
            "names model.gone.weight in model-00001-of-00002.safetensors, which does not hold it (1 tensors differ)",
        ),
        (lambda files: files.pop("model.norm.weight"), "does not name model.norm.weight (1 tensors differ)"),
        (lambda files: files.update(dict.fromkeys(files, "model-00002-of-00002.safetensors")), "does not hold it ("),
    ],
    ids=["absent", "unlisted", "other shard"],
)
def test_an_index_must_match_its_shards(folder: Path, change: Callable[[Any], object], message: str) -> None:
    tiny.shard(folder)
    edit_index(folder, change)
    error = refused(folder)
    assert error.problem.startswith(f"{folder / INDEX} ")
    assert message in error.problem
    assert error.allowed == "an index that names every tensor of its shards"


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "./m.safetensors"])
def test_an_index_cannot_name_files_elsewhere(folder: Path, file: str) -> None:
    tiny.shard(folder)
    (folder / "sub").mkdir()
    edit_index(folder, lambda files: files.update({"model.norm.weight": file}))
    error = refused(folder)
    assert error.problem == f"{folder / INDEX} names {file!r}"
    assert error.allowed == "names of files in the same folder"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"\\ud800"'],
)
def test_an_invalid_index_is_refused(folder: Path, text: str) -> None:
    tiny.shard(folder)
    (folder / INDEX).write_text(text, encoding="utf-8")
    error = refused(folder)
    assert error.problem == f"{folder / INDEX} is no index of weight files"
    assert error.allowed == '{"weight_map": {"tensor": "file", ...}}'


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = tiny.shard(folder)
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file({**tensors, name: torch.zeros(1)}, second, metadata={"format": "pt"})
    error = refused(folder)
    assert error.problem == f"{folder}: tensor {name} is in both {first.name} and {second.name}"


@pytest.mark.parametrize(
    ("keep", "old", "new"),
    [
        *((keep, b"", b"") for keep in (0, 5, 8, 100, -1)),
        (None, b"{", b"["),
        (None, b'"F32"', b'"F33"'),
        (None, b'"shape":[16]', b'"shape":[17]'),
        (None, b"data_offsets", b"data_offsetz"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(folder: Path, keep: int | None, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(old, new, 1)[:keep])
    assert path.read_bytes() != content
    error = refused(folder)
    assert error.problem.startswith(f"{path} is damaged or cut short: ")
    assert len(error.problem.splitlines()) == 1
    assert error.action == "copy or download the file again, and compare its sha256 with the source's"


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickle_with_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    path, mark = folder / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"model.norm.weight": torch.ones(16), "more": Evil(mark)}, path)
    error = refused(folder)
    assert error.problem == f"{path} holds more than tensors; pickles that run code are not loaded"
    assert error.allowed == "a file that torch.load(weights_only=True) reads, or safetensors"
    assert not mark.exists()


def test_pickle_of_old_versions_is_refused_with_a_conversion(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    error = refused(folder)
    assert error.problem == f"{path} is in the format of torch before 1.6, which cannot be memory-mapped"
    assert f"p = {str(path)!r}; torch.save(torch.load(p, weights_only=True), p)" in error.action
    torch.save(torch.load(path, weights_only=True), path)  # as the action says
    assert set(WeightFiles(folder, "it")) == tensors.keys()


@pytest.mark.parametrize(
    "document",
    [
        [torch.ones(2)],
        {"step": 3},
        {"model": {"norm.weight": torch.ones(2)}},
        {3: torch.ones(2)},
        {"a": torch.eye(3).to_sparse()},
    ],
    ids=["list", "number", "nested", "numbered", "sparse"],
)
def test_pickle_without_a_state_dict_is_refused(folder: Path, document: Any) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(document, path)
    error = refused(folder)
    assert error.problem == f"{path} is no plain table of tensors"
    assert error.allowed == "a state dict: tensors by name"


@pytest.mark.parametrize("harm", ["short", "empty", "no pickle"])
def test_a_damaged_pickle_file_is_refused(folder: Path, harm: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if harm == "no pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"none")
    else:
        torch.save(tensors, path)
        path.write_bytes(path.read_bytes()[: -400 if harm == "short" else 0])
    error = refused(folder)
    assert str(path) in error.problem
    assert error.action or error.allowed


def test_a_file_that_changes_under_its_reader_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = WeightFiles(folder, "it")

    class Gone:
        def get_tensor(self, name: str) -> torch.Tensor:
            raise OSError(5, f"Input/output error: {name}")

    monkeypatch.setitem(files._open, "model.safetensors", Gone())
    with pytest.raises(SurgeryError, match=r"model\.safetensors is damaged or cut short: .*Input/output error"):
        files.tensor("model.norm.weight")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'1' * 64}\nsize 12\n".encode()
PAGE = b"<html><head><title>401</title></head></html>"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "what", "action"),
    [
        (POINTER, "a Git LFS pointer, not the file itself", "run git lfs pull"),
        (PAGE, "an HTML page", "download the file itself"),
        (gzip.compress(b"weights", mtime=0), "gzip data", "gzip -d"),
        (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF model", "download the model's safetensors files"),
        (b'{"error": "not found"}', "JSON lines", ""),
    ],
)
def test_a_weight_file_of_another_kind_is_named(
    folder: Path, name: str, content: bytes, what: str, action: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    error = refused(folder)
    assert error.problem == f"{folder / name} is {what}"
    assert error.action.startswith(action) or action in error.action
    assert "torch.load" not in str(error)


def test_a_shard_that_is_a_pointer_is_named(folder: Path) -> None:
    _, second = tiny.shard(folder)
    second.write_bytes(POINTER)
    assert refused(folder).problem == f"{second} is a Git LFS pointer, not the file itself"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"some text", "")])
def test_an_empty_or_unknown_weight_file_is_damaged(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    error = refused(folder)
    assert error.problem.startswith(f"{folder / name} is damaged or cut short: {reason}")


def test_safetensors_under_the_name_of_a_pickle_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder)
    assert error.problem == f"{folder / 'pytorch_model.bin'} is a safetensors file"
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")  # as the action says
    assert "name it model.safetensors" in error.action
    assert len(WeightFiles(folder, "it"))
