"""Read a user's DeepSpeed JSON, and find the problems that need neither recipe nor machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.config.deepspeed_keys import DERIVED, RECIPE_OWNED, REFUSED, Document
from inheritune_ds.config.fields import AUTO
from inheritune_ds.config.messages import check
from inheritune_ds.config.zero import offload_device
from inheritune_ds.errors import RecipeError
from inheritune_ds.storage.file_kind import FileKind, action_for, unexpected_kind
from inheritune_ds.storage.redaction import secret_problems

DEFAULT_STAGE = 1
INERT_PARAM = ("last_batch_iteration", -1)
"""A scheduler param of Hugging Face's examples that has no effect."""


def read(path: Path | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file; without a path, return an empty document (everything `auto`)."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise RecipeError(
            f"DeepSpeed config {path} cannot be read: {(error.strerror or 'unreadable').lower()}",
            allowed="a DeepSpeed JSON file",
            action="give an existing file, such as ds_configs/zero1.json",
        ) from None
    except (ValueError, RecursionError) as error:
        other = unexpected_kind(path, (FileKind.JSON_OBJECT, FileKind.JSON_LINES, FileKind.MARKED))
        raise RecipeError(
            f"DeepSpeed config {path}: {f'it is {other.value}' if other else error}",
            allowed="JSON, each key once",
            action=(action_for(other, path) if other else "") or "fix the file, or start from ds_configs/zero1.json",
        ) from None
    if not isinstance(document, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(document), "a single value")
        raise RecipeError(
            f"DeepSpeed config {path}: the document is {kind}, not an object",
            allowed='{"train_micro_batch_size_per_gpu": "auto", ...}',
            action="start from ds_configs/zero1.json",
        )
    if secrets := secret_problems(document, f"DeepSpeed config {path}"):
        raise RecipeError.of(secrets)
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {key!r} appears twice")
        document[key] = value
    return document


def problems(document: Mapping[str, Any], origin: str, seq_len: int | None = None) -> list[RecipeError]:
    """Find every key and value that DeepSpeed would ignore or refuse, or that the recipe owns."""
    known = {key: value for key, value in document.items() if key not in REFUSED}
    _, found = check(Document, known, origin)
    for key in sorted(document.keys() - known.keys()):
        if not is_off(document[key]):
            found.append(
                RecipeError(
                    f"{origin}: {key}: not usable here: {REFUSED[key]}",
                    allowed='no such key, or {"enabled": false}',
                    action=f"remove {key}",
                )
            )
    scheduler = _scheduler(document.get("scheduler"), origin)
    return found + _owned(document, origin, seq_len) + scheduler + _pairs(document, origin)


def block(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object inside the document; empty when it is missing, null, or not an object."""
    value = document.get(key)
    return dict(value) if isinstance(value, dict) else {}


def _owned(document: Mapping[str, Any], origin: str, seq_len: int | None) -> list[RecipeError]:
    """Refuse numbers that the recipe owns, or that are derived from it."""
    found = []
    for path, (recipe_key, _) in RECIPE_OWNED.items():
        given: Any = document
        for part in path.split("."):
            given = given.get(part, AUTO) if isinstance(given, dict) else AUTO
        if given == AUTO:
            continue
        value = json.dumps(given) if isinstance(given, list | dict) else str(given)
        if path == "train_batch_size":  # DeepSpeed counts windows, the recipe tokens
            value = str(given * seq_len) if seq_len and isinstance(given, int) else f"{given} x training.seq_len"
        found.append(
            RecipeError(
                f"{origin}: {path}: {given!r} is set here, but the recipe owns it as {recipe_key}",
                allowed=f'"{AUTO}", or no such key',
                action=f'write "{AUTO}" here and {recipe_key}={value} on the command line',
            )
        )
    for key, formula in DERIVED.items():
        if document.get(key, AUTO) != AUTO:
            found.append(
                RecipeError(
                    f"{origin}: {key}: {document[key]!r} is set here, but it is derived: {formula}",
                    allowed=f'"{AUTO}", or no such key',
                    action="set training.global_batch_tokens in the recipe",
                )
            )
    return found


def _scheduler(given: Any, origin: str) -> list[RecipeError]:
    """Refuse a schedule that has an effect: the recipe owns it."""
    if given is None:
        return []
    params = given.get("params", {}) if isinstance(given, dict) else None
    own = sorted({*given} - {"type", "params"}) if isinstance(given, dict) else []
    if isinstance(params, dict):
        own += [key for key, value in sorted(params.items()) if value != AUTO and (key, value) != INERT_PARAM]
    if not own and isinstance(params, dict):
        return []
    return [
        RecipeError(
            f"{origin}: scheduler: {', '.join(own) or 'it'} is set here, but the recipe owns the schedule",
            allowed='params that are all "auto", or no scheduler block',
            action="set schedule.kind, schedule.warmup_steps, schedule.min_lr_ratio and optimizer.lr in the recipe",
        )
    ]


def _pairs(document: Mapping[str, Any], origin: str) -> list[RecipeError]:
    """Refuse values that exclude each other."""
    found = []
    if block(document, "fp16").get("enabled") is True and block(document, "bf16").get("enabled") is True:
        found.append(
            RecipeError(
                f"{origin}: fp16.enabled: bf16 and fp16 are both true",
                allowed="one of them",
                action="remove fp16 where the GPU has bf16 (Ampere and newer)",
            )
        )
    zero = block(document, "zero_optimization")
    stage = zero.get("stage", AUTO)
    stage = DEFAULT_STAGE if stage == AUTO else stage
    device = offload_device(zero, "offload_param")
    if stage != 3 and device != "none":
        found.append(
            RecipeError(
                f"{origin}: zero_optimization.offload_param.device: {device!r} needs stage 3: DeepSpeed ignores it "
                f"with stage {stage}",
                allowed="zero_optimization.stage 3",
                action="set zero_optimization.stage to 3 (ds_configs/zero3_offload.json), or remove "
                "offload_param.device",
            )
        )
    return found


def is_off(value: Any) -> bool:
    """Whether a block has `"enabled": false`."""
    return isinstance(value, dict) and value.get("enabled") is False
