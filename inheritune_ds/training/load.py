"""Load a target to be trained: whole, or under ZeRO-3 only this rank's part of each parameter."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inheritune_ds.checkpoints.reshard import stage_3_pieces
from inheritune_ds.config.deepspeed_keys import without_ours
from inheritune_ds.surgery.load import load_config, load_model
from inheritune_ds.surgery.meta_model import MetaModel, contradiction, mapped_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_target(folder: Path, ds_config: Mapping[str, Any]) -> "PreTrainedModel":
    """Load the target in a folder for the engine of a resolved DeepSpeed config.

    Returns:
        A model in fp32; under ZeRO-3 one whose parameters DeepSpeed has partitioned, in the precision of the passes,
        and whose buffers are on this rank's device.

    Raises:
        SurgeryError: If the weights are not those that the config asks for.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return load_model(folder, dtype="float32")
    meta = MetaModel(load_config(folder))
    meta.fill({}, lambda _: True)  # computes the buffers that no file holds
    model = meta.model
    _partition(meta, folder, without_ours(ds_config))
    model.tie_weights(recompute_mapping=False)
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lacking:
        raise contradiction([f"{name} is in no file of {folder}" for name in lacking])
    return model


def _partition(meta: MetaModel, folder: Path, ds_config: Mapping[str, Any]) -> None:
    """Replace each parameter of a model on the meta device by a partitioned one with this rank's values.

    As `deepspeed.zero.Init` does it with a whole module, but without whole parameters: of each, memory for all elements
    is reserved for a moment, and only this rank's are read, from the mapped file. Nothing is sent between ranks.
    """
    import deepspeed

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config)
    device = init.local_device
    for buffer in meta.model.buffers():
        if not buffer.is_meta:
            buffer.data = buffer.data.to(device)
    for name, values in mapped_tensors(folder):
        if name in meta.tied:
            continue
        owner, _, leaf = name.rpartition(".")
        module = meta.model.get_submodule(owner)
        empty = getattr(module, leaf)
        if not isinstance(empty, nn.Parameter):
            setattr(module, leaf, values.to(device, empty.dtype))
            continue
        parameter: Any = nn.Parameter(torch.empty(values.shape, dtype=init.dtype, device=device))
        for piece in stage_3_pieces({name: values.shape}, init.rank, init.dp_world_size):
            own = slice(piece.start, piece.start + piece.numel)
            parameter.data.view(-1)[own].copy_(values.reshape(-1)[own])
        setattr(module, leaf, parameter)
        init._convert_to_deepspeed_param(parameter)  # noqa: SLF001 - its public ways send whole parameters
        parameter.partition()
