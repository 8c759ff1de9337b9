"""Judge the result of a cut with plain transformers, safetensors and torch, without this package.

A target is correct if its tensors equal those that transformers loads from the (mutated) checkpoint for the blocks of
the case, if its hidden state equals that of the reference with the other blocks bypassed, and if transformers has
initialized none of its tensors.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

EXIT_CODES = range(3, 13)
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
MAY_DIFFER = {
    *("num_hidden_layers", "n_layer", "layer_types", "mlp_only_layers", "decoder_sparse_step", "max_window_layers"),
    *("architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"),
}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def judge_refusal(code: int, message: str, folder: Path) -> list[str]:
    """List what is wrong with a refusal: it must print one error, exit with its code, and leave no files."""
    wrong = []
    if code not in EXIT_CODES:
        wrong.append(f"exit code {code}")
    if message.count("inheritune-ds: error: ") != 1 or not message.startswith("inheritune-ds: error: "):
        wrong.append(f"not one error: {message!r}")
    if sorted(path.name for path in folder.iterdir()) != ["reference"]:
        wrong.append("files were left")
    return wrong


def judge_target(reference: Path, target: Path, blocks: tuple[int, ...]) -> tuple[str, list[str]]:
    """Name what was compared, and list what is wrong with a target."""
    origin, problems = _load(reference)
    if origin is None or problems:
        return "not compared", [f"transformers cannot use the reference, but a target was made: {'; '.join(problems)}"]
    made, problems = _load(target, strict=True)
    if made is None or problems:
        return "not compared", [f"transformers cannot use the target: {'; '.join(problems)}"]
    wrong = [*_compare_tensors(origin, made, blocks), *_compare_configs(origin, made, blocks)]
    wrong += _check_report(reference, target)
    origin, made = origin.float(), made.float()  # some kernels do not support float64
    hidden = _bypassed(origin, blocks) if made.config.num_hidden_layers == len(blocks) else None
    if hidden is None:
        return "tensors", wrong
    if not torch.equal(_hidden_state(made, len(blocks) - 1), hidden):
        wrong.append("the hidden state is another")
    return "tensors, hidden state", wrong


def _load(folder: Path, *, strict: bool = False) -> tuple[PreTrainedModel | None, list[str]]:
    """Load a model in float64, which holds all other types exactly, and list the problems of the load."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float64", output_loading_info=True)
    except Exception as error:  # noqa: BLE001 - any is an answer
        return None, [f"{type(error).__name__}: {str(error)[:200]}"]
    model: PreTrainedModel = loaded[0].eval()
    info = {key: list(value) for key, value in loaded[1].items() if value}
    if not strict:
        info.pop("unexpected_keys", None)  # skipped and reported
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # products may round differently on a mapped file
    return model, [f"{key}: {value[:3]}" for key, value in info.items()]


def _path(model: PreTrainedModel) -> str:
    return BLOCKS.get(model.config.model_type, "model.layers")


def _compare_tensors(origin: PreTrainedModel, made: PreTrainedModel, blocks: tuple[int, ...]) -> list[str]:
    path = _path(origin) + "."
    expected = {}
    for name, tensor in origin.state_dict().items():
        number, _, rest = name.removeprefix(path).partition(".")
        if not name.startswith(path):
            expected[name] = tensor
            continue
        for place, block in enumerate(blocks):
            if block == int(number):
                expected[f"{path}{place}.{rest}"] = tensor
    found = made.state_dict()
    if found.keys() != expected.keys():
        return [f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"]
    wrong = [f"{name} is another" for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    wrong += [f"{name} is not finite" for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    return wrong[:3]


def _compare_configs(origin: PreTrainedModel, made: PreTrainedModel, blocks: tuple[int, ...]) -> list[str]:
    old, new = origin.config.to_dict(), made.config.to_dict()
    keys = [key for key in {*old, *new} - MAY_DIFFER if "drop" not in key and old.get(key) != new.get(key)]
    wrong = [f"config: {key} is {new.get(key)!r}, it was {old.get(key)!r}" for key in keys]
    types = getattr(origin.config, "layer_types", None)
    if types and list(made.config.layer_types) != [types[block] for block in blocks]:
        wrong.append("config: layer_types")
    if made.config.num_hidden_layers != len(blocks):
        wrong.append("config: number of blocks")
    return wrong


def _check_report(reference: Path, target: Path) -> list[str]:
    """Compare the files with the report: sources, types, bytes."""
    report = json.loads((target / "inheritance.json").read_text(encoding="utf-8"))
    tensors = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    files: dict[str, dict[str, torch.Tensor]] = {}
    names = {entry["name"] for entry in report["tensors"]}
    wrong = [] if tensors.keys() == names else ["the report's names are others"]
    for entry in report["tensors"]:
        name, source = entry["name"], entry["source"]
        if not entry["inherited"] or source["model"] != "reference":
            wrong.append(f"the report says that {name} is fresh")
            continue
        if source["file"] not in files:
            path = reference / source["file"]
            files[source["file"]] = (
                torch.load(path, weights_only=True, mmap=True)  # as transformers does
                if path.suffix == ".bin"
                else load_file(path)
            )
        tensor, origin = tensors[name], files[source["file"]][source["tensor"]]
        if tensor.dtype != origin.dtype or _bytes(tensor) != _bytes(origin):
            wrong.append(f"{name} has other bytes than its source")
        if hashlib.sha256(_bytes(tensor)).hexdigest() != entry["sha256"]:
            wrong.append(f"{name} has another hash than the report says")
    return wrong[:3]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _hidden_state(model: PreTrainedModel, block: int) -> torch.Tensor:
    caught: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(f"{_path(model)}.{block}").register_forward_hook(keep)
    longest = getattr(model.config, "max_position_embeddings", 12)
    length = min(12, longest) if longest > 0 else 12
    with torch.no_grad():
        model(input_ids=torch.arange(length).view(1, length) % model.config.vocab_size, use_cache=False)
    handle.remove()
    return caught[0]


def _bypassed(model: PreTrainedModel, blocks: tuple[int, ...]) -> torch.Tensor | None:
    """Hidden state after the last kept block; None if blocks change their index and depend on it."""
    if blocks == tuple(sorted(set(blocks))):
        for number, block in enumerate(model.get_submodule(_path(model)).children()):
            if number not in blocks:
                block.forward = _around(block)
        return _hidden_state(model, blocks[-1])
    if len(set(getattr(model.config, "layer_types", None) or ["one"])) > 1:
        return None
    owner, _, name = _path(model).rpartition(".")
    every = list(model.get_submodule(_path(model)).children())
    setattr(model.get_submodule(owner), name, nn.ModuleList(copy.deepcopy(every[block]) for block in blocks))
    model.config.num_hidden_layers = len(blocks)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[0]] * len(blocks)
    return _hidden_state(model, len(blocks) - 1)


def _around(block: nn.Module) -> Any:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = original(*args, **kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return forward
