"""The values of a target's tensors: mapped from a source's file, converted, or fresh."""

import copy

import torch

from inheritune_ds.surgery.half_width import leading_half
from inheritune_ds.surgery.load import quiet_transformers
from inheritune_ds.surgery.meta_model import MetaModel
from inheritune_ds.surgery.tensor_map import SourceModel, TensorCopy, TensorMap
from inheritune_ds.surgery.weight_files import Span


class TargetValues:
    """Reads, converts or initializes the tensors of a target."""

    def __init__(self, skeleton: MetaModel, plan: TensorMap, *, half: bool, seed: int) -> None:
        self.skeleton, self.plan, self.half, self._seed = skeleton, plan, half, seed
        self._fresh: dict[str, torch.Tensor] = {}
        self.sizes = {graft.name: self.meta(graft).nbytes for graft in plan.grafts}

    def meta(self, graft: TensorCopy) -> torch.Tensor:
        """A tensor of the target on the meta device."""
        if graft.source is None:
            shape, dtype = self.skeleton.shapes[graft.module_name], self.skeleton.dtype
        else:
            found = graft.source.files.meta(graft.source_name)
            shape = self.skeleton.shapes[graft.module_name] if self.half else tuple(found.shape)
            dtype = self._dtype(graft.source, found)
        return torch.empty(shape, dtype=dtype, device="meta")

    def span(self, graft: TensorCopy) -> Span | None:
        """Bytes in a source's file that equal a tensor of the target; None if it is converted or fresh."""
        if graft.source is None or self.half:
            return None
        found = graft.source.files.meta(graft.source_name)
        return graft.source.files.span(graft.source_name) if self._dtype(graft.source, found) == found.dtype else None

    def of(self, graft: TensorCopy) -> torch.Tensor:
        """A tensor of the target."""
        if graft.source is None:
            return self._fresh_tensors()[graft.module_name]
        tensor = graft.source.files.tensor(graft.source_name)
        if self.half:
            tensor = leading_half(tensor, self.skeleton.shapes[graft.module_name], graft.module_name)
        return tensor.to(self._dtype(graft.source, tensor))

    def _dtype(self, source: SourceModel, tensor: torch.Tensor) -> torch.dtype:
        """The source's dtype; if two sources differ, the dtype that holds both exactly."""
        if tensor.is_floating_point() and source.dtype != self.skeleton.dtype:
            return torch.promote_types(tensor.dtype, self.skeleton.dtype)
        return tensor.dtype

    def _fresh_tensors(self) -> dict[str, torch.Tensor]:
        """Initialize a whole model, so that values do not depend on which parts are used."""
        if not self._fresh:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(self._seed)
            with quiet_transformers():
                config = copy.deepcopy(self.skeleton.config)
                model = AutoModelForCausalLM.from_config(config, dtype=self.skeleton.dtype)
            self._fresh = dict(model.state_dict())
        return self._fresh

    def drop_fresh(self) -> None:
        """Free the memory of fresh tensors."""
        self._fresh = {}
