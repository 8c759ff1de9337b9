"""The DeepSpeed config of a run: a user's JSON with every `auto` filled in from the recipe and the machine."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.deepspeed_checks import DEFAULT_STAGE, block
from inheritune_ds.config.deepspeed_keys import OPTIMIZER_TYPE, RECIPE_OWNED, PassedOn
from inheritune_ds.config.fields import AUTO
from inheritune_ds.config.kernels import OPTIMIZERS, KernelRequest
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.config.zero import Precision, offload_device, precision_of, read_layout, uses_bf16_optimizer
from inheritune_ds.errors import RecipeError

MICRO_BATCH = "train_micro_batch_size_per_gpu"
LEAST_BUCKET = 5 * 10**7
"""Elements that ZeRO-1 and 2 reduce at once at least: smaller messages do not fill the link between GPUs."""


@dataclass(frozen=True)
class Machine:
    """The device of a rank, for the config's `auto` values."""

    kind: Literal["cuda", "cpu"]
    memory_gib: float
    """Memory that one rank may use: what other programs leave of it."""
    bf16: bool
    """Whether it computes in bfloat16 at full speed."""
    name: str = ""
    """The GPU's name by the driver; empty for a CPU, or if the ranks have different GPUs."""


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed config with every number written out."""

    config: Mapping[str, Any]
    """DeepSpeed's keys, and the blocks `kernels` and `reliability`."""
    notes: tuple[str, ...]
    """A line on each choice."""
    shape: tuple[Shape, int] | None = None
    """The target's shape and number of blocks; None if unknown."""

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage: 1, 2 or 3."""
        return int(self.config["zero_optimization"]["stage"])

    @property
    def precision(self) -> Precision:
        """Precision of the forward and backward pass."""
        return precision_of(self.config)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's or the model's state is in host memory."""
        return self.offloads_optimizer or offload_device(self.config["zero_optimization"], "offload_param") != "none"

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state is in host memory and DeepSpeed's CPU Adam updates it."""
        return offload_device(self.config["zero_optimization"], "offload_optimizer") != "none"

    @property
    def micro_batch_size(self) -> int:
        """Sequences per rank per micro-step."""
        return int(self.config[MICRO_BATCH])

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return int(self.config["gradient_accumulation_steps"])

    @property
    def kernels(self) -> KernelRequest:
        """The `kernels` block."""
        return KernelRequest(**self.config["kernels"])

    @property
    def reliability(self) -> Reliability:
        """The `reliability` block."""
        return Reliability.of(self.config["reliability"])


@dataclass
class _Resolver:
    """One pass over a user's document that gathers values, notes and problems."""

    document: dict[str, Any]
    recipe: Recipe
    origin: str
    problems: list[RecipeError]
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=lambda: KernelRequest().model_dump())

    def refuse(self, key: str, problem: str, *, allowed: str, action: str) -> None:
        self.problems.append(RecipeError(f"{self.origin}: {key}: {problem}", allowed=allowed, action=action))

    def passed_on(self) -> None:
        """Copy the keys that the user's file owns."""
        for key, value in self.document.items():
            if key in PassedOn.model_fields and value not in (AUTO, None):
                self.config[key] = value
            elif key == "scheduler" and value is not None:
                self.notes.append("scheduler: dropped, the recipe's schedule is used (schedule.* in the recipe)")

    def owned_by_recipe(self) -> None:
        for path, (_, value) in RECIPE_OWNED.items():
            *parents, last = path.split(".")
            node = self.config
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value(self.recipe)
        self.config["optimizer"]["type"] = OPTIMIZER_TYPE

    def precision(self, machine: Machine) -> None:
        bf16 = {"enabled": AUTO, **block(self.document, "bf16")}
        fp16 = {"enabled": False, **block(self.document, "fp16")}
        if fp16["enabled"] is True and machine.kind == "cpu":
            self.refuse(
                "fp16.enabled",
                "half precision is not available on a CPU",
                allowed="bf16, or neither (fp32)",
                action="write false; bf16 is then used where the CPU has it",
            )
        if bf16["enabled"] == AUTO:
            bf16["enabled"] = machine.bf16 and fp16["enabled"] is not True
            why = f"bf16 is {'supported' if machine.bf16 else 'not supported at full speed'} on this {machine.kind}"
            if fp16["enabled"] is True:
                why = "fp16 is on"
            self.notes.append(f"bf16: {'on' if bf16['enabled'] else 'off'} (auto: {why})")
        if fp16["enabled"] == AUTO:
            fp16["enabled"] = False
        self.config["bf16"], self.config["fp16"] = bf16, fp16

    def data_types(self) -> None:
        types = {"grad_accum_dtype": AUTO, **block(self.document, "data_types")}
        if types["grad_accum_dtype"] == AUTO:
            types["grad_accum_dtype"] = "fp32"
            self.notes.append("data_types.grad_accum_dtype: fp32 (auto: gradients add up in full precision)")
        self.config["data_types"] = types

    def zero(self, hidden_size: int | None) -> None:
        zero = block(self.document, "zero_optimization")
        stage = zero.get("stage", AUTO)
        if stage == AUTO:
            stage = DEFAULT_STAGE
            self.notes.append(f"zero_optimization.stage: {stage} (auto: the fastest that keeps exact sums)")
        zero["stage"] = stage if stage in (1, 2, 3) else DEFAULT_STAGE
        # The formulas are Hugging Face's (transformers.integrations.deepspeed, `auto` values).
        least = LEAST_BUCKET if zero["stage"] < 3 else 0
        formulas: dict[str, Callable[[int], int]] = {
            "reduce_bucket_size": lambda hidden: max(hidden * hidden, least),
            "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
        }
        for key, formula in formulas.items():
            if zero.get(key) == AUTO and hidden_size is not None:
                zero[key] = formula(hidden_size)
                why = "the least for ZeRO-1 and 2" if zero[key] == least else f"from hidden_size {hidden_size}"
                self.notes.append(f"zero_optimization.{key}: {zero[key]} (auto: {why})")
        if zero.get("round_robin_gradients") is True:
            # On several ranks 0.19.8 links masters to the wrong weights: the export would be scrambled.
            zero["round_robin_gradients"] = False
            self.notes.append("zero_optimization.round_robin_gradients: off; DeepSpeed mixes up master weights with it")
        zero.setdefault("overlap_comm", zero["stage"] == 3)
        self.config["zero_optimization"] = zero

    def gradients(self, world_size: int) -> None:
        """Fill in two settings that cost nothing with DeepSpeed's BF16_Optimizer."""
        zero = self.config["zero_optimization"]
        relevant = {"stage": zero["stage"], "offload_optimizer": zero.get("offload_optimizer")}
        layout = read_layout(
            {**self.config, "zero_optimization": relevant}, seq_len=self.recipe.training.seq_len, world_size=world_size
        )
        if not uses_bf16_optimizer(layout):
            return
        bf16 = self.config["bf16"]
        if bf16.get("immediate_grad_update", AUTO) == AUTO:
            bf16["immediate_grad_update"] = True
            self.notes.append("bf16.immediate_grad_update: on (auto: frees each bf16 gradient, same numbers)")
        if world_size == 1 and self.config.get("communication_data_type") is None:
            self.config["communication_data_type"] = "fp32"
            self.notes.append("communication_data_type: fp32 (auto: one rank sends nothing, so nothing is rounded)")

    def kernels(self, machine: Machine) -> None:
        """Write all keys of the block, and refuse what the machine or another key excludes."""
        given = block(self.document, "kernels")
        self.request |= {key: value for key, value in given.items() if key in KernelRequest.model_fields}
        if self.request["activation_checkpointing"] == AUTO:
            self.request["activation_checkpointing"] = "none"
            self.notes.append("kernels.activation_checkpointing: none (auto: it costs a second forward pass)")
        if self.request["deterministic"]:
            self.notes.append("kernels.deterministic: on (the same bits in every run on the same GPUs, at less speed)")
        so_far = Resolved(self.config, ())
        attention, on_cpu = str(self.request["attention"]), machine.kind == "cpu"
        if attention.startswith("flash_attention") and (on_cpu or so_far.precision == "fp32"):
            why = "has no kernel for a CPU" if on_cpu else "computes in half precision, this run in fp32"
            self.refuse(
                "kernels.attention",
                f"{attention} {why}",
                allowed='sdpa, eager, or "auto"; flash attention on a GPU with bf16 or fp16',
                action='write "auto"',
            )
        if self.request["compile"] is True and so_far.zero_stage == 3:
            self.refuse(
                "kernels.compile",
                "true does not work with stage 3: its hooks gather parameters inside the block and break the graph",
                allowed='false or "auto", or zero_optimization.stage 1 or 2',
                action='write "auto", or set zero_optimization.stage to 2',
            )
        self._optimizer(offloaded=so_far.offloads_optimizer)

    def _optimizer(self, *, offloaded: bool) -> None:
        name = self.request["optimizer"]
        torch_adam = block(block(self.document, "optimizer"), "params").get("torch_adam") is True
        if offloaded and name in OPTIMIZERS:
            self.refuse(
                "kernels.optimizer",
                f"{name} does not work with offload_optimizer: only DeepSpeed's CPU Adam updates a state on the host",
                allowed=f'"{AUTO}"',
                action=f'write "{AUTO}", or remove zero_optimization.offload_optimizer',
            )
        elif torch_adam and name in ("apex", "deepspeed"):
            self.refuse(
                "kernels.optimizer",
                f"{name} contradicts optimizer.params.torch_adam, which selects torch's",
                allowed="one of them",
                action="remove optimizer.params.torch_adam",
            )
        elif torch_adam and name == AUTO and not offloaded:
            self.request["optimizer"] = "torch_fused"
            self.notes.append("kernels.optimizer: torch_fused (optimizer.params.torch_adam selects torch's)")

    def batch(self, world_size: int) -> None:
        """Check that the ranks share a step evenly; `fit` fills in an `auto` micro-batch."""
        windows = self.recipe.training.batch_windows
        given = self.document.get(MICRO_BATCH, AUTO)
        self.config.pop(MICRO_BATCH, None)
        if windows % world_size:
            nearest = max(round(windows / world_size), 1) * world_size * self.recipe.training.seq_len
            self.problems.append(
                RecipeError(
                    f"training.global_batch_tokens {self.recipe.training.global_batch_tokens} is {windows} windows of "
                    f"{self.recipe.training.seq_len} tokens, which {world_size} ranks cannot share evenly",
                    allowed=f"a multiple of {world_size * self.recipe.training.seq_len} tokens",
                    action=f"write training.global_batch_tokens={nearest} on the command line, or use another number "
                    "of ranks",
                )
            )
            return
        if type(given) is not int or given < 1:
            return
        per_rank = windows // world_size
        if per_rank % given:
            divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
            self.refuse(
                MICRO_BATCH,
                f"{given} does not divide the {per_rank} windows of a step on each of {world_size} ranks",
                allowed=", ".join(map(str, divisors)),
                action=f'write {max(n for n in divisors if n <= given)}, or another of these, or "auto"',
            )
            return
        self.config |= batch_of(given, per_rank)

    def without_auto(self, given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Leave the remaining `auto` and null values to DeepSpeed; Hugging Face's configs have such `auto`s."""
        kept: dict[str, Any] = {}
        for key, value in given.items():
            if value == AUTO:
                self.notes.append(f"{prefix}{key}: DeepSpeed's own default (auto)")
            elif isinstance(value, dict):
                kept[key] = self.without_auto(value, f"{prefix}{key}.")
            elif value is not None:
                kept[key] = value
        return kept


def batch_of(micro_batch_size: int, windows: int) -> dict[str, int]:
    """DeepSpeed's two keys for the windows that one rank has in a step."""
    return {MICRO_BATCH: micro_batch_size, "gradient_accumulation_steps": windows // micro_batch_size}


def resolve(  # noqa: PLR0913 - one argument for each thing that decides
    document: dict[str, Any],
    recipe: Recipe,
    *,
    origin: str,
    shape: tuple[Shape, int] | None,
    world_size: int,
    machine: Machine,
) -> Resolved:
    """Check a DeepSpeed config and fill in every `auto` but that of the micro-batch, which `fit` fills in.

    `document` is from `deepspeed_checks.read`, and called `origin` in messages. `shape` is that of the reference or
    target, with the target's number of blocks; None if unknown.

    Raises:
        RecipeError: With every problem found.
    """
    supported = deepspeed_checks.sort_out(document)
    found = deepspeed_checks.problems(document, origin, recipe.training.seq_len, world_size)
    resolver = _Resolver(supported.kept, recipe, origin, found, notes=supported.notes)
    resolver.passed_on()
    resolver.owned_by_recipe()
    resolver.precision(machine)
    resolver.data_types()
    resolver.zero(shape[0].hidden_size if shape else None)
    resolver.gradients(world_size)
    resolver.kernels(machine)
    resolver.config.setdefault("steps_per_print", 2**31 - 1)  # the trainer prints its own progress
    # DeepSpeed's timer waits for the device twice in each micro-step; the trainer measures a step by itself.
    resolver.config.setdefault("timers", {"throughput": {"enabled": False}})
    resolver.batch(world_size)
    if resolver.problems:
        raise RecipeError.of(resolver.problems)
    config = resolver.without_auto(resolver.config)
    config["kernels"] = resolver.request  # keeps its auto: only torch knows what works
    config["reliability"] = asdict(Reliability.of(block(document, "reliability")))
    return Resolved(dict(sorted(config.items())), tuple(resolver.notes), shape)
