"""One training case of the GPU check: order, result, and the process of its own that it runs in.

A process of its own gives every case an empty GPU; running out of memory is a result, not the end of the part.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_parts.part import Part
from benchmarks.record import REPOSITORY
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.files import read_json, write_json

_LOG_END = 3000
_COMPILER_FAULTS = {
    "code that the compiler left eager": "left_eager",
    "breaks of graphs": "breaks",
    "graphs made after the warm-up": "recompiles",
}
"""Bars of all cases together, and the numbers of a case."""


@dataclass(frozen=True)
class Case:
    """A model to train for a few steps, as a run with this DeepSpeed config would.

    Attributes:
        shape: The model, in the keys of a recipe's `shape`; windows are as long as its positions.
        step_windows: Windows an optimizer step.
        micro_batch: Windows a micro-step; `auto` for the planner's choice, None for the config's own.
        ds_config: File of ds_configs/.
        document: Replaces top-level keys of that file.
        memory_gib: Limit of the planner's choice; None: the whole device.
        cap_gib: Limit of torch's allocator on the GPU; None: no limit.
        warmup_steps: Steps before the first timed block, with compilation.
    """

    name: str
    shape: dict[str, Any]
    step_windows: int
    micro_batch: int | Literal["auto"] | None
    device: Literal["cpu", "cuda"]
    ds_config: str = "zero1.json"
    document: dict[str, Any] = field(default_factory=dict)
    memory_gib: float | None = None
    cap_gib: float | None = None
    warmup_steps: int = 3
    blocks: int = 5
    block_steps: int = 4


@dataclass(frozen=True)
class Trained:
    """Results of a case.

    Attributes:
        micro_batch: Windows a micro-step.
        accumulation: Micro-steps a step.
        out_of_memory: The allocator's message; then nothing below is known.
        tokens_per_s: `median`, `min`, `max` over the blocks.
        first_step_s: The first step, with compilation.
        start_s: From the start of the case to the end of its first step.
        mfu: Of the median rate; None for an unknown GPU.
        peak_gib: Peak of live tensors after the warm-up; on a CPU None.
        reserved_gib: Peak of the allocator; on a CPU None.
        predicted_gib: The planner's peak of live tensors.
        predicted_tokens_per_s: The planner's; None for an unknown GPU.
        outside_ratio: Median share of a timed step outside forward and backward passes.
        data_wait_ratio: Median share of waiting for data.
        graphs: Compiled in the warm-up; blocks of the same kind share one.
        left_eager: Pieces of code that the compiler gave up; every block that should run one runs without compilation.
        breaks: Places where a graph ends and the interpreter continues.
        recompiles: Graphs compiled after the warm-up.
        syncs: Host synchronizations of a step by place in the source, counted separately; on a CPU None.
        syncs_per_micro_step: Those of every micro-step; None on a CPU, and with one micro-step a step, where those of
            the step are as frequent.
        notes: The chosen kernels, with reasons.
    """

    name: str
    micro_batch: int
    accumulation: int
    parameters: int
    out_of_memory: str = ""
    steps: int = 0
    step_tokens: int = 0
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    first_step_s: float = 0.0
    start_s: float = 0.0
    mfu: float | None = None
    peak_gib: float | None = None
    reserved_gib: float | None = None
    predicted_gib: float | None = None
    predicted_tokens_per_s: float | None = None
    outside_ratio: float = 0.0
    data_wait_ratio: float = 0.0
    graphs: int = 0
    left_eager: int = 0
    breaks: int = 0
    recompiles: int = 0
    syncs: dict[str, float] | None = None
    syncs_per_micro_step: int | None = None
    loss: float | None = None
    notes: Sequence[str] = ()

    def words(self) -> str:
        """The case in a line."""
        head = f"{self.name}: micro-batch {self.micro_batch} x {self.accumulation}"
        if self.out_of_memory:
            return f"{head}: out of memory"
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        peak = "" if self.peak_gib is None else f", {self.peak_gib:.1f} GiB (predicted {self.predicted_gib or 0.0:.1f})"
        rest = f"outside the passes {self.outside_ratio:.1%}, first step {self.first_step_s:.1f} s"
        return f"{head}: {self.tokens_per_s['median']:,.0f} tokens/s{mfu}{peak}, {rest}"


class Cases:
    """The cases of a part, one after the other within its time; each is listed under `cases` in the report."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._found: list[Trained] = []
        self._longest_s = 0.0

    def measure(self, case: Case, *, apart: bool = False) -> Trained | None:
        """Run a case; on a GPU, and with `apart`, in a process of its own.

        Returns:
            None if less time is left than the longest case took, or if its process ended without a result: then the
            part counts as failed, whatever its other cases show.
        """
        part = self._part
        if part.left_s < self._longest_s:
            part.report.line(f"{case.name}: skipped, {part.left_s:.0f} s remain of the part's time")
            return None
        start_s = time.monotonic()
        if part.rehearse and not apart:
            from torch import _dynamo

            from benchmarks.gpu_parts.training import run_case

            _dynamo.reset()  # as in a process of its own, no graph is there yet
            found = run_case(case, part.folder)
        else:
            try:
                found = _in_process(part, case)
            except MachineError as error:
                part.report.fail(str(error))
                part.report.line(error.problem.partition(";")[0])
                return None
        self._longest_s = max(self._longest_s, time.monotonic() - start_s)
        self._found.append(found)
        part.report.figure("cases", [asdict(one) for one in self._found])
        for words, key in _COMPILER_FAULTS.items():
            count = sum(getattr(one, key) for one in self._found)
            part.report.bar(words, count, at_most=0, of_gpu=False)
        part.report.line(found.words())
        part.report.done(case.name)
        return found


def _in_process(part: Part, case: Case) -> Trained:
    log, result = part.folder / f"{case.name}.log", part.folder / f"{case.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts.case", json.dumps(asdict(case)), str(result)]
    with log.open("wb") as stream:
        try:
            subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=max(part.left_s, 0.0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _no_result(case, "was not done in time", log) from None
    answer = read_json(result)
    if answer is None:
        raise _no_result(case, "ended without a result", log)
    return Trained(**answer)


def _no_result(case: Case, what: str, log: Path) -> MachineError:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return MachineError(
        f"the case {case.name} {what}; the end of its output:\n{text[-_LOG_END:]}",
        action="fix the error above, or give --only without this part",
    )


def main() -> None:
    """Run the case of the first argument; write its result to the file of the second."""
    from benchmarks.gpu_parts.training import run_case

    result = Path(sys.argv[2])
    write_json(result, asdict(run_case(Case(**json.loads(sys.argv[1])), result.parent)))
    sys.stdout.flush()
    os._exit(0)  # nothing is kept, and process groups take seconds to leave


if __name__ == "__main__":
    main()
