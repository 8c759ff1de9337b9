"""The models of a recipe: a shape, the reference, and the target's selection and parts."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, field_validator, model_validator

from inheritune_ds.config.fields import ConfigModel, Text, as_value_error, is_local_path
from inheritune_ds.config.inheritance import inherited_parts
from inheritune_ds.config.selection import parse

RECIPE_PREFIX = "recipe:"


class Shape(ConfigModel):
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


class Reference(ConfigModel):
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


class Target(ConfigModel):
    """The model that is trained: selected blocks of the reference, or a shape from scratch."""

    select: Text | None = None
    """Which blocks of the reference are kept, such as `first:13` ([surgery.md](surgery.md#selections))."""
    inherit: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Text], Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
    ] = "all"
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
            as_value_error(lambda: parse(select))
        return select

    @field_validator("inherit")
    @classmethod
    def _known(cls, inherit: str | list[str]) -> str | list[str]:
        as_value_error(lambda: inherited_parts(inherit))
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
