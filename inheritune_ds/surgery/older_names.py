"""Save configs and tokenizers so that transformers 4 reads them, too.

transformers 5 renamed keys and reads both names; version 4 knows the older ones only, and what else reads these files
(vLLM, llama.cpp, lm-eval) often does. A key that it does not know is a default there: another `rope_theta`, silently.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.storage.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OWN_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
"""Families with older names of their own for `rope_theta` and `partial_rotary_factor`."""
_BY_ATTENTION = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta",),
}
"""Families with different rotary embeddings in full and sliding attention: older names of the two `rope_theta`."""
_WHOLE_HEADS = ("phi3", "phi4_multimodal")
"""Families that keep a `partial_rotary_factor` which they are given, so that the config would no longer be the same."""
_MACHINE_KEYS = ("backend", "is_local", "local_files_only")


def save_config(config: "PreTrainedConfig", folder: Path) -> None:
    """Write config.json with the older names beside the new ones."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = read_json(path)
    write_json(path, {**values, **_older_names(values)})


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the files of a tokenizer, as `rename_tokenizer` leaves them."""
    tokenizer.save_pretrained(folder)
    rename_tokenizer(folder)


def rename_tokenizer(folder: Path) -> None:
    """Replace names in tokenizer_config.json that transformers 4 refuses; remove keys about this machine."""
    path = folder / _TOKENIZER_CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        return  # without this file the tokenizer has no class
    renamed = {key: value for key, value in values.items() if key not in _MACHINE_KEYS}
    if values.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):  # a mapping in transformers 4
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    if renamed != values:
        write_json(path, renamed)


def _older_names(values: dict[str, Any]) -> dict[str, Any]:
    """The older names of a config's keys, with their values."""
    older = {"torch_dtype": values["dtype"]} if values.get("dtype") else {}
    rope, family = values.get("rope_parameters"), values["model_type"]
    if isinstance(rope, dict) and family in _BY_ATTENTION:
        names, parts = _BY_ATTENTION[family], [rope["full_attention"], rope["sliding_attention"]]
        older |= {name: part["rope_theta"] for name, part in zip(names, parts, strict=False)}
        if "rope_theta" in names:  # the others have no scaling in transformers 4
            older |= _scaling(parts[0], values)
    elif isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in values:
        theta, share = _OWN_NAMES.get(family, ("rope_theta", "partial_rotary_factor"))
        older |= {theta: rope["rope_theta"]} | _scaling(rope, values)
        rotated = rope.get("partial_rotary_factor")
        if rotated is not None and not (rotated == 1.0 and family in _WHOLE_HEADS):
            older[share] = rotated
    return older


def _scaling(rope: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling`; empty for rotary embeddings that are not scaled."""
    if rope["rope_type"] == "default":
        return {}
    if values["model_type"] == "phi3":  # any other key is refused there
        own = {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
        return {"rope_scaling": own}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    length = "original_max_position_embeddings"
    # transformers 5 fills it in; version 4 may divide the two lengths and find the factor 1.
    if rope["rope_type"] == "yarn" and scaling.get(length) == values.get("max_position_embeddings"):
        scaling.pop(length, None)
    return {"rope_scaling": scaling}
