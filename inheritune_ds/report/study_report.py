"""The report of a study: tables and figures of several runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from inheritune_ds.report.comparison import Arm, Difference, check_comparable, paired_difference
from inheritune_ds.report.figures import COLORS, Level, draw_study
from inheritune_ds.report.results import ReferenceEvaluation, RunResult
from inheritune_ds.report.tables import (
    difference_document,
    difference_parts,
    make_folder,
    note,
    reference_arm,
    reference_name,
    table,
    with_interval,
)
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
    arm: str
    """Equal for runs whose recipes differ in the seed alone."""


def write_study_report(out_dir: Path, title: str, rows: Sequence[StudyRow]) -> Path:
    """Write report.md, report.json and curves.png into `out_dir`/report; return the path of report.md.

    At least one of the `rows` is a target. Without a run of role reference, the reference's loss comes from the
    target's `eval/reference.json`, if it exists.

    Raises:
        RunFolderError: When two runs were validated on different windows, or the metrics of one are damaged.
        StorageError: When the folder cannot be written.
    """
    arms = _arms(rows)
    differences = _differences(arms)
    outside = _outside_reference(rows)
    text = f"{note(arms[0][1].estimate(), arms[0][1].precision)}\n\n{_HEAD_START_NOTE}"
    folder = make_folder(out_dir)
    _draw(folder / "curves.png", title, rows)
    document = {
        "title": title,
        "runs": [
            {"label": row.label, "role": row.role, "folder": str(row.result.folder), **row.result.document()}
            for row in rows
        ],
        "reference": outside.document() if outside else None,
        "arms": [_arm_document(role, arm) for role, arm in arms],
        "differences": [difference_document(difference) for difference in differences],
        "note": text,
    }
    write_json(folder / "report.json", document)
    parts = [
        f"# {title}",
        study_tables(rows),
        _HEAD_START_NOTE,
        "![Validation loss of each run over the tokens it has seen](curves.png)",
        "\n".join(f"- {row.label}: run `{row.result.folder}`, exported model `{row.result.export}`" for row in rows),
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def study_tables(rows: Sequence[StudyRow]) -> str:
    """Render the tables of the runs, the arms and the paired differences and their note, readable as plain text."""
    arms = _arms(rows)
    differences = difference_parts(_differences(arms))
    tables = [_runs_table(rows, arms[0][1].precision), *_arms_table(arms), *differences]
    return "\n\n".join([*tables, note(arms[0][1].estimate(), arms[0][1].precision)])


def _runs_table(rows: Sequence[StudyRow], precision: str) -> str:
    loss = [f"val loss ({precision})", "95 % interval", "val loss at step 0"]
    header = ["run", "role", *loss, "parameters", "blocks", "tokens seen", "seconds"]
    outside = _outside_reference(rows)
    body = []
    if outside is not None:
        losses = with_interval(outside.pieces.estimate())
        body.append([reference_name(outside.model), "reference", *losses, "", f"{outside.parameters:,}", "", "", ""])
    for row in rows:
        result, summary = row.result, row.result.summary
        losses = [
            *with_interval(result.final.pieces.estimate()),
            f"{result.initial.loss:.4f}" if result.initial else "",
        ]
        sizes = [f"{summary.parameters:,}", f"{summary.blocks}", f"{summary.tokens_seen:,}"]
        body.append([row.label, row.role, *losses, *sizes, f"{summary.train_seconds:,.0f}"])
    return "\n".join(table(header, body))


def _arms_table(arms: Sequence[tuple[Role, Arm]]) -> list[str]:
    """The table of arms of several runs; none without one."""
    body = [
        [arm.label, f"{len(arm.evaluations)}", *with_interval(arm.estimate()), "yes" if arm.seeds else "no"]
        for _, arm in arms
        if len(arm.evaluations) > 1
    ]
    header = ["runs of one recipe", "seeds", "mean val loss", "95 % interval", "seeds in the interval"]
    return ["\n".join(table(header, body))] if body else []


def _arm_document(role: Role, arm: Arm) -> dict[str, Any]:
    return {"label": arm.label, "role": role, "runs": len(arm.evaluations), **asdict(arm.estimate())}


def _arms(rows: Sequence[StudyRow]) -> list[tuple[Role, Arm]]:
    """The arms of a study with their roles, in the order of the rows; the outside reference is last.

    Raises:
        RunFolderError: When two runs cannot be compared: all share one table and one figure.
    """
    groups: dict[tuple[Role, str, str], list[StudyRow]] = {}
    for row in rows:
        groups.setdefault((row.role, row.arm, row.result.summary.precision), []).append(row)
    arms = [(role, _arm(role, group)) for (role, _, _), group in groups.items()]
    outside = _outside_reference(rows)
    if outside is not None:
        arms.append(("reference", reference_arm(outside)))
    check_comparable([arm for _, arm in arms])
    return arms


def _arm(role: Role, rows: Sequence[StudyRow]) -> Arm:
    labels = list(dict.fromkeys(row.label for row in rows))
    label = labels[0] if len(rows) == 1 else f"{', '.join(labels)} ({len(rows)} seeds)"
    results = [row.result for row in rows]
    return Arm(
        label,
        results[0].summary.precision,
        tuple(result.final for result in results),
        given=role == "reference" and len(rows) == 1,
    )


def _differences(arms: Sequence[tuple[Role, Arm]]) -> list[Difference]:
    others = [arm for wanted in ("baseline", "reference") for role, arm in arms if role == wanted]
    return [paired_difference(arm, other) for role, arm in arms if role == "target" for other in others]


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
