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
_ATTENTION = re.compile(r"attn|attention|(^|_)att(_|$)", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|(^|_)ff(_|$)", re.IGNORECASE)
# Names that say less: what stands in the place of an attention, and pieces that stand for a whole MLP.
_MIXER = re.compile(r"mixer|mamba|temporal|recurrent|ssm|conv|lstm", re.IGNORECASE)
_UNITS = re.compile(r"experts?|router|(^|_)fc\d?|gate|dense|(^|_)w\d|^intermediate$|^output$", re.IGNORECASE)


def part_of(model: "PreTrainedModel", blocks: BlockList, name: str) -> str:
    """The part of a model that a tensor is (`parts.PARTS`); empty if it is none of them.

    The head and the token embeddings are what the model itself calls so; a norm of the embeddings belongs to them.
    Inside a block, the outermost module around the tensor that is a norm, an attention (or what stands in its place)
    or an MLP decides; norms inside an attention or an MLP belong to it.

    Args:
        model: Where the tensor is.
        blocks: Its blocks.
        name: Dotted name of the tensor in the model.
    """
    index = blocks.index_of(name)
    if index is None:
        return _outer_part(model, blocks, name)
    block = model.get_submodule(f"{blocks.path}.{index}")
    place, kind = _around(block, blocks.rest(name).rpartition(".")[0])
    return f"{_norm_owner(block, place)}_norms" if kind == "norm" else kind


def _outer_part(model: "PreTrainedModel", blocks: BlockList, name: str) -> str:
    from torch import nn

    owner, _, _ = name.rpartition(".")
    module = model.get_submodule(owner)
    if module is model.get_input_embeddings():
        return "token_embeddings"
    if module is model.get_output_embeddings() or owner.startswith(_around_head(model)):
        return "head"
    if isinstance(module, nn.Embedding):
        return "position_embeddings"
    if not (_NORM.search(owner.rpartition(".")[2]) or "Norm" in type(module).__name__):
        return ""
    # LFM calls its final norm that of the embeddings; it comes after the blocks.
    order = [path for path, _ in model.named_modules()]
    before = order.index(owner) < order.index(blocks.path)
    return "token_embeddings" if before and "embed" in owner else "final_norm"


def _around_head(model: "PreTrainedModel") -> tuple[str, ...]:
    """Name of the module that holds the head's matrix and what belongs to it (BERT's); none if that is the model."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "")
    parent = path.rpartition(".")[0]
    return (parent,) if parent else ()


def _around(block: "nn.Module", path: str) -> tuple[str, str]:
    """The outermost module around a place in a block that is a norm, an attention or an MLP: its path and kind."""
    module, words = block, path.split(".") if path else []
    for end, word in enumerate(words, start=1):
        module = module.get_submodule(word)
        kind = _kind(word, module)
        if kind:
            return ("", "") if kind == "other" else (".".join(words[:end]), kind)
    return "", ""


def _kind(word: str, module: "nn.Module") -> str:
    """What a module is by its name and class; empty for a container of an attention or an MLP."""
    inside = [name for name, _ in module.named_children()]
    type_name = type(module).__name__
    if _NORM.search(word) or (not inside and "Norm" in type_name):
        return "" if any(_ATTENTION.search(name) for name in inside) else "norm"  # DBRX: norm_attn_norm
    if _ATTENTION.search(word):
        return "attention"
    if _MLP.search(word):
        return "mlp"
    if _MIXER.search(word):
        return "mlp" if re.search(r"(MLP|MoE)$", type_name) else "attention"  # Nemotron-H: all are mixers
    if _UNITS.search(word):
        return "mlp"
    return "" if any(_ATTENTION.search(name) or _MLP.search(name) for name in inside) else "other"


def _norm_owner(block: "nn.Module", norm: str) -> str:
    """Whether a block's norm is the attention's or the MLP's: by its name, else by its place among the norms."""
    found = {name: _around(block, name) for name, _ in block.named_modules()}
    norms = [name for name, (place, kind) in found.items() if kind == "norm" and place == name]
    kinds = {kind for _, kind in found.values()}
    named = _named_owner(norm.rpartition(".")[2], norms)
    if named:
        return named
    if not {"attention", "mlp"} <= kinds:
        return "attention" if "attention" in kinds else "mlp"
    if len(norms) > 1:
        return "mlp" if norms.index(norm) > 0 else "attention"
    # An attention as BERT's that has its own norm needs no other.
    own = any(name.startswith("attention.") and _NORM.search(name.rpartition(".")[2]) for name in found)
    return "mlp" if own and "attention.self" in found else "attention"


def _named_owner(word: str, norms: list[str]) -> str:
    """Whose a norm is by its name; empty if that does not say."""
    if _MLP.search(word):
        return "mlp"
    if word[-1] in "12":
        return "attention" if word[-1] == "1" else "mlp"
    if word.startswith("post_attention"):
        # With norms of its own around the MLP, this one follows the attention (Gemma 2, OLMo 2); else it precedes the
        # MLP (LLaMA), and so it does beside one that follows the attention by name (GLM-4).
        around_mlp = any(_MLP.search(name) for name in norms)
        return "attention" if around_mlp and not any("post_self_attn" in name for name in norms) else "mlp"
    return "attention" if _ATTENTION.search(word) or "operator" in word else ""
