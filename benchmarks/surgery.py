"""Cut OpenLLaMA-3B's shape in half: measure time, memory, and the phases of a surgery.

`python -m benchmarks.surgery` creates a random reference of 3.4B parameters in fp16 (6.9 GB below --folder), cuts it to
its first 13 blocks and writes docs/results/surgery.json. It needs 15 GB of disk and 16 GB of memory.

Time: planning and writing the target (the cut) against a plain copy of the same bytes, alternating (copy, cut, cut,
copy, ...) in one process, with the source in the page cache and all written files flushed in between. Memory: the peak
of anonymous memory of a whole `inheritune-ds inherit` in its own process, minus that after its imports. Mapped files do
not count: the kernel reclaims their pages.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.host_memory import anonymous_bytes, peak_growth
from benchmarks.record import command_line, record

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""openlm-research/open_llama_3b."""
SELECT = "first:13"
EXPECTED_PARAMETERS = 1_815_638_400
TIME_BAR = 1.3
"""Most time of the cut, in times of a plain copy."""
MEMORY_BAR = (1.15, 400e6)
"""Most anonymous memory above the idle process: times the target's bytes, plus bytes."""


def make_reference(folder: Path) -> None:
    """Write a random reference in shards."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="2GB")


def cut(reference: Path, folder: Path) -> float:
    """Plan and write the target; seconds."""
    from inheritune_ds.config.model import Target
    from inheritune_ds.surgery.inherit import Cut, make_config, plan_target
    from inheritune_ds.surgery.load import load_config
    from inheritune_ds.surgery.reference import ReferenceModel
    from inheritune_ds.surgery.write_shards import write_shards

    start = time.perf_counter()
    chosen = Cut(
        target=Target(select=SELECT),
        seed=0,
        identity={},
        command="",
        reference=ReferenceModel("reference", reference, "", {}),
        reference_config=load_config(reference),
    )
    values = plan_target(chosen, *make_config(chosen.target, chosen.reference_config))
    folder.mkdir()
    write_shards(folder, values.plan.grafts, values)
    return time.perf_counter() - start


def plain_copy(files: Sequence[Path], folder: Path) -> float:
    """Copy files; seconds."""
    start = time.perf_counter()
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return time.perf_counter() - start


def in_turns(reference: Path, folder: Path, blocks: int) -> dict[str, list[float]]:
    """Time copy, cut, cut, copy, ... `blocks` times each, after one round of warm-up."""
    original = folder / "original"
    cut(reference, original)
    files = sorted(original.glob("*.safetensors"))
    work: dict[str, Callable[[], float]] = {
        "copy": lambda: plain_copy(files, folder / "turn"),
        "cut": lambda: cut(reference, folder / "turn"),
    }
    times: dict[str, list[float]] = {"copy": [], "cut": []}
    for number in range(blocks + 1):
        for name in ("copy", "cut") if number % 2 == 0 else ("cut", "copy"):
            os.sync()
            seconds = work[name]()
            if number:
                times[name].append(seconds)
                print(f"{name:<5}{seconds:7.2f} s", flush=True)
            shutil.rmtree(folder / "turn")
    return times


def time_calls(module: Any, name: str, seconds: dict[str, float]) -> None:
    """Add up the seconds of the calls of a module's function under its name."""
    function = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    setattr(module, name, timed)


def build_once(reference: Path, output: Path) -> dict[str, Any]:
    """Run the whole command in a child process; return its phases and peak of anonymous memory."""
    start = time.perf_counter()
    import torch  # noqa: F401 - part of the idle process
    import transformers.models.llama.modeling_llama  # noqa: F401

    import inheritune_ds.surgery.inherit  # noqa: F401
    from inheritune_ds import cli
    from inheritune_ds.surgery import inherit

    seconds = {"imports": time.perf_counter() - start}
    idle = anonymous_bytes()
    phases: dict[str, float] = {}
    for name in ("plan_target", "write_shards", "describe_tensors", "prove", "describe_files"):
        time_calls(inherit, name, phases)
    words = ["inherit", "--reference", str(reference), "--select", SELECT, "--output", str(output)]
    growth: dict[str, float] = {}
    start = time.perf_counter()
    with peak_growth(growth, "command"):
        code = cli.main(words)
    whole = time.perf_counter() - start
    if code:
        sys.exit(code)
    seconds |= phases
    seconds["hash of the reference, and the rest"] = whole - sum(phases.values())
    report = json.loads((output / "inheritance.json").read_text(encoding="utf-8"))
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "whole_s": round(whole, 2),
        "idle_anonymous_bytes": idle,
        "peak_anonymous_bytes": idle + round(growth["command"]),
        "parameters": report["parameters"],
        "target_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "proof": report["proof"],
    }


def main() -> None:
    """Measure all, print a table, write the JSON file; exit with 1 if a bar is missed."""
    parser = command_line("surgery", __doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for 15 GB of files")
    parser.add_argument("--blocks", type=int, default=5, help="measured turns of each kind (default: 5)")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(build_once(*args.child)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_reference(folder / "reference")
        times = in_turns(folder / "reference", folder, args.blocks)
        command = [sys.executable, "-m", "benchmarks.surgery", "--child", str(folder / "reference")]
        done = subprocess.run([*command, str(folder / "target")], check=True, stdout=subprocess.PIPE, text=True)
        whole = json.loads(done.stdout.splitlines()[-1])
    ratio = statistics.median(times["cut"]) / statistics.median(times["copy"])
    above = whole["peak_anonymous_bytes"] - whole["idle_anonymous_bytes"]
    allowed = MEMORY_BAR[0] * whole["target_bytes"] + MEMORY_BAR[1]
    checks = {
        "parameters": whole["parameters"] == EXPECTED_PARAMETERS,
        "time": ratio <= TIME_BAR,
        "memory": above <= allowed,
        "proof": whole["proof"]["hidden_state"] == "equal, bit for bit",
    }
    print(f"cut / copy      {ratio:.2f}  (medians of {args.blocks}; at most {TIME_BAR})")
    print(f"memory          {above / 1e9:.2f} GB above the idle process (at most {allowed / 1e9:.2f})")
    for phase, value in whole["seconds"].items():
        print(f"{phase:<36}{value:8.2f} s")
    print(f"checks          {checks}")
    spread = {
        name: {"median_s": round(statistics.median(values), 3), "all_s": [round(value, 3) for value in values]}
        for name, values in times.items()
    }
    figures = {"turns": spread, "cut_over_copy": round(ratio, 3), "anonymous_bytes_above_idle": above}
    record(args, {**figures, "anonymous_bytes_allowed": round(allowed), "whole": whole, "checks": checks})
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
