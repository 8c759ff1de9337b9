"""Tables that the reports share."""

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from inheritune_ds.config.fields import is_local_path
from inheritune_ds.report.comparison import Difference
from inheritune_ds.report.results import Evaluation, RunResult
from inheritune_ds.storage.files import storage_errors

NOTE = (
    "Losses are means over the fixed validation windows, in nats per token; ± is one standard error, s / √n over the"
    " windows. Windows of one document are not independent, so the true uncertainty is larger than the standard errors"
    " say. Each run is one seed: the spread between seeds is not in these numbers."
)
AT_START, AT_END = "before training (step 0)", "after training"


def without_windows(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Sum up an evaluation for report.json; the losses of the single windows stay in eval/."""
    if evaluation is None:
        return None
    return {**evaluation.model_dump(exclude={"windows", "targets"}), "windows": len(evaluation.windows)}


def difference_parts(differences: Sequence[Difference]) -> list[str]:
    """The table of paired differences as the parts of a Markdown page; none without a difference."""
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


def loss_cell(evaluation: Evaluation | None) -> str:
    """Loss ± standard error, in nats per token; empty without an evaluation."""
    return "" if evaluation is None else f"{evaluation.loss:.4f} ± {evaluation.stderr:.4f}"


def exported_model(result: RunResult) -> Path:
    """The folder of a run's exported model."""
    return result.folder / result.summary.export


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
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


def make_folder(parent: Path) -> Path:
    """Make the folder `report` inside another."""
    folder = parent / "report"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def reference_name(model: str) -> str:
    """What a reader calls a reference: the hub id whole, of a folder the last part."""
    return PurePath(model).name if is_local_path(model) else model
