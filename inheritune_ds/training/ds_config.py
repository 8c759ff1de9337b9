"""The DeepSpeed config: read a user's JSON, check it, and fill in what the recipe and machine own.

Torch is not imported here, so that a login node can check a config at once.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inheritune_ds.budget import largest_micro_batch
from inheritune_ds.errors import InherituneError, RecipeError
from inheritune_ds.recipe import Recipe, Shape
from inheritune_ds.training.ds_keys import (
    AUTO,
    BLOCK_KEYS,
    DERIVED,
    OPTIMIZER_TYPE,
    PASSED_ON,
    RECIPE_OWNED,
    REFUSED,
    STAGES,
    ZERO_KEYS,
    accepts,
)


@dataclass(frozen=True)
class Machine:
    """What the config's `auto` values ask of the machine.

    Attributes:
        kind: `cuda` or `cpu`.
        memory_gib: Memory that one rank may use, in GiB.
        bf16: Whether the device computes in bfloat16 at full speed.
    """

    kind: Literal["cuda", "cpu"]
    memory_gib: float
    bf16: bool


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed config with every number written out, and a line on each choice that was made."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage: 1, 2 or 3."""
        return int(self.config["zero_optimization"]["stage"])

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """What the forward and backward pass compute in."""
        if self.config["bf16"]["enabled"]:
            return "bf16"
        return "fp16" if self.config["fp16"]["enabled"] else "fp32"

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's or the model's state lies in host memory."""
        zero = self.config["zero_optimization"]
        return _offloads(zero, "offload_optimizer") or _offloads(zero, "offload_param")

    @property
    def micro_batch_size(self) -> int:
        """Sequences per rank per micro-step."""
        return int(self.config["train_micro_batch_size_per_gpu"])

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return int(self.config["gradient_accumulation_steps"])


def read(path: Path | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file; without a path, an empty document (everything `auto`)."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise RecipeError(
            f"DeepSpeed config {path} cannot be read: {(error.strerror or 'unreadable').lower()}",
            action="give an existing file, such as ds_configs/zero1.json",
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"DeepSpeed config {path}: {error}", allowed="JSON, each key once") from None
    if not isinstance(document, dict):
        raise RecipeError(f"DeepSpeed config {path}: the document is not an object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return document


@dataclass
class _Resolver:
    """One pass over a user's document that gathers values, notes and problems."""

    document: dict[str, Any]
    recipe: Recipe
    origin: str
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[InherituneError] = field(default_factory=list)

    def refuse(self, key: str, problem: str, *, allowed: str = "", action: str = "") -> None:
        self.problems.append(RecipeError(f"{self.origin}: {key}: {problem}", allowed=allowed, action=action))

    def block(self, key: str) -> dict[str, Any]:
        """A nested object of the user's document; empty when it is missing or not an object."""
        value = self.document.get(key, {})
        if isinstance(value, dict):
            known = sorted(BLOCK_KEYS.get(key, value))
            for name in sorted({*value} - {*known}):
                hint = _suggest(name, known, f"{key}.")
                self.refuse(f"{key}.{name}", "unknown key", allowed=", ".join(known), action=hint)
            return dict(value)
        self.refuse(key, f"{value!r} is not an object", allowed='{"...": ...}')
        return {}

    def known_keys(self) -> None:
        owned = {key.split(".")[0] for key in RECIPE_OWNED}
        known = sorted({*PASSED_ON, *owned, *DERIVED, "scheduler"})
        for key, value in self.document.items():
            if key in REFUSED:
                if isinstance(value, dict) and value.get("enabled") is False:
                    self.notes.append(f"{key}: dropped, it is not enabled")
                else:
                    self.refuse(key, f"not usable here: {REFUSED[key]}", action=f"remove {key}")
            elif key not in known:
                self.refuse(key, "unknown key", allowed=", ".join(known), action=_suggest(key, known))
            elif key in PASSED_ON:
                self.config[key] = value

    def owned_by_recipe(self) -> None:
        for path, (recipe_key, value) in RECIPE_OWNED.items():
            given: Any = self.document
            for part in path.split("."):
                given = given.get(part, AUTO) if isinstance(given, dict) else AUTO
            if given != AUTO:
                self.refuse(
                    path,
                    f"{given!r} stands here, but the recipe owns it as {recipe_key}",
                    allowed=f'"{AUTO}", or leave it out',
                    action=f'write "{AUTO}" here and {recipe_key}={self._as_yaml(path, given)} on the command line',
                )
            node = self.config
            *parents, last = path.split(".")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value(self.recipe)
        for key, formula in DERIVED.items():
            if self.document.get(key, AUTO) != AUTO:
                self.refuse(
                    key,
                    f"{self.document[key]!r} stands here, but it is derived: {formula}",
                    allowed=f'"{AUTO}", or leave it out',
                    action="set training.global_batch_tokens in the recipe",
                )

    def _as_yaml(self, path: str, given: Any) -> str:
        if path == "train_batch_size" and isinstance(given, int):
            given *= self.recipe.training.seq_len  # DeepSpeed counts windows, the recipe tokens
        return json.dumps(given) if isinstance(given, list | dict) else str(given)

    def optimizer(self) -> None:
        block = self.block("optimizer")
        given = block.get("type", OPTIMIZER_TYPE)
        if given != OPTIMIZER_TYPE:
            self.refuse("optimizer.type", f"{given!r} is not supported", allowed=OPTIMIZER_TYPE)
        params = block.get("params", {})
        allowed = {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"}
        if not isinstance(params, dict):
            self.refuse("optimizer.params", f"{params!r} is not an object", allowed='{"...": ...}')
            params = {}
        for key in sorted({*params} - allowed):
            self.refuse(f"optimizer.params.{key}", "unknown key", allowed=", ".join(sorted(allowed)))
        for key in ("torch_adam", "adam_w_mode"):
            if params.get(key, True) is not True:
                self.refuse(f"optimizer.params.{key}", f"{params[key]!r} is not supported", allowed="true")
        self.config["optimizer"]["type"] = OPTIMIZER_TYPE

    def scheduler(self) -> None:
        block = self.document.get("scheduler")
        if block is None:
            return
        params = block.get("params", {}) if isinstance(block, dict) else None
        numeric = sorted(key for key, value in params.items() if value != AUTO) if isinstance(params, dict) else []
        if not isinstance(params, dict) or numeric:
            what = ", ".join(numeric) or "it"
            self.refuse(
                "scheduler",
                f"{what} stands here, but the recipe owns the schedule",
                allowed='params that are all "auto", or no scheduler block',
                action="set schedule.kind, schedule.warmup_steps, schedule.min_lr_ratio and optimizer.lr in the recipe",
            )
        else:
            self.notes.append("scheduler: dropped, the recipe's schedule is used (schedule.* in the recipe)")

    def precision(self, machine: Machine) -> None:
        bf16, fp16 = {"enabled": AUTO, **self.block("bf16")}, {"enabled": False, **self.block("fp16")}
        if fp16["enabled"] is True and bf16["enabled"] is True:
            self.refuse("fp16.enabled", "bf16 and fp16 are both true", allowed="one of them")
        for name, part in (("bf16", bf16), ("fp16", fp16)):
            if not isinstance(part["enabled"], bool) and part["enabled"] != AUTO:
                self.refuse(f"{name}.enabled", f"{part['enabled']!r} is not accepted", allowed='true, false or "auto"')
        if fp16["enabled"] is True and machine.kind == "cpu":
            self.refuse("fp16.enabled", "half precision is not available on a CPU", allowed="bf16, or neither (fp32)")
        if bf16["enabled"] == AUTO:
            bf16["enabled"] = machine.bf16 and fp16["enabled"] is not True
            why = "supported" if machine.bf16 else "not supported at full speed"
            self.notes.append(
                f"bf16: {'on' if bf16['enabled'] else 'off'} (auto: bf16 is {why} on this {machine.kind})"
            )
        if fp16["enabled"] == AUTO:
            fp16["enabled"] = False
        for name, part in (("bf16", bf16), ("fp16", fp16)):
            # Hugging Face writes "auto" for the loss scaler's settings too: DeepSpeed's defaults are meant.
            self.config[name] = {key: value for key, value in part.items() if value != AUTO}

    def data_types(self) -> None:
        block = {"grad_accum_dtype": AUTO, **self.block("data_types")}
        if block["grad_accum_dtype"] in (AUTO, None):
            block["grad_accum_dtype"] = "fp32"
            self.notes.append("data_types.grad_accum_dtype: fp32 (auto: gradients add up in full precision)")
        if block["grad_accum_dtype"] not in ("fp32", "bf16", "fp16"):
            self.refuse(
                "data_types.grad_accum_dtype", f"{block['grad_accum_dtype']!r} is unknown", allowed="fp32, bf16, fp16"
            )
        self.config["data_types"] = block

    def zero(self, hidden_size: int | None) -> None:
        block = self.block("zero_optimization")
        for key, value in block.items():
            if key not in ZERO_KEYS:
                self.refuse(
                    f"zero_optimization.{key}",
                    "unknown key",
                    allowed=", ".join(ZERO_KEYS),
                    action=_suggest(key, list(ZERO_KEYS), "zero_optimization."),
                )
            elif key != "stage" and value != AUTO and not accepts(ZERO_KEYS[key], value):
                self.refuse(f"zero_optimization.{key}", f"{value!r} is not accepted", allowed=ZERO_KEYS[key])
        stage = block.get("stage", AUTO)
        if stage == AUTO:
            stage = 1
            self.notes.append("zero_optimization.stage: 1 (auto: the fastest that keeps exact sums)")
        if type(stage) is not int or stage not in STAGES:
            self.refuse(
                "zero_optimization.stage",
                f"{stage!r} is not supported (stage 0 loses precision in bf16 and has no gradient norm)",
                allowed="1, 2 or 3",
            )
            stage = 1
        block["stage"] = stage
        # The formulas are Hugging Face's (transformers.integrations.deepspeed, `auto` values).
        formulas: dict[str, Callable[[int], int]] = {
            "reduce_bucket_size": lambda hidden: hidden * hidden,
            "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
        }
        for key in [key for key, value in block.items() if value == AUTO]:
            if key in formulas and hidden_size is not None:
                block[key] = formulas[key](hidden_size)
                self.notes.append(f"zero_optimization.{key}: {block[key]} (auto: from hidden_size {hidden_size})")
            else:
                del block[key]
                self.notes.append(f"zero_optimization.{key}: DeepSpeed's own default (auto)")
        block.setdefault("overlap_comm", stage == 3)  # DeepSpeed's default, written out
        self.config["zero_optimization"] = block

    def batch(self, shape: tuple[Shape, int] | None, world_size: int, machine: Machine) -> None:
        windows = self.recipe.training.batch_windows
        given = self.document.get("train_micro_batch_size_per_gpu", AUTO)
        if windows % world_size:
            self.problems.append(
                RecipeError(
                    f"training.global_batch_tokens {self.recipe.training.global_batch_tokens} is {windows} windows of "
                    f"{self.recipe.training.seq_len} tokens, which {world_size} ranks cannot share evenly",
                    allowed=f"a multiple of {world_size * self.recipe.training.seq_len} tokens",
                    action="change training.global_batch_tokens or the number of ranks",
                )
            )
            return
        per_rank = windows // world_size
        if given == AUTO:
            given = self._fitting_micro_batch(shape, world_size, machine)
        elif isinstance(given, bool) or not isinstance(given, int) or given < 1:
            self.refuse("train_micro_batch_size_per_gpu", f"{given!r} is not accepted", allowed="1, 2, 3, ... or auto")
            return
        elif per_rank % given:
            divisors = ", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
            self.refuse(
                "train_micro_batch_size_per_gpu",
                f"{given} does not divide the {per_rank} windows that each of {world_size} ranks has in a step",
                allowed=divisors,
            )
            return
        if given is not None:
            self.config["train_micro_batch_size_per_gpu"] = given
            self.config["gradient_accumulation_steps"] = per_rank // given

    def _fitting_micro_batch(self, shape: tuple[Shape, int] | None, world_size: int, machine: Machine) -> int | None:
        if shape is None:
            self.refuse(
                "train_micro_batch_size_per_gpu",
                "auto needs the shape of the model, which is not known for this reference",
                allowed="a number",
                action="write the number of sequences that fit",
            )
            return None
        if self.problems:  # stage and precision may be wrong: the estimate would be one of something else
            return None
        resolved = Resolved(self.config, ())
        zero = self.config["zero_optimization"]
        try:
            size = largest_micro_batch(
                shape[0],
                shape[1],
                memory_gib=machine.memory_gib,
                batch_windows=self.recipe.training.batch_windows,
                seq_len=self.recipe.training.seq_len,
                zero_stage=resolved.zero_stage,
                world_size=world_size,
                precision=resolved.precision,
                accumulate_fp32=self.config["data_types"]["grad_accum_dtype"] == "fp32",
                offload_optimizer=_offloads(zero, "offload_optimizer"),
                offload_parameters=_offloads(zero, "offload_param"),
            )
        except InherituneError as error:
            self.problems.append(error)
            return None
        self.notes.append(
            f"train_micro_batch_size_per_gpu: {size} (auto: the largest that {machine.memory_gib:.0f} GiB hold)"
        )
        return size


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    return bool((zero.get(key) or {}).get("device", "none") != "none")


def _suggest(key: str, known: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {prefix}{matches[0]}?" if matches else f"remove {prefix}{key}"


def resolve(  # noqa: PLR0913 - one argument for each thing that decides
    document: dict[str, Any],
    recipe: Recipe,
    *,
    origin: str,
    shape: tuple[Shape, int] | None,
    world_size: int,
    machine: Machine,
) -> Resolved:
    """Fill in every `auto` of a DeepSpeed config and check all of it.

    Args:
        document: The user's JSON as `read` returns it.
        recipe: Owner of batch, clip, optimizer numbers and schedule.
        origin: How to call the document in messages.
        shape: The reference's or target's shape and the target's blocks; None if not known.
        world_size: Number of ranks.
        machine: What one rank has.

    Raises:
        RecipeError: With every problem found.
    """
    resolver = _Resolver(document, recipe, origin)
    resolver.known_keys()
    resolver.owned_by_recipe()
    resolver.optimizer()
    resolver.scheduler()
    resolver.precision(machine)
    resolver.data_types()
    resolver.zero(shape[0].hidden_size if shape else None)
    resolver.config.setdefault("steps_per_print", 2**31 - 1)  # the trainer prints its own progress
    resolver.batch(shape, world_size, machine)
    if resolver.problems:
        raise RecipeError.of(resolver.problems)
    zero = resolver.config["zero_optimization"]
    if not _offloads(zero, "offload_optimizer"):
        # One implementation for every run: torch's AdamW through DeepSpeed; under offload it is DeepSpeedCPUAdam.
        resolver.config["optimizer"]["params"]["torch_adam"] = True
    return Resolved(dict(sorted(resolver.config.items())), tuple(resolver.notes))
