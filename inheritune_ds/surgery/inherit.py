"""Build the target: selected blocks of the reference with its embeddings, final norm and head.

Everything is inherited by default (token and position embeddings, blocks, final norm, head); the
authors' scripts leave some of them random. With `inherit: none` the target has the same shape and
random values. The report lists every tensor of the target with its source.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.errors import CorpusError, SurgeryError
from inheritune_ds.files import read_json, storage_errors, write_json
from inheritune_ds.publish import describe_files, has_files, staged
from inheritune_ds.recipe import Target
from inheritune_ds.surgery.blocks import BlockList, cut_config, find_blocks, set_dropout
from inheritune_ds.surgery.reference import ReferenceModel, build_config, load_config, load_model
from inheritune_ds.surgery.selection import select_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
REPORT = "inheritance.json"


@dataclass(frozen=True)
class TargetModel:
    """A target on disk: a Hugging Face folder and its inheritance report."""

    folder: Path
    report: Mapping[str, Any]


def find_target(folder: Path, identity: Mapping[str, Any]) -> TargetModel | None:
    """The finished target in `folder`, if it was built for the same `identity`; files checked by size."""
    manifest, report = read_json(folder / MANIFEST), read_json(folder / REPORT)
    if manifest is None or report is None or manifest["identity"] != identity:
        return None
    return TargetModel(folder, report) if has_files(folder, manifest["files"]) else None


def build_target(  # noqa: PLR0913 - the parts that make a target, each by name
    target: Target,
    *,
    reference: ReferenceModel | None,
    reference_config: "PreTrainedConfig | None",
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    folder: Path,
    identity: Mapping[str, Any],
) -> TargetModel:
    """Build the target and publish it as a Hugging Face folder.

    Args:
        target: From the recipe.
        reference: Weights to inherit from; None with `inherit: none` or from scratch.
        reference_config: Config the target's is cut from; None from scratch.
        tokenizer: Travels along; its special ids go into the config.
        seed: Of the random values of fresh tensors.
        folder: Where the target goes.
        identity: Recorded, so that `find_target` knows whose it is.

    Raises:
        SurgeryError: If the selection or the model does not fit.
        CorpusError: If the tokenizer has ids that the model has no embedding for.
    """
    import torch

    if reference_config is None:
        assert target.shape is not None  # the recipe's own check
        selection: tuple[int, ...] = ()
        config = build_config(target.shape)
    else:
        selection = select_blocks(target.select or "", reference_config.num_hidden_layers)
        config = cut_config(reference_config, selection)
    set_dropout(config, target.dropout)
    check_vocabulary(len(tokenizer), config.vocab_size)
    if reference is None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.use_cache = True  # a wish of generation; the trainer itself never keeps a cache
    torch.manual_seed(seed)
    model, inherited = _build_model(config, reference, selection)
    report = _report(
        model=model,
        blocks=find_blocks(model, config.num_hidden_layers),
        inherited=inherited,
        selection=selection,
        reference=reference,
        preset=target.inherit if reference else "none",
    )
    with staged(folder) as temporary, storage_errors(folder):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / REPORT, report)
        _prove(temporary, model)
        write_json(temporary / MANIFEST, {"identity": identity, "files": describe_files(temporary)})
    return TargetModel(folder, report)


def _build_model(
    config: "PreTrainedConfig", reference: ReferenceModel | None, selection: tuple[int, ...]
) -> "tuple[PreTrainedModel, dict[str, str]]":
    """Build the target with its values; return it with target tensor -> reference tensor."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = load_model(reference.folder) if reference else None
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=source.dtype if source else torch.float32)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise SurgeryError(
            f"no causal language model can be built from a {config.model_type} config: {reason}",
            allowed="a decoder-only model, such as gpt2 or llama",
        ) from None
    if source is None:
        model.generation_config = GenerationConfig.from_model_config(config)
        return model, {}
    model.generation_config = source.generation_config
    return model, _copy_tensors(source, model, selection, reference_depth=source.config.num_hidden_layers)


def check_vocabulary(tokenizer_size: int, model_size: int) -> None:
    """Refuse a tokenizer with more entries than the model has embeddings.

    Raises:
        CorpusError: Naming both sizes.
    """
    if tokenizer_size > model_size:
        raise CorpusError(
            f"corpus.tokenizer has {tokenizer_size} entries, the model's vocabulary {model_size}",
            allowed=f"a tokenizer with at most {model_size} entries",
            action="use the reference's own tokenizer (leave corpus.tokenizer out) or a larger vocab_size",
        )


def _copy_tensors(
    source: "PreTrainedModel", model: "PreTrainedModel", selection: tuple[int, ...], *, reference_depth: int
) -> dict[str, str]:
    """Copy every tensor of the target from the reference; return target name -> reference name."""
    import torch

    origin = find_blocks(source, reference_depth)
    own = find_blocks(model, len(selection))
    available = source.state_dict()
    names: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            index = own.index_of(name)
            source_name = name if index is None else origin.renamed(name, selection[index])
            if source_name not in available or available[source_name].shape != tensor.shape:
                raise SurgeryError(f"the reference has no tensor {source_name} of shape {tuple(tensor.shape)}")
            tensor.copy_(available[source_name])
            names[name] = source_name
    return names


def _report(  # noqa: PLR0913 - one field each
    *,
    model: "PreTrainedModel",
    blocks: BlockList,
    inherited: Mapping[str, str],
    selection: tuple[int, ...],
    reference: ReferenceModel | None,
    preset: str,
) -> dict[str, Any]:
    tensors = [
        {
            "name": name,
            "block": blocks.index_of(name),
            "inherited": name in inherited,
            "source": inherited.get(name),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": tensor_sha256(tensor),
        }
        for name, tensor in model.state_dict().items()
    ]
    counts = parameter_counts(model, blocks)
    return {
        "reference": reference.identity if reference else None,
        "inherit": preset,
        "selection": list(selection),
        "blocks": blocks.depth,
        **counts,
        "tensors": tensors,
    }


def parameter_counts(model: "torch.nn.Module", blocks: BlockList) -> dict[str, int]:
    """Count parameters in all and in blocks; a tied head counts once."""
    named = list(model.named_parameters())
    return {
        "parameters": sum(parameter.numel() for _, parameter in named),
        "block_parameters": sum(parameter.numel() for name, parameter in named if blocks.index_of(name) is not None),
    }


def tensor_sha256(tensor: "torch.Tensor") -> str:
    """Hash the bytes of a tensor (hex), whatever its dtype."""
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def weights_sha256(state: Mapping[str, "torch.Tensor"]) -> str:
    """Hash of a whole state dict (hex): names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode())
        digest.update(tensor_sha256(state[name]).encode())
    return digest.hexdigest()


def _prove(folder: Path, model: "PreTrainedModel") -> None:
    """Reload what was written; every tensor must come back, bit for bit, and none may be left over."""
    reloaded = load_model(folder)
    if weights_sha256(reloaded.state_dict()) != weights_sha256(model.state_dict()):
        raise SurgeryError(
            f"the target written to {folder} is not the one that was built",
            action="check the disk, then give the same command again",
        )


def target_config(folder: Path) -> "PreTrainedConfig":
    """The config of a built target."""
    return load_config(folder)
