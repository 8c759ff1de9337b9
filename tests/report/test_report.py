import json
import math
from pathlib import Path

import pytest

from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.report.comparison import Arm, paired_difference
from inheritune_ds.report.figures import count, spread
from inheritune_ds.report.results import run_result
from inheritune_ds.report.run_report import write_run_report
from inheritune_ds.report.study_report import Role, StudyRow, study_tables, write_study_report
from inheritune_ds.tracking.metrics import curve, read_metrics
from tests.report.runs import (
    BATCH_TOKENS,
    ON_THIS_TEXT,
    STEPS,
    STUDENT,
    TEXT,
    columns,
    evaluation,
    losses,
    make_run,
    png_size,
    study,
    write_json,
)


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
