"""Export of the trained target as a Hugging Face folder, compared with the trained weights."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.data.tokens.tokenizer import load_tokenizer
from inheritune_ds.errors import ExportError
from inheritune_ds.run.folder import EXPORT_MANIFEST
from inheritune_ds.storage.files import storage_errors, write_json, write_text
from inheritune_ds.storage.folders import describe_files, staged
from inheritune_ds.surgery.compare import tensor_sha256, weights_sha256
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.meta_model import as_in_files
from inheritune_ds.surgery.older_names import save_config, save_tokenizer
from inheritune_ds.surgery.report import lineage
from inheritune_ds.surgery.weight_files import WeightFiles
from inheritune_ds.surgery.write_shards import write_stream
from inheritune_ds.training.kernels import Kernels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 64
LOGITS_RTOL = 1e-4
"""Of the largest logit: kernels that round differently in fp32 stay far below it, weights rounded to bf16 far above."""


def export_model(  # noqa: PLR0913 - the parts of the folder, by keyword
    folder: Path,
    *,
    target_folder: Path,
    tokenizer_folder: Path,
    parameters: Iterable[tuple[str, "torch.Tensor"]],
    dtype: str,
    card: str,
    recipe_fingerprint: str,
) -> str:
    """Write safetensors, config, generation config, tokenizer and model card; read them back and compare.

    Args:
        folder: Published atomically; replaces an older export.
        target_folder: The target before training, for config and generation config.
        tokenizer_folder: Of the target's tokenizer.
        parameters: Names and fp32 values of all parameters; each is written before the next is gathered.
        dtype: float32 keeps the values exactly; bfloat16 rounds them.
        card: Text of the model card.
        recipe_fingerprint: For `RunFolder.has_finished`.

    Returns:
        sha256 of the exported weights (see `weights_sha256`).

    Raises:
        ExportError: If the folder, loaded again, does not hold the same values.
    """
    import torch

    model = load_model(target_folder)
    with staged(folder) as temporary, storage_errors(folder):
        written = _Weights(model, target_folder, getattr(torch, dtype)).write(temporary, iter(parameters))
        model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
        save_config(model.config, temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        save_tokenizer(load_tokenizer(str(tokenizer_folder.resolve())), temporary)
        write_text(temporary / "README.md", card)
        state = load_model(temporary).state_dict()
        hashes = {name: tensor_sha256(value) for name, value in state.items()}
        if any(hashes.get(name) != digest for name, digest in written.items()):
            raise ExportError(
                f"the export in {temporary} does not load as the trained model",
                action="check the disk, then rerun the same command to resume",
            )
        digest = weights_sha256(state, hashes)
        files = describe_files(temporary)
        write_json(
            temporary / EXPORT_MANIFEST,
            {"recipe_fingerprint": recipe_fingerprint, "weights_sha256": digest, "dtype": dtype, "files": files},
        )
    return digest


class _Weights:
    """Writes trained parameters under the names of the target's files, one at a time.

    A family whose conversion to files combines parameters is written at once.
    """

    def __init__(self, model: "PreTrainedModel", target_folder: Path, dtype: "torch.dtype") -> None:
        self._model, self._dtype = model, dtype
        self._own = dict(model.named_parameters())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
        named = {self._in_state(name): value for name, value in (*self._own.items(), *self._buffers.items())}
        self._metas = {name: self._cast(value.to("meta")) for name, value in named.items()}
        one_by_one = self._is_cut_one_by_one(WeightFiles(target_folder, str(target_folder)))
        self._chunks = [[name] for name in named] if one_by_one else [list(named)]

    def _in_state(self, name: str) -> str:
        """The name of a parameter in the files, where a tied one has its partner's."""
        saved: str = self._model.all_tied_weights_keys.get(name, name)
        return saved

    def _cast(self, value: "torch.Tensor") -> "torch.Tensor":
        return value.to(self._dtype) if value.is_floating_point() else value

    def _is_cut_one_by_one(self, files: WeightFiles) -> bool:
        """Whether each tensor alone converts to tensors of the target's files, in their shapes."""
        shapes = {name: files.meta(name).shape for name in files}
        try:
            cut = [as_in_files(self._model, {name: meta}) for name, meta in self._metas.items()]
        except Exception:  # noqa: BLE001 - raised by the conversion of a family
            return False
        return all(shapes.get(name) == meta.shape for part in cut for name, meta in part.items())

    def write(self, folder: Path, parameters: Iterator[tuple[str, "torch.Tensor"]]) -> dict[str, str]:
        """Write all parameters, given in the model's order; sha256 of parameters and buffers as written, by name.

        Raises:
            ExportError: If the parameters are not the model's.
        """
        written: dict[str, str] = {}

        def tensors() -> Iterator["torch.Tensor"]:
            incoming = self._named(parameters, written)
            for chunk in self._chunks:
                values = dict(next(incoming) for _ in chunk)
                yield from as_in_files(self._model, values).values()

        metas = (as_in_files(self._model, {name: self._metas[name] for name in chunk}) for chunk in self._chunks)
        write_stream(folder, {name: meta for part in metas for name, meta in part.items()}, tensors())
        if strange := sorted(name for name, _ in parameters):
            raise _not_the_target(strange)
        return written

    def _named(
        self, parameters: Iterator[tuple[str, "torch.Tensor"]], written: dict[str, str]
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Parameters, then buffers, as they are written; adds their hashes to `written`."""
        for name, value in parameters:
            if name not in self._own:
                raise _not_the_target([name])
            cast = self._cast(value)
            written[name] = tensor_sha256(cast)
            yield self._in_state(name), cast
            if len(written) == len(self._own):
                break
        if written.keys() != self._own.keys():
            raise _not_the_target(sorted(self._own.keys() - written.keys()))
        for name, value in self._buffers.items():
            cast = self._cast(value)
            written[name] = tensor_sha256(cast)
            yield name, cast


def _not_the_target(names: list[str]) -> ExportError:
    return ExportError(f"the trained parameters are not the target's: {names[:5]}")


def check_logits(
    folder: Path,
    tokens_BT: "torch.Tensor",  # noqa: N803
    trained_BTV: "torch.Tensor",  # noqa: N803
    kernels: Kernels,
    device: "torch.device",
) -> None:
    """Compare the logits of an fp32 export, computed eagerly, with those of the trained state.

    They must have the same bits. Compiled code and Liger's kernels round differently: then they may differ by
    LOGITS_RTOL of the largest logit.

    Args:
        folder: The export.
        tokens_BT: Token ids, (1, T).
        trained_BTV: Logits of the trained state, (1, T, V), on the CPU.
        kernels: The engine's.
        device: The engine's.

    Raises:
        ExportError: With the largest difference.
    """
    import torch

    loaded = load_model(folder)
    loaded.set_attn_implementation(kernels.attention)
    model: torch.nn.Module = loaded  # the plain type: transformers' own `to` is a wrapper
    model.to(device).eval()
    with torch.no_grad():
        exported_BTV = model(input_ids=tokens_BT.to(device), use_cache=False).logits.float().cpu()  # noqa: N806
    worst = float((exported_BTV - trained_BTV).abs().max())
    exact = not (kernels.compile or kernels.liger)
    limit = 0.0 if exact else LOGITS_RTOL * float(trained_BTV.abs().max())
    if not worst <= limit:
        allowed = "the same bits" if exact else f"at most {limit:.3g}, since the training's kernels round differently"
        raise ExportError(
            f"the logits of {folder} differ from the trained state's by up to {worst:.3g}", allowed=allowed
        )


def write_probe(path: Path, tokens_BT: "torch.Tensor", logits_BTV: "torch.Tensor") -> None:  # noqa: N803
    """Save the probe's tokens and logits, so that users can repeat the comparison elsewhere."""
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
    """Text of the card: lineage, training, recipe.

    Args:
        recipe: The resolved recipe.
        report: inheritance.json.
        result: run.json.
    """
    unique = "" if result["unique_tokens"] is None else f" ({result['unique_tokens']:,} unique)"
    error = "" if result["val_stderr"] is None else f" +- {result['val_stderr']:.4f}"
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [inheritune]\n---\n"
    return f"""{front}
# {recipe["name"]}

{recipe["description"]}

- Lineage: {lineage(report)}
- Parameters: {result["parameters"]:,} ({result["block_parameters"]:,} in {result["blocks"]} blocks)
- Training: {result["steps"]:,} steps, {result["tokens_seen"]:,} tokens seen{unique},
  precision {result["precision"]}, ZeRO stage {result["zero_stage"]}, {result["world_size"]} rank(s)
- Validation loss: {result["val_loss"]:.4f}{error} nats per token
- License: that of the reference and of the corpus; this card grants nothing beyond them.

Made with inheritune_ds {result["version"]} from this recipe:

```json
{json.dumps(recipe, indent=2)}
```
"""
