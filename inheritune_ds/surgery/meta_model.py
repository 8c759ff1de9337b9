"""A model without its weights: modules on the meta device, filled from checkpoint tensors part by part.

It answers which tensors a model has, their names in a file, where its blocks are, and whether two blocks compute the
same. `verify` fills single modules, runs them and empties them again.

transformers loads only whole models, so this module alone calls four of its internal functions: the key mapping
between files and modules (per-expert tensors of a file are one fused parameter of the module, prefixes differ, old
names are renamed), its reverse, and the loader behind `from_pretrained`.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inheritune_ds.errors import SurgeryError
from inheritune_ds.storage.hub import first_line
from inheritune_ds.surgery.blocks import find_blocks
from inheritune_ds.surgery.config_cut import num_blocks
from inheritune_ds.surgery.load import load_config, quiet_transformers
from inheritune_ds.surgery.weight_files import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class MetaModel:
    """A causal language model on the meta device; the config is copied, `path` is as in `find_blocks`.

    Raises:
        SurgeryError: If no causal language model can be built from the config, or its blocks cannot be identified or
            share weights.
    """

    def __init__(
        self, config: "PreTrainedConfig", dtype: torch.dtype = torch.float32, *, path: str | None = None
    ) -> None:
        check_decoder(config)
        self.config = copy.deepcopy(config)
        self.dtype = dtype
        self.model = _build(self.config, dtype)
        self.blocks = find_blocks(self.model, num_blocks(self.config), path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        for name, source in self.tied.items():
            if self.blocks.index_of(name) is not None or self.blocks.index_of(source) is not None:
                raise SurgeryError(
                    f"a {self.config.model_type} model cannot be cut: its blocks share weights ({name} is {source})",
                    allowed="a model in which every block has weights of its own",
                )

    @property
    def required(self) -> set[str]:
        """Names of the tensors that a file must hold: all but those tied to another."""
        return self.shapes.keys() - self.tied.keys()

    def block(self, index: int) -> nn.Module:
        """Module of one block."""
        return self.model.get_submodule(f"{self.blocks.path}.{index}")

    def module_names(self, file_names: Iterable[str]) -> dict[str, str]:
        """Map names in a file to names in the model, also for tensors that the model lacks."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        prefix, known = self.model.base_model_prefix, self.model.state_dict()

        def rename(name: str) -> str:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed, _ = rename_source_key(name, [], [], prefix, known)
            return renamed

        return {name: rename(name) for name in file_names}

    def is_ignored(self, module_name: str) -> bool:
        """Whether the model's class ignores a tensor of this name in a file, as older versions saved it."""
        patterns = set(self.model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001 - no public name
        patterns |= {
            r"rotary_emb\.inv_freq",
            r"(^|\.)position_ids$",
            r"\.attn\.((attention\.)?(masked_)?bias|causal_mask)$",
        }
        return any(re.search(pattern, module_name) for pattern in patterns)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load tensors, by name in the file, into their modules; of meta tensors only names and shapes are checked.

        Raises:
            SurgeryError: If a tensor has no place or another shape, or a part of a fused parameter is missing.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        meta = all(tensor.device.type == "meta" for tensor in tensors.values())
        load_config = LoadStateDictConfig(
            ignore_mismatched_sizes=True,
            device_map={"": "meta" if meta else "cpu"},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),  # noqa: SLF001 - no public name
            weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type] # all are of the two
        )
        try:
            with quiet_transformers():
                info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), load_config)
        except Exception as error:  # noqa: BLE001 - a family's own conversion may raise anything
            raise SurgeryError(
                f"the weights of a {self.config.model_type} model cannot be loaded part by part: {first_line(error)}",
                allowed="a model whose weights are converted block by block",
            ) from None
        self.model.tie_weights(recompute_mapping=False)
        problems = [f"{name} has no place in the model" for name in sorted(info.unexpected_keys)]
        problems += [
            f"{name} has shape {list(found)}, the config asks for {list(wanted)}"
            for name, found, wanted in sorted(info.mismatched_keys)
        ]
        problems += [f"{name}: {reason}" for name, reason in sorted(info.conversion_errors.items())]
        problems += list(info.error_msgs)
        if problems:
            raise contradiction(problems)

    def fill(self, tensors: Mapping[str, torch.Tensor], wanted: Callable[[str], bool]) -> None:
        """Load tensors, by name in the file, and compute the `wanted` buffers that no file holds."""
        from transformers import initialization

        self.load(tensors)
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            if wanted(name) and buffer.device.type == "meta":
                owner, _, leaf = name.rpartition(".")
                empty = torch.empty_like(buffer, device="cpu")
                self.model.get_submodule(owner).register_buffer(leaf, empty, persistent=False)
        with torch.no_grad(), initialization.guard_torch_init_functions():
            for name, module in self.model.named_modules():
                own = [*dict(module.named_buffers(recurse=False)), *dict(module.named_parameters(recurse=False))]
                # A module without tensors of its own may compute the buffers of its submodules.
                if all(wanted(f"{name}.{leaf}" if name else leaf) for leaf in own):
                    # Loaded tensors carry a mark of their own; the module's mark is from an earlier fill.
                    vars(module).pop("_is_hf_initialized", None)
                    self._owner(name)._initialize_weights(module)  # noqa: SLF001 - no public name

    def _owner(self, name: str) -> "PreTrainedModel":
        """Innermost model around a module: its class computes the module's buffers."""
        from transformers import PreTrainedModel

        owner = self.model
        module: nn.Module = owner
        for part in name.split(".") if name else []:
            module = module.get_submodule(part)
            owner = module if isinstance(module, PreTrainedModel) else owner
        return owner


def as_in_files(model: "PreTrainedModel", tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert (meta) tensors of a model to their form in a file: the file's names, fused parameters split."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def mapped_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and saved buffers of the model in a folder, in the model's order; tied ones under all their names.

    A tensor that a file holds as it is is mapped from there, in the file's type. Fused parameters, and all parameters
    of a model whose files have several types (converted to fp32), are in memory, one block at a time.

    Raises:
        SurgeryError: If the files hold a tensor that the model has no place for.
    """
    files = WeightFiles(folder, str(folder))
    dtypes = {files.meta(name).dtype for name in files}
    model = MetaModel(load_config(folder), dtypes.pop() if len(dtypes) == 1 else torch.float32)
    modules, places = model.module_names(files), {name: place for place, name in enumerate(model.shapes)}
    in_order = sorted(files, key=lambda name: places.get(modules[name], 0))
    for _, names in groupby(in_order, lambda name: model.blocks.index_of(modules[name])):
        model.load({name: files.tensor(name) for name in names})
        state = model.model.state_dict()
        nn.Module.to(model.model, "meta")
        for name in list(state):
            tensor = state.pop(name)  # the model's tensor lives as long as the caller uses it
            if not tensor.is_meta:
                yield name, tensor


def contradiction(problems: list[str]) -> SurgeryError:
    """The error for weights that do not match their config."""
    shown = "\n".join(f"    {problem}" for problem in problems[:5])
    more = f"\n    and {len(problems) - 5} more" if len(problems) > 5 else ""
    return SurgeryError(
        f"the config contradicts the weights:\n{shown}{more}",
        allowed="weights and config.json of the same model",
        action="download both from the same place again; missing weights are never filled in at random",
    )


def check_decoder(config: "PreTrainedConfig") -> None:
    """Raise a SurgeryError unless a config describes a decoder-only causal language model that can be cut."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    shared = getattr(config, "num_kv_shared_layers", 0)
    indexers = getattr(config, "indexer_types", None) or ()
    reasons = {
        "it is of an encoder-decoder family": getattr(config, "is_encoder_decoder", False)
        or any(
            hasattr(config, f"{count}encoder_layers") and hasattr(config, f"{count}decoder_layers")
            for count in ("", "num_")
        ),
        "transformers has no causal language model for it": type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING,
        f"it is made of several models ({', '.join(sorted(config.sub_configs))})": _is_composite(config),
        "its weights are quantized (quantization_config)": getattr(config, "quantization_config", None) is not None,
        f"blocks share keys and values across layers (num_kv_shared_layers is {shared})": bool(shared),
        "blocks reuse the key selection of an earlier block (indexer_types holds 'shared')": "shared" in indexers,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise SurgeryError(
            f"a {config.model_type} model cannot be cut: {reason}",
            allowed="a decoder-only causal language model of the installed transformers",
        )


def _is_composite(config: "PreTrainedConfig") -> bool:
    try:
        return config.get_text_config() is not config
    except ValueError:  # it has several (MusicGen)
        return True


def _build(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - model classes raise errors of many kinds
        raise SurgeryError(
            f"no causal language model can be built from this {config.model_type} config: {first_line(error)}",
            allowed="a decoder-only model, such as gpt2 or llama",
        ) from None
    model.eval()
    return model


def check_same_blocks(reference: MetaModel, block: int, target: MetaModel, place: int) -> None:
    """Refuse a block that would compute something else at its new index.

    Every module of the two blocks must have the same class, tensor shapes and settings. Dropout may differ, and a
    number that equals the block's index or the model's depth in both.

    Raises:
        SurgeryError: Naming the setting that differs.
    """
    ours, theirs = dict(target.block(place).named_modules()), dict(reference.block(block).named_modules())
    kind, depths = reference.config.model_type, (reference.blocks.depth, target.blocks.depth)
    for name in [*theirs, *ours]:
        if name not in ours or name not in theirs or type(ours[name]) is not type(theirs[name]):
            was = type(theirs[name]).__name__ if name in theirs else "nothing"
            now = type(ours[name]).__name__ if name in ours else "nothing"
            raise _place_error(kind, block, place, f"{name or 'the block'} is a {was} there and a {now} here")
    for name, module in theirs.items():
        before, after = _settings(module), _settings(ours[name])
        for key in sorted({*before, *after}):
            old, new = before.get(key), after.get(key)
            if old == new or (old, new) in ((block, place), depths):
                continue
            if not (_is_of_config(key, old, reference) and _is_of_config(key, new, target)):
                where = f"{name}.{key}" if name else key
                raise _place_error(kind, block, place, f"{where} is {old!r} there and {new!r} here")


def _is_of_config(key: str, value: Any, skeleton: MetaModel) -> bool:
    """Whether a module's setting is a list of the whole model under the config's name (GPT-Neo)."""
    return isinstance(value, list | tuple) and bool(value == getattr(skeleton.config, key, None))


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module, and the shapes of its tensors."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | list | type(None))
        and not key.startswith("_")
        and "drop" not in key
    }
    if isinstance(module, nn.Dropout):
        del plain["p"]  # the target's dropout is the recipe's
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain | {key: list(tensor.shape) for key, tensor in named}


def _place_error(kind: str, block: int, place: int, difference: str) -> SurgeryError:
    return SurgeryError(
        f"{kind}: block {block} of the reference would not compute the same as block {place} of the target: "
        f"{difference}. Its computation depends on its index, and the config cannot express the selection",
        allowed="a selection that keeps every block at its index (first:n), or moves blocks by whole periods of the "
        "model",
    )
