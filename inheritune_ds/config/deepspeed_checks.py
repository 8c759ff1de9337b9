"""Read a user's DeepSpeed JSON, and find the problems that need neither recipe nor machine."""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inheritune_ds.config.deepspeed_keys import DERIVED, RECIPE_OWNED, SECOND_NAMES, Document
from inheritune_ds.config.deepspeed_refused import INSTEAD, REFUSED, UNREAD, changes_nothing
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


@dataclass
class Sorted:
    """A document without the keys that do not work here."""

    kept: dict[str, Any]
    """The other keys, under the first of their names."""
    notes: list[str] = field(default_factory=list)
    """A line on each key that is dropped because its value changes nothing."""
    refused: dict[str, Any] = field(default_factory=dict)
    """The other values of keys that do not work here, by key path."""


def sort_out(document: Mapping[str, Any]) -> Sorted:
    """Drop the keys that do not work here."""
    found = Sorted({})
    found.kept = _first_names(_supported(document, "", found))
    return found


def _supported(given: Mapping[str, Any], prefix: str, found: Sorted) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in given.items():
        path = f"{prefix}{key}"
        if path in UNREAD:
            found.notes.append(f"{path}: dropped, DeepSpeed does not read it")
        elif path in REFUSED and changes_nothing(path, value):
            found.notes.append(f"{path}: dropped, it changes nothing")
        elif path in REFUSED:
            found.refused[path] = value
        else:
            kept[key] = _supported(value, f"{path}.", found) if isinstance(value, dict) else value
    return kept


def _first_names(given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        SECOND_NAMES.get(f"{prefix}{key}", key): _first_names(value, f"{key}.") if isinstance(value, dict) else value
        for key, value in given.items()
    }


def problems(
    document: Mapping[str, Any], origin: str, seq_len: int | None = None, world_size: int | None = None
) -> list[RecipeError]:
    """Find every key and value that DeepSpeed would ignore or refuse, or that the recipe owns.

    `seq_len` is the recipe's, and `world_size` the number of ranks, if they are known: actions then name the tokens.
    """
    known = Sorted({})
    _, found = check(Document, _supported(document, "", known), origin)
    found += [_not_usable(path, value, origin) for path, value in sorted(known.refused.items())]
    first = sort_out(document).kept
    scheduler = _scheduler(document.get("scheduler"), origin)
    return [
        *found,
        *_named_twice(document, origin),
        *_owned(first, origin, seq_len),
        *_derived(first, origin, seq_len, world_size),
        *scheduler,
        *_pairs(first, origin),
    ]


def _not_usable(path: str, value: Any, origin: str) -> RecipeError:
    off = '{"enabled": false}' if isinstance(value, dict) else "a value that changes nothing"
    return RecipeError(
        f"{origin}: {path}: not usable here: {REFUSED[path]}",
        allowed=f"no such key, or {off}",
        action=INSTEAD.get(path, f"remove {path}"),
    )


def _named_twice(document: Mapping[str, Any], origin: str) -> list[RecipeError]:
    """Refuse a key under two of its names."""
    found = []
    for path, name in SECOND_NAMES.items():
        *parents, other = path.split(".")
        place = block(document, parents[0]) if parents else document
        if other in place and name in place:
            first = ".".join([*parents, name])
            found.append(
                RecipeError(
                    f"{origin}: {path}: it is another name of {first}, which is set, too",
                    allowed="one of them",
                    action=f"remove {path}",
                )
            )
    return found


def block(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object inside the document; empty when it is missing, null, or not an object."""
    value = document.get(key)
    return dict(value) if isinstance(value, dict) else {}


def _owned(document: Mapping[str, Any], origin: str, seq_len: int | None) -> list[RecipeError]:
    """Refuse numbers that the recipe owns."""
    found = []
    for path, (recipe_key, _) in RECIPE_OWNED.items():
        given: Any = document
        for part in path.split("."):
            given = given.get(part, AUTO) if isinstance(given, dict) else AUTO
        if given == AUTO:
            continue
        value = json.dumps(given, separators=(",", ":")) if isinstance(given, list | dict) else str(given)
        action = f'write "{AUTO}" here and {shlex.quote(f"{recipe_key}={value}")} on the command line'
        if path == "train_batch_size":  # DeepSpeed counts windows, the recipe tokens
            action = f'write "{AUTO}" here and set {recipe_key} to {given} x training.seq_len'
            if seq_len and isinstance(given, int):
                action = f'write "{AUTO}" here and {recipe_key}={given * seq_len} on the command line'
        found.append(
            RecipeError(
                f"{origin}: {path}: {given!r} is set here, but the recipe owns it as {recipe_key}",
                allowed=f'"{AUTO}", or no such key',
                action=action,
            )
        )
    return found


def _derived(
    document: Mapping[str, Any], origin: str, seq_len: int | None, world_size: int | None
) -> list[RecipeError]:
    """Refuse numbers that are derived from those of the recipe."""
    return [
        RecipeError(
            f"{origin}: {key}: {document[key]!r} is set here, but it is derived: {formula}",
            allowed=f'"{AUTO}", or no such key',
            action=_batch_action(document, document[key], seq_len, world_size),
        )
        for key, formula in DERIVED.items()
        if document.get(key, AUTO) != AUTO
    ]


def _batch_action(document: Mapping[str, Any], accumulation: Any, seq_len: int | None, world_size: int | None) -> str:
    """Ask for the global batch that a number of micro-steps means to DeepSpeed."""
    if document.get("train_batch_size", AUTO) != AUTO:
        return f'write "{AUTO}" here'
    factors = {
        "accumulation": accumulation,
        "micro-batch": document.get("train_micro_batch_size_per_gpu"),
        "training.seq_len": seq_len,
        "ranks": world_size,
    }
    if all(type(factor) is int for factor in factors.values()):
        tokens = math.prod(factors.values())
        return f'write "{AUTO}" here and training.global_batch_tokens={tokens} on the command line'
    product = " x ".join(str(factor) if type(factor) is int else name for name, factor in factors.items())
    return f'write "{AUTO}" here and set training.global_batch_tokens to {product}'


_SCHEDULES = {
    "WarmupLR": "schedule.kind=constant",
    "WarmupCosineLR": "schedule.kind=cosine",
    "WarmupDecayLR": "schedule.kind=wsd schedule.decay_ratio=1.0 schedule.min_lr_ratio=0.0",
}
"""The recipe's schedule of the same shape."""
_SCHEDULE_PARAMS = {
    "warmup_num_steps": "schedule.warmup_steps={}",
    "warmup_max_lr": "optimizer.lr={}",
    "cos_min_ratio": "schedule.min_lr_ratio={}",
    "total_num_steps": "'training.duration={} steps'",
}


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
    kind = given.get("type") if isinstance(given, dict) else None
    action = "remove scheduler here and set schedule.kind, schedule.warmup_steps and optimizer.lr in the recipe"
    if kind in _SCHEDULES and isinstance(params, dict):
        numbers = [form.format(params[key]) for key, form in _SCHEDULE_PARAMS.items() if params.get(key, AUTO) != AUTO]
        action = f"remove scheduler here and write {' '.join([_SCHEDULES[kind], *numbers])} on the command line"
    return [
        RecipeError(
            f"{origin}: scheduler: {', '.join(own) or 'it'} is set here, but the recipe owns the schedule",
            allowed='params that are all "auto", or no scheduler block',
            action=action,
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
                action="set zero_optimization.stage to 3 (as in ds_configs/zero3_offload.json), or remove "
                "zero_optimization.offload_param",
            )
        )
    return found
