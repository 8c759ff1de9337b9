"""The values of a target's tensors: mapped from a source's file, converted where two sources differ, or fresh."""

import copy

import torch

from inheritune_ds.surgery.half_width import leading_half
from inheritune_ds.surgery.load import quiet_transformers
from inheritune_ds.surgery.meta_model import MetaModel
from inheritune_ds.surgery.tensor_map import SourceModel, TensorCopy, TensorMap
from inheritune_ds.surgery.weight_files import Span


class TargetValues:
    """Gives the values of the target's tensors: mapped from a source, converted where needed, or fresh."""

    def __init__(self, skeleton: MetaModel, plan: TensorMap, *, half: bool, seed: int) -> None:
        self._skeleton, self._half, self._seed = skeleton, half, seed
        self._fresh: dict[str, torch.Tensor] = {}
        self.sizes = {graft.name: _bytes(self.meta(graft)) for graft in plan.grafts}

    def meta(self, graft: TensorCopy) -> torch.Tensor:
        """Type and shape of a tensor of the target."""
        if graft.source is None:
            shape, dtype = self._skeleton.shapes[graft.module_name], self._skeleton.dtype
        else:
            found = graft.source.files.meta(graft.source_name)
            shape = self._skeleton.shapes[graft.module_name] if self._half else tuple(found.shape)
            dtype = self._dtype(graft.source, found)
        return torch.empty(shape, dtype=dtype, device="meta")

    def span(self, graft: TensorCopy) -> Span | None:
        """Where a source's file holds exactly the bytes of a tensor of the target; None if they must be made."""
        if graft.source is None or self._half:
            return None
        found = graft.source.files.meta(graft.source_name)
        return graft.source.files.span(graft.source_name) if self._dtype(graft.source, found) == found.dtype else None

    def of(self, graft: TensorCopy) -> torch.Tensor:
        """A tensor of the target."""
        if graft.source is None:
            return self._fresh_tensors()[graft.module_name]
        tensor = graft.source.files.tensor(graft.source_name)
        if self._half:
            tensor = leading_half(tensor, self._skeleton.shapes[graft.module_name], graft.module_name)
        return tensor.to(self._dtype(graft.source, tensor))

    def _dtype(self, source: SourceModel, tensor: torch.Tensor) -> torch.dtype:
        """A source's own type; where two sources have different ones, that which holds both exactly."""
        if tensor.is_floating_point() and source.dtype != self._skeleton.dtype:
            return torch.promote_types(tensor.dtype, self._skeleton.dtype)
        return tensor.dtype

    def _fresh_tensors(self) -> dict[str, torch.Tensor]:
        """A whole model as its architecture initialises it: the same values whatever part of it is used."""
        if not self._fresh:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(self._seed)
            with quiet_transformers():
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self._skeleton.config), dtype=self._skeleton.dtype
                )
            self._fresh = dict(model.state_dict())
        return self._fresh

    def drop_fresh(self) -> None:
        """Give the memory of fresh tensors back."""
        self._fresh = {}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
