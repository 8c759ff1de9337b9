import json
import math
import statistics
import struct
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.data.window_losses import student_t
from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.report.comparison import Arm, paired_difference
from inheritune_ds.report.figures import count, spread
from inheritune_ds.report.results import Evaluation, run_result
from inheritune_ds.report.run_report import write_run_report
from inheritune_ds.report.study_report import Role, StudyRow, study_tables, write_study_report
from inheritune_ds.tracking.metrics import curve, read_metrics

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


def test_read_metrics_ignores_an_incomplete_last_line(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/tokens": 8, "train/loss": 2.5}\n{"step": 2, "tr')
    assert read_metrics(tmp_path) == [{"step": 1, "train/tokens": 8, "train/loss": 2.5}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": "1", "train/tokens": 8}', '{"step": 1}'])
def test_read_metrics_names_a_damaged_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "train/tokens": 8}}\n')
    with pytest.raises(RunFolderError, match=r"metrics.jsonl, line 1 is not a row of metrics"):
        read_metrics(tmp_path)


def test_run_result_reads_a_finished_run(tmp_path: Path) -> None:
    result = run_result(make_run(tmp_path / "run", 5.0, 4.0, reference=3.9))
    assert result.summary.parameters == 1_234_567
    assert result.initial is not None
    assert result.initial.loss == pytest.approx(5.0)
    assert result.final.pieces.losses == tuple(128 * loss for loss in losses(4.0))
    assert result.reference is not None
    assert result.reference.model == "models/big"


def test_curve_is_a_metric_over_tokens(tmp_path: Path) -> None:
    rows = read_metrics(make_run(tmp_path / "run", 5.0, 4.0))
    validation = curve(rows, "val/loss", "val/stderr")
    assert validation.tokens == (0, 50 * BATCH_TOKENS, 100 * BATCH_TOKENS)
    assert validation.values == pytest.approx((5.0, 4.5, 4.0))
    assert len(validation.stderr) == 3
    assert curve(rows, "train/loss").values == (4.5, 4.0)
    assert curve(rows, "train/lr").values == pytest.approx((5e-4, 0.0))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("run.json", None, r"cannot be read: no such file or directory\n.*finished run\n.*to resume it"),
        (f"eval/validation-step-{STEPS:08d}.json", None, "cannot be read: no such file or directory"),
        ("run.json", "{", r"is damaged: Invalid JSON(.|\n)*do: restore an intact copy"),
        ("run.json", "{}", "is damaged: name: Field req"),
        (
            f"eval/validation-step-{STEPS:08d}.json",
            '{"loss": 1.0, "stderr": 0.1, "windows": [1.0]}',
            r"was written by an earlier version.*\n.*\n.*under another name",
        ),
    ],
)
def test_run_result_names_a_missing_or_damaged_file(
    name: str, content: str | None, problem: str, tmp_path: Path
) -> None:
    path = make_run(tmp_path, 5.0, 4.0) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RunFolderError, match=f"{name} {problem}"):
        run_result(tmp_path)


def test_reports_need_a_validation_among_the_metrics(tmp_path: Path) -> None:
    rows = study(tmp_path)
    (tmp_path / "small" / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl holds no validation\n.*val/loss"):
        write_run_report(tmp_path / "small")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl holds no validation"):
        write_study_report(tmp_path, "Three runs", rows)


def test_paired_difference_is_computed_by_document() -> None:
    a, b = losses(4.0), losses(4.5, tilt=0.05)
    per_document = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(per_document) / 4
    difference = paired_difference(arm("a", evaluation(a)), arm("b", evaluation(b)))
    found, mean = difference.found, statistics.fmean(per_document)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(error, rel=1e-9)
    assert found.interval == pytest.approx((mean - STUDENT * error, mean + STUDENT * error), rel=1e-5)
    assert found.documents == 16
    assert (difference.over_seeds, difference.words) == (False, ON_THIS_TEXT)


def test_paired_difference_weighs_documents_by_their_tokens() -> None:
    tokens = [30, 0, 40, 30]
    a = arm("a", evaluation([2.0, 0.0, 1.0, 4.0], tokens))
    b = arm("b", evaluation([1.5, 0.0, 1.0, 3.5], tokens))
    assert paired_difference(a, b).found.mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("of", "to", "given"), [(1, 1, False), (2, 3, False), (3, 2, False), (1, 1, True), (2, 1, True)]
)
def test_fewer_than_three_seeds_state_no_order_and_leave_the_seeds_out(of: int, to: int, given: bool) -> None:  # noqa: FBT001
    a = arm("a", *(evaluation(losses(3.0 + 0.01 * seed)) for seed in range(of)))
    b = arm("b", *(evaluation(losses(4.0 + 0.01 * seed, tilt=0.05)) for seed in range(to)), given=given)
    found = paired_difference(a, b)
    alone = paired_difference(arm("a", evaluation(losses(3.0))), arm("b", evaluation(losses(4.0, tilt=0.05))))
    assert found.words == ON_THIS_TEXT
    assert found.found.stderr == pytest.approx(alone.found.stderr)


def test_three_seeds_add_their_variance_to_the_interval() -> None:
    levels = ((4.0, 4.1, 4.3), (4.6, 4.5, 4.45, 4.7))
    a, b = (
        arm(label, *(evaluation(losses(level, tilt=tilt)) for level in given))
        for label, given, tilt in zip("ab", levels, (0.01, 0.05), strict=True)
    )
    documents = statistics.variance([-0.04 * (-1) ** index for index in range(16)]) / 16
    first, second = (statistics.variance(given) / len(given) for given in levels)
    total = documents + first + second
    dof = total**2 / (documents**2 / 15 + first**2 / 2 + second**2 / 3)
    difference = paired_difference(a, b)
    found, mean = difference.found, statistics.fmean(levels[0]) - statistics.fmean(levels[1])
    assert difference.over_seeds
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(total))
    half = student_t(dof) * math.sqrt(total)
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert difference.words == "below, over seeds and documents"


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (3.0, "below, over seeds and documents"),
        (5.0, "above, over seeds and documents"),
        (4.0, "no clear difference: the interval includes 0"),
    ],
)
def test_an_order_is_stated_over_seeds_against_a_given_reference(level: float, words: str) -> None:
    a = arm("a", *(evaluation(losses(level + shift)) for shift in (-0.05, 0.0, 0.05)))
    assert paired_difference(a, arm("b", evaluation(losses(4.0, tilt=0.05)), given=True)).words == words


def test_runs_of_one_recipe_as_two_arms_of_one_seed_are_not_ordered() -> None:
    """Three runs that differ in the seed alone were once "below by 3.7" and "by 4.1 standard errors"."""
    runs = [arm(str(seed), evaluation(losses(4.0 + 0.02 * seed, tilt=0.01 * seed))) for seed in range(3)]
    for of in runs:
        for to in runs:
            assert paired_difference(of, to).words == ON_THIS_TEXT


@pytest.mark.parametrize(("dominant", "words"), [(14, "too few"), (1, "below")])
def test_few_effective_documents_state_no_order(dominant: int, words: str) -> None:
    tokens = [128 * dominant, *[128] * 15]
    a = arm("a", *(evaluation(losses(3.0 + 0.01 * seed), tokens) for seed in range(3)))
    b = arm("b", *(evaluation(losses(4.0 + 0.01 * seed, tilt=0.05), tokens) for seed in range(3)))
    assert paired_difference(a, b).words.startswith(words)


def test_one_document_has_no_interval() -> None:
    a, b = (arm(label, evaluation([loss])) for label, loss in (("a", 1.0), ("b", 2.0)))
    found = paired_difference(a, b)
    assert (found.found.mean, found.found.interval) == (-1.0, None)
    assert found.words == "no interval: fewer than 2 effective documents"


@pytest.mark.parametrize(
    ("windows", "text", "problem"),
    [
        ([1.0, 2.0, 3.0], {}, "on 2 windows and b on 3 windows: they cannot be compared"),
        ([1.0, 2.0], {"tokens_sha256": "b" * 64}, "on the text aaaaaaaaaaaa and b on the text bbbbbbbbbbbb: they"),
        ([1.0, 2.0], {"seq_len": 64}, "on windows of 128 tokens and b on windows of 64 tokens: they cannot"),
        ([1.0, 2.0], {"tokens": [128, 127]}, "on 256 targets of 2 documents and b on 255 targets of 2 documents: they"),
    ],
)
def test_paired_difference_refuses_other_windows(windows: list[float], text: dict[str, Any], problem: str) -> None:
    one, other = arm("a", evaluation([1.0, 2.0])), arm("b", evaluation(windows, **text))
    message = rf"^a was validated {problem}.*\n  allowed: .*corpus.max_tokens.*\n  do: make these equal"
    with pytest.raises(RunFolderError, match=message):
        paired_difference(one, other)


def test_paired_difference_refuses_another_precision() -> None:
    one = arm("a", evaluation([1.0, 2.0]))
    with pytest.raises(
        RunFolderError, match=r"^a was validated in fp32 and b in bf16: they cannot be compared\n.*one prec"
    ):
        paired_difference(one, Arm("b", "bf16", one.evaluations))


def test_run_report_shows_step_0_the_end_and_the_reference(tmp_path: Path) -> None:
    report = write_run_report(make_run(tmp_path / "run", 5.0, 4.0, reference=3.9))
    assert report == tmp_path / "run" / "report" / "report.md"
    lines = report.read_text().splitlines()
    half = STUDENT * evaluation(losses(5.0))["stderr"]
    assert columns(lines[2]) == ["validation", "val loss (fp32)", "95 % interval"]
    assert columns(lines[4]) == ["before training (step 0)", "5.0000", f"{5 - half:.4f} to {5 + half:.4f}"]
    assert columns(lines[5]) == ["after training", "4.0000", f"{4 - half:.4f} to {4 + half:.4f}"]
    assert columns(lines[6])[:2] == ["reference: models/big", "3.9000"]
    assert any(columns(line)[0] == "after training minus models/big" for line in lines)
    assert any(columns(line) == ["parameters of the reference", "9,876,543"] for line in lines)
    assert (
        "over the 16 documents of these windows; by their shares of the tokens they count as 16.0" in report.read_text()
    )
    assert "Warning" not in report.read_text()
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["final"] == {
        **TEXT,
        "loss": pytest.approx(4.0),
        "stderr": pytest.approx(half / STUDENT),
        "interval": pytest.approx([4 - half, 4 + half], rel=1e-5),
        "windows": 16,
        "documents": 16,
        "effective_documents": pytest.approx(16.0),
    }
    assert [item["to"] for item in document["differences"]] == ["before training (step 0)", "models/big"]
    assert png_size(report.with_name("curves.png")) == (1140, 780)


def test_run_report_needs_neither_a_reference_nor_a_first_validation(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5.0, 4.0)
    (folder / "eval/validation-step-00000000.json").unlink()
    rows = [row for row in read_metrics(folder) if "val/loss" in row]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_run_report(folder)
    assert "paired difference" not in report.read_text()
    assert json.loads(report.with_suffix(".json").read_text())["reference"] is None


def test_reports_warn_of_few_effective_documents(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5.0, 4.0)
    for step in (0, STEPS):
        found = evaluation(losses(4.0)[:14])
        write_json(folder / f"eval/validation-step-{step:08d}.json", {"step": step, **found})
    warning = "**Warning**: fewer than 15 effective documents."
    assert warning in write_run_report(folder).read_text()
    assert warning in study_tables([StudyRow("small", "target", run_result(folder), "1")])


def test_run_report_refuses_a_reference_in_another_precision(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5.0, 4.0, reference=3.9, precision="bf16")
    with pytest.raises(RunFolderError, match="after training was validated in bf16 and models/big in fp32"):
        write_run_report(folder)


def test_run_report_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5.0, 4.0)
    (folder / "report").write_text("in the way")
    with pytest.raises(StorageError, match="report cannot be written"):
        write_run_report(folder)


def test_study_report_compares_the_target_with_every_other_run(tmp_path: Path) -> None:
    rows = study(tmp_path)
    report = write_study_report(tmp_path / "study", "Three runs", rows)
    text = report.read_text()
    assert text.startswith("# Three runs\n\n| run ")
    lines = text.splitlines()
    half = STUDENT * evaluation(losses(4.0))["stderr"]
    assert columns(lines[2]) == [
        "run", "role", "val loss (fp32)", "95 % interval", "val loss at step 0", "parameters", "blocks", "tokens seen",
        "seconds",
    ]  # fmt: skip
    assert columns(lines[5]) == [
        "small", "target", "4.0000", f"{4 - half:.4f} to {4 + half:.4f}", "5.0000", "1,234,567", "4", "409,600", "62",
    ]  # fmt: skip
    document = json.loads(report.with_suffix(".json").read_text())
    found = {(item["of"], item["to"]): item for item in document["differences"]}
    assert list(found) == [("small", "random"), ("small", "big")]
    small, random = (Arm(row.label, "fp32", (row.result.final,)) for row in rows[1:])
    expected = paired_difference(small, random).found
    assert expected.interval is not None
    assert found["small", "random"]["interval"] == list(expected.interval)
    low, high = expected.interval
    cells = ["small minus random", f"{expected.mean:+.4f}", f"{low:+.4f} to {high:+.4f}", ON_THIS_TEXT]
    assert cells in [columns(line) for line in lines]
    assert [(item["label"], item["runs"]) for item in document["arms"]] == [("big", 1), ("small", 1), ("random", 1)]
    assert f"exported model `{tmp_path / 'small' / 'export'}`" in text
    assert png_size(report.with_name("curves.png")) == (1140, 660)


def test_study_report_reads_an_outside_reference_from_the_target(tmp_path: Path) -> None:
    target = StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0, reference=3.9)), "1")
    baseline = StudyRow("random", "baseline", run_result(make_run(tmp_path / "random", 8.1, 4.5)), "2")
    report = write_study_report(tmp_path / "study", "Two runs", [target, baseline])
    first = columns(report.read_text().splitlines()[4])
    assert first[:2] == ["models/big", "reference"]
    assert first[2] == "3.9000"
    assert first[4:] == ["", "9,876,543", "", "", ""]
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["reference"]["model"] == "models/big"
    assert [item["to"] for item in document["differences"]] == ["random", "models/big"]


def test_study_report_needs_no_reference(tmp_path: Path) -> None:
    target = StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0)), "1")
    report = write_study_report(tmp_path / "study", "One run", [target])
    assert "paired difference" not in report.read_text()
    assert report.with_name("curves.png").exists()


def test_study_report_refuses_runs_on_other_windows(tmp_path: Path) -> None:
    rows = study(tmp_path)
    path = tmp_path / f"random/eval/validation-step-{STEPS:08d}.json"
    write_json(path, {"step": STEPS, **evaluation(losses(4.5)[:-1])})
    rows[2] = StudyRow("random", "baseline", run_result(tmp_path / "random"), "3")
    with pytest.raises(RunFolderError, match="big was validated on 16 windows and random on 15"):
        write_study_report(tmp_path / "study", "Three runs", rows)
    assert not (tmp_path / "study").exists()


def test_study_tables_refuse_runs_on_other_text_that_no_difference_pairs(tmp_path: Path) -> None:
    rows = [
        StudyRow(name, "target", run_result(make_run(tmp_path / name, 5.0, 4.0)), name) for name in ("small", "smaller")
    ]
    assert "| smaller " in study_tables(rows)
    other = evaluation(losses(4.0), tokens_sha256="b" * 64)
    write_json(tmp_path / f"smaller/eval/validation-step-{STEPS:08d}.json", {"step": STEPS, **other})
    rows[1] = StudyRow("smaller", "target", run_result(tmp_path / "smaller"), "smaller")
    with pytest.raises(RunFolderError, match=r"small was validated on the text a+ and smaller on the text b+: they"):
        study_tables(rows)


def test_runs_that_differ_in_the_seed_are_one_arm(tmp_path: Path) -> None:
    rows = []
    levels: tuple[tuple[Role, float], ...] = (("target", 4.0), ("baseline", 4.5))
    for role, level in levels:
        for seed in range(3):
            folder = make_run(tmp_path / f"{role}-{seed}", 8.0, level + 0.02 * seed, tilt=0.01)
            rows.append(StudyRow(role, role, run_result(folder), "1"))
    report = write_study_report(tmp_path / "study", "Six runs", rows)
    document = json.loads(report.with_suffix(".json").read_text())
    (found,) = document["differences"]
    assert (found["of"], found["to"]) == ("target (3 seeds)", "baseline (3 seeds)")
    assert (found["over_seeds"], found["words"]) == (True, "below, over seeds and documents")
    error = math.sqrt(2 * 0.02**2 / 3)
    assert found["stderr"] == pytest.approx(error, rel=1e-6)
    assert found["interval"] == pytest.approx([-0.5 - 2.7764 * error, -0.5 + 2.7764 * error], abs=1e-5)
    table = [columns(line) for line in report.read_text().splitlines()]
    assert ["runs of one recipe", "seeds", "mean val loss", "95 % interval", "seeds in the interval"] in table
    assert any(row[:3] == ["target (3 seeds)", "3", "4.0200"] and row[4] == "yes" for row in table)
    assert any(
        row[0] == "target (2 seeds)" and row[4] == "no" for row in cells_of(study_tables([*rows[:2], *rows[3:]]))
    )


def cells_of(tables: str) -> list[list[str]]:
    return [columns(line) for line in tables.splitlines()]


def test_one_arm_in_two_precisions_is_refused(tmp_path: Path) -> None:
    rows = [
        StudyRow(precision, "target", run_result(make_run(tmp_path / precision, 5.0, 4.0, precision=precision)), "1")
        for precision in ("fp32", "bf16")
    ]
    with pytest.raises(RunFolderError, match="fp32 was validated in fp32 and bf16 in bf16: they cannot be compared"):
        study_tables(rows)


def test_study_tables_line_up_as_plain_text(tmp_path: Path) -> None:
    *blocks, _ = study_tables(study(tmp_path)).split("\n\n")
    for block in blocks:
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({tuple(i for i, char in enumerate(line) if char == "|") for line in lines}) == 1


def test_spread_moves_only_close_heights_apart() -> None:
    assert spread([30.0, 0.0, 14.0], 14.0) == [30.0, 0.0, 14.0]
    assert spread([10.0, 10.0, 10.0], 6.0) == [4.0, 10.0, 16.0]
    assert spread([5.0, 0.0, 4.0, 100.0], 6.0) == pytest.approx([9.0, -3.0, 3.0, 100.0])


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (500, "500"), (200_000, "200k"), (1.5e6, "1.5M"), (8e9, "8B"), (999, "999")]
)
def test_count_is_short(number: float, text: str) -> None:
    assert count(number) == text
