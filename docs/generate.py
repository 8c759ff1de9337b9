"""Generate the parts of the docs that come from the code: tables of keys, exit codes, metrics, options; the picture.

Each table is between `<!-- generated: NAME -->` and `<!-- end -->`. `--check` prints a diff and exits with 1 if a
table or the picture is stale.
"""
# ruff: noqa: INP001  # a script beside the docs, not a package

import argparse
import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import layers
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from tables import campaign, families, table

from inheritune_ds import cli, errors
from inheritune_ds.config import deepspeed_keys, deepspeed_refused, fields, recipe
from inheritune_ds.config.kernels import (
    ATTENTION_ORDER,
    COMPILE_FLOPS_CPU,
    COMPILE_MFU,
    COMPILE_SECONDS_GPU,
    KernelRequest,
)
from inheritune_ds.config.messages import words
from inheritune_ds.config.reliability import WATCHDOG_S, Reliability
from inheritune_ds.tracking.metrics import METRICS

DOCS = Path(__file__).parent
SECTION = re.compile(r"(<!-- generated: (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MEANINGS = {
    "Recipe.name": "Name of the run folder; for a shipped recipe, also what `--recipe` takes.",
    "Recipe.description": "One line, shown by `inheritune-ds recipes`.",
    "Recipe.seed": "Decides fresh weights, the order of the windows and dropout.",
    "Corpus.sources": "Read in this order.",
    "Optimizer.lr": "The largest learning rate of the schedule.",
    "Optimizer.betas": "Decay of the averages of gradient and squared gradient, per step.",
    "Optimizer.eps": "Added to the denominator of AdamW's update.",
    "Optimizer.weight_decay": "Per step, times the learning rate.",
    "Schedule.kind": "Cosine or no decay, or warmup-stable-decay, after the warmup.",
    "Schedule.warmup_steps": "Steps of linear rise at the start.",
    "Validation.interval_steps": "Steps from one validation to the next; step 0 and the last one always have one.",
    "Checkpointing.interval_steps": "Steps from one checkpoint to the next; the last step always has one.",
    "Logging.interval_steps": "Steps from one line in `metrics.jsonl` to the next.",
    "Logging.wandb_project": "W&B project; offline unless W&B is configured.",
    "Export.dtype": "Type of the exported weights.",
    "PublishedClaim.text": "The claim, quoted.",
    "PublishedClaim.hours": "Hours of training it states.",
    "PublishedClaim.gpu": "The GPU it names.",
    "PublishedClaim.gpus": "How many of them.",
    "PublishedClaim.source": "Where it is published.",
    "Shape.model_type": "Family.",
    "Shape.vocab_size": "Rows of the token embedding.",
    "Shape.hidden_size": "Width.",
    "Shape.num_hidden_layers": "Blocks.",
    "Shape.num_attention_heads": "Heads of a block.",
    "Shape.max_position_embeddings": "Longest sequence, in tokens.",
    "Shape.tie_word_embeddings": "Whether the head is the token embedding (always so for gpt2).",
    "HubSource.dataset": "Id of the dataset on the hub.",
    "HubSource.text_field": "Field of a record that holds the document.",
    **dict.fromkeys([f"{kind}Source.kind" for kind in ("Embedded", "Files", "Hub", "Tokens")], "This source."),
}
"""Meaning of keys without a docstring in their model."""
AUTO_KERNELS = {
    "attention": "the first that works of the list for the GPU (below); flash attention needs a GPU, bf16 or fp16, and "
    "a supported family",
    "optimizer": "the first of these that works; on a CPU `torch_fused`. `offload_optimizer` always uses DeepSpeed's "
    "CPU Adam, and a name is refused",
    "liger": "on for a GPU if liger-kernel has RMSNorm, RoPE or SwiGLU for the family (it has none for GPT-2) and "
    "blocks are not compiled, because torch.compile fuses the same operations",
    "loss": "`chunked`, which never holds the logits of all tokens at once; `plain`, with a line, for families whose "
    "logits are more than head times hidden state",
    "compile": f"on where it pays: not with stage 3; on a CPU in bf16 from {COMPILE_FLOPS_CPU:.0e} FLOPs per rank; "
    f"on a GPU from {COMPILE_SECONDS_GPU / 60:.0f} minutes at {COMPILE_MFU} of its peak",
    "activation_checkpointing": "`none`; the others trade a second forward pass (`selective`: without its matrix "
    "products and attention) for memory",
    "deterministic": "`false` without it; `true` gives the same bits in every run on the same GPUs, at less speed",
}
"""The selection of `auto` in inheritune_ds/training/kernels.py, one line each."""
GENERATIONS = {
    8: "Ampere, Ada (A6000, A100, 4090)",
    9: "Hopper (H100, H200)",
    10: "Blackwell and later (B200, 5090)",
}
"""GPUs by the major number of their compute capability."""
RELIABILITY = {
    "async_save": "training waits only until its state is copied to host memory; a thread writes, coordinates with "
    "the other ranks and publishes. Needs as much host memory as this rank's share of a checkpoint, which `plan` "
    "counts",
    "on_save_error": "when the disk refuses a checkpoint (full, read-only, broken): continue training with a warning, "
    "or exit with code 5. The older checkpoints remain either way",
    "watchdog": "whether a phase that exceeds its limit ends the run",
    "start": "building the engine, restoring a checkpoint",
    "first_step": "the first step of a launch, which compiles",
    "step": "any other step, with its tokens and its line in metrics.jsonl",
    "validation": "a whole validation",
    "save": "a save until training resumes; in the background, the time that a rank waits for another",
    "finish": "export, checks and report",
}
"""Meaning of the keys of the `reliability` block."""


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Docstrings below the fields of a model, by field name, each on one line."""
    found: dict[str, str] = {}
    for ancestor in reversed([each for each in model.__mro__ if issubclass(each, fields.ConfigModel)]):
        (tree,) = ast.parse(inspect.getsource(ancestor)).body
        assert isinstance(tree, ast.ClassDef)
        for pair in pairwise(tree.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                    found[name] = " ".join(str(text).split())
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's type, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def describe_type(annotation: Any, metadata: list[Any]) -> str:
    """A type with its bounds as text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(parts[0], [*parts[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part, metadata) for part in parts if part is not NoneType)
    if origin in (list, tuple, dict):
        inner = [describe_type(part, []) for part in parts]
        count = f"{len(parts)} x " if origin is tuple else ""
        return f"mapping of {' to '.join(inner)}" if origin is dict else f"list of {count}{inner[0]}"
    if issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    name = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}.get(annotation, "")
    stated = [mark.words for mark in metadata if isinstance(mark, fields.Allowed)]
    return stated[0] if stated else " ".join([name, " and ".join(_bounds(metadata))]).strip()


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for item in metadata:
        for inner in getattr(item, "metadata", None) or [item]:
            for kind, sign in ((Gt, ">"), (Ge, ">="), (Lt, "<"), (Le, "<=")):
                if isinstance(inner, kind):
                    yield f"{sign} {getattr(inner, kind.__name__.lower())}"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None:
        return "not set"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def recipe_keys() -> str:
    """A section per model: its docstring, and a table of its keys."""
    paths: dict[type[BaseModel], list[str]] = {recipe.Recipe: [""]}
    queue: list[type[BaseModel]] = [recipe.Recipe]
    sections = []
    for model in queue:  # grows while it is walked
        for name, field in model.model_fields.items():
            for part in models_in(field.annotation):
                if part not in paths:
                    queue.append(part)
                paths.setdefault(part, []).append(f"{paths[model][0]}{name}.")
    for model in queue:
        where = ", ".join(f"`{path}*`" for path in paths[model]) if model is not recipe.Recipe else "top level"
        meanings = field_docstrings(model)
        sections += [f"### {model.__name__}", "", f"{where}: {inspect.cleandoc(model.__doc__ or '')}", ""]
        rows = []
        for name, field in model.model_fields.items():
            kind = describe_type(field.annotation, field.metadata)
            parts = [_first_line(part) for part in models_in(field.annotation)]
            meaning = meanings.get(name) or MEANINGS.get(f"{model.__name__}.{name}") or " ".join(parts)
            rows.append((f"`{name}`", kind, _default(field), meaning))
        sections.append(table(("key", "value", "default", "meaning"), rows))
    return "\n".join(sections)


def _first_line(described: type) -> str:
    return inspect.cleandoc(described.__doc__ or "").split("\n")[0]


def exit_codes() -> str:
    """A row per exit code."""
    kinds = [kind for kind in errors.InherituneError.__subclasses__() if kind.__module__ == errors.__name__]
    interrupted = (
        "Ctrl-C (or SIGTERM, SIGUSR1, SIGHUP) while a run is prepared: finished stages are kept; or a "
        "second Ctrl-C within 5 s"
    )
    rows = [
        ("0", "", "success, or an agreed early stop: `status.json` in the run folder says which"),
        ("1", "", "a defect of this program (traceback): please report it"),
        ("2", "", "a mistake on the command line"),
    ]
    kinds.sort(key=lambda kind: kind.exit_code)
    rows += [(f"{kind.exit_code}", f"`{kind.__name__}`", _first_line(kind)) for kind in kinds]
    return table(("code", "error", "meaning"), [*rows, ("130", "", interrupted)])


def options() -> str:
    """A table per verb: its options."""
    sections = []
    for verb, summary in cli.VERBS.items():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(f"inheritune_ds.cli.{verb}").add_arguments(parser)
        rows = []
        for action in parser._actions:  # noqa: SLF001 - argparse has no public list
            choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
            kind = "integer" if action.type is int else "number" if action.type is float else "text"
            value = "switch" if action.nargs == 0 else choices or str(action.metavar or kind)
            names = action.option_strings or [action.dest]
            rows.append((", ".join(f"`{name}`" for name in names), value, str(action.help)))
        sections += [f"### {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        sections += [table(("option", "value", "meaning"), rows)] if rows else []
        sections += [parser.epilog or "", ""]
    return "\n".join(sections)


def ds_owned() -> str:
    """DeepSpeed keys with values from the recipe."""
    owned = [(f"`{key}`", f"`{owner}` in the recipe") for key, (owner, _) in deepspeed_keys.RECIPE_OWNED.items()]
    derived = [(f"`{key}`", f"derived: {formula}") for key, formula in deepspeed_keys.DERIVED.items()]
    return table(("DeepSpeed key", "comes from"), owned + derived)


def ds_passed_on() -> str:
    """DeepSpeed keys that are passed on."""
    keys = ", ".join(f"`{key}`" for key in sorted(deepspeed_keys.PassedOn.model_fields))
    zero = ", ".join(f"`{key}`" for key in deepspeed_keys.Zero.model_fields)
    return f"Top level: {keys}.\n\nInside `zero_optimization`: {zero}.\n"


def _values(field: FieldInfo) -> str:
    return words(field.annotation).removesuffix(', or "auto"')


def ds_kernels() -> str:
    """Keys of the `kernels` block: values, and the selection of `auto`."""
    rows = [
        (f"`{key}`", words(field.annotation).replace('"auto"', "`auto`"), AUTO_KERNELS[key])
        for key, field in KernelRequest.model_fields.items()
    ]
    return table(("key", "value", "`auto` selects"), rows)


def ds_attentions() -> str:
    """The order of attentions on each generation of GPUs."""
    rows = [(GENERATIONS[major], ", ".join(f"`{name}`" for name in order)) for major, order in ATTENTION_ORDER.items()]
    return table(("GPU", "`auto` tries, in this order"), rows)


def ds_reliability() -> str:
    """Keys of the `reliability` block: values, defaults and meanings."""
    given = Reliability()
    rows = [
        (f"`{key}`", _values(field), f"`{str(getattr(given, key)).lower()}`", RELIABILITY[key])
        for key, field in deepspeed_keys.ReliabilityBlock.model_fields.items()
        if key in RELIABILITY
    ]
    rows += [
        (f"`watchdog_s.{key}`", "seconds", f"`{seconds:g}`", RELIABILITY[key]) for key, seconds in WATCHDOG_S.items()
    ]
    return table(("key", "value", "default", "meaning"), rows)


def ds_refused() -> str:
    """DeepSpeed keys that are refused, with the reason."""
    return table(("key", "why"), [(f"`{key}`", why) for key, why in sorted(deepspeed_refused.REFUSED.items())])


def metrics() -> str:
    """A row per metric."""
    rows = [(f"`{name}`", metric.unit, metric.meaning) for name, metric in METRICS.items()]
    return table(("name", "unit", "meaning"), rows)


TABLES: list[Callable[[], str]] = [recipe_keys, exit_codes, options, metrics, families, campaign, layers.overview]
TABLES += [ds_owned, ds_passed_on, ds_kernels, ds_attentions, ds_reliability, ds_refused]
SECTIONS = {make.__name__: make for make in TABLES}


def render(text: str) -> str:
    """Return a page with its sections generated again."""
    return SECTION.sub(lambda match: f"{match[1]}\n{SECTIONS[match['name']]().strip()}\n\n{match[3]}", text)


def current() -> Iterator[tuple[Path, str, str]]:
    """Yield every file with generated text: its path, its text, and the new text."""
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        yield path, old, render(old)
    drawing = DOCS / "images" / "architecture.svg"
    yield drawing, drawing.read_text(encoding="utf-8"), layers.picture()


def main() -> int:
    """Write or check every file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args().check
    stale = [(path, old, new) for path, old, new in current() if old != new]
    for path, old, new in stale:
        if check:
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"{path}", "new"))
        else:
            path.write_text(new, encoding="utf-8")
    if stale and check:
        print("do: make format (or python docs/generate.py)")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
