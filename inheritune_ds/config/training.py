"""The training keys of a recipe: length, optimizer, schedule, validation, checkpoints, faults, logging, export."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from inheritune_ds.config.fields import ConfigModel, Ratio, Text, TrainingDuration


class Training(ConfigModel):
    """How long and in which batches."""

    seq_len: PositiveInt
    """Tokens a window."""
    global_batch_tokens: PositiveInt
    """Tokens an optimizer step, over all ranks and micro-steps."""
    duration: TrainingDuration
    """`8 epochs`, `100_000 steps` or `250M tokens`; the count may end in K, M or B."""
    sampling: Literal["shuffled", "random", "sequential"] = "shuffled"
    """`shuffled`: every window once an epoch, each epoch in another order; `random`: windows at random places, with
    replacement, as the paper's GPT-2 scripts; `sequential`: in the order of the text."""
    packing: Literal["windows", "documents"] = "windows"
    """`windows`: attention crosses documents inside a window, as in the paper; `documents`: it does not, positions
    begin anew at every document, and no loss is counted for the first token of one."""

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        if self.global_batch_tokens % self.seq_len:
            below = self.global_batch_tokens // self.seq_len * self.seq_len
            raise ValueError(
                f"global_batch_tokens {self.global_batch_tokens} is not a multiple of "
                f"seq_len {self.seq_len}; the nearest are "
                f"{', '.join(str(n) for n in (below, below + self.seq_len) if n)}"
            )
        return self

    @property
    def batch_windows(self) -> int:
        """Windows an optimizer step, over all ranks and micro-steps."""
        return self.global_batch_tokens // self.seq_len


class Optimizer(ConfigModel):
    """AdamW; weight decay falls on matrices only (no norms, biases, embeddings or tied head)."""

    lr: PositiveFloat
    betas: tuple[Ratio, Ratio] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Schedule(ConfigModel):
    """Learning rate as a pure function of the step."""

    kind: Literal["cosine", "constant", "wsd"]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Ratio = 0.1
    """Learning rate of the last update as a share of `optimizer.lr` (cosine, wsd)."""
    decay_ratio: Ratio = 0.2
    """wsd: share of all steps that are below the peak at the end, falling on a line."""


class Validation(ConfigModel):
    """Loss on the held-out windows."""

    interval_steps: PositiveInt
    max_tokens: PositiveInt = 4_194_304
    """The first windows of the held-out part, up to this many tokens; the same at every step."""


class Checkpointing(ConfigModel):
    """When the state is saved."""

    interval_steps: PositiveInt
    keep: PositiveInt = 3
    """The newest checkpoints kept; older ones are deleted after a newer one is verified."""
    keep_every: PositiveInt | None = None
    """Of the older ones every so manieth stays for good: those at multiples of keep_every x interval_steps."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: the same command goes on from the newest verified checkpoint; `never`: a folder that holds checkpoints
    is refused."""


class Faults(ConfigModel):
    """What happens when the numbers of a step go wrong: its update is left out, and told."""

    spikes: Literal["off", "warn", "skip"] = "warn"
    """A loss or gradient norm far above those before it: said, or its update left out like that of a value that is not
    finite."""
    sigma: PositiveFloat = 6.0
    """How many standard deviations above the mean of the last steps a spike is."""
    window_steps: Annotated[int, Field(ge=16)] = 128
    """The accepted steps that mean and deviation are taken of."""
    rollback_after: PositiveInt = 3
    """After so many updates left out in a row the run goes back to its newest verified checkpoint and skips their
    batches."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """When these are used up, the run ends instead."""


class Logging(ConfigModel):
    """What is written while training."""

    interval_steps: PositiveInt = 10
    wandb_project: Text = "inheritune_ds"


class Export(ConfigModel):
    """The Hugging Face folder at the end."""

    dtype: Literal["float32", "bfloat16"] = "float32"
