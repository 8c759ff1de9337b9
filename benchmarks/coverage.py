"""How often the stated 95 % intervals contain the truth, in synthetic studies whose truth is known.

`python -m benchmarks.coverage` draws studies of two arms by the sizes of the documents and the number of seeds, and
computes the mean loss of one arm and the paired difference of both with the code of the reports. With one seed the
truth is that of this seed. The last column is the earlier interval of one run an arm, +- 1.96 s / sqrt(n) over windows.
It ends with 1 if a coverage is outside `RANGE`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import command_line, record
from inheritune_ds.data.window_losses import Estimate, Pieces
from inheritune_ds.report.comparison import Arm, paired_difference
from inheritune_ds.report.results import Evaluation

RANGE = (0.915, 0.97)
STUDIES = 2_000
DOCUMENTS, WINDOWS, SEQ_LEN = 60, 128, 128
"""As many windows as the quickstart validates on, of as many documents as it holds out."""
MEAN, GAIN = 5.0, -0.1
"""Loss of the first arm, and its difference from the second, nats per token."""
DOCUMENT_SD, DOCUMENT_GAIN_SD = 0.5, 0.1
"""Between documents: of the loss, and of an arm's own part of it."""
SEED_SD, DOCUMENT_SEED_SD = 0.02, 0.05
"""Between runs that differ in the seed: of the mean, and of a document."""
TOKEN_SD, RUN_TOKEN_SD = 2.0, 0.3
"""Between tokens of a document: in all runs alike, and of a run alone."""

Sizes = Literal["equal", "lognormal", "one of 35 %"]
SIZES: tuple[Sizes, ...] = ("equal", "lognormal", "one of 35 %")
SEEDS = (1, 3)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """The pieces of a study's windows; each array (K,)."""

    windows: NDArray[np.int64]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]


def draw_text(sizes: Sizes, draw: np.random.Generator) -> Text:
    """Cut documents of drawn lengths into windows."""
    shares = np.ones(DOCUMENTS) if sizes == "equal" else draw.lognormal(0.0, 1.0, DOCUMENTS)
    if sizes == "one of 35 %":
        shares[0] = 0.35 / 0.65 * shares[1:].sum()
        draw.shuffle(shares)
    ends = np.round(np.cumsum(shares) / shares.sum() * WINDOWS * SEQ_LEN).astype(np.int64)
    cuts = np.unique([0, *ends, *range(0, WINDOWS * SEQ_LEN, SEQ_LEN)])
    documents = np.unique(np.searchsorted(ends, cuts[:-1], side="right"), return_inverse=True)[1]
    return Text(cuts[:-1] // SEQ_LEN, documents, np.diff(cuts))


def draw_arms(text: Text, seeds: int, draw: np.random.Generator) -> tuple[list[Arm], Floats]:
    """Two arms on one text, and their true mean losses (2,)."""
    count = int(text.documents.max()) + 1
    noise = draw.normal(0.0, TOKEN_SD, len(text.tokens)) * np.sqrt(text.tokens)
    shared = draw.normal(0.0, DOCUMENT_SD, count)
    arms, truths = [], []
    for label, mean in (("a", MEAN), ("b", MEAN - GAIN)):
        own = shared + draw.normal(0.0, DOCUMENT_GAIN_SD, count)
        shifts = draw.normal(0.0, SEED_SD, seeds)
        runs = [own + shift + draw.normal(0.0, DOCUMENT_SEED_SD, count) for shift in shifts]
        arms.append(Arm(label, "fp32", tuple(_evaluate(text, mean + run, noise, draw) for run in runs)))
        truths.append(mean + (shifts[0] if seeds == 1 else 0.0))
    return arms, np.array(truths)


def _evaluate(text: Text, means: Floats, noise: Floats, draw: np.random.Generator) -> Evaluation:
    own = draw.normal(0.0, RUN_TOKEN_SD, len(text.tokens)) * np.sqrt(text.tokens)
    losses = means[text.documents] * text.tokens + noise + own
    parts = (text.windows, text.documents, text.tokens, losses)
    pieces = Pieces(*(tuple(part.tolist()) for part in parts))
    found = pieces.estimate()
    return Evaluation(
        format=2,
        loss=found.mean,
        stderr=found.stderr,
        windows=WINDOWS,
        seq_len=SEQ_LEN,
        tokens_sha256="",
        pieces=pieces,
    )


def studies(sizes: Sizes, seeds: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield of each study: whether each interval contains the truth, its width, and the effective documents."""
    draw = np.random.default_rng([seed, SIZES.index(sizes), seeds])
    for _ in range(count):
        text = draw_text(sizes, draw)
        (a, b), truths = draw_arms(text, seeds, draw)
        found = {
            "loss": (a.estimate(), truths[0]),
            "difference": (paired_difference(a, b).found, truths[0] - truths[1]),
        }
        low, high = _over_windows(a.evaluations[0], b.evaluations[0])
        yield {
            "effective_documents": found["loss"][0].effective_documents,
            **{name: _holds(one, truth) for name, (one, truth) in found.items()},
            "difference_over_windows": low <= truths[0] - truths[1] <= high,
        }


def _holds(found: Estimate, truth: float) -> bool:
    assert found.interval is not None
    return bool(found.interval[0] <= truth <= found.interval[1])


def _over_windows(a: Evaluation, b: Evaluation) -> tuple[float, float]:
    """The earlier interval of the difference, which took the windows as independent."""
    sums = [np.bincount(one.pieces.windows, one.pieces.losses) / SEQ_LEN for one in (a, b)]
    differences = sums[0] - sums[1]
    mean, half = float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / WINDOWS**0.5
    return mean - half, mean + half


def coverage(sizes: Sizes, seeds: int, count: int, seed: int) -> dict[str, float]:
    """Means over studies of what `studies` yields."""
    found = list(studies(sizes, seeds, count, seed))
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def main() -> None:
    """Count, print a table, write the JSON file.

    Raises:
        SystemExit: With 1 if a coverage is outside the range.
    """
    parser = command_line("coverage", __doc__, rehearse="draw 200 studies of each kind, and judge nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the simulation (default: 1 2)")
    args = parser.parse_args()
    count, rows = 200 if args.rehearse else STUDIES, []
    print("simulation  documents    seeds  n_eff   loss  difference  over windows")
    for seed in args.seeds:
        for sizes in SIZES:
            for seeds in SEEDS:
                found = coverage(sizes, seeds, count, seed)
                rows.append({"simulation_seed": seed, "documents": sizes, "seeds": seeds, **found})
                print(
                    f"{seed:<10}  {sizes:<11}  {seeds:>5}  {found['effective_documents']:>5.1f}  {found['loss']:.3f}"
                    f"  {found['difference']:>10.3f}  {found['difference_over_windows']:>12.3f}"
                )
    record(args, {"studies": count, "range": RANGE, "coverage": rows})
    outside = [row for row in rows for key in ("loss", "difference") if not RANGE[0] <= row[key] <= RANGE[1]]
    if outside and not args.rehearse:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
