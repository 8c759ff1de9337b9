"""Finished runs with made-up losses, for the tests of reports."""

import json
import math
import statistics
import struct
from pathlib import Path
from typing import Any

from inheritune_ds.report.comparison import Arm
from inheritune_ds.report.results import Evaluation, run_result
from inheritune_ds.report.study_report import StudyRow

STEPS, BATCH_TOKENS = 100, 4096
ON_THIS_TEXT = "on this text; the spread between seeds is not in it"
TEXT: dict[str, Any] = {"seq_len": 128, "tokens_sha256": "a" * 64}
"""Windows of all evaluations of this file; each is a document of its own."""
NOISE = tuple(math.sin(1.7 * document) / 3 for document in range(16))
"""Of the documents: large, and the same for all models, so the paired difference removes it."""
STUDENT = 2.13145
"""Of 15 degrees of freedom."""


def losses(level: float, *, tilt: float = 0.01) -> list[float]:
    mean = statistics.fmean(NOISE)
    return [level + noise - mean + tilt * (-1) ** index for index, noise in enumerate(NOISE)]


def evaluation(windows: list[float], tokens: list[int] | None = None, **text: Any) -> dict[str, Any]:
    counts, numbers = tokens or [128] * len(windows), list(range(len(windows)))
    sums = [loss * count for loss, count in zip(windows, counts, strict=True)]
    pieces = {"windows": numbers, "documents": numbers, "tokens": counts, "losses": sums}
    error = statistics.stdev(windows) / math.sqrt(len(windows)) if len(windows) > 1 else None
    document = {"format": 2, "loss": sum(sums) / sum(counts), "stderr": error, "windows": len(windows)}
    return {**document, **TEXT, **text, "pieces": pieces}


def arm(label: str, *runs: dict[str, Any], given: bool = False) -> Arm:
    return Arm(label, "fp32", tuple(Evaluation(**run) for run in runs), given=given)


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def make_run(
    folder: Path,
    start: float,
    end: float,
    *,
    tilt: float = 0.01,
    reference: float | None = None,
    precision: str = "fp32",
) -> Path:
    """Write the files of a finished run."""
    summary = {
        "name": folder.name, "recipe_fingerprint": "f" * 64, "parameters": 1_234_567, "blocks": 4,
        "block_parameters": 1_000_000, "steps": STEPS, "tokens_seen": STEPS * BATCH_TOKENS, "unique_tokens": 300_000,
        "epochs": 1.37, "train_seconds": 61.7, "world_size": 2, "zero_stage": 1, "precision": precision,
        "master_weights": "fp32 model",
        "kind": "inherited", "export": "export", "version": "0.1.0",
    }  # fmt: skip
    write_json(folder / "run.json", summary)
    rows: list[dict[str, float]] = []
    for step, level in ((0, start), (STEPS // 2, (start + end) / 2), (STEPS, end)):
        result = evaluation(losses(level, tilt=tilt))
        write_json(folder / f"eval/validation-step-{step:08d}.json", {"step": step, **result})
        axes = {"step": step, "train/tokens": step * BATCH_TOKENS}
        if step:
            rows.append({**axes, "train/loss": level, "train/lr": 1e-3 * (1 - step / STEPS)})
        rows.append({**axes, "val/loss": result["loss"], "val/stderr": result["stderr"], "val/ppl": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if reference is not None:
        other = evaluation(losses(reference, tilt=0.03))
        write_json(
            folder / "eval/reference.json",
            {"model": "models/big", "parameters": 9_876_543, "precision": "fp32", **other},
        )
    return folder


def study(tmp_path: Path) -> list[StudyRow]:
    return [
        StudyRow("big", "reference", run_result(make_run(tmp_path / "big", 8.0, 4.2, tilt=0.02)), "1"),
        StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0)), "2"),
        StudyRow("random", "baseline", run_result(make_run(tmp_path / "random", 8.1, 4.5, tilt=0.05)), "3"),
    ]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
