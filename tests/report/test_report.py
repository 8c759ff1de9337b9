import json
import math
import statistics
import struct
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.report.comparison import paired_difference
from inheritune_ds.report.figures import count, spread
from inheritune_ds.report.results import Evaluation, run_result
from inheritune_ds.report.run_report import write_run_report
from inheritune_ds.report.study_report import StudyRow, study_tables, write_study_report
from inheritune_ds.tracking.metrics import curve, read_metrics

STEPS, BATCH_TOKENS = 100, 4096
TEXT: dict[str, Any] = {"seq_len": 128, "tokens_sha256": "a" * 64}
"""Windows of all evaluations of this file."""
NOISE = (0.3, -0.2, 0.1, -0.4, 0.2, 0.0)
"""Of the windows: large, and the same for all models, so the paired difference removes it."""


def losses(level: float, *, tilt: float = 0.01) -> list[float]:
    return [level + noise + tilt * (-1) ** index for index, noise in enumerate(NOISE)]


def evaluation(windows: list[float], **text: Any) -> dict[str, Any]:
    error = statistics.stdev(windows) / math.sqrt(len(windows))
    return {"loss": statistics.fmean(windows), "stderr": error, "windows": windows, **TEXT, **text}


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def make_run(folder: Path, start: float, end: float, *, tilt: float = 0.01, reference: float | None = None) -> Path:
    """Write the files of a finished run."""
    summary = {
        "name": folder.name, "recipe_fingerprint": "f" * 64, "parameters": 1_234_567, "blocks": 4,
        "block_parameters": 1_000_000, "steps": STEPS, "tokens_seen": STEPS * BATCH_TOKENS, "unique_tokens": 300_000,
        "epochs": 1.37, "train_seconds": 61.7, "world_size": 2, "zero_stage": 1, "precision": "fp32",
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
        StudyRow("big", "reference", run_result(make_run(tmp_path / "big", 8.0, 4.2, tilt=0.02))),
        StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0))),
        StudyRow("random", "baseline", run_result(make_run(tmp_path / "random", 8.1, 4.5, tilt=0.05))),
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
    assert result.final.windows == tuple(losses(4.0))
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
    with pytest.raises(RunFolderError, match=r"metrics.jsonl holds no validation\n.*val/loss and val/stderr"):
        write_run_report(tmp_path / "small")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl holds no validation"):
        write_study_report(tmp_path, "Three runs", rows)


def test_paired_difference_is_computed_from_the_windows() -> None:
    a, b = losses(4.0), losses(4.5, tilt=0.05)
    per_window = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(per_window) / math.sqrt(len(per_window))
    found = paired_difference("a", Evaluation(**evaluation(a)), "b", Evaluation(**evaluation(b)))
    assert found.mean == pytest.approx(statistics.fmean(per_window), rel=1e-12)
    assert found.stderr == pytest.approx(error, rel=1e-12)
    assert found.ratio == pytest.approx(found.mean / error, rel=1e-12)
    assert found.windows == 6
    assert found.words == f"below by {-found.mean / error:.1f} standard errors"


@pytest.mark.parametrize(
    ("b", "words"),
    [
        ([1.0, 2.0, 3.0], "equal in every window"),
        ([1.5, 2.5, 3.5], "below by the same amount in every window"),
        ([1.5, 1.5, 3.0], "no difference beyond 3 standard errors"),
        ([0.0, 1.0, 2.25], "above by 11.0 standard errors"),
        ([2.0, 3.0, 3.75], "below by 11.0 standard errors"),
    ],
)
def test_paired_difference_describes_itself_in_words(b: list[float], words: str) -> None:
    one, other = Evaluation(**evaluation([1.0, 2.0, 3.0])), Evaluation(**evaluation(b))
    assert paired_difference("a", one, "b", other).words == words


def test_paired_difference_needs_three_standard_errors() -> None:
    zero = Evaluation(loss=0.0, stderr=0.0, windows=(0.0,) * 4, **TEXT)

    def words(shift: float) -> str:
        spread_out = Evaluation(loss=0, stderr=0, windows=tuple(shift + x for x in (1.5, -1.5, 1.5, -1.5)), **TEXT)
        return paired_difference("a", spread_out, "b", zero).words

    error = statistics.stdev((1.5, -1.5, 1.5, -1.5)) / 2
    assert words(-2.99 * error) == "no difference beyond 3 standard errors"
    assert words(-3.02 * error) == "below by 3.0 standard errors"


@pytest.mark.parametrize(
    ("windows", "text", "problem"),
    [
        ([1.0, 2.0, 3.0], {}, "2 windows and b on 3 windows: they cannot be compared"),
        ([1.0, 2.0], {"tokens_sha256": "b" * 64}, "the text aaaaaaaaaaaa and b on the text bbbbbbbbbbbb: they"),
        ([1.0, 2.0], {"seq_len": 64}, "windows of 128 tokens and b on windows of 64 tokens: they cannot"),
    ],
)
def test_paired_difference_refuses_other_windows(windows: list[float], text: dict[str, Any], problem: str) -> None:
    one, other = Evaluation(**evaluation([1.0, 2.0])), Evaluation(**evaluation(windows, **text))
    message = rf"^a was validated on {problem}.*\n  allowed: .*corpus.max_tokens.*\n  do: make these equal"
    with pytest.raises(RunFolderError, match=message):
        paired_difference("a", one, "b", other)


def test_paired_difference_refuses_a_single_window() -> None:
    single = Evaluation(loss=1.0, stderr=0.0, windows=(1.0,), **TEXT)
    message = r"1 windows, which has no standard error\n.*two windows or more\n.*max_tok"
    with pytest.raises(RunFolderError, match=message):
        paired_difference("a", single, "b", single)


def test_run_report_shows_step_0_the_end_and_the_reference(tmp_path: Path) -> None:
    report = write_run_report(make_run(tmp_path / "run", 5.0, 4.0, reference=3.9))
    assert report == tmp_path / "run" / "report" / "report.md"
    lines = report.read_text().splitlines()
    error = evaluation(losses(5.0))["stderr"]
    assert columns(lines[4]) == ["before training (step 0)", f"5.0000 ± {error:.4f}"]
    assert columns(lines[5]) == ["after training", f"4.0000 ± {error:.4f}"]
    assert columns(lines[6])[0] == "reference: models/big"
    assert columns(lines[6])[1].startswith("3.9000 ± ")
    assert any(columns(line)[0] == "after training minus models/big" for line in lines)
    assert any(columns(line) == ["parameters of the reference", "9,876,543"] for line in lines)
    assert "Windows of one document are not independent" in report.read_text()
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["final"] == {"loss": pytest.approx(4.0), "stderr": pytest.approx(error), "windows": 6, **TEXT}
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
    error, first = evaluation(losses(4.0))["stderr"], evaluation(losses(5.0))["stderr"]
    assert columns(lines[2]) == [
        "run", "role", "val loss", "val loss at step 0", "parameters", "blocks", "tokens seen", "seconds",
    ]  # fmt: skip
    assert columns(lines[5]) == [
        "small", "target", f"4.0000 ± {error:.4f}", f"5.0000 ± {first:.4f}", "1,234,567", "4", "409,600", "62",
    ]  # fmt: skip
    document = json.loads(report.with_suffix(".json").read_text())
    found = {(item["of"], item["to"]): item for item in document["differences"]}
    assert list(found) == [("small", "random"), ("small", "big")]
    expected = paired_difference("small", rows[1].result.final, "random", rows[2].result.final)
    assert found["small", "random"]["ratio"] == expected.ratio
    assert expected.words in text
    assert f"exported model `{tmp_path / 'small' / 'export'}`" in text
    assert png_size(report.with_name("curves.png")) == (1140, 660)


def test_study_report_reads_an_outside_reference_from_the_target(tmp_path: Path) -> None:
    target = StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0, reference=3.9)))
    baseline = StudyRow("random", "baseline", run_result(make_run(tmp_path / "random", 8.1, 4.5)))
    report = write_study_report(tmp_path / "study", "Two runs", [target, baseline])
    first = columns(report.read_text().splitlines()[4])
    assert first[:2] == ["models/big", "reference"]
    assert first[2].startswith("3.9000 ± ")
    assert first[3:] == ["", "9,876,543", "", "", ""]
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["reference"]["model"] == "models/big"
    assert [item["to"] for item in document["differences"]] == ["random", "models/big"]


def test_study_report_needs_no_reference(tmp_path: Path) -> None:
    target = StudyRow("small", "target", run_result(make_run(tmp_path / "small", 5.0, 4.0)))
    report = write_study_report(tmp_path / "study", "One run", [target])
    assert "paired difference" not in report.read_text()
    assert report.with_name("curves.png").exists()


def test_study_report_refuses_runs_on_other_windows(tmp_path: Path) -> None:
    rows = study(tmp_path)
    path = tmp_path / f"random/eval/validation-step-{STEPS:08d}.json"
    write_json(path, {"step": STEPS, **evaluation(losses(4.5)[:-1])})
    rows[2] = StudyRow("random", "baseline", run_result(tmp_path / "random"))
    with pytest.raises(RunFolderError, match="big was validated on 6 windows and random on 5"):
        write_study_report(tmp_path / "study", "Three runs", rows)
    assert not (tmp_path / "study").exists()


def test_study_tables_refuse_runs_on_other_text_that_no_difference_pairs(tmp_path: Path) -> None:
    rows = [StudyRow(name, "target", run_result(make_run(tmp_path / name, 5.0, 4.0))) for name in ("small", "smaller")]
    assert "| smaller " in study_tables(rows)
    other = evaluation(losses(4.0), tokens_sha256="b" * 64)
    write_json(tmp_path / f"smaller/eval/validation-step-{STEPS:08d}.json", {"step": STEPS, **other})
    rows[1] = StudyRow("smaller", "target", run_result(tmp_path / "smaller"))
    with pytest.raises(RunFolderError, match=r"small was validated on the text a+ and smaller on the text b+: they"):
        study_tables(rows)


def test_study_tables_line_up_as_plain_text(tmp_path: Path) -> None:
    for block in study_tables(study(tmp_path)).split("\n\n"):
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
