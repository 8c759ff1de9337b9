"""Where a model keeps its transformer blocks, found from the model itself."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inheritune_ds.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

DROPOUT_KEY = re.compile(r"(^|_)(dropout|pdrop|dropout_p|dropout_prob|dropout_rate)($|_)")


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
        return int(tensor_name[len(self.path) + 1 :].split(".", 1)[0])

    def renamed(self, tensor_name: str, index: int) -> str:
        """The name of the same tensor in block `index`."""
        rest = tensor_name[len(self.path) + 1 :].split(".", 1)[1]
        return f"{self.path}.{index}.{rest}"


def find_blocks(model: "nn.Module", depth: int) -> BlockList:
    """Find the module list that holds `depth` blocks.

    Args:
        model: A causal language model, with real or meta tensors.
        depth: `num_hidden_layers` of its config.

    Raises:
        SurgeryError: If no list, or more than one at the top, has that many entries.
    """
    from torch import nn

    paths = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise SurgeryError(
            f"the blocks of a {type(model).__name__} cannot be told: module lists with {depth} entries: {found}",
            allowed="a decoder-only model with one list of blocks",
        )
    return BlockList(outermost[0], depth)


def cut_config(config: "PreTrainedConfig", selection: tuple[int, ...]) -> "PreTrainedConfig":
    """Copy a config for the selected blocks; the reference's own config is never touched.

    Every list with one entry per block (`layer_types`, `no_rope_layers`, ...) is cut with the selection.
    """
    values = config.to_dict()
    depth = config.num_hidden_layers
    for key, value in values.items():
        if isinstance(value, list) and len(value) == depth and "layer" in key:
            values[key] = [value[index] for index in selection]
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[depth_key] = len(selection)
    return type(config).from_dict(values)


def set_dropout(config: "PreTrainedConfig", dropout: float) -> None:
    """Write one dropout probability to every dropout key of a config (`attn_pdrop`, `attention_dropout`, ...)."""
    for key, value in config.to_dict().items():
        if isinstance(value, int | float) and not isinstance(value, bool) and DROPOUT_KEY.search(key):
            setattr(config, key, dropout)
