"""The trained target as a Hugging Face folder, proven to be the trained one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.errors import ExportError
from inheritune_ds.run.folder import EXPORT_MANIFEST
from inheritune_ds.storage.files import storage_errors, write_json, write_text
from inheritune_ds.storage.folders import describe_files, staged
from inheritune_ds.surgery.compare import weights_sha256
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.report import lineage

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 64


def export_model(  # noqa: PLR0913 - what goes into the folder, each by name
    folder: Path,
    *,
    target_folder: Path,
    tokenizer_folder: Path,
    parameters: Mapping[str, "torch.Tensor"],
    dtype: str,
    card: str,
    recipe_fingerprint: str,
) -> str:
    """Write safetensors, config, generation config, tokenizer and model card; read them back and compare.

    Args:
        folder: Published atomically; an older export is replaced.
        target_folder: The target as surgery made it: config and generation config.
        tokenizer_folder: Its tokenizer.
        parameters: fp32 values of every named parameter.
        dtype: float32 keeps the values exactly; bfloat16 rounds them.
        card: Text of the model card.
        recipe_fingerprint: Recorded, so that `RunFolder.has_finished` knows whose it is.

    Returns:
        sha256 of the exported weights (see `weights_sha256`).

    Raises:
        ExportError: If the folder, loaded again, does not hold the same values.
    """
    import torch
    from transformers import AutoTokenizer

    model = load_model(target_folder, dtype="float32")
    own = dict(model.named_parameters())
    if own.keys() != parameters.keys():
        raise ExportError(f"the trained parameters are not the target's: {sorted(own.keys() ^ parameters.keys())[:5]}")
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value)
    torch.nn.Module.to(model, getattr(torch, dtype))
    expected = weights_sha256(model.state_dict())
    with staged(folder) as temporary, storage_errors(folder):
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False).save_pretrained(temporary)
        write_text(temporary / "README.md", card)
        found = weights_sha256(load_model(temporary).state_dict())
        if found != expected:
            raise ExportError(
                f"the export in {temporary} does not load as the trained model",
                action="check the disk, then give the same command again",
            )
        files = describe_files(temporary)
        write_json(
            temporary / EXPORT_MANIFEST,
            {"recipe_fingerprint": recipe_fingerprint, "weights_sha256": expected, "dtype": dtype, "files": files},
        )
    return expected


def check_logits(folder: Path, tokens_BT: "torch.Tensor", trained_BTV: "torch.Tensor") -> None:  # noqa: N803
    """Compare the logits of an fp32 export with those of the engine's last state, bit for bit.

    Args:
        folder: The export.
        tokens_BT: Token ids of shape (1, T).
        trained_BTV: Logits of the trained state, on the CPU.

    Raises:
        ExportError: If any differs.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: torch.nn.Module = load_model(folder)  # the plain type: transformers' own `to` is a wrapper
    model.to(torch.device(device)).eval()
    with torch.no_grad():
        exported_BTV = model(input_ids=tokens_BT.to(device), use_cache=False).logits.float().cpu()  # noqa: N806
    if not torch.equal(exported_BTV, trained_BTV):
        worst = float((exported_BTV - trained_BTV).abs().max())
        raise ExportError(f"the logits of {folder} differ from the trained state's by up to {worst:.3g}")


def write_probe(path: Path, tokens_BT: "torch.Tensor", logits_BTV: "torch.Tensor") -> None:  # noqa: N803
    """Keep the probe's tokens and logits, so that anybody can repeat the comparison elsewhere."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with storage_errors(path):
        save_file(
            {"tokens": tokens_BT, "logits": logits_BTV.contiguous()},
            path,
            metadata={"threads": str(torch.get_num_threads()), "device": device},
        )


def model_card(recipe: Mapping[str, Any], report: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Text of the card: lineage, what was inherited, how it was trained, how to repeat it.

    Args:
        recipe: The resolved recipe.
        report: The inheritance report.
        result: The run's figures (run.json).
    """
    unique = "" if result["unique_tokens"] is None else f" ({result['unique_tokens']:,} unique)"
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [inheritune]\n---\n"
    return f"""{front}
# {recipe["name"]}

{recipe["description"]}

- Lineage: {lineage(report)}
- Parameters: {result["parameters"]:,} ({result["block_parameters"]:,} in {result["blocks"]} blocks)
- Training: {result["steps"]:,} steps, {result["tokens_seen"]:,} tokens seen{unique},
  precision {result["precision"]}, ZeRO stage {result["zero_stage"]}, {result["world_size"]} rank(s)
- Validation loss: {result["val_loss"]:.4f} +- {result["val_stderr"]:.4f} nats a token
- Licence: that of the reference and of the corpus; this card grants nothing beyond them.

Made with inheritune_ds {result["version"]} from this recipe:

```json
{json.dumps(recipe, indent=2)}
```
"""
