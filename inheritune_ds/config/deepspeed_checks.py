"""A user's DeepSpeed JSON: read it, and find what is wrong with it whatever the recipe and the machine are.

Torch is not imported here, so that a login node can check a config at once.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inheritune_ds.config.deepspeed_keys import (
    AUTO,
    DERIVED,
    OURS,
    OWNED_ELSEWHERE,
    PASSED_ON,
    RECIPE_OWNED,
    REFUSED,
    Kinds,
)
from inheritune_ds.errors import InherituneError, RecipeError
from inheritune_ds.storage.redaction import secret_problems

DEFAULT_STAGE = 1
INERT_SCHEDULE = {"last_batch_iteration": -1}
"""Scheduler params that Hugging Face's examples write out and that say nothing."""


def read(path: Path | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file; without a path, an empty document (everything `auto`)."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise RecipeError(
            f"DeepSpeed config {path} cannot be read: {(error.strerror or 'unreadable').lower()}",
            allowed="a DeepSpeed JSON file",
            action="give an existing file, such as ds_configs/zero1.json",
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"DeepSpeed config {path}: {error}",
            allowed="JSON, each key once",
            action="mend the file, or start from ds_configs/zero1.json",
        ) from None
    if not isinstance(document, dict):
        raise RecipeError(
            f"DeepSpeed config {path}: the document is {_kind_of(document)}, not an object",
            allowed='{"train_micro_batch_size_per_gpu": "auto", ...}',
            action="start from ds_configs/zero1.json",
        )
    if secrets := secret_problems(document, f"DeepSpeed config {path}"):
        raise RecipeError.of(secrets)
    return document


def _kind_of(document: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(document), "a single value")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return document


def problems(document: Mapping[str, Any], origin: str, seq_len: int | None = None) -> list[InherituneError]:
    """Find every key and value that DeepSpeed would ignore or stop at, or that has another owner.

    Args:
        document: The user's JSON as `read` returns it.
        origin: How to call it in messages.
        seq_len: The recipe's `training.seq_len`, where the recipe is known.
    """
    checker = _Checker(origin)
    checker.top_level(document)
    checker.owned(document, seq_len)
    checker.scheduler(document.get("scheduler"))
    checker.precision(document)
    zero = document.get("zero_optimization")
    if isinstance(zero, dict):
        checker.offload(zero)
    return checker.found


def block(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object inside the document; empty when it is left out, null, or not an object."""
    value = document.get(key)
    return dict(value) if isinstance(value, dict) else {}


def offload_device(zero: Mapping[str, Any], key: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts its state: none or cpu."""
    device = block(zero, key).get("device", AUTO)
    return "none" if device == AUTO else str(device)


@dataclass
class _Checker:
    """Gathers the problems of one document."""

    origin: str
    found: list[InherituneError] = field(default_factory=list)

    def refuse(self, key: str, problem: str, *, allowed: str, action: str) -> None:
        self.found.append(RecipeError(f"{self.origin}: {key}: {problem}", allowed=allowed, action=action))

    def top_level(self, document: Mapping[str, Any]) -> None:
        known = {key: value for key, value in document.items() if key not in REFUSED}
        self.keys(known, {**PASSED_ON, **OWNED_ELSEWHERE, **OURS}, "")
        for key in sorted({*document} - {*known}):
            if not is_off(document[key]):
                reason = f"not usable here: {REFUSED[key]}"
                self.refuse(key, reason, allowed='no such key, or {"enabled": false}', action=f"remove {key}")

    def keys(self, given: Mapping[str, Any], kinds: Kinds, prefix: str) -> None:
        """Compare an object and the objects inside it with the keys that are known."""
        for key, value in given.items():
            kind, path = kinds.get(key), f"{prefix}{key}"
            if kind is None:
                hint = _suggest(key, [*kinds], prefix)
                self.refuse(path, "unknown key", allowed=", ".join(sorted(kinds)), action=hint)
            elif value == AUTO:
                continue
            elif isinstance(kind, Mapping):
                if isinstance(value, dict):
                    self.keys(value, kind, f"{path}.")
                elif value is not None:
                    allowed = f"{{...}} with keys of {', '.join(sorted(kind))}"
                    self.refuse(path, f"{value!r} is not an object", allowed=allowed, action=f"mend or remove {path}")
            elif not kind.accepts(value):
                self.refuse(
                    path,
                    f"{value!r} is not accepted{kind.reason(value)}",
                    allowed=f'{kind.allowed}, or "{AUTO}"',
                    action=f'write "{AUTO}", or remove {path}',
                )

    def owned(self, document: Mapping[str, Any], seq_len: int | None) -> None:
        for path, (recipe_key, _) in RECIPE_OWNED.items():
            given = _at(document, path)
            if given == AUTO:
                continue
            said = json.dumps(given) if isinstance(given, list | dict) else str(given)
            if path == "train_batch_size":  # DeepSpeed counts windows, the recipe tokens
                said = str(given * seq_len) if seq_len and isinstance(given, int) else f"{given} x training.seq_len"
            self.refuse(
                path,
                f"{given!r} stands here, but the recipe owns it as {recipe_key}",
                allowed=f'"{AUTO}", or leave it out',
                action=f'write "{AUTO}" here and {recipe_key}={said} on the command line',
            )
        for key, formula in DERIVED.items():
            if document.get(key, AUTO) != AUTO:
                self.refuse(
                    key,
                    f"{document[key]!r} stands here, but it is derived: {formula}",
                    allowed=f'"{AUTO}", or leave it out',
                    action="set training.global_batch_tokens in the recipe",
                )

    def scheduler(self, given: Any) -> None:
        if given is None:
            return
        params = given.get("params", {}) if isinstance(given, dict) else None
        own = sorted({*given} - {"type", "params"}) if isinstance(given, dict) else []
        if isinstance(params, dict):
            own += [key for key, value in sorted(params.items()) if value != AUTO and INERT_SCHEDULE.get(key) != value]
        if own or not isinstance(params, dict):
            self.refuse(
                "scheduler",
                f"{', '.join(own) or 'it'} stands here, but the recipe owns the schedule",
                allowed='params that are all "auto", or no scheduler block',
                action="set schedule.kind, schedule.warmup_steps, schedule.min_lr_ratio and optimizer.lr in the recipe",
            )

    def precision(self, document: Mapping[str, Any]) -> None:
        if block(document, "fp16").get("enabled") is True and block(document, "bf16").get("enabled") is True:
            self.refuse(
                "fp16.enabled",
                "bf16 and fp16 are both true",
                allowed="one of them",
                action="remove fp16 where the GPU has bf16 (Ampere and newer)",
            )

    def offload(self, zero: Mapping[str, Any]) -> None:
        """Refuse what DeepSpeed ignores, or stops at, before stage 3."""
        stage = zero.get("stage", AUTO)
        stage = DEFAULT_STAGE if stage == AUTO else stage
        if stage == 3:
            return
        device = offload_device(zero, "offload_param")
        if device != "none":
            self._needs_stage_3("offload_param.device", device, f"ignores it with stage {stage}")

    def _needs_stage_3(self, key: str, value: Any, what: str) -> None:
        self.refuse(
            f"zero_optimization.{key}",
            f"{value!r} needs stage 3: DeepSpeed {what}",
            allowed="zero_optimization.stage 3",
            action=f"set zero_optimization.stage to 3 (ds_configs/zero3_offload.json), or remove {key}",
        )


def is_off(value: Any) -> bool:
    """Whether a block says of itself that it is not enabled."""
    return isinstance(value, dict) and value.get("enabled") is False


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for part in path.split("."):
        value = value.get(part, AUTO) if isinstance(value, dict) else AUTO
    return value


def _suggest(key: str, known: Sequence[str], prefix: str) -> str:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {prefix}{matches[0]}?" if matches else f"remove {prefix}{key}"
