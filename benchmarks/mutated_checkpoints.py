"""Mutate small checkpoints at random: every cut ends as a correct target or as one error.

`python -m benchmarks.mutated_checkpoints` writes docs/results/mutated_checkpoints.json. The seed and a case's number
determine its checkpoint (family, kind of files), mutation and selection. `benchmarks.mutation_judge` judges the result
with plain transformers, without this package.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.mutation_judge import hashes, judge_refusal, judge_target
from benchmarks.record import command_line, record
from inheritune_ds.cli import main as inheritune_ds

DEPTH = 4
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "n_positions": 32, "vocab_size": 40},
    "gpt_neox": {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"},
    "llama": SHAPE,
    "qwen2": {**SHAPE, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4},
    "qwen3_moe": {**SHAPE, "moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}
LAYOUTS = (
    *("one file", "two shards", "pickle", "two pickle shards") * 2,
    *("one file with its hash", "two shards with their hashes"),
)
Tensors = dict[str, torch.Tensor]
Mutation = Callable[[Path, random.Random], object]


@dataclass(frozen=True)
class Case:
    """One checkpoint, one mutation, one selection and its blocks (None if it is invalid)."""

    number: int
    family: str
    layout: str
    mutation: str
    select: str
    blocks: tuple[int, ...] | None


def make_case(number: int, seed: int) -> tuple[Case, random.Random]:
    """The case of a number, and its source of random numbers."""
    chance = random.Random(f"{seed} {number}")  # noqa: S311 - repeatable on purpose
    mutation = list(MUTATIONS)[number % len(MUTATIONS)]
    layouts = [layout for layout in LAYOUTS if "shards" in layout or mutation not in NEED_SHARDS]
    select, blocks = _selection(chance)
    family, layout = chance.choice(list(FAMILIES)), chance.choice(layouts)
    return Case(number, family, layout, mutation, select, blocks), chance


def _selection(chance: random.Random) -> tuple[str, tuple[int, ...] | None]:
    """A selection and its blocks; one in ten is invalid for a model with `DEPTH` blocks."""
    every = tuple(range(DEPTH))
    count, first = chance.randint(1, DEPTH), chance.randint(0, DEPTH - 1)
    last = chance.randint(first, DEPTH - 1)
    some = tuple(chance.choices(every, k=chance.randint(1, 5)))
    valid = [
        (f"first:{count}", every[:count]),
        (f"last:{count}", every[DEPTH - count :]),
        (f"range:{first}-{last}", every[first : last + 1]),
        (f"every:{count}", every[::count]),
        ("even:3", (0, 2, 3)),
        ("even:2", (0, 3)),
        (f"drop:{first}-{first}", (*every[:first], *every[first + 1 :])),
        (",".join(map(str, some)), some),
        ("0-1,0-1", (0, 1, 0, 1)),
    ]
    if chance.random() < 0.9:
        return chance.choice(valid)
    beyond = ("first:0", f"first:{DEPTH + 1}", f"last:{DEPTH + 3}", f"range:2-{DEPTH}", "range:3-1", "drop:0-3")
    odd = ("even:1", "middle:2", "1,,2", "by:rank:2", f"0,{DEPTH}", "first:two", "-1", "")
    return chance.choice(beyond + odd), None


def make_bases(folder: Path) -> None:
    """Save one model of every family, each tensor random."""
    for family, values in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        model.save_pretrained(folder / family)


def lay_out(base: Path, folder: Path, layout: str) -> None:
    """Copy a model into the kind of files of a layout."""
    shutil.copytree(base, folder)
    if "shards" in layout or "pickle" in layout:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        count = 2 if "shards" in layout else 1
        stem, suffix = ("pytorch_model", "bin") if "pickle" in layout else ("model", "safetensors")
        weight_map: dict[str, str] = {}
        for number in range(count):
            name = f"{stem}-{number + 1:05d}-of-00002.{suffix}" if count == 2 else f"{stem}.{suffix}"
            part = {key: tensors[key] for key in list(tensors)[number::count]}
            torch.save(part, folder / name) if suffix == "bin" else save_file(part, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        if count == 2:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    if "hash" in layout:
        described = {name: {"sha256": digest} for name, digest in hashes(folder).items()}
        (folder / "manifest.json").write_text(json.dumps({"files": described}), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _edit(folder: Path, chance: random.Random, change: Callable[[Tensors, str], object]) -> None:
    """Change the tensors of one weight file; `change` gets them and the name of one of them."""
    path = chance.choice(_files(folder))
    if path.suffix == ".bin":
        tensors = dict(torch.load(path, weights_only=True))
        change(tensors, chance.choice(sorted(tensors)))
        torch.save(tensors, path)
        return
    tensors = load_file(path)
    change(tensors, chance.choice(sorted(tensors)))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _tensors_mutation(change: Callable[[Tensors, str, random.Random], object]) -> Mutation:
    """Make a mutation from a change of tensors (`_edit`)."""
    return lambda folder, chance: _edit(folder, chance, lambda tensors, name: change(tensors, name, chance))


def _flip(folder: Path, chance: random.Random, *, header: bool) -> None:
    path = chance.choice(_files(folder))
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 3000
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(size) if header else chance.randrange(size, len(content))
        content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut_short(folder: Path, chance: random.Random) -> None:
    path = chance.choice(_files(folder))
    content = path.read_bytes()
    size = len(content)
    path.write_bytes(content[: chance.choice((0, 7, size // 2, size - 1, chance.randrange(size)))])


def _lengthen(folder: Path, chance: random.Random) -> None:
    path = chance.choice(_files(folder))
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 64)))


@_tensors_mutation
def _swap(tensors: Tensors, name: str, chance: random.Random) -> None:
    alike = [other for other in sorted(tensors) if tensors[other].shape == tensors[name].shape]
    other = chance.choice(chance.choice((alike, sorted(tensors))))
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _new_name(name: str, chance: random.Random) -> str:
    words = name.split(".")
    number = next((at for at, word in enumerate(words) if word.isdecimal()), None)
    ways = [name + "x", "more." + name, ".".join(words[1:]), name.replace("weight", "wait")]
    if number is not None:
        ways += [".".join([*words[:number], new, *words[number + 1 :]]) for new in ("0", "2", str(DEPTH), "-1", "07")]
    return chance.choice(ways)


@_tensors_mutation
def _rename(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[_new_name(name, chance)] = tensors.pop(name)


@_tensors_mutation
def _repeat(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[_new_name(name, chance)] = tensors[name] + 0.5


def _edit_config(folder: Path, chance: random.Random) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in chance.sample(sorted(values), chance.randint(1, 2)):
        old = values[key]
        ways: list[Any] = [None, "text", [], {}, -1]
        if isinstance(old, bool):
            ways = [not old] * 3 + ["yes", None]
        elif isinstance(old, int | float):
            ways += [old * 2, old + 1, old - 1, 0, float(old) / 2]
        elif isinstance(old, list):
            ways += [old[:-1], [*old, *old[:1]], old[::-1]]
        values[key] = chance.choice(ways)
        if chance.random() < 0.2:
            del values[key]
    path.write_text(json.dumps(values), encoding="utf-8")


def _edit_index(folder: Path, chance: random.Random) -> None:
    path = next(folder.glob("*.index.json"))
    text = path.read_text(encoding="utf-8")
    listed = json.loads(text)["weight_map"]
    name = chance.choice(sorted(listed))
    other = chance.choice(sorted(set(listed.values()) - {listed[name]}))
    ways: list[Any] = [
        {**listed, name: other},
        {**listed, name: "../" + listed[name]},
        {**listed, name: "nothing"},
        {**listed, "more.weight": other},
        {key: file for key, file in listed.items() if key != name},
        {key: file for key, file in listed.items() if file == other},
        {},
        [name],
    ]
    document = json.dumps({"metadata": {}, "weight_map": chance.choice(ways)})
    path.write_text(chance.choice((document, document, document, text[:-3], "")), encoding="utf-8")


def _edit_type(folder: Path, chance: random.Random) -> None:
    names = ("float16", "bfloat16", "float64", "int32", "int8", "bool", "float8_e4m3fn")
    dtype, whole = getattr(torch, chance.choice(names)), chance.random() < 0.5

    def change(tensors: Tensors, name: str) -> None:
        for key in list(tensors) if whole else [name]:
            tensors[key] = tensors[key].to(dtype)

    _edit(folder, chance, change)


@_tensors_mutation
def _edit_shape(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensor = tensors[name]
    ways = [tensor.flatten(), tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor.unsqueeze(0), tensor.sum()]
    tensors[name] = chance.choice([*ways, tensor.mT if tensor.dim() > 1 else tensor[:0]])


def _spoil(folder: Path, chance: random.Random) -> None:
    value = chance.choice((float("nan"), float("inf"), -float("inf"), 3e38))
    _edit(folder, chance, lambda tensors, name: tensors[name].view(-1)[:1].fill_(value))


def _lose_file(folder: Path, chance: random.Random) -> None:
    chance.choice([*_files(folder), folder / "config.json"]).unlink()


def _exchange(folder: Path, chance: random.Random) -> None:
    first, second = _files(folder)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    if chance.random() < 0.5:
        second.write_bytes(content)


MUTATIONS: dict[str, Mutation] = {
    "none": lambda *_: None,
    "bits of a header flipped": lambda folder, chance: _flip(folder, chance, header=True),
    "bits of the data flipped": lambda folder, chance: _flip(folder, chance, header=False),
    "file cut short": _cut_short,
    "file with more bytes": _lengthen,
    "tensors swapped": _swap,
    "tensor renamed": _rename,
    "tensor repeated under another name": _repeat,
    "tensor dropped": lambda folder, chance: _edit(folder, chance, lambda tensors, name: tensors.pop(name)),
    "values of the config edited": _edit_config,
    "index edited": _edit_index,
    "tensors of another type": _edit_type,
    "tensor of another shape": _edit_shape,
    "number that is not finite, or huge": _spoil,
    "file lost": _lose_file,
    "shards exchanged": _exchange,
}
NEED_SHARDS = ("index edited", "shards exchanged")


def run_case(case: Case, chance: random.Random, bases: Path, folder: Path) -> tuple[str, list[str]]:
    """Cut one mutated checkpoint; return its ending and all errors in it."""
    reference, target = folder / "reference", folder / "target"
    lay_out(bases / case.family, reference, case.layout)
    intact = hashes(reference)
    MUTATIONS[case.mutation](reference, chance)
    given = hashes(reference)
    changed = {name for name in intact.keys() | given.keys() if intact.get(name) != given.get(name)}
    damaged = "hash" in case.layout and any(name.endswith(".safetensors") for name in changed)
    out, err = io.StringIO(), io.StringIO()
    words = ["inherit", "--reference", str(reference), "--select", case.select, "--output", str(target)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = inheritune_ds(words)
    except BaseException as error:  # noqa: BLE001 - any other exception is a bug, and is reported
        return "traceback", [f"{type(error).__name__} got out: {str(error)[:200]}"]
    wrong = [] if hashes(reference) == given else ["the reference's folder was changed"]
    if code:
        wrong += judge_refusal(code, err.getvalue(), folder)
        if not changed and case.blocks is not None:
            wrong.append(f"a whole checkpoint was refused: {err.getvalue()}")
        return f"refusal (exit code {code})", wrong
    if damaged:
        wrong.append("a weight file is not the one that its manifest describes")
    if case.blocks is None:
        return "target", [*wrong, "this is no selection"]
    judged, more = judge_target(reference, target, case.blocks)
    return f"target ({judged})", wrong + more


def run_cases(numbers: range, seed: int, folder: Path) -> tuple[list[str], list[str]]:
    """Run cases; return one line for each case and for each error."""
    lines, wrong = [], []
    make_bases(folder / "bases")
    for number in numbers:
        case, chance = make_case(number, seed)
        place = folder / str(number)
        place.mkdir()
        ending, found = run_case(case, chance, folder / "bases", place)
        words = (f"{number:03d}", case.family, case.layout, case.mutation, repr(case.select), ending)
        lines.append(" | ".join(words))
        wrong += [f"{lines[-1]}: {problem}" for problem in found]
        shutil.rmtree(place)
    return lines, wrong


def main() -> int:
    """Run the cases, print errors, write the JSON file."""
    parser = command_line("mutated_checkpoints", __doc__)
    parser.add_argument("--cases", type=int, default=200, help="default: 200")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        lines, wrong = run_cases(range(args.cases), args.seed, Path(folder))
    endings = Counter(line.rpartition(" | ")[2] for line in lines)
    for ending, count in endings.most_common():
        print(f"{count:5d} {ending}")
    print(*wrong, sep="\n")
    figures = {"seed": args.seed, "cases": len(lines), "endings": dict(endings.most_common()), "wrong": wrong}
    record(args, {**figures, "each": lines})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
