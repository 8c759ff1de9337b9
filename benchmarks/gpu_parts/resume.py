"""A run through `deepspeed train.py`: once straight, once killed in the middle and started again; both must agree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.part import Part
from benchmarks.launch import kill, launched, train_command, wait_for
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.files import read_json, sha256_file
from inheritune_ds.tracking.metrics import read_metrics

STEPS, CHECKPOINT_STEP = 60, 30
LOSS_TOLERANCE, LOSS_FALL = 0.02, 0.5
"""Relative (on a GPU attention's backward pass adds in another order each time); nats from first to last step."""
SIZES = {"hidden": 768, "blocks": 12, "heads": 12, "mlp": 2048, "window": 512, "batch": 65_536}
TOY = {"hidden": 64, "blocks": 2, "heads": 2, "mlp": 176, "window": 64, "batch": 2_048}
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
schedule: {{kind: cosine, warmup_steps: 10}}
validation: {{interval_steps: {interval}, max_tokens: 32_768}}
checkpoint: {{interval_steps: {interval}}}
logging: {{interval_steps: 1}}
"""
_LOG_END = 3000


@dataclass(frozen=True)
class Runs:
    """The run folders of the launches of a part."""

    part: Part
    ds_config: str

    def folder(self, name: str) -> Path:
        """Of one run."""
        return self.part.folder / "runs" / name

    @property
    def log(self) -> Path:
        """Output of all launches."""
        return self.part.folder / "train.log"

    def command(self, name: str, steps: int) -> list[str]:
        """`deepspeed train.py` for a run of `steps` steps."""
        recipe = self.part.folder / f"{name}.yaml"
        sizes = self.part.sized(SIZES, TOY)
        text = RECIPE.format(name=name, steps=steps, interval=CHECKPOINT_STEP, **sizes)
        recipe.write_text(text, encoding="utf-8")
        folders = ("--runs-dir", str(self.part.folder / "runs"), "--cache-dir", str(self.part.folder / "cache"))
        return train_command("--deepspeed_config", self.ds_config, "--recipe", str(recipe), *folders)

    def finish(self, name: str, steps: int) -> None:
        """Run to the end."""
        with launched(self.command(name, steps), self.log) as process:
            wait_for(lambda: False, process, self.part.left_s)
            if process.poll() != 0:
                raise self.broken(f"the run {name} did not end well")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The training rows logged so far."""
        if not (self.folder(name) / "metrics.jsonl").exists():
            return []
        return [row for row in read_metrics(self.folder(name)) if "train/loss" in row]

    def broken(self, what: str) -> MachineError:
        """An error with the end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return MachineError(f"{what}; the end of the log:\n{text[-_LOG_END:]}", action="fix the error above")


def resume(part: Part) -> None:
    """Train, kill, resume, compare."""
    runs = Runs(part, part.sized("ds_configs/zero1.json", "ds_configs/cpu.json"))
    part.report.expect("straight", "killed", "resumed")
    runs.finish("straight", STEPS)
    part.report.done("straight")
    with launched(runs.command("killed", STEPS), runs.log) as process:
        published = runs.folder("killed") / "checkpoints" / f"step-{CHECKPOINT_STEP:08d}"
        reached = wait_for(published.exists, process, part.left_s)
        if not reached or process.poll() is not None:
            raise runs.broken(f"the run to be killed had ended before, or not published step {CHECKPOINT_STEP}")
        kill(process)
    part.report.done("killed")
    runs.finish("killed", STEPS)
    _compare(part, runs)
    part.report.done("resumed")


def _compare(part: Part, runs: Runs) -> None:
    run = read_json(runs.folder("straight") / "run.json") or {}
    part.report.figure("run", {key: run.get(key) for key in ("parameters", "precision", "zero_stage", "steps")})
    straight, resumed = (
        {row["step"]: row["train/loss"] for row in runs.metrics(name)} for name in ("straight", "killed")
    )
    worst = max(abs(resumed.get(step, 0.0) - loss) / loss for step, loss in straight.items())
    hashes = {sha256_file(runs.folder(name) / "export" / "model.safetensors") for name in ("straight", "killed")}
    part.report.figure("final weights bit-equal", len(hashes) == 1)
    part.report.figure("loss", {"first": straight[1], "last": straight[STEPS]})
    part.report.bar("steps logged", len(straight), at_least=STEPS, of_gpu=False)
    part.report.bar("fall of the loss", straight[1] - straight[STEPS], at_least=LOSS_FALL, of_gpu=False)
    part.report.bar("loss of a step, relative difference", worst, at_most=LOSS_TOLERANCE, of_gpu=False)
    part.report.line(f"final weights {'bit-equal' if len(hashes) == 1 else 'not bit-equal'}")
