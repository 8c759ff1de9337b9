"""The recipe: what an experiment is, and nothing of the machine it runs on.

A recipe is a YAML file (read by `recipe_file`); this module holds its models. Every field has one
owner: what stands here must not stand in the DeepSpeed config (`training.ds_config`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from inheritune_ds.errors import RecipeError
from inheritune_ds.parts import inherited_parts
from inheritune_ds.selection import parse

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, StringConstraints(min_length=1)]

RECIPE_PREFIX = "recipe:"
DURATION_PATTERN = re.compile(r"([0-9][0-9_]*)(K|M|B)? (steps|tokens|epochs)")
_SCALES = {None: 1, "K": 10**3, "M": 10**6, "B": 10**9}


class Part(BaseModel):
    """Base of every recipe model: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class EmbeddedSource(Part):
    """The running Python's own documentation: about 2 MB of English on every machine."""

    kind: Literal["embedded"]


class FilesSource(Part):
    """Local files: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz or .parquet."""

    kind: Literal["files"]
    paths: Annotated[list[Text], Field(min_length=1)]
    """Files or glob patterns, relative to the current folder; a pattern's matches are sorted."""
    text_field: Text = "text"
    """Field of a JSON record or parquet column that holds the document."""
    document_separator: Text | None = None
    """Cuts a .txt file into documents; the whole file is one document when left out."""


class HubSource(Part):
    """A dataset of the Hugging Face hub, by file pattern; loading scripts are never run."""

    kind: Literal["hub"]
    dataset: Text
    data_files: Text
    """Pattern inside the dataset repository, such as `data/*.parquet`."""
    revision: Text = "main"
    """A commit, tag or branch; resolved to a full commit and pinned in the token manifest."""
    split: Text = "train"
    text_field: Text = "text"
    download_gib: PositiveFloat | None = None
    """Size of the files to download, for the budget."""


Source = Annotated[EmbeddedSource | FilesSource | HubSource, Field(discriminator="kind")]


class TrainedTokenizer(Part):
    """A byte-level BPE trained on the corpus itself."""

    vocab_size: Annotated[int, Field(ge=257)]
    """Entries, the end-of-text token and the 256 bytes among them."""


class Corpus(Part):
    """The documents, their tokenizer and the held-out part."""

    sources: Annotated[list[Source], Field(min_length=1)]
    tokenizer: Text | TrainedTokenizer | None = None
    """Hub id or local folder, or `{vocab_size: n}` to train one; the reference's when left out."""
    max_tokens: PositiveInt | None = None
    """Stop after this many training tokens (documents in the order of the sources)."""
    validation_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of the documents that is held out, chosen by the hash of their text."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # noqa: S105 - no password
    """Integer type of the token files; `auto` is the smallest that the vocabulary fits."""


class Training(Part):
    """How long and in which batches."""

    seq_len: PositiveInt
    """Tokens a window."""
    global_batch_tokens: PositiveInt
    """Tokens an optimizer step, over all ranks and micro-steps."""
    duration: Annotated[str, StringConstraints(pattern=f"^{DURATION_PATTERN.pattern}$")]
    """`8 epochs`, `100_000 steps` or `250M tokens`."""

    @property
    def duration_parts(self) -> tuple[int, str]:
        """The duration as (count, unit), unit one of steps, tokens, epochs."""
        match = DURATION_PATTERN.fullmatch(self.duration)
        assert match is not None  # the field's pattern
        return int(match.group(1)) * _SCALES[match.group(2)], match.group(3)

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

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
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
        """What decides the numbers of a run: the recipe without names, logging and claims."""
        left_out = {"name", "description", "logging", "checkpoint", "published_claim"}
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


def is_local_path(name: str) -> bool:
    """Whether a model or tokenizer name means a folder: it exists, or it is written as a path."""
    path = PurePath(name)
    return path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
