"""The weight files of a model folder: tensors by name, mapped into memory."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from inheritune_ds.errors import RecipeError, SurgeryError
from inheritune_ds.storage.file_kind import FileKind, action_for, look
from inheritune_ds.storage.hub import first_line
from inheritune_ds.storage.safetensors import Entry, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFE_PATTERNS = (SINGLE, INDEX, "model-*.safetensors")
PICKLE_PATTERNS = (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin")


def weight_files(folder: Path, name: str) -> list[Path]:
    """List the weight files of a folder in transformers' order: safetensors first, a single file first.

    Raises:
        RecipeError: If there are none.
        SurgeryError: If the index is invalid or names a missing file.
    """
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / file for file in sorted(set(_read_index(folder, index).values()))]
    raise RecipeError(
        f"reference.model: {name} holds no weights",
        allowed=f"{SINGLE} or {INDEX} with its shards (or {PICKLE}, {PICKLE_INDEX}) beside config.json",
    )


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors. A model with other dtypes is quantized, and is refused."""


Span = tuple[Path, int, int]
"""A tensor's bytes in a file: its path, their offset and number."""


class WeightFiles:
    """The tensors of a model folder, `name` in messages. Only headers are read at first; tensors are mapped.

    Raises:
        RecipeError: If there are no weights.
        SurgeryError: If a file is missing, truncated, damaged, or differs from its index.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        paths = weight_files(folder, name)
        self.is_pickle = paths[0].suffix == ".bin"
        self.file_of: dict[str, str] = {}  # file name by tensor name
        self._open: dict[str, Any] = {}
        self._headers: dict[Path, dict[str, Entry]] = {}
        for path in paths:
            self._open[path.name] = _open_pickle(path) if self.is_pickle else _open_safetensors(path)
            for tensor in self._open[path.name].keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if tensor in self.file_of:
                    raise SurgeryError(
                        f"{folder}: tensor {tensor} is in both {self.file_of[tensor]} and {path.name}",
                        action="copy or download all weight files again, from one place",
                    )
                self.file_of[tensor] = path.name
        index = folder / (PICKLE_INDEX if self.is_pickle else INDEX)
        if index.is_file() and paths[0].name not in (SINGLE, PICKLE):
            self._check_index(index)

    def _check_index(self, index: Path) -> None:
        listed = _read_index(self.folder, index.name)
        absent = sorted(name for name, file in listed.items() if self.file_of.get(name) != file)
        unlisted = sorted(self.file_of.keys() - listed.keys())
        if absent or unlisted:
            name = (absent or unlisted)[0]
            what = f"names {name} in {listed[name]}, which does not hold it" if absent else f"does not name {name}"
            raise SurgeryError(
                f"{index} {what} ({len(absent) + len(unlisted)} tensors differ)",
                allowed="an index that names every tensor of its shards",
                action="copy or download the index and the shards again, from one place",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor; None in a pickle file."""
        if self.is_pickle:
            return None
        path = self.folder / self.file_of[name]
        if path not in self._headers:
            self._headers[path] = read_header(path)
        entry = self._headers[path][name]
        return path, entry.start, entry.nbytes

    def meta(self, name: str) -> torch.Tensor:
        """A tensor on the meta device."""
        return self.tensor(name).to("meta")

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file; do not write to it. Raises a SurgeryError if the file has changed since."""
        handle = self._open[self.file_of[name]]
        try:
            tensor: torch.Tensor = handle[name] if self.is_pickle else handle.get_tensor(name)
        except Exception as error:  # noqa: BLE001 - a damaged file causes errors of many kinds
            raise _unreadable(self.folder / self.file_of[name], error) from None
        return tensor


def _read_index(folder: Path, index: str) -> dict[str, str]:
    path = folder / index
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        valid = isinstance(listed, dict) and listed and all(isinstance(file, str) for file in listed.values())
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise SurgeryError(f"{path} is no index of weight files", allowed='{"weight_map": {"tensor": "file", ...}}')
    for file in sorted(set(listed.values())):
        if file != Path(file).name:
            raise SurgeryError(f"{path} names {file!r}", allowed="names of files in the same folder")
        if not (folder / file).is_file():
            raise SurgeryError(
                f"{folder / file} is missing; {index} names it",
                action="complete the folder: download the missing file, or the whole model again",
            )
    return dict(listed)


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    _check_kind(path, FileKind.SAFETENSORS)
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # noqa: BLE001 - safetensors' own error class, OSError for an unreadable file
        raise _unreadable(path, error) from None


def _open_pickle(path: Path) -> dict[str, torch.Tensor]:
    kind = _check_kind(path, FileKind.ZIP, FileKind.OLD_TORCH)
    if kind is FileKind.OLD_TORCH:
        raise SurgeryError(
            f"{path} is in the format of torch before 1.6, which cannot be memory-mapped",
            action=f'convert it once: python -c "import torch; p = {str(path)!r}; '
            'torch.save(torch.load(p, weights_only=True), p)"',
        )
    if kind is None:
        raise _unreadable(path, "torch.save did not write it")
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise SurgeryError(
            f"{path} holds more than tensors; pickles that run code are not loaded",
            allowed="a file that torch.load(weights_only=True) reads, or safetensors",
        ) from None
    except Exception as error:  # noqa: BLE001 - a damaged file causes errors of many kinds
        raise _unreadable(path, error) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
        for name, value in loaded.items()
    ):
        raise SurgeryError(f"{path} is no plain table of tensors", allowed="a state dict: tensors by name")
    return loaded


def _check_kind(path: Path, *allowed: FileKind) -> FileKind | None:
    """Return the kind of a weight file; raise a SurgeryError if it is known and not one of those `allowed`."""
    try:
        kind = look(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if kind is FileKind.EMPTY:
        raise _unreadable(path, "it is empty")
    if kind is not None and kind not in allowed:
        raise SurgeryError(
            f"{path} is {kind.value}",
            allowed="weights in safetensors, or in the zip format of torch.save",
            action=action_for(kind, path),
        )
    return kind


def _unreadable(path: Path, reason: Exception | str) -> SurgeryError:
    return SurgeryError(
        f"{path} is damaged or cut short: {reason if isinstance(reason, str) else first_line(reason)}",
        action="copy or download the file again, and compare its sha256 with the source's",
    )
