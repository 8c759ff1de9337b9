"""From launch to the first step of `deepspeed train.py`: without compilation, compiled cold, compiled again."""

import time
from typing import Any

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.resume import Runs
from benchmarks.launch import launched, wait_for
from benchmarks.record import REPOSITORY
from inheritune_ds.storage.files import read_json, write_json

STARTS = (("tokens made", False), ("eager", False), ("compiled, no cache", True), ("compiled, cached", True))
"""The first makes the token files that the others find; the compiler's cache is the part's own."""


def startup(part: Part) -> None:
    """Seconds of each kind of start."""
    found: dict[str, Any] = {}
    starts = part.sized(STARTS, STARTS[:1])
    part.report.expect(*(words for words, _ in starts))
    for number, (words, compiled) in enumerate(starts):
        found[words] = _first_step_s(part, f"start-{number}", compiled=compiled)
        part.report.figure("seconds from launch to the first step", found)
        part.report.line(f"{words}: {found[words]:.1f} s from launch to the end of the first step")
        part.report.done(words)


def _first_step_s(part: Part, name: str, *, compiled: bool) -> float:
    document = read_json(REPOSITORY / "ds_configs" / part.sized("zero1.json", "cpu.json"))
    document["kernels"] |= {"compile": compiled}
    config = part.folder / f"{name}.json"
    write_json(config, document)
    runs = Runs(part, str(config))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(part.folder / "inductor"), "TRITON_CACHE_DIR": str(part.folder / "triton")}
    start = time.perf_counter()
    with launched(runs.command(name, steps=12), runs.log, caches) as process:
        if not wait_for(lambda: bool(runs.metrics(name)), process, part.left_s):
            raise runs.broken("no step was made")
        return time.perf_counter() - start
