"""Build a model or a config with transformers, quietly."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.config.model import Shape
from inheritune_ds.data.tokens.tokenizer import load_tokenizer
from inheritune_ds.errors import InherituneError, SurgeryError
from inheritune_ds.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_ADVICE = re.compile(
    r"trust_remote_code|pip3? install|pip upgrade|huggingface\.co|github\.com|\bfrom_(tf|flax)\b|"
    r"\b(force_download|ignore_mismatched_sizes|low_cpu_mem_usage|revision|token)=|\b(please|make sure|you (can|should|"
    r"may|need)|try|check out|checkout|open an issue|download)\b",
    re.IGNORECASE,
)
"""Words of a sentence in an error of transformers that gives advice instead of a fact."""


def load_config(folder: Path) -> "PreTrainedConfig":
    """Load a model's config without remote code; raise a SurgeryError if transformers cannot."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a broken config
        raise _not_loadable(f"{folder / 'config.json'} cannot be loaded", folder, error) from None
    return config


def load_model(folder: Path, *, dtype: str = "auto") -> "PreTrainedModel":
    """Load a causal language model; `dtype` is a torch dtype's name, or `auto` for the checkpoint's own.

    Raises:
        SurgeryError: If it is no causal language model, or if its weights are not those that its config asks for.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True
            )
    except InherituneError:
        raise
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a broken folder
        raise _not_loadable(f"{folder} cannot be loaded as a causal language model", folder, error) from None
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    for what, names in (
        ("lacks {} weights that its config asks for", info["missing_keys"]),
        ("has {} weights that its config has no place for", info["unexpected_keys"]),
        ("has {} weights of another shape than its config says", [key[0] for key in info["mismatched_keys"]]),
    ):
        if names:
            raise SurgeryError(
                f"{folder} {what.format(len(names))}: {', '.join(sorted(names)[:5])}",
                action="complete the folder; weights are never filled in at random",
            )
    return model


def _not_loadable(problem: str, folder: Path, error: Exception) -> SurgeryError:
    """The reason without the advice of transformers, which names arguments that do not exist here."""
    from transformers import CONFIG_MAPPING, __version__

    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None or kind in CONFIG_MAPPING:
        sentences = _SENTENCE_END.split(str(error).strip())
        facts = " ".join(text for text in sentences if not _ADVICE.search(text))
        return SurgeryError(f"{problem}: {facts[:400] or type(error).__name__}")
    why = f"transformers {__version__} has no model_type {kind!r}"
    if isinstance(config, dict) and "auto_map" in config:
        why += ", and the code that comes with a model is never run"
    return SurgeryError(
        f"{problem}: {why}",
        allowed="a model of a family that transformers has",
        action="use such a model, or convert this one to a class of transformers first",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report, warnings and bars; problems are raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def own_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer in a model folder; None without one. Raises a CorpusError if it cannot be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return load_tokenizer(str(folder.resolve()))


def build_config(shape: Shape) -> "PreTrainedConfig":
    """Build the Hugging Face config of a model from scratch."""
    from transformers import AutoConfig

    values = shape.model_dump(exclude_none=True)
    model_type = values.pop("model_type")
    if model_type == "gpt2":
        for key in ("rms_norm_eps", "rope_theta", "num_key_value_heads"):
            values.pop(key, None)
        if "intermediate_size" in values:
            values["n_inner"] = values.pop("intermediate_size")
    else:
        values.pop("scale_attn_by_inverse_layer_idx")
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    # `inherit` sets the special ids from the tokenizer; GPT-2's default lies outside a small vocabulary.
    return AutoConfig.for_model(model_type, bos_token_id=None, eos_token_id=None, **values)
