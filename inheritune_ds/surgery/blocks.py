"""Where a model keeps its transformer blocks, and which part of the model a tensor is; found from the model itself."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inheritune_ds.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockList:
    """The one list of transformer blocks of a decoder.

    Attributes:
        path: Dotted name of the list, such as `model.layers` or `transformer.h`.
        depth: Number of blocks.
    """

    path: str
    depth: int

    def index_of(self, tensor_name: str) -> int | None:
        """Block that a tensor belongs to; None for embeddings, final norm and head."""
        if not tensor_name.startswith(f"{self.path}."):
            return None
        number = tensor_name[len(self.path) + 1 :].split(".", 1)[0]
        return int(number) if number.isdecimal() else None

    def rest(self, tensor_name: str) -> str:
        """The name of a block's tensor inside the block."""
        return tensor_name[len(self.path) + 1 :].split(".", 1)[1]


def find_blocks(model: "nn.Module", depth: int, path: str | None = None) -> BlockList:
    """Find the module list that holds `depth` blocks.

    Args:
        model: A causal language model, with real or meta tensors.
        depth: `num_hidden_layers` of its config.
        path: Where the list is, if a model of the same family has told; a short target may have other lists that are
            as long.

    Raises:
        SurgeryError: If no list, or more than one at the top, has that many entries.
    """
    from torch import nn

    paths = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if path is not None and path in paths:
        return BlockList(path, depth)
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise SurgeryError(
            f"the blocks of a {type(model).__name__} cannot be told: module lists with {depth} entries: {found}",
            allowed="a decoder-only model with one list of blocks",
        )
    return BlockList(outermost[0], depth)


_NORM = re.compile(r"(^|_)(layer)?_?norms?\d*(_|$)|layernorm|rmsnorm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|temporal|recurrent|ssm|conv", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|feed_?forward|ffn|(^|_)ff(_|$)|moe|experts?|router|(^|_)fc\d?|gate|dense|(^|_)w\d|^intermediate$|^output$",
    re.IGNORECASE,
)


def part_of(model: "PreTrainedModel", blocks: BlockList, name: str) -> str:
    """The part of a model that a tensor is (`parts.PARTS`); empty if it is none of them.

    The head and the token embeddings are what the model itself calls so. Inside a block, a child of the block is a
    norm, an attention (or what stands in its place) or an MLP by its name; norms inside an attention or an MLP belong
    to it.

    Args:
        model: Where the tensor is.
        blocks: Its blocks.
        name: Dotted name of the tensor in the model.
    """
    if blocks.index_of(name) is None:
        return _outer_part(model, name)
    child, _, _ = blocks.rest(name).partition(".")
    if _NORM.search(child):
        block = model.get_submodule(f"{blocks.path}.{blocks.index_of(name)}")
        return f"{_norm_owner(block, child)}_norms"
    if _ATTENTION.search(child):
        return "attention"
    return "mlp" if _MLP.search(child) else ""


def _outer_part(model: "PreTrainedModel", name: str) -> str:
    from torch import nn

    owner, _, _ = name.rpartition(".")
    module = model.get_submodule(owner)
    if module is model.get_input_embeddings():
        return "token_embeddings"
    if module is model.get_output_embeddings() or owner.startswith(_around_head(model)):
        return "head"
    if isinstance(module, nn.Embedding):
        return "position_embeddings"
    return "final_norm" if _NORM.search(owner.rpartition(".")[2]) or "Norm" in type(module).__name__ else ""


def _around_head(model: "PreTrainedModel") -> tuple[str, ...]:
    """Name of the module that holds the head's matrix and what belongs to it (BERT's); none if that is the model."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "")
    parent = path.rpartition(".")[0]
    return (parent,) if parent else ()


def _norm_owner(block: "nn.Module", norm: str) -> str:
    """Whether a block's norm is the attention's or the MLP's: by its name, else by its place among the norms."""
    if re.search(r"feed_?forward|ffn|mlp|moe|(^|_)ff_", norm):
        return "mlp"
    if re.search(r"attn|attention", norm) and not norm.startswith("post_attention"):
        return "attention"
    norms = [name for name, _ in block.named_children() if _NORM.search(name)]
    if norm.startswith("post_attention"):
        # With norms of its own around the MLP, this one follows the attention (Gemma 2, OLMo 2); else it precedes the
        # MLP (LLaMA).
        return "attention" if any(re.search(r"feed_?forward|ffn|mlp", name) for name in norms) else "mlp"
    return "mlp" if norms.index(norm) > 0 and len(norms) > 1 else "attention"
