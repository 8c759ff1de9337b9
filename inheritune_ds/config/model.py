"""The models of a recipe: a shape, the reference, and the target."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, field_validator, model_validator

from inheritune_ds.config.fields import ConfigModel, Text, as_value_error, is_local_path
from inheritune_ds.config.inheritance import inherited_parts
from inheritune_ds.config.selection import parse

RECIPE_PREFIX = "recipe:"


class Shape(ConfigModel):
    """The architecture of a model, in Hugging Face's config keys; other families than these two need no shape."""

    model_type: Literal["gpt2", "llama"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    intermediate_size: PositiveInt | None = None
    """Units of the MLP; default for gpt2: 4 x hidden_size; required for llama."""
    num_key_value_heads: PositiveInt | None = None
    """Heads that share keys and values (llama); default: num_attention_heads."""
    tie_word_embeddings: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    """llama only."""
    rope_theta: PositiveFloat = 10000.0
    """llama only."""
    scale_attn_by_inverse_layer_idx: bool = False
    """gpt2 only: attention logits of block i divided by i + 1, as the paper's GPT-2 track does."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        if self.model_type == "llama" and self.intermediate_size is None:
            raise ValueError("intermediate_size is required for model_type llama")
        if self.model_type == "gpt2" and not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true for model_type gpt2")
        shared = self.num_key_value_heads or heads
        if heads % shared:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}")
        return self


class Reference(ConfigModel):
    """The pretrained model that blocks are inherited from."""

    model: Text
    """Hub id, local folder, or `recipe:NAME` (trained first if missing)."""
    revision: Text = "main"
    """Hub only: a commit, tag or branch; resolved to a full commit and pinned in the run folder."""
    shape: Shape | None = None
    """Hub only: allows a budget without a network; checked against config.json."""
    download_gib: PositiveFloat | None = None
    """Hub only: size of the files to download, for the budget."""

    @property
    def recipe_name(self) -> str | None:
        """The name after `recipe:`; None for a hub id or a folder."""
        return self.model.removeprefix(RECIPE_PREFIX) if self.model.startswith(RECIPE_PREFIX) else None

    @field_validator("model")
    @classmethod
    def _normalize(cls, model: str) -> str:
        """Give a folder one spelling: `models//llama/` is `models/llama`."""
        if model.startswith(RECIPE_PREFIX):
            return model
        return re.sub(r"/(\.?/)+", "/", model).removesuffix("/.").rstrip("/") or "/"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recipe_name is not None and self.shape is not None:
            raise ValueError(f"shape is owned by {self.model}: remove it here")
        if self.revision != "main" and (self.recipe_name is not None or is_local_path(self.model)):
            raise ValueError(f"revision {self.revision} is for models of the hub: remove it for {self.model}")
        return self


class Target(ConfigModel):
    """The model that is trained: selected blocks of the reference, or a shape from scratch."""

    select: Text | None = None
    """Blocks of the reference to keep, such as `first:13` ([surgery.md](surgery.md#selections))."""
    inherit: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Text], Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
    ] = "all"
    """Parts of the reference to inherit: a preset or a list of parts ([surgery.md](surgery.md#inheritance))."""
    width: Literal["full", "half"] = "full"
    """`half`: the first half of the heads and MLP units of every kept block, the paper's half-width baseline."""
    block_scores: Text | None = None
    """JSON file with the measured scores for `select: by:NAME:n`."""
    shape: Shape | None = None
    """Architecture of a model trained from scratch; only without a reference."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Replaces the reference's value of every dropout key of the model's config."""

    @field_validator("select", mode="before")
    @classmethod
    def _from_number(cls, select: Any) -> Any:
        """YAML reads a list of one block as a number."""
        return str(select) if isinstance(select, int) and not isinstance(select, bool) else select

    @field_validator("select")
    @classmethod
    def _check_select(cls, select: str | None) -> str | None:
        if select is not None:
            as_value_error(lambda: parse(select))
        return select

    @field_validator("inherit")
    @classmethod
    def _check_inherit(cls, inherit: str | list[str]) -> str | list[str]:
        as_value_error(lambda: inherited_parts(inherit))
        return inherit

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        if self.inherits_moments and self.width != "full":
            raise ValueError("inherit: moments needs width: full, since the state of half a matrix is not kept")
        if self.block_scores is not None and (self.select is None or parse(self.select).kind != "by"):
            raise ValueError(f"block_scores is for select: by:NAME:n: remove it with select: {self.select}")
        return self

    @property
    def inherits_moments(self) -> bool:
        """Whether the optimizer state comes from the reference, too."""
        return isinstance(self.inherit, str) and self.inherit.strip() == "moments"

    @property
    def inherits_nothing(self) -> bool:
        """Whether all weights are random."""
        return not inherited_parts(self.inherit)
