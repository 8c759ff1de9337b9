"""Tables and texts that the reports share."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from inheritune_ds.config.fields import is_local_path
from inheritune_ds.data.window_losses import Estimate
from inheritune_ds.report.comparison import MIN_EFFECTIVE_DOCUMENTS, MIN_SEEDS, Arm, Difference
from inheritune_ds.report.results import ReferenceEvaluation
from inheritune_ds.storage.files import storage_errors

AT_START, AT_END = "before training (step 0)", "after training"


def note(found: Estimate, precision: str) -> str:
    """What the losses and intervals of a report are; with a warning if the windows hold too few documents.

    `found` is any estimate on the report's windows.
    """
    text = (
        f"Losses are means over the validation windows, in nats per token, computed in {precision}. Intervals are 95 % "
        f"intervals over the {found.documents:,} documents of these windows; by their shares of the tokens they count "
        f"as {found.effective_documents:.1f} documents of equal length. The interval of one run does not contain the "
        f"spread between seeds; that of {MIN_SEEDS} or more runs that differ in the seed alone does."
    )
    if found.effective_documents >= MIN_EFFECTIVE_DOCUMENTS:
        return text
    return (
        f"{text}\n\n**Warning**: fewer than {MIN_EFFECTIVE_DOCUMENTS:.0f} effective documents. The intervals are "
        "rough, and no order of models is stated. Hold out more documents (corpus.validation_ratio) or "
        "validate on more of them (validation.max_tokens)."
    )


def with_interval(found: Estimate, sign: str = "") -> list[str]:
    """A mean and its interval as two cells."""
    interval = "" if found.interval is None else " to ".join(f"{end:{sign}.4f}" for end in found.interval)
    return [f"{found.mean:{sign}.4f}", interval]


def difference_parts(differences: Sequence[Difference]) -> list[str]:
    """The table of paired differences as parts of a Markdown page."""
    if not differences:
        return []
    header = ["paired difference of val loss", "mean", "95 % interval", "in words"]
    body = [
        [f"{difference.of} minus {difference.to}", *with_interval(difference.found, "+"), difference.words]
        for difference in differences
    ]
    return ["\n".join(table(header, body))]


def difference_document(difference: Difference) -> dict[str, Any]:
    """Its entry in report.json."""
    found = asdict(difference)
    return {"of": found.pop("of"), "to": found.pop("to"), **found.pop("found"), **found}


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Render a Markdown table with aligned columns; columns of numbers are aligned to the right."""
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    numeric = [
        all(not row[column] or row[column][0] in "+-0123456789" for row in body) for column in range(len(header))
    ]
    pads = [str.rjust if number else str.ljust for number in numeric]
    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, numeric, strict=True)]
    return [
        "| " + " | ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) + " |"
        for row in [header, rule, *body]
    ]


def make_folder(parent: Path) -> Path:
    """Create the folder `report` inside another."""
    folder = parent / "report"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def reference_name(model: str) -> str:
    """Short name of a reference: the hub id, or the last part of a path."""
    return PurePath(model).name if is_local_path(model) else model


def reference_arm(found: ReferenceEvaluation) -> Arm:
    """A reference that no run of the report trains."""
    return Arm(reference_name(found.model), found.precision, (found,), given=True)
