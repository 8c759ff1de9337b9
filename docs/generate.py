"""Write the tables of the docs that repeat what the code says: recipe keys, DeepSpeed keys, exit codes, metrics.

Each table stands between `<!-- generated: NAME -->` and `<!-- end -->`; the text around it is written by
hand. `python docs/generate.py` writes them, `--check` ends with 1 and a diff when one is not current.
"""
# ruff: noqa: INP001  # a script beside the docs, not a package

import argparse
import ast
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from inheritune_ds import errors
from inheritune_ds.config import deepspeed_keys, fields, recipe
from inheritune_ds.config.kernels import COMPILE_FLOPS_CPU, COMPILE_MFU, COMPILE_SECONDS_GPU, KernelRequest
from inheritune_ds.config.messages import words
from inheritune_ds.config.reliability import WATCHDOG_S, Reliability
from inheritune_ds.storage.files import read_json
from inheritune_ds.tracking.metrics import METRICS

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # for the lists that the tests hold
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
    "PublishedClaim.source": "Where it stands.",
    "Shape.model_type": "Family.",
    "Shape.vocab_size": "Rows of the token embedding.",
    "Shape.hidden_size": "Width.",
    "Shape.num_hidden_layers": "Blocks.",
    "Shape.num_attention_heads": "Heads of a block.",
    "Shape.max_position_embeddings": "Longest sequence, in tokens.",
    "Shape.tie_word_embeddings": "Whether the head is the token embedding (always so for gpt2).",
    "HubSource.dataset": "Id of the dataset on the hub.",
    "HubSource.text_field": "Field of a record that holds the document.",
    "EmbeddedSource.kind": "This source.",
    "FilesSource.kind": "This source.",
    "HubSource.kind": "This source.",
    "TokensSource.kind": "This source.",
}
"""Meaning of keys whose model leaves them without a docstring."""


AUTO_KERNELS = {
    "attention": "the first of these that works; flash attention is for GPUs, bf16 or fp16, and families that have it",
    "optimizer": "the first of these that works; on a CPU `torch_fused`. Under `offload_optimizer` it is always "
    "DeepSpeed's CPU Adam, and a name is refused",
    "liger": "on for a GPU where liger-kernel has RMSNorm, RoPE or SwiGLU for the family (GPT-2: it has none) and "
    "blocks are not compiled, for torch.compile fuses the same",
    "loss": "`chunked`: the logits of all tokens never exist at once; families whose logits are more than head times "
    "hidden state take `plain`, with a line",
    "compile": f"on where it pays: not with stage 3; on a CPU in bf16 from {COMPILE_FLOPS_CPU:.0e} FLOPs of a rank on; "
    f"on a GPU from {COMPILE_SECONDS_GPU / 60:.0f} minutes at {COMPILE_MFU} of its peak on",
    "activation_checkpointing": "`none`; the others trade a second forward pass (`selective`: without its matrix "
    "products and attention) for memory",
}
"""What the ladders of inheritune_ds/training/kernels.py do, in a line each."""

RELIABILITY = {
    "async_save": "training waits only until its state is copied to host memory; a thread writes, meets the other "
    "ranks and publishes. Takes as much host memory as this rank's share of a checkpoint",
    "on_save_error": "what happens when the disk refuses a checkpoint (full, read-only, broken): train on with a loud "
    "line, or end with exit code 5. The older checkpoints stay either way",
    "watchdog": "whether a phase that takes longer than its limit ends the run",
    "start": "building the engine, restoring a checkpoint",
    "first_step": "the first step of a launch, which compiles",
    "step": "any other step, with its tokens and its line in metrics.jsonl",
    "validation": "a whole validation",
    "save": "a save until training goes on; in the background, what a rank waits for another",
    "finish": "export, checks and report",
}
"""What the keys of the `reliability` block mean."""


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Docstrings below the fields of a model, by field name, each on one line."""
    found: dict[str, str] = {}
    for ancestor in reversed([each for each in model.__mro__ if issubclass(each, fields.ConfigModel)]):
        (tree,) = ast.parse(inspect.getsource(ancestor)).body
        assert isinstance(tree, ast.ClassDef)
        for node, below in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(node, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(below.value, ast.Constant):
                assert isinstance(node.target, ast.Name)
                found[node.target.id] = " ".join(str(below.value.value).split())
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that a field's type names, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def describe_type(annotation: Any, metadata: list[Any]) -> str:
    """A type and its bounds in words."""
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
        return "left out"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def recipe_keys() -> str:
    """A section a model: what it is, and a table of its keys."""
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
        sections += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            kind = describe_type(field.annotation, field.metadata)
            parts = [_first_line(part) for part in models_in(field.annotation)]
            meaning = meanings.get(name) or MEANINGS.get(f"{model.__name__}.{name}") or " ".join(parts)
            sections.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
        sections.append("")
    return "\n".join(sections)


def _first_line(described: type) -> str:
    return inspect.cleandoc(described.__doc__ or "").split("\n")[0]


def exit_codes() -> str:
    """A row an exit code."""
    rows = ["| code | error | meaning |", "|---|---|---|"]
    rows.append("| 0 | | success, or an agreed early stop: `status.json` in the run folder says which |")
    rows.append("| 1 | | a defect of this program (traceback): please report it |")
    rows.append("| 2 | | the command line is mistyped |")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    errors_by_code = sorted((kind for kind in kinds if issubclass(kind, errors.InherituneError)), key=_exit_code)
    rows += [f"| {_exit_code(kind)} | `{kind.__name__}` | {_first_line(kind)} |" for kind in errors_by_code[1:]]
    rows.append(
        "| 130 | | Ctrl-C (or SIGTERM, SIGUSR1; `inherit`: also SIGHUP) while a run is prepared: finished stages are "
        "kept; or a second Ctrl-C within 5 s |"
    )
    return "\n".join(rows) + "\n"


def _exit_code(kind: type[errors.InherituneError]) -> int:
    return kind.exit_code


def ds_owned() -> str:
    """DeepSpeed keys whose value comes from the recipe."""
    rows = ["| DeepSpeed key | comes from |", "|---|---|"]
    rows += [f"| `{key}` | `{owner}` in the recipe |" for key, (owner, _) in deepspeed_keys.RECIPE_OWNED.items()]
    rows += [f"| `{key}` | derived: {formula} |" for key, formula in deepspeed_keys.DERIVED.items()]
    return "\n".join(rows) + "\n"


def ds_passed_on() -> str:
    """DeepSpeed keys that reach DeepSpeed as they are written."""
    keys = ", ".join(f"`{key}`" for key in sorted(deepspeed_keys.PassedOn.model_fields))
    zero = ", ".join(f"`{key}`" for key in deepspeed_keys.Zero.model_fields)
    return f"Top level: {keys}.\n\nInside `zero_optimization`: {zero}.\n"


def _values(field: FieldInfo) -> str:
    return words(field.annotation).removesuffix(', or "auto"')


def ds_kernels() -> str:
    """Keys of the `kernels` block: values, and what auto takes."""
    rows = ["| key | value | `auto` takes |", "|---|---|---|"]
    for key, field in KernelRequest.model_fields.items():
        rows.append(f"| `{key}` | {_values(field)}, or `auto` | {AUTO_KERNELS[key]} |")
    return "\n".join(rows) + "\n"


def ds_reliability() -> str:
    """Keys of the `reliability` block: values, defaults and meanings."""
    given = Reliability()
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in deepspeed_keys.ReliabilityBlock.model_fields.items():
        if key in RELIABILITY:
            default = str(getattr(given, key)).lower()
            rows.append(f"| `{key}` | {_values(field)} | `{default}` | {RELIABILITY[key]} |")
    for key, seconds in WATCHDOG_S.items():
        rows.append(f"| `watchdog_s.{key}` | seconds | `{seconds:g}` | {RELIABILITY[key]} |")
    return "\n".join(rows) + "\n"


def ds_refused() -> str:
    """DeepSpeed keys that are refused, with the reason."""
    rows = ["| key | why |", "|---|---|"]
    rows += [f"| `{key}` | {reason} |" for key, reason in sorted(deepspeed_keys.REFUSED.items())]
    return "\n".join(rows) + "\n"


def metrics() -> str:
    """A row a metric."""
    rows = ["| name | unit | meaning |", "|---|---|---|"]
    rows += [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in METRICS.items()]
    return "\n".join(rows) + "\n"


def campaign() -> str:
    """A row a part of the campaign: what it proves, what came of it, and how long that took."""
    results = read_json(DOCS / "results" / "reliability.json") or {}
    rows = ["| | part | promise | cases passed | minutes | figures |", "|---|---|---|---|---|---|"]
    for name, part in sorted(results.items(), key=lambda item: (item[1]["point"], item[0])):
        told = "; ".join(
            f"{key.replace('_', ' ')} {_figure(value)}" for key, value in part["figures"].items() if value != ""
        )
        rows.append(
            f"| {part['point']} | `{name}` | {part['promise']} | {part['passed']} of {part['cases']} "
            f"| {part['seconds'] / 60:.1f} | {told} |"
        )
    return "\n".join(rows) + "\n"


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_figure(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def families() -> str:
    """Model types by what a surgery can do with them."""
    from tests.surgery.families import NOT_TINY, TINY
    from tests.surgery.refusals import IN_PLACE, REFUSED

    exact = [f"`{name}`" for name in TINY if name not in REFUSED and name not in IN_PLACE]
    text = [
        f"**Cut exactly ({len(exact)} types).** Each is tested with a tiny random model of 6 blocks and the selections "
        "`first:3`, `last:2`, `0,2,5` and `even:3`: " + ", ".join(exact) + ".",
        "",
        "**Cut, unless the selection changes what follows from the place.** Of the same four, these were refused:",
        "",
        "| type | refused | what the message names |",
        "|---|---|---|",
    ]
    for name in sorted(set(IN_PLACE) & set(TINY)):
        by_reason: dict[str, list[str]] = {}
        for selection, reason in IN_PLACE[name].items():
            by_reason.setdefault(reason, []).append(f"`{selection}`")
        text += [f"| `{name}` | {', '.join(which)} | {reason} |" for reason, which in by_reason.items()]
    text += ["", "**Not cut.**", "", "| type | the message says |", "|---|---|"]
    whole = {name: reason for name, reason in REFUSED.items() if name in TINY}
    text += [f"| `{name}` | {reason} |" for name, reason in sorted(whole.items())]
    text += [f"| `{name}` | not tested: {reason} |" for name, reason in sorted(NOT_TINY.items())]
    return "\n".join(text) + "\n"


SECTIONS: dict[str, Callable[[], str]] = {
    "recipe_keys": recipe_keys,
    "exit_codes": exit_codes,
    "ds_owned": ds_owned,
    "ds_passed_on": ds_passed_on,
    "ds_kernels": ds_kernels,
    "ds_reliability": ds_reliability,
    "ds_refused": ds_refused,
    "metrics": metrics,
    "families": families,
    "campaign": campaign,
}


def render(text: str) -> str:
    """Return a document with its generated sections made anew."""
    return SECTION.sub(lambda match: f"{match[1]}\n{SECTIONS[match['name']]().strip()}\n\n{match[3]}", text)


def main() -> int:
    """Write or check every document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when a table is not current")
    check = parser.parse_args().check
    stale = 0
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if old == new:
            continue
        if check:
            stale = 1
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"{path}", "current")
            )
        else:
            path.write_text(new, encoding="utf-8")
    if stale:
        print("do: make format (or python docs/generate.py)")
    return stale


if __name__ == "__main__":
    sys.exit(main())
