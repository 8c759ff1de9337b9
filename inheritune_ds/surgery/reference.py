"""Locate the reference model and identify its weights and settings."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.model import Reference, Shape
from inheritune_ds.errors import RecipeError, SurgeryError
from inheritune_ds.plan.shapes import shape_from_config
from inheritune_ds.storage import hub
from inheritune_ds.storage.file_kind import FileKind, action_for, unexpected_kind
from inheritune_ds.storage.files import read_json, sha256_file
from inheritune_ds.storage.known_hashes import KnownHashes
from inheritune_ds.surgery.weight_files import INDEX, PICKLE_PATTERNS, SAFE_PATTERNS, SINGLE, weight_files

FILE_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Everything but weights: config, tokenizer, card and license."""
TOKENIZER_PATTERNS = (
    *("tokenizer*.json", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)
SETTINGS_PATTERNS = ("config.json", "generation_config.json", *TOKENIZER_PATTERNS)
"""Files beside the weights that determine the model's outputs."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ReferenceModel:
    """A reference on disk: a Hugging Face folder with config and weights."""

    name: str
    """As in the recipe."""
    folder: Path
    commit: str
    """Full commit of a hub model; empty for a folder."""
    weights_sha256: dict[str, str]
    """By file name."""
    settings_sha256: dict[str, str] = field(default_factory=dict)
    """Of config, generation config and tokenizer, by file name."""

    def document(self) -> dict[str, Any]:
        """As JSON, for the other ranks."""
        return {**asdict(self), "folder": str(self.folder.resolve())}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The one of `document`."""
        return cls(**{**document, "folder": Path(document["folder"])})

    @property
    def identity(self) -> dict[str, Any]:
        """Its entry in the run folder, without the path of the folder."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @property
    def weights_identity(self) -> dict[str, Any]:
        """Its entry as the previous target of a growing one."""
        return {"name": self.name, "weights_sha256": self.weights_sha256}


def locate(
    reference: Reference, recipe_export: Callable[[str], Path], hashes: KnownHashes | None = None
) -> ReferenceModel:
    """Find the reference on this machine or download it; `recipe_export` gives the export of `recipe:NAME`.

    `hashes` has those of files that were hashed before.

    Raises:
        HubError: If the hub cannot be reached or does not have it.
        RecipeError: If a local folder is missing or holds no model.
        SurgeryError: If a weight file does not match its recorded hash.
    """
    commit = ""
    if reference.recipe_name is not None:
        folder = recipe_export(reference.recipe_name)
    elif is_local_path(reference.model) or Path(reference.model).is_dir():
        folder = Path(reference.model).expanduser()
    else:
        folder, commit = _download(reference)
    read_config(folder, reference.model)
    if not matching_files(folder, [*SAFE_PATTERNS, *PICKLE_PATTERNS]):
        _refuse_other_kinds(folder, reference.model)
    sha256 = sha256_file if hashes is None else hashes.sha256
    weights = {path.name: sha256(path) for path in weight_files(folder, reference.model)}
    _check_known_hashes(folder, weights)
    settings = {path.name: sha256(path) for path in matching_files(folder, SETTINGS_PATTERNS)}
    return ReferenceModel(reference.model, folder, commit, weights, settings)


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a folder that match any pattern, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _check_known_hashes(folder: Path, weights: dict[str, str]) -> None:
    """Compare the files' hashes with recorded ones: blob names in the hub's cache, or the manifest of an export."""
    manifest = read_json(folder / "manifest.json")
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    for name, found in weights.items():
        entry = listed.get(name) if isinstance(listed, dict) else None
        known = entry.get("sha256", "") if isinstance(entry, dict) else (folder / name).resolve().name
        if _SHA256.fullmatch(str(known)) and known != found:
            raise SurgeryError(
                f"{folder / name} is damaged: its sha256 is {found}, it was {known}",
                action="delete the file and download it again",
            )


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read `config.json` of a local model, or raise a RecipeError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        _refuse_other_kinds(folder, name)
        raise RecipeError(
            f"reference.model: {name} is no model folder: {folder / 'config.json'} is missing",
            allowed="a Hugging Face model folder, a hub id such as openlm-research/open_llama_3b, or recipe:NAME",
        ) from None
    except ValueError as error:
        kind = unexpected_kind(folder / "config.json", (FileKind.JSON_OBJECT, FileKind.JSON_LINES))
        reason = f"is not JSON: {error}" if kind is None else f"is {kind.value}"
        action = "" if kind is None else action_for(kind, folder / "config.json")
        raise RecipeError(f"reference.model: {folder / 'config.json'} {reason}", action=action) from None
    if not isinstance(config, dict):
        raise RecipeError(f"reference.model: {folder / 'config.json'} is not a JSON object")
    return config


_OTHER_KINDS = (
    ("adapter_config.json", "an adapter", "merge it into {base} first (PEFT's merge_and_unload), and save the result"),
    ("*.gguf", "a GGUF model", "give the Hugging Face folder that it was converted from"),
    *(
        (
            pattern,
            "a checkpoint of DeepSpeed",
            "write its weights with DeepSpeed's zero_to_fp32.py first, beside config.json",
        )
        for pattern in ("zero_to_fp32.py", "global_step*", "*_model_states.pt", "*_optim_states.pt")
    ),
    *(
        (pattern, "a checkpoint of Meta's code", "convert it with transformers' convert_llama_weights_to_hf.py first")
        for pattern in ("consolidated.*.pth", "consolidated.safetensors", "params.json")
    ),
    ("export/config.json", "a run folder", "give its folder export"),
    ("checkpoint-*/config.json", "an output folder of Hugging Face's Trainer", "give one of its folders checkpoint-*"),
    ("*.distcp", "a distributed checkpoint of torch", "save the model with save_pretrained first"),
)
"""Folders without a model that people give: the file that shows it, what it is, what to do."""


def _refuse_other_kinds(folder: Path, name: str) -> None:
    """Raise a RecipeError for a folder that is not a model, but something known."""
    for pattern, kind, action in _OTHER_KINDS:
        if next(folder.glob(pattern), None) is not None:
            adapter = read_json(folder / "adapter_config.json")
            base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
            raise RecipeError(
                f"reference.model: {name} is {kind}{f' of {base}' if base else ''}, not a model folder",
                allowed="a Hugging Face model folder: config.json and weights",
                action=action.format(base=base or "its base model"),
            )


def _download(reference: Reference) -> tuple[Path, str]:
    repository = hub.resolve(reference.model, reference.revision, "model")
    folder = hub.snapshot(repository, [*FILE_PATTERNS, *SAFE_PATTERNS])
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        folder = hub.snapshot(repository, [*FILE_PATTERNS, *PICKLE_PATTERNS])  # only without safetensors
    if reference.shape is not None:
        check_shape(reference.shape, read_config(folder, reference.model), reference.model)
    return folder, repository.commit


def check_shape(shape: Shape, config: dict[str, Any], name: str) -> None:
    """Raise a RecipeError with every field in which a recipe's `reference.shape` differs from the model's config."""
    actual = read_shape(config, name)
    given = shape.model_dump(exclude_none=True)
    found = actual.model_dump() if actual else {"model_type": config.get("model_type")}
    wrong = [
        f"{key}: recipe {value}, model {found.get(key)}" for key, value in given.items() if found.get(key) != value
    ]
    if wrong:
        raise RecipeError(
            f"reference.shape does not describe {name}: {'; '.join(wrong)}", action="correct or remove reference.shape"
        )


def read_shape(config: dict[str, Any], name: str) -> Shape | None:
    """The shape in a config, None for another family. Raises a SurgeryError if a size is missing or invalid."""
    try:
        return shape_from_config(config)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
    raise SurgeryError(
        f"{name} does not describe a model: {reason}", allowed="a complete config.json as save_pretrained writes it"
    )
