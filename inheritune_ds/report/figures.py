"""Figures of training curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inheritune_ds.errors import RunFolderError
from inheritune_ds.report.results import RunResult
from inheritune_ds.storage.files import storage_errors
from inheritune_ds.tracking.metrics import METRICS_FILE, Curve, Row, curve, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colors, distinct for any color vision (jfly.uni-koeln.de/color), darkest first."""
_INK = "#222222"
_QUIET = "#6b6b6b"
_TRAINING = "#3f96c4"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.major.pad": 6.0,
    "ytick.major.pad": 6.0,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Level:
    """A constant loss, the reference's, drawn as a thin dashed line."""

    label: str
    """Empty if a curve with a label ends there."""
    value: float
    color: str = _QUIET


def draw_study(path: Path, title: str, lines: Sequence[tuple[str, Path]], level: Level | None) -> None:
    """Draw the validation curves of several runs over tokens seen, as a PNG.

    `lines` has label and run folder of each curve, the first one drawn on top; `level` is the reference's final loss.
    Raises a RunFolderError if the metrics of a run are damaged or hold no validation.
    """
    from matplotlib import rc_context

    curves = [_validation(run_dir, read_metrics(run_dir)) for _, run_dir in lines]
    with rc_context(_STYLE):
        figure = _new_figure(7.6, 4.4)
        axes = figure.subplots()
        ends = [
            _draw_validation(axes, curves[index], label, COLORS[index % len(COLORS)], len(lines) - index)
            for index, (label, _) in enumerate(lines)
        ]
        dashed = "; dashed: the reference's final loss" if level else ""
        _head(axes, title, f"all on the same windows; bands: ± 1 standard error{dashed}")
        axes.set_ylabel("validation loss (nats per token)")
        _token_axis(axes, curves)
        _finish(figure, axes, ends, level, path)


def draw_run(path: Path, result: RunResult) -> None:
    """Draw training loss, validation loss with one standard error, and learning rate of a run, as a PNG.

    Errors as in `draw_study`.
    """
    from matplotlib import rc_context

    rows = read_metrics(result.folder)
    training, lr, validation = curve(rows, "train/loss"), curve(rows, "train/lr"), _validation(result.folder, rows)
    with rc_context(_STYLE):
        figure = _new_figure(7.6, 5.2)
        loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        ends = [_draw_validation(loss_axes, validation, "validation", COLORS[0], 2)]
        if training.tokens:
            loss_axes.plot(training.tokens, training.values, color=_TRAINING, linewidth=1.2, zorder=2, clip_on=False)
            ends.append(_End("training", training.values[-1], _TRAINING))
        _head(loss_axes, result.summary.name, "band: ± 1 standard error of the validation loss")
        loss_axes.set_ylabel("loss (nats per token)")
        lr_axes.plot(lr.tokens, lr.values, color=_QUIET, linewidth=1.4)
        lr_axes.set_ylabel("learning rate")
        lr_axes.set_ylim(bottom=0.0)
        lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        _token_axis(lr_axes, [validation, training])
        figure.align_ylabels()
        level = None if result.reference is None else Level("reference", result.reference.loss)
        _finish(figure, loss_axes, ends, level, path)


def _validation(run_dir: Path, rows: Sequence[Row]) -> Curve:
    found = curve(rows, "val/loss", "val/stderr")
    if not found.tokens:
        raise RunFolderError(
            f"{run_dir / METRICS_FILE} holds no validation",
            allowed="rows with val/loss",
            action="delete the run folder and rerun the run's own command",
        )
    return found


def _new_figure(width: float, height: float) -> "Figure":
    # Without pyplot: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class _End(NamedTuple):
    """The label of a line, and the last value."""

    label: str
    value: float
    color: str


def _draw_validation(axes: "Axes", curve: Curve, label: str, color: str, order: int) -> _End:
    marker = "o" if len(curve.tokens) <= 40 else ""
    axes.plot(curve.tokens, curve.values, color=color, marker=marker, markersize=4.5, zorder=2 + order, clip_on=False)
    points = list(zip(curve.values, curve.stderr, strict=True))
    low, high = [value - error for value, error in points], [value + error for value, error in points]
    axes.fill_between(curve.tokens, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
    return _End(label, curve.values[-1], color)


def _head(axes: "Axes", title: str, subtitle: str) -> None:
    axes.set_title(title, pad=24.0)
    axes.annotate(
        subtitle, (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", color=_QUIET, fontsize=9
    )


def _token_axis(axes: "Axes", curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("tokens seen in training")
    axes.set_xlim(0, 1.01 * max(curve.tokens[-1] for curve in curves if curve.tokens))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))


def count(number: float) -> str:
    """Abbreviate a count: 800k, 1.5M, 2B."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:g}{suffix}"
    return f"{number:g}"


def _finish(figure: "Figure", axes: "Axes", ends: Sequence[_End], level: Level | None, path: Path) -> None:
    """Draw the level and, after the layout, the labels at the ends of the lines; save."""
    ends = list(ends)
    if level is not None:
        axes.axhline(level.value, color=level.color, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1.5)
        if level.label:
            ends.append(_End(level.label, level.value, level.color))
    figure.canvas.draw()
    _label_ends(axes, ends)
    with storage_errors(path.parent):
        figure.savefig(path, dpi=150)


def _label_ends(axes: "Axes", ends: Sequence[_End]) -> None:
    """Write final value and label to the right of each line's end, without overlap."""
    points_per_pixel = 72.0 / axes.figure.dpi
    right = axes.get_xlim()[1]
    heights = [float(axes.transData.transform((right, end.value))[1]) * points_per_pixel for end in ends]
    for end, height, place in zip(ends, heights, spread(heights, gap=14.0), strict=True):
        axes.annotate(
            f"{end.value:.2f}  {end.label}",
            (right, end.value),
            xytext=(7, place - height),
            textcoords="offset points",
            va="center",
            color=end.color,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, as little as possible, until neighbors are at least `gap` from each other.

    Adjacent groups are merged around their mean, the least-squares solution (pool adjacent violators).
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[tuple[float, int]] = []  # (mean of height minus rank x gap, members)
    for rank, index in enumerate(order):
        mean, members = heights[index] - rank * gap, 1
        while groups and groups[-1][0] > mean:
            before, others = groups.pop()
            mean = (mean * members + before * others) / (members + others)
            members += others
        groups.append((mean, members))
    places = [0.0] * len(heights)
    starts = [mean for mean, members in groups for _ in range(members)]
    for rank, (index, start) in enumerate(zip(order, starts, strict=True)):
        places[index] = start + rank * gap
    return places
