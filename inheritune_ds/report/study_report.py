"""The report of a study: tables and figures of several runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from inheritune_ds.report.comparison import Difference, check_same_windows, paired_difference
from inheritune_ds.report.figures import COLORS, Level, draw_study
from inheritune_ds.report.results import ReferenceEvaluation, RunResult
from inheritune_ds.report.tables import NOTE, difference_parts, make_folder, reference_name, table
from inheritune_ds.storage.files import write_json, write_text

Role = Literal["reference", "target", "baseline"]
_HEAD_START_NOTE = (
    "A target that inherits starts from its reference's trained weights: tokens and seconds of the target do not count"
    " the reference's own training."
)


@dataclass(frozen=True)
class StudyRow:
    """One run of a study."""

    label: str
    role: Role
    result: RunResult


def write_study_report(out_dir: Path, title: str, rows: Sequence[StudyRow]) -> Path:
    """Write report.md, report.json and curves.png into `out_dir`/report; return the path of report.md.

    At least one of the `rows` is a target. Without a run of role reference, the reference's loss comes from the
    target's `eval/reference.json`, if it exists.

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
        "runs": [
            {"label": row.label, "role": row.role, "folder": str(row.result.folder), **row.result.document()}
            for row in rows
        ],
        "reference": outside.document() if outside else None,
        "differences": [asdict(difference) for difference in differences],
        "note": f"{NOTE} {_HEAD_START_NOTE}",
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {title}",
        study_tables(rows),
        f"{NOTE} {_HEAD_START_NOTE}",
        "![Validation loss of each run over the tokens it has seen](curves.png)",
        "\n".join(f"- {row.label}: run `{row.result.folder}`, exported model `{row.result.export}`" for row in rows),
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def study_tables(rows: Sequence[StudyRow]) -> str:
    """Render the tables of the runs and of the paired differences, readable as plain text."""
    header = ["run", "role", "val loss", "val loss at step 0", "parameters", "blocks", "tokens seen", "seconds"]
    outside = _outside_reference(rows)
    body = []
    if outside is not None:
        name = reference_name(outside.model)
        body.append([name, "reference", str(outside), "", f"{outside.parameters:,}", "", "", ""])
    for row in rows:
        result, summary = row.result, row.result.summary
        losses = [str(result.final), str(result.initial or "")]
        sizes = [f"{summary.parameters:,}", f"{summary.blocks}", f"{summary.tokens_seen:,}"]
        body.append([row.label, row.role, *losses, *sizes, f"{summary.train_seconds:,.0f}"])
    return "\n\n".join(["\n".join(table(header, body)), *difference_parts(_study_differences(rows))])


def _study_differences(rows: Sequence[StudyRow]) -> list[Difference]:
    outside = _outside_reference(rows)
    others = [(row.label, row.result.final) for role in ("baseline", "reference") for row in rows if row.role == role]
    others += [(reference_name(outside.model), outside)] if outside else []
    for row in rows[1:]:  # unpaired runs share one table and one figure, too
        check_same_windows(rows[0].label, rows[0].result.final, row.label, row.result.final)
    targets = [(row.label, row.result.final) for row in rows if row.role == "target"]
    return [paired_difference(*target, *other) for target in targets for other in others]


def _outside_reference(rows: Sequence[StudyRow]) -> ReferenceEvaluation | None:
    """Return the reference's own evaluation when no run of the study is the reference."""
    if any(row.role == "reference" for row in rows):
        return None
    return next((row.result.reference for row in rows if row.role == "target" and row.result.reference), None)


def _draw(path: Path, title: str, rows: Sequence[StudyRow]) -> None:
    """Draw a study: targets first (on top), the reference's final loss as a level in its color."""
    ordered = [row for role in ("target", "baseline", "reference") for row in rows if row.role == role]
    lines = [(row.label, row.result.folder) for row in ordered]
    outside = _outside_reference(rows)
    level = None
    if outside is not None:
        level = Level(f"reference {reference_name(outside.model)}", outside.loss)
    elif ordered[-1].role == "reference":
        level = Level("", ordered[-1].result.final.loss, COLORS[(len(lines) - 1) % len(COLORS)])
    draw_study(path, title, lines, level)
