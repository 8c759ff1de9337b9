"""Reports: the tables and figures of one run, or of a study of several."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from inheritune_ds.analysis.comparison import Difference, check_same_windows, paired_difference
from inheritune_ds.analysis.curves import COLOURS, Level, Line, draw_run, draw_study
from inheritune_ds.analysis.results import Evaluation, ReferenceEvaluation, RunResult, read_metrics, run_result
from inheritune_ds.files import storage_errors, write_json, write_text
from inheritune_ds.recipe_base import is_local_path

__all__ = ["Role", "StudyRow", "read_metrics", "run_result", "study_tables", "write_run_report", "write_study_report"]

Role = Literal["reference", "target", "baseline"]

_NOTE = (
    "Losses are means over the fixed validation windows, in nats per token; ± is one standard error, s / √n over the"
    " windows. Windows of one document are not independent, so the true uncertainty is larger than the standard errors"
    " say. Each run is one seed: the spread between seeds is not in these numbers."
)
_HEAD_START_NOTE = (
    "A target that inherits starts from what its reference has learned: its tokens come on top of the reference's own"
    " training, which tokens and seconds of the target do not count."
)
_AT_START, _AT_END = "before training (step 0)", "after training"


@dataclass(frozen=True)
class StudyRow:
    """One run of a study."""

    label: str
    role: Role
    result: RunResult


def write_run_report(run_dir: Path) -> Path:
    """Write report.md, report.json and curves.png of a finished run into `run_dir`/report.

    Args:
        run_dir: The run folder.

    Returns:
        Path of report.md.

    Raises:
        RunFolderError: When the run has not finished, or a file of it is damaged.
        StorageError: When the folder cannot be written.
    """
    result = run_result(run_dir)
    folder = _make_folder(run_dir)
    with storage_errors(folder):
        draw_run(folder / "curves.png", result)
    differences = _run_differences(result)
    summary = result.summary
    document = {
        "run": summary.model_dump(),
        "initial": _without_windows(result.initial),
        "final": _without_windows(result.final),
        "reference": _without_windows(result.reference),
        "differences": [asdict(difference) for difference in differences],
        "note": _NOTE,
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {summary.name}",
        "\n".join(_validation_table(result)),
        *_difference_parts(differences),
        "\n".join(_facts_table(result)),
        _NOTE,
        "![Training and validation loss and the learning rate over the tokens seen](curves.png)",
        f"The exported model (a Hugging Face folder): `{_export(result)}`",
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def write_study_report(out_dir: Path, title: str, rows: Sequence[StudyRow]) -> Path:
    """Write report.md, report.json and curves.png of several runs into `out_dir`/report.

    Args:
        out_dir: Folder of the study.
        title: Heading.
        rows: The runs, one target at least. Without one of role reference, the reference's loss comes from
            the target's `eval/reference.json`, when its run has one.

    Returns:
        Path of report.md.

    Raises:
        RunFolderError: When two runs were validated on different windows.
        StorageError: When the folder cannot be written.
    """
    differences = _study_differences(rows)
    outside = _outside_reference(rows)
    folder = _make_folder(out_dir)
    with storage_errors(folder):
        _draw(folder / "curves.png", title, rows)
    document = {
        "title": title,
        "runs": [_row_document(row) for row in rows],
        "reference": _without_windows(outside),
        "differences": [asdict(difference) for difference in differences],
        "note": f"{_NOTE} {_HEAD_START_NOTE}",
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {title}",
        study_tables(rows),
        f"{_NOTE} {_HEAD_START_NOTE}",
        "![Validation loss of each run over the tokens it has seen](curves.png)",
        "\n".join(f"- {row.label}: run `{row.result.folder}`, exported model `{_export(row.result)}`" for row in rows),
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def study_tables(rows: Sequence[StudyRow]) -> str:
    """Render the table of the runs and that of the paired differences, readable as they stand."""
    header = ["run", "role", "val loss", "val loss at step 0", "parameters", "blocks", "tokens seen", "seconds"]
    body = [
        [
            row.label,
            row.role,
            _loss(row.result.final),
            _loss(row.result.initial),
            f"{row.result.summary.parameters:,}",
            f"{row.result.summary.blocks}",
            f"{row.result.summary.tokens_seen:,}",
            f"{row.result.summary.train_seconds:,.0f}",
        ]
        for row in rows
    ]
    outside = _outside_reference(rows)
    if outside is not None:
        body.insert(0, [_named(outside.model), "reference", _loss(outside), "", f"{outside.parameters:,}", "", "", ""])
    return "\n\n".join(["\n".join(_table(header, body)), *_difference_parts(_study_differences(rows))])


def _study_differences(rows: Sequence[StudyRow]) -> list[Difference]:
    outside = _outside_reference(rows)
    others = [(row.label, row.result.final) for row in rows if row.role == "baseline"]
    others += [(row.label, row.result.final) for row in rows if row.role == "reference"]
    others += [(_named(outside.model), outside)] if outside else []
    for row in rows[1:]:  # those that are not paired stand in one table and one figure all the same
        check_same_windows(rows[0].label, rows[0].result.final, row.label, row.result.final)
    targets = [row for row in rows if row.role == "target"]
    return [
        paired_difference(target.label, target.result.final, label, other)
        for target in targets
        for label, other in others
    ]


def _run_differences(result: RunResult) -> list[Difference]:
    differences = []
    if result.initial is not None:
        differences.append(paired_difference(_AT_END, result.final, _AT_START, result.initial))
    if result.reference is not None:
        differences.append(paired_difference(_AT_END, result.final, _named(result.reference.model), result.reference))
    return differences


def _outside_reference(rows: Sequence[StudyRow]) -> ReferenceEvaluation | None:
    """Return the reference's own evaluation when no run of the study is the reference."""
    if any(row.role == "reference" for row in rows):
        return None
    evaluations = [row.result.reference for row in rows if row.role == "target"]
    return next((evaluation for evaluation in evaluations if evaluation is not None), None)


def _draw(path: Path, title: str, rows: Sequence[StudyRow]) -> None:
    """Draw a study: targets first (on top), the reference's final loss as a level in its colour."""
    ordered = [row for role in ("target", "baseline", "reference") for row in rows if row.role == role]
    lines = [Line(row.label, row.result.validation) for row in ordered]
    outside = _outside_reference(rows)
    level = None
    if outside is not None:
        level = Level(f"reference {_named(outside.model)}", outside.loss)
    elif ordered[-1].role == "reference":
        colour = COLOURS[(len(lines) - 1) % len(COLOURS)]
        level = Level("", ordered[-1].result.final.loss, colour)
    draw_study(path, title, lines, level)


def _row_document(row: StudyRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "role": row.role,
        "folder": str(row.result.folder),
        "run": row.result.summary.model_dump(),
        "initial": _without_windows(row.result.initial),
        "final": _without_windows(row.result.final),
    }


def _without_windows(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Sum up an evaluation for report.json; the losses of the single windows stay in eval/."""
    if evaluation is None:
        return None
    return {**evaluation.model_dump(exclude={"windows", "targets"}), "windows": len(evaluation.windows)}


def _difference_parts(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    header = ["paired difference of val loss", "mean", "standard error", "mean / standard error", "in words"]
    body = [
        [
            f"{difference.of} minus {difference.to}",
            f"{difference.mean:+.4f}",
            f"{difference.stderr:.4f}",
            "" if difference.ratio is None else f"{difference.ratio:+.1f}",
            difference.words,
        ]
        for difference in differences
    ]
    return ["\n".join(_table(header, body))]


def _validation_table(result: RunResult) -> list[str]:
    body = [[_AT_END, _loss(result.final)]]
    if result.initial is not None:
        body.insert(0, [_AT_START, _loss(result.initial)])
    if result.reference is not None:
        body.append([f"reference: {_named(result.reference.model)}", _loss(result.reference)])
    return _table(["validation", "val loss"], body)


def _facts_table(result: RunResult) -> list[str]:
    summary = result.summary
    known = summary.unique_tokens is not None
    unique = f"{summary.unique_tokens:,}" if known else "not counted, windows were drawn at random"
    facts = {
        "parameters": f"{summary.parameters:,}",
        "blocks": f"{summary.blocks} ({summary.block_parameters:,} parameters in them)",
        "start": {"inherited": "inherited from the reference", "scratch": "random"}[summary.kind],
        "steps": f"{summary.steps:,}",
        "tokens seen": f"{summary.tokens_seen:,}",
        "unique tokens": f"{unique} ({summary.epochs:.2f} epochs)",
        "training time": f"{summary.train_seconds:,.0f} s",
        "ranks": f"{summary.world_size} (ZeRO stage {summary.zero_stage}, {summary.precision})",
        "fp32 master weights": {
            "refilled": f"the target's exact values, set again after DeepSpeed had rounded them ({summary.precision})",
            "fp32 model": "the target's exact values, as the model itself holds them",
        }[summary.master_weights],
        "recipe fingerprint": summary.recipe_fingerprint,
    }
    if result.reference is not None:
        facts["parameters of the reference"] = f"{result.reference.parameters:,}"
    return _table(["of this run", ""], [[name, value] for name, value in facts.items()])


def _loss(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else f"{evaluation.loss:.4f} ± {evaluation.stderr:.4f}"


def _export(result: RunResult) -> Path:
    return result.folder / result.summary.export


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Render a Markdown table whose columns line up in plain text; all but text cells stand at the right."""
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    right = [_is_numbers([row[column] for row in body]) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return [
        "| " + " | ".join(_pad(*cell) for cell in zip(row, widths, right, strict=True)) + " |"
        for row in [header, rule, *body]
    ]


def _pad(text: str, width: int, number: bool) -> str:  # noqa: FBT001 (a cell's three properties, zipped)
    return text.rjust(width) if number else text.ljust(width)


def _is_numbers(cells: Sequence[str]) -> bool:
    return all(not cell or cell[0] in "+-0123456789" for cell in cells)


def _make_folder(parent: Path) -> Path:
    folder = parent / "report"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _named(model: str) -> str:
    """What a reader calls a reference: the hub id whole, of a folder the last part."""
    return PurePath(model).name if is_local_path(model) else model
