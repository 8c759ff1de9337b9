"""The recipe: what an experiment is, and nothing of the machine it runs on.

A recipe is a YAML file (read by `recipe_file`); this module holds its models. Every field has one
owner: what stands here must not stand in the DeepSpeed config (`training.ds_config`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from inheritune_ds.corpus import Corpus
from inheritune_ds.errors import RecipeError
from inheritune_ds.parts import inherited_parts
from inheritune_ds.recipe_base import AMOUNT, Name, Part, Ratio, Text, amount_and_unit, is_local_path
from inheritune_ds.selection import parse

RECIPE_PREFIX = "recipe:"
DURATION_PATTERN = f"{AMOUNT} (steps|tokens|epochs)"


class Shape(Part):
    """The architecture of a model, in Hugging Face's config keys.

    Enough to count parameters, FLOPs and bytes without a network, and to build a model from
    scratch. Two families are described; a reference of any other family needs no shape.
    """

    model_type: Literal["gpt2", "llama"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    intermediate_size: PositiveInt | None = None
    """Units of the MLP; 4 x hidden_size for gpt2 when left out, required for llama."""
    num_key_value_heads: PositiveInt | None = None
    """Heads that share keys and values (llama); num_attention_heads when left out."""
    tie_word_embeddings: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    """llama only."""
    rope_theta: PositiveFloat = 10000.0
    """llama only."""
    scale_attn_by_inverse_layer_idx: bool = False
    """gpt2 only: attention logits of block i divided by i + 1, as the paper's GPT-2 track does."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.model_type == "llama" and self.intermediate_size is None:
            raise ValueError("intermediate_size is required for model_type llama")
        if self.model_type == "gpt2" and not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true for model_type gpt2")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class Reference(Part):
    """The pretrained model that blocks are inherited from."""

    model: Text
    """Hub id, local folder, or `recipe:NAME` (trained first when it is not there yet)."""
    revision: Text = "main"
    """Hub only: a commit, tag or branch; resolved to a full commit and pinned in the run folder."""
    shape: Shape | None = None
    """Hub only: lets the budget be computed without a network; checked against config.json."""
    download_gib: PositiveFloat | None = None
    """Hub only: size of the files to download, for the budget."""

    @property
    def recipe_name(self) -> str | None:
        """The name behind `recipe:`, or None for a hub id or a folder."""
        return self.model.removeprefix(RECIPE_PREFIX) if self.model.startswith(RECIPE_PREFIX) else None

    @field_validator("model")
    @classmethod
    def _plain(cls, model: str) -> str:
        """One spelling for a folder: `models//llama/` is `models/llama`."""
        if model.startswith(RECIPE_PREFIX):
            return model
        plain = re.sub(r"/(\.?/)+", "/", model).removesuffix("/.").rstrip("/")
        return plain or "/"

    @model_validator(mode="after")
    def _hub_only(self) -> Self:
        if self.recipe_name is not None and self.shape is not None:
            raise ValueError(f"shape is owned by {self.model}: leave it out here")
        if self.revision != "main" and (self.recipe_name is not None or is_local_path(self.model)):
            raise ValueError(f"revision {self.revision} is for models of the hub: leave it out for {self.model}")
        return self


class Target(Part):
    """The model that is trained: selected blocks of the reference, or a shape from scratch."""

    select: Text | None = None
    """Which blocks of the reference are kept, such as `first:13` ([surgery.md](surgery.md#selections))."""
    inherit: Text | list[Text] = "all"
    """What of the reference is inherited: a preset or a list of parts ([surgery.md](surgery.md#inheritance))."""
    width: Literal["full", "half"] = "full"
    """`half`: the first half of the heads and MLP units of every kept block, the paper's half-width baseline."""
    block_scores: Text | None = None
    """JSON file with the measured scores that `select: by:NAME:n` goes by."""
    shape: Shape | None = None
    """Architecture of a model trained from scratch; only without a reference."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Written to every dropout key of the model's config, whatever the reference had."""

    @field_validator("select", mode="before")
    @classmethod
    def _one_block(cls, select: Any) -> Any:
        """YAML reads a list of one block as a number."""
        return str(select) if isinstance(select, int) and not isinstance(select, bool) else select

    @field_validator("select")
    @classmethod
    def _readable(cls, select: str | None) -> str | None:
        if select is not None:
            _as_value_error(lambda: parse(select))
        return select

    @field_validator("inherit")
    @classmethod
    def _known(cls, inherit: str | list[str]) -> str | list[str]:
        _as_value_error(lambda: inherited_parts(inherit))
        return inherit

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.block_scores is not None and (self.select is None or parse(self.select).kind != "by"):
            raise ValueError(f"block_scores is for select: by:NAME:n: leave it out with select: {self.select}")
        return self

    @property
    def inherits_nothing(self) -> bool:
        """Whether all values are random, so that no weights are needed."""
        return not inherited_parts(self.inherit)


class Training(Part):
    """How long and in which batches."""

    seq_len: PositiveInt
    """Tokens a window."""
    global_batch_tokens: PositiveInt
    """Tokens an optimizer step, over all ranks and micro-steps."""
    duration: Annotated[str, StringConstraints(pattern=f"^{DURATION_PATTERN}$")]
    """`8 epochs`, `100_000 steps` or `250M tokens`."""
    sampling: Literal["shuffled", "random", "sequential"] = "shuffled"
    """`shuffled`: every window once an epoch, each epoch in another order; `random`: windows at random places, with
    replacement, as the paper's GPT-2 scripts; `sequential`: in the order of the text."""
    packing: Literal["windows", "documents"] = "windows"
    """`windows`: attention crosses documents inside a window, as in the paper; `documents`: it does not, positions
    begin anew at every document, and no loss is counted for the first token of one."""

    @property
    def duration_parts(self) -> tuple[int, str]:
        """The duration as (count, unit), unit one of steps, tokens, epochs."""
        return amount_and_unit(self.duration)

    @field_validator("duration")
    @classmethod
    def _positive(cls, duration: str) -> str:
        if re.match(r"[0_]+[KMB]? ", duration):
            raise ValueError("the duration must be at least 1")
        return duration

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


class Optimizer(Part):
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


class Schedule(Part):
    """Learning rate as a pure function of the step."""

    kind: Literal["cosine", "constant", "wsd"]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Ratio = 0.1
    """Learning rate of the last update as a share of `optimizer.lr` (cosine, wsd)."""
    decay_ratio: Ratio = 0.2
    """wsd: share of all steps that are below the peak at the end, falling on a line."""


class Validation(Part):
    """Loss on the held-out windows."""

    interval_steps: PositiveInt
    max_tokens: PositiveInt = 4_194_304
    """The first windows of the held-out part, up to this many tokens; the same at every step."""


class Checkpointing(Part):
    """When the state is saved."""

    interval_steps: PositiveInt
    keep: PositiveInt = 3
    """The newest checkpoints kept; older ones are deleted after a newer one is verified."""
    keep_every: PositiveInt | None = None
    """Of the older ones every so manieth stays for good: those at multiples of keep_every x interval_steps."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: the same command goes on from the newest verified checkpoint; `never`: a folder that holds checkpoints
    is refused."""


class Faults(Part):
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


class Logging(Part):
    """What is written while training."""

    interval_steps: PositiveInt = 10
    wandb_project: Text = "inheritune_ds"


class Export(Part):
    """The Hugging Face folder at the end."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class PublishedClaim(Part):
    """A cost that a publication states for this recipe; the budget says whether it can be true."""

    text: Text
    hours: PositiveFloat
    gpu: Text
    gpus: PositiveInt = 1
    source: Text


class Recipe(Part):
    """A whole experiment."""

    name: Name
    description: Text
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    reference: Reference | None = None
    target: Target
    corpus: Corpus
    training: Training
    optimizer: Optimizer
    schedule: Schedule
    validation: Validation
    checkpoint: Checkpointing
    faults: Faults = Faults()
    logging: Logging = Logging()
    export: Export = Export()
    published_claim: PublishedClaim | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference is None:
            if self.target.shape is None:
                raise ValueError("give a reference and target.select, or target.shape (from scratch)")
            if self.target.select is not None:
                raise ValueError("target.select needs a reference to select from")
            if self.corpus.tokenizer is None:
                raise ValueError("corpus.tokenizer is required without a reference")
        else:
            if self.target.shape is not None:
                raise ValueError("target.shape is for training from scratch: it excludes reference")
            if self.target.select is None:
                raise ValueError("target.select is required with a reference, such as first:4")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run: the recipe without names, logging, claims and what guards it.

        A run whose faults have ended it may go on with another policy; run.json counts what was left out.
        """
        left_out = {"name", "description", "logging", "checkpoint", "faults", "published_claim"}
        return self.model_dump(mode="json", exclude=left_out)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `identity`."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _as_value_error(check: Callable[[], object]) -> None:
    """Let pydantic collect a problem that a grammar of its own has found."""
    try:
        check()
    except RecipeError as error:
        raise ValueError(str(error)) from None
