"""The GPU check: train, kill, go on, measure, in one unattended command without a network.

`python -m benchmarks.gpu_check` trains a small llama from scratch on Python's own documentation (bf16, ZeRO-1) through
`deepspeed train.py`, once straight and once killed in the middle and started again, and writes
docs/results/gpu_check.json. It ends with 0 when every check passed, 1 when one failed, 10 where there is no GPU.
`--rehearse` goes through the same on a CPU with a tiny model: it tests this script, not a GPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.launch import kill, launched, train_command, wait_for
from benchmarks.record import RESULTS, write_result
from inheritune_ds.analysis.results import read_metrics
from inheritune_ds.errors import MachineError
from inheritune_ds.files import read_json, sha256_file
from inheritune_ds.machine import detect_gpus

STEPS, CHECKPOINT_STEP, WARMUP_STEPS = 60, 30, 10
RUN_TIMEOUT_S = 480.0
LOSS_TOLERANCE = 0.02
"""Relative; attention's backward pass adds in another order each time on a GPU."""
SIZES = {
    "gpu": {"hidden": 768, "blocks": 12, "heads": 12, "mlp": 2048, "window": 512, "batch": 65_536},
    "rehearsal": {"hidden": 64, "blocks": 2, "heads": 2, "mlp": 176, "window": 64, "batch": 2_048},
}
RECIPE = """\
name: {name}
description: the GPU check's run
target:
  shape:
    model_type: llama
    vocab_size: 4096
    hidden_size: {hidden}
    num_hidden_layers: {blocks}
    num_attention_heads: {heads}
    intermediate_size: {mlp}
    max_position_embeddings: {window}
corpus:
  sources: [{{kind: embedded}}]
  tokenizer: {{vocab_size: 4096}}
  validation_ratio: 0.1
training: {{seq_len: {window}, global_batch_tokens: {batch}, duration: {steps} steps}}
optimizer: {{lr: 6e-4}}
schedule: {{kind: cosine, warmup_steps: {warmup}}}
validation: {{interval_steps: {checkpoint}, max_tokens: 32_768}}
checkpoint: {{interval_steps: {checkpoint}}}
logging: {{interval_steps: 1}}
"""


class Check:
    """The runs of one check below a folder, and what was found out about them."""

    def __init__(self, folder: Path, *, rehearse: bool) -> None:
        self.folder = folder
        self.rehearse = rehearse
        self.results: list[dict[str, Any]] = []

    def note(self, name: str, *, passed: bool, detail: str) -> None:
        """Keep and print the outcome of one check."""
        self.results.append({"check": name, "passed": passed, "detail": detail})
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {detail}", flush=True)

    def run_dir(self, name: str) -> Path:
        """The run folder of a run."""
        return self.folder / "runs" / name

    def train(self, name: str, *, kill_at: int | None = None) -> bool:
        """Start a run and wait for its end, or kill it once the checkpoint of a step is published."""
        recipe = self.folder / f"{name}.yaml"
        size = SIZES["rehearsal" if self.rehearse else "gpu"]
        text = RECIPE.format(name=name, steps=STEPS, warmup=WARMUP_STEPS, checkpoint=CHECKPOINT_STEP, **size)
        recipe.write_text(text, encoding="utf-8")
        command = train_command(
            *("--deepspeed_config", "ds_configs/cpu.json" if self.rehearse else "ds_configs/zero1.json"),
            *("--recipe", str(recipe)),
            *("--runs-dir", str(self.folder / "runs"), "--cache-dir", str(self.folder / "cache")),
        )
        environ = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        environ |= {"DS_ACCELERATOR": "cpu"} if self.rehearse else {}
        with launched(command, self.log, environ) as process:
            if kill_at is not None:
                published = self.run_dir(name) / "checkpoints" / f"step-{kill_at:08d}"
                reached = wait_for(published.exists, process, RUN_TIMEOUT_S)
                running = process.poll() is None
                kill(process)
                return reached and running
            wait_for(lambda: False, process, RUN_TIMEOUT_S)
            return process.poll() == 0

    @property
    def log(self) -> Path:
        """Output of all launches."""
        return self.folder / "log"

    def losses(self, name: str) -> dict[int, float]:
        """Training loss by step."""
        return {row["step"]: row["train/loss"] for row in read_metrics(self.run_dir(name)) if "train/loss" in row}

    def check_straight_run(self) -> bool:
        """Train without interruption."""
        start = time.perf_counter()
        ended = self.train("gpu-check")
        run = read_json(self.run_dir("gpu-check") / "run.json") or {}
        precision = "fp32" if self.rehearse else "bf16"
        right = run.get("precision") == precision and run.get("zero_stage") == 1 and run.get("steps") == STEPS
        told = f"{run.get('steps')} steps, {run.get('precision')}, ZeRO-{run.get('zero_stage')}"
        self.note(
            "training", passed=ended and right, detail=f"{told}, {time.perf_counter() - start:.1f} s with start-up"
        )
        if ended:
            losses = self.losses("gpu-check")
            fell = losses[STEPS] < losses[1] - 0.5
            self.note(
                "loss falls", passed=fell, detail=f"{losses[1]:.3f} at step 1, {losses[STEPS]:.3f} at step {STEPS}"
            )
        return ended

    def check_resume(self) -> None:
        """Kill a second run after its first checkpoint, start it again, compare it with the straight one."""
        killed = self.train("gpu-check-killed", kill_at=CHECKPOINT_STEP)
        ended = killed and self.train("gpu-check-killed")
        self.note("resume", passed=ended, detail=f"killed after step {CHECKPOINT_STEP}, then the same command again")
        if not ended:
            return
        straight, resumed = self.losses("gpu-check"), self.losses("gpu-check-killed")
        worst = max(abs(resumed.get(step, 0.0) - loss) / loss for step, loss in straight.items())
        weights = [sha256_file(self.run_dir(name) / "export" / "model.safetensors") for name in _NAMES]
        same = "equal" if weights[0] == weights[1] else "not bit-equal"
        detail = f"largest relative difference of a step's loss {worst:.2e}; final weights {same}"
        self.note("resumed run agrees with the straight one", passed=worst <= LOSS_TOLERANCE, detail=detail)

    def figures(self) -> dict[str, Any]:
        """Speed and memory of the straight run, after its first steps."""
        rows = [row for row in read_metrics(self.run_dir("gpu-check")) if row["step"] > WARMUP_STEPS]
        figures: dict[str, Any] = {
            "parameters": (read_json(self.run_dir("gpu-check") / "run.json") or {})["parameters"]
        }
        for name in ("perf/tokens_per_s", "perf/step_ms", "perf/mfu"):
            values = [row[name] for row in rows if name in row]
            if values:
                figures[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        figures["mem/peak_gib"] = max((row["mem/peak_gib"] for row in rows if "mem/peak_gib" in row), default=None)
        return figures


_NAMES = ("gpu-check", "gpu-check-killed")


def main() -> int:
    """Run all checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with a tiny model; --out is then required")
    parser.add_argument("--out", type=Path, help="where the JSON file goes (default: docs/results/gpu_check.json)")
    args = parser.parse_args()
    if args.rehearse and args.out is None:
        parser.error("--rehearse needs --out: docs/results/ is for figures of a GPU")
    if not args.rehearse and not detect_gpus():
        print("no GPU: nvidia-smi reports none, nothing was checked", file=sys.stderr)
        return MachineError.exit_code
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), rehearse=args.rehearse)
        trained = check.check_straight_run()
        if trained:
            check.check_resume()
        passed = all(result["passed"] for result in check.results)
        if not passed:
            print(f"the log's end:\n{check.log.read_text(encoding='utf-8', errors='replace')[-6000:]}", file=sys.stderr)
        figures = check.figures() if trained else {}
    write_result(
        args.out or RESULTS / "gpu_check.json", {"passed": passed, "checks": check.results, "figures": figures}
    )
    for name, figure in figures.items():
        print(f"{name:<20} {figure}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
