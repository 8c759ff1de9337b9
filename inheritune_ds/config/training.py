"""The training keys of a recipe: duration, optimizer, schedule, validation, checkpoints, faults, logging, export."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from inheritune_ds.config.fields import ConfigModel, Ratio, Text, TrainingDuration


class Training(ConfigModel):
    """Duration and batches."""

    seq_len: PositiveInt
    """Tokens per window."""
    global_batch_tokens: PositiveInt
    """Tokens per optimizer step, over all ranks and micro-steps."""
    duration: TrainingDuration
    """`8 epochs`, `100_000 steps` or `250M tokens`; the count may end in K, M or B."""
    sampling: Literal["shuffled", "random", "sequential"] = "shuffled"
    """`shuffled`: every window exactly once per epoch, each epoch in another order; `random`: windows at random
    positions, with replacement, as the paper's GPT-2 scripts; `sequential`: in the order of the text."""
    packing: Literal["windows", "documents"] = "windows"
    """`windows`: attention crosses documents inside a window, as in the paper; `documents`: it does not, positions
    restart at every document, and its first token has no loss."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.global_batch_tokens % self.seq_len:
            below = self.batch_windows * self.seq_len
            nearest = ", ".join(str(size) for size in (below, below + self.seq_len) if size)
            raise ValueError(
                f"global_batch_tokens {self.global_batch_tokens} is not a multiple of seq_len {self.seq_len}; "
                f"the nearest are {nearest}"
            )
        return self

    @property
    def batch_windows(self) -> int:
        """Windows per optimizer step, over all ranks and micro-steps."""
        return self.global_batch_tokens // self.seq_len


class Optimizer(ConfigModel):
    """AdamW; weight decay applies to matrices only (no norms, biases, embeddings, tied head or recurrent states)."""

    lr: PositiveFloat
    betas: tuple[Ratio, Ratio] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this norm; 0 disables clipping."""

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
    """wsd: share of all steps in the final linear decay."""


class Validation(ConfigModel):
    """Loss on windows of the held-out part."""

    interval_steps: PositiveInt
    max_tokens: PositiveInt = 4_194_304
    """Windows evenly spread over the held-out part, up to this many tokens; the same at every step, for every seed."""


class Checkpointing(ConfigModel):
    """Saving and deleting of checkpoints."""

    interval_steps: PositiveInt
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep; older ones are deleted after a newer one is verified."""
    keep_every: PositiveInt | None = None
    """Also keep the checkpoints at multiples of keep_every x interval_steps."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: rerunning the command resumes from the newest verified checkpoint; `never`: a folder with checkpoints is
    refused."""


class Faults(ConfigModel):
    """Handling of invalid numbers: an update with a loss or gradient that is not finite is skipped and logged."""

    spikes: Literal["off", "warn", "skip"] = "warn"
    """A loss or gradient norm far above the previous ones is logged (`warn`), or its update is skipped (`skip`)."""
    sigma: PositiveFloat = 6.0
    """Least distance of a spike from the mean of the last steps, in standard deviations."""
    window_steps: Annotated[int, Field(ge=16)] = 128
    """Number of accepted steps for mean and standard deviation."""
    rollback_after: PositiveInt = 3
    """After this many skipped updates in a row the run returns to its newest verified checkpoint and skips their
    batches."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """After this many rollbacks the run ends instead."""


class Logging(ConfigModel):
    """Metrics during training."""

    interval_steps: PositiveInt = 10
    wandb_project: Text = "inheritune_ds"


class Export(ConfigModel):
    """The exported Hugging Face folder."""

    dtype: Literal["float32", "bfloat16"] = "float32"
