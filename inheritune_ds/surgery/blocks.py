"""Find the transformer blocks of a model, and the part of the model that each tensor belongs to."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inheritune_ds.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockList:
    """The one list of transformer blocks of a decoder."""

    path: str
    """Dotted name of the list, such as `model.layers` or `transformer.h`."""
    depth: int

    def index_of(self, tensor_name: str) -> int | None:
        """Block of a tensor; None for embeddings, final norm and head."""
        if not tensor_name.startswith(f"{self.path}."):
            return None
        number = tensor_name[len(self.path) + 1 :].split(".", 1)[0]
        return int(number) if number.isdecimal() else None


def find_blocks(model: "nn.Module", depth: int, path: str | None = None) -> BlockList:
    """Find the module list that holds `depth` (`num_hidden_layers`) blocks.

    A short target may have other lists of that length: `path` is then known from a model of the same family.

    Raises:
        SurgeryError: If no list, or more than one at the top, has that many entries.
    """
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    paths = [name for name, module in lists.items() if len(module) == depth]
    if path is not None and path in paths:
        return BlockList(path, depth)
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise SurgeryError(
            f"the blocks of a {type(model).__name__} cannot be identified: module lists with {depth} entries: {found}",
            allowed="a decoder-only model with one list of blocks",
        )
    return BlockList(outermost[0], depth)


_NORM = re.compile(r"(^|_)(layer)?_?norms?\d*(_|$)|layernorm|rmsnorm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|_)att(_|$)", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|(^|_)ff(_|$)", re.IGNORECASE)
# Weaker evidence: layers used instead of attention, and components of an MLP that has no module of its own.
_MIXER = re.compile(r"mixer|mamba|temporal|recurrent|ssm|conv|lstm", re.IGNORECASE)
_UNITS = re.compile(r"experts?|router|(^|_)fc\d?|gate|dense|(^|_)w\d|^intermediate$|^output$", re.IGNORECASE)


def part_of(model: "PreTrainedModel", blocks: BlockList, name: str) -> str:
    """The part of a model (`config.inheritance.PARTS`) that a tensor belongs to; empty if none.

    The model itself names its head and its token embeddings; a norm of the embeddings belongs to them.
    Inside a block, the outermost module around the tensor that is a norm, an attention (or its substitute) or an MLP
    decides; norms inside an attention or an MLP belong to it.
    """
    index = blocks.index_of(name)
    if index is None:
        return _outer_part(model, blocks, name)
    block = model.get_submodule(f"{blocks.path}.{index}")
    inside = name.removeprefix(f"{blocks.path}.{index}.")
    place, kind = _around(block, inside.rpartition(".")[0])
    return f"{_norm_owner(block, place)}_norms" if kind == "norm" else kind


def _outer_part(model: "PreTrainedModel", blocks: BlockList, name: str) -> str:
    from torch import nn

    owner = name.rpartition(".")[0]
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
    """Name of the module around the head's matrix (BERT's); none if that is the model itself."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "")
    parent = path.rpartition(".")[0]
    return (parent,) if parent else ()


def _around(block: "nn.Module", path: str) -> tuple[str, str]:
    """Path and kind of the outermost module on a path in a block that is a norm, an attention or an MLP."""
    module, words = block, path.split(".") if path else []
    for end, word in enumerate(words, start=1):
        module = module.get_submodule(word)
        kind = _kind(word, module)
        if kind:
            return ("", "") if kind == "other" else (".".join(words[:end]), kind)
    return "", ""


def _kind(word: str, module: "nn.Module") -> str:
    """Kind of a module by its name and class; empty for a container of an attention or an MLP."""
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
    """Assign a block's norm to the attention or the MLP: by its name, else by its position among the norms."""
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
    # BERT's attention has a norm of its own.
    own = any(name.startswith("attention.") and _NORM.search(name.rpartition(".")[2]) for name in found)
    return "mlp" if own and "attention.self" in found else "attention"


def _named_owner(word: str, norms: list[str]) -> str:
    """Owner of a norm by its name; empty if the name is ambiguous."""
    if _MLP.search(word):
        return "mlp"
    if word[-1] in "12":
        return "attention" if word[-1] == "1" else "mlp"
    if word.startswith("post_attention"):
        # Where the MLP has norms of its own, this one follows the attention (Gemma 2, OLMo 2). Otherwise it precedes
        # the MLP (LLaMA); also beside a norm that is named after the attention (GLM-4).
        around_mlp = any(_MLP.search(name) for name in norms)
        return "attention" if around_mlp and not any("post_self_attn" in name for name in norms) else "mlp"
    return "attention" if _ATTENTION.search(word) or "operator" in word else ""
