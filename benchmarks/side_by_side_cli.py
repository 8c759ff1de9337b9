"""The command line that the side-by-side measurements share."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.comparison import Comparison
from benchmarks.record import command_line, record
from benchmarks.side_by_side import MAX_OTHER_CORES, SHAPES, TOY, Setting, measure, report
from benchmarks.subjects.worker import SUBJECTS
from inheritune_ds.errors import InherituneError, MachineError

REHEARSAL_ENVIRON = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling a toy takes longer than all the rest of a rehearsal."""


def batches(text: str) -> list[tuple[int, int]]:
    """Read `8x4,4x1`: micro-batch and accumulation of every setting."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not MICRO_BATCHxACCUMULATION, such as 8x4,4x1")
    pairs = (pair.partition("x") for pair in text.split(","))
    return [(int(micro_batch), int(accumulation)) for micro_batch, _, accumulation in pairs]


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def names(text: str) -> list[str]:
    """Read `plain,project`: subjects."""
    given = text.split(",")
    unknown = [name for name in given if name not in SUBJECTS]
    if unknown or len(set(given)) < len(given):
        problem = f"no subject: {', '.join(unknown)}" if unknown else f"a name is repeated: {text}"
        raise argparse.ArgumentTypeError(f"{problem}; there are {', '.join(SUBJECTS)}")
    return given


@dataclass(frozen=True)
class Benchmark:
    """A command that measures trainers side by side.

    Attributes:
        name: Of its module and its result.
        about: First line of its help.
        subjects: The default subjects, from the arguments.
        batches: Default micro-batch and accumulation of its settings.
        environ: Set for all subjects.
    """

    name: str
    about: str
    subjects: Callable[[argparse.Namespace], Sequence[str]]
    batches: str
    allocator: str
    comparisons: Callable[[Setting], Sequence[Comparison]]
    environ: Mapping[str, str] = field(default_factory=dict)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure, print the tables, write the JSON file; returns 1 if a bar was missed."""
        args = self._parser().parse_args(arguments)
        try:
            return self._run(args)
        except InherituneError as error:
            print(f"{self.name}: error: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    def _parser(self) -> argparse.ArgumentParser:
        parser = command_line(self.name, self.about, rehearse="a toy: it tests this command, and measures nothing")
        add = parser.add_argument
        add("--shape", choices=SHAPES, default="llama", help="the model (default: llama)")
        add("--device", choices=("cpu", "cuda"), default="cpu")
        add("--batches", type=batches, metavar="BxA,...", help=f"micro-batch x accumulation (default: {self.batches})")
        add("--subjects", type=names, metavar="A,B,...", help=f"any of {', '.join(SUBJECTS)}")
        text = f"keep: freed memory is kept in all subjects alike; default: as each does itself ({self.allocator})"
        add("--allocator", choices=("keep", "default"), default=self.allocator, help=text)
        add("--processes", type=positive, default=3, help="times that every subject is started (default: 3)")
        add("--blocks", type=positive, default=5, help="rounds of every set of processes (default: 5)")
        add("--seconds", type=float, default=2.0, help="length of a block, about (default: 2)")
        add("--warmup", type=positive, default=3, help="steps before the first block (default: 3)")
        add("--litgpt-python", help="interpreter of an environment that has litgpt 0.5.13")
        add("--nanogpt", help="folder of a nanoGPT checkout (--shape gpt2)")
        return parser

    def _run(self, args: argparse.Namespace) -> int:
        chosen = tuple(args.subjects or self.subjects(args))
        check_subjects(chosen, args)
        figures, missed = [], False
        for batch in args.batches or batches("2x2" if args.rehearse else self.batches):
            setting = self._setting(args, chosen, batch)
            comparisons = self.comparisons(setting)
            if args.rehearse:
                comparisons = [replace(comparison, bar=None) for comparison in comparisons]
            found, lines = report(measure(setting), comparisons)
            print("", *lines, "", sep="\n", flush=True)
            figures.append(found)
            missed |= any(ratio["verdict"] == "missed" for ratio in found["ratios"].values())
        if (args.shape, args.device) != ("llama", "cpu"):
            args.name += f"-{args.shape}-{args.device}"
        record(args, {"rehearsal": args.rehearse, "settings": figures})
        return int(missed)

    def _setting(self, args: argparse.Namespace, chosen: tuple[str, ...], batch: tuple[int, int]) -> Setting:
        shape, toy = SHAPES[args.shape], args.rehearse
        if toy:
            shape = {**shape, **TOY, **({"intermediate_size": 48} if "intermediate_size" in shape else {})}
        return Setting(
            subjects=chosen,
            shape=("toy" if toy else args.shape, shape),
            micro_batch=batch[0],
            accumulation=batch[1],
            device=args.device,
            allocator=args.allocator,
            processes=1 if toy else args.processes,
            blocks=2 if toy else args.blocks,
            block_s=0.0 if toy else args.seconds,
            warmup_steps=1 if toy else args.warmup,
            max_other_cores=float("inf") if toy else MAX_OTHER_CORES,
            environ={**self.environ, **(REHEARSAL_ENVIRON if toy else {})},
            litgpt_python=args.litgpt_python,
            nanogpt=args.nanogpt,
        )


def check_subjects(chosen: Sequence[str], args: argparse.Namespace) -> None:
    """Refuse subjects that cannot be run, before any is started.

    Raises:
        MachineError: If litgpt's environment, a nanoGPT checkout or the GPU is not there.
    """
    if "litgpt" in chosen and not (args.litgpt_python and Path(args.litgpt_python).is_file()):
        raise MachineError(
            f"the subject litgpt needs an interpreter of its own environment; --litgpt-python is {args.litgpt_python}",
            action="python -m venv L; L/bin/pip install litgpt==0.5.13; then --litgpt-python L/bin/python",
        )
    if "nanogpt" in chosen:
        if args.shape == "llama":
            raise MachineError(
                "nanoGPT has no llama",
                allowed=", ".join(name for name, shape in SHAPES.items() if shape["model_type"] == "gpt2"),
                action="give --shape gpt2, or leave nanogpt out of --subjects",
            )
        if not (args.nanogpt and (Path(args.nanogpt) / "model.py").is_file()):
            raise MachineError(
                f"the subject nanogpt needs a checkout of nanoGPT, with its model.py; --nanogpt is {args.nanogpt}",
                action="git clone https://github.com/karpathy/nanoGPT, then --nanogpt nanoGPT",
            )
