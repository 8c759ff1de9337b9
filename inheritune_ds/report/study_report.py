"""The report of a study: tables and figures of several runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from inheritune_ds.report.comparison import Difference, check_same_windows, paired_difference
from inheritune_ds.report.figures import COLOURS, Level, draw_study
from inheritune_ds.report.results import ReferenceEvaluation, RunResult
from inheritune_ds.report.tables import (
    NOTE,
    difference_parts,
    exported_model,
    loss_cell,
    make_folder,
    reference_name,
    table,
    without_windows,
)
from inheritune_ds.storage.files import write_json, write_text

Role = Literal["reference", "target", "baseline"]
_HEAD_START_NOTE = (
    "A target that inherits starts from what its reference has learned: its tokens come on top of the reference's own"
    " training, which tokens and seconds of the target do not count."
)


@dataclass(frozen=True)
class StudyRow:
    """One run of a study."""

    label: str
    role: Role
    result: RunResult


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
        RunFolderError: When two runs were validated on different windows, or the metrics of one are damaged.
        StorageError: When the folder cannot be written.
    """
    differences = _study_differences(rows)
    outside = _outside_reference(rows)
    folder = make_folder(out_dir)
    _draw(folder / "curves.png", title, rows)
    document = {
        "title": title,
        "runs": [_row_document(row) for row in rows],
        "reference": without_windows(outside),
        "differences": [asdict(difference) for difference in differences],
        "note": f"{NOTE} {_HEAD_START_NOTE}",
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {title}",
        study_tables(rows),
        f"{NOTE} {_HEAD_START_NOTE}",
        "![Validation loss of each run over the tokens it has seen](curves.png)",
        "\n".join(
            f"- {row.label}: run `{row.result.folder}`, exported model `{exported_model(row.result)}`" for row in rows
        ),
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
            loss_cell(row.result.final),
            loss_cell(row.result.initial),
            f"{row.result.summary.parameters:,}",
            f"{row.result.summary.blocks}",
            f"{row.result.summary.tokens_seen:,}",
            f"{row.result.summary.train_seconds:,.0f}",
        ]
        for row in rows
    ]
    outside = _outside_reference(rows)
    if outside is not None:
        body.insert(
            0,
            [reference_name(outside.model), "reference", loss_cell(outside), "", f"{outside.parameters:,}", "", "", ""],
        )
    return "\n\n".join(["\n".join(table(header, body)), *difference_parts(_study_differences(rows))])


def _study_differences(rows: Sequence[StudyRow]) -> list[Difference]:
    outside = _outside_reference(rows)
    others = [(row.label, row.result.final) for row in rows if row.role == "baseline"]
    others += [(row.label, row.result.final) for row in rows if row.role == "reference"]
    others += [(reference_name(outside.model), outside)] if outside else []
    for row in rows[1:]:  # those that are not paired stand in one table and one figure all the same
        check_same_windows(rows[0].label, rows[0].result.final, row.label, row.result.final)
    targets = [row for row in rows if row.role == "target"]
    return [
        paired_difference(target.label, target.result.final, label, other)
        for target in targets
        for label, other in others
    ]


def _outside_reference(rows: Sequence[StudyRow]) -> ReferenceEvaluation | None:
    """Return the reference's own evaluation when no run of the study is the reference."""
    if any(row.role == "reference" for row in rows):
        return None
    evaluations = [row.result.reference for row in rows if row.role == "target"]
    return next((evaluation for evaluation in evaluations if evaluation is not None), None)


def _draw(path: Path, title: str, rows: Sequence[StudyRow]) -> None:
    """Draw a study: targets first (on top), the reference's final loss as a level in its colour."""
    ordered = [row for role in ("target", "baseline", "reference") for row in rows if row.role == role]
    runs = [(row.label, row.result.folder) for row in ordered]
    outside = _outside_reference(rows)
    level = None
    if outside is not None:
        level = Level(f"reference {reference_name(outside.model)}", outside.loss)
    elif ordered[-1].role == "reference":
        colour = COLOURS[(len(runs) - 1) % len(COLOURS)]
        level = Level("", ordered[-1].result.final.loss, colour)
    draw_study(path, title, runs, level)


def _row_document(row: StudyRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "role": row.role,
        "folder": str(row.result.folder),
        "run": row.result.summary.model_dump(),
        "initial": without_windows(row.result.initial),
        "final": without_windows(row.result.final),
    }
