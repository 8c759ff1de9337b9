"""Tables and texts that the reports share."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from inheritune_ds.config.fields import is_local_path
from inheritune_ds.report.comparison import Difference
from inheritune_ds.storage.files import storage_errors

NOTE = (
    "Losses are means over the fixed validation windows, in nats per token; ± is one standard error, s / √n over the"
    " windows. Windows of one document are not independent, so the true uncertainty is larger than the standard errors"
    " say. Each run is one seed: the spread between seeds is not in these numbers."
)
AT_START, AT_END = "before training (step 0)", "after training"


def difference_parts(differences: Sequence[Difference]) -> list[str]:
    """The table of paired differences as parts of a Markdown page."""
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
    return ["\n".join(table(header, body))]


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
