"""`kernels.deterministic`: a run, and one that is killed in the middle and resumed, have the same bits."""

import json
from pathlib import Path

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.resume import CHECKPOINT_STEP, STEPS, Runs
from benchmarks.launch import kill, launched, wait_for
from inheritune_ds.storage.files import sha256_file


def deterministic(part: Part) -> None:
    """Train, kill, resume, compare every loss and the final weights."""
    shipped = json.loads(Path(part.sized("ds_configs/zero1.json", "ds_configs/cpu.json")).read_text(encoding="utf-8"))
    config = part.folder / "deterministic.json"
    config.write_text(json.dumps({**shipped, "kernels": {**shipped["kernels"], "deterministic": True}}))
    runs = Runs(part, str(config))
    part.report.expect("straight", "killed", "resumed")
    _run(runs, "straight")
    part.report.done("straight")
    _run(runs, "killed", until=runs.folder("killed") / "checkpoints" / f"step-{CHECKPOINT_STEP:08d}")
    part.report.done("killed")
    _run(runs, "killed")
    straight, resumed = ([row["train/loss"] for row in runs.metrics(name)] for name in ("straight", "killed"))
    hashes = {sha256_file(runs.folder(name) / "export" / "model.safetensors") for name in ("straight", "killed")}
    part.report.bar("steps logged", len(straight), at_least=STEPS, of_gpu=False)
    part.report.bar("losses of a resumed run are bit-equal", int(straight == resumed), at_least=1, of_gpu=False)
    part.report.bar("weights of a resumed run are bit-equal", int(len(hashes) == 1), at_least=1, of_gpu=False)
    part.report.done("resumed")


def _run(runs: Runs, name: str, until: Path | None = None) -> None:
    """Run to the end, or kill it once `until` exists."""
    with launched(runs.command(name, STEPS), runs.log) as process:
        reached = wait_for(lambda: until is not None and until.exists(), process, runs.part.left_s)
        if until is not None and reached and process.poll() is None:
            kill(process)
        elif until is not None or process.poll() != 0:
            raise runs.broken(f"the run {name} did not end well, or ended before it was to be killed")
