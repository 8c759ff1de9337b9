import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.cli import main
from inheritune_ds.config.loading import load_recipe, read_document, shipped_names
from inheritune_ds.config.messages import validate
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import InherituneError, MachineError, RecipeError
from inheritune_ds.study import processes, runner
from inheritune_ds.study.runner import StudyRunError
from inheritune_ds.study.spec import StudyFile
from tests.study.bench import calls, interrupt_myself, start, survivors, write_study


def test_study_chooses_another_port_if_the_default_is_in_use(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("", processes.DEFAULT_PORT))
        other.listen()
        assert start() is not None
    ports = [call["port"] for call in calls(bench)]
    assert str(processes.DEFAULT_PORT) not in ports
    assert f"deepspeed --master_port {ports[0]} --num_gpus 2 train.py " in capfd.readouterr().out


@pytest.mark.parametrize("name", shipped_names("studies"))
def test_shipped_studies_name_recipes_that_load(name: str) -> None:
    text, origin = read_document(name, "studies")
    shipped = validate(StudyFile, parse_yaml(text, origin), origin)
    assert shipped.name == name
    assert all(load_recipe(run.recipe, run.overrides).name == run.recipe for run in shipped.runs)


def test_study_trains_each_run_in_order_and_writes_the_report(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = start("quickstart", "training.duration=20 steps")
    assert report == Path("runs/study-quickstart/report/report.md")
    assert report.exists()
    assert [call["name"] for call in calls(bench)] == ["quickstart-reference", "quickstart", "quickstart-scratch"]
    said = capfd.readouterr().out
    for line in (
        "[1/3] quickstart-reference (reference)",
        "[2/3] quickstart (target)",
        "[3/3] quickstart-scratch (baseline)",
    ):
        assert line in said
    assert "| inherited (first 4 of 8) | target " in said
    assert "figure  runs/study-quickstart/report/curves.png" in said
    assert "model   runs/quickstart/export  (inherited (first 4 of 8))" in said


def test_study_logs_the_deepspeed_command(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("quickstart", "training.duration=20 steps")
    echoed = [line for line in capfd.readouterr().out.splitlines() if " train.py " in line]
    assert echoed[1] == (
        "deepspeed --num_gpus 2 train.py --deepspeed_config ds_configs/cpu.json --recipe quickstart"
        " --runs-dir runs --cache-dir cache 'training.duration=20 steps'"
        " reference.model=recipe:runs/study-quickstart/recipes/quickstart-reference.yaml"
    )
    assert calls(bench)[1]["arguments"] == shlex.split(echoed[1])[4:]
    assert calls(bench)[1]["port"] == str(processes.DEFAULT_PORT)


def test_overrides_of_a_study_reach_the_reference_that_it_trains(bench: Path) -> None:
    start("quickstart", "training.duration=20 steps")
    reference, target, baseline = (call["arguments"] for call in calls(bench))
    path = Path("runs/study-quickstart/recipes/quickstart-reference.yaml")
    assert reference[-1] == "training.duration=20 steps"
    assert target[-2:] == baseline[-2:] == ["training.duration=20 steps", f"reference.model=recipe:{path}"]
    trained = load_recipe("quickstart-reference", ["training.duration=20 steps"])
    assert load_recipe(str(path)) == trained
    given = load_recipe("quickstart", target[-2:])
    assert given.reference is not None
    assert given.reference.recipe_name == str(path)


@pytest.mark.parametrize("overrides", [[], ["logging.interval_steps=5"]])
def test_reference_without_overrides_keeps_its_recipe(bench: Path, overrides: list[str]) -> None:
    start("quickstart", *overrides)
    assert not any("reference.model" in word for call in calls(bench) for word in call["arguments"])
    assert not Path("runs/study-quickstart/recipes").exists()


def test_target_inherits_from_a_reference_with_overrides(bench: Path) -> None:
    runs = [
        {"recipe": "quickstart-reference", "role": "reference", "overrides": ["name=other", "seed=7"]},
        {"recipe": "quickstart", "role": "target", "overrides": ["seed=8"]},
    ]
    write_study(bench.parent / "study.yaml", runs=runs)
    (bench / "quickstart-reference").write_text("running 3")
    with pytest.raises(StudyRunError):
        start("study.yaml")
    path = Path("runs/study-mine/recipes/other.yaml")
    written = load_recipe(str(path))
    assert (written.name, written.seed) == ("other", 7)
    write_study(bench.parent / "study.yaml", runs=list(reversed(runs)))
    (bench / "quickstart-reference").unlink()
    with suppress(InherituneError):
        start("study.yaml")
    assert not any("reference.model" in word for word in calls(bench)[-1]["arguments"])


def test_launcher_is_written_for_the_user_s_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "bin" / "deepspeed", tmp_path / "other" / "deepspeed"
    for launcher in (own, other):
        launcher.parent.mkdir()
        launcher.write_text("#!/bin/sh\n")
        launcher.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    for path, named in ((own.parent, "deepspeed"), (other.parent, "bin/deepspeed"), ("/nowhere", "bin/deepspeed")):
        monkeypatch.setenv("PATH", str(path))
        assert runner._deepspeed() == named
    own.unlink()
    assert runner._deepspeed() == "deepspeed"


def test_study_reports_a_missing_train_py(bench: Path) -> None:
    (bench.parent / "train.py").unlink()
    with pytest.raises(MachineError, match=r"train.py is neither at .* nor at .*train.py\n.*clone the repository"):
        start()
    assert calls(bench) == []


def test_study_finds_train_py_in_another_folder(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = bench.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    start()
    assert f" {bench.parent / 'train.py'} --deepspeed_config" in capfd.readouterr().out


def test_study_returns_the_exit_code_of_a_failed_run(bench: Path) -> None:
    (bench / "quickstart").write_text("failed 9")
    with pytest.raises(StudyRunError, match=r"^run quickstart ended with exit code 9\n.*the run's own message above"):
        start()
    assert [call["name"] for call in calls(bench)] == ["quickstart-reference", "quickstart"]
    assert not Path("runs/study-quickstart").exists()


@pytest.mark.parametrize(
    ("behavior", "problem", "code"),
    [
        ("finished 8", "run quickstart-reference ended with exit code 8", 8),
        ("running 0", r"ended without finishing \(its state: running\)", 11),
        ("failed 0", r"ended without finishing \(its state: failed\)", 11),
        ("none 0", r"ended without finishing \(its state: unknown\)", 11),
    ],
)
def test_run_must_end_with_exit_code_zero_and_a_finished_status(
    bench: Path, behavior: str, problem: str, code: int
) -> None:
    (bench / "quickstart-reference").write_text(behavior)
    with pytest.raises(StudyRunError, match=problem) as caught:
        start()
    assert caught.value.exit_code == code


def test_study_stops_without_a_report_at_a_requeued_run(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (bench / "quickstart").write_text("requeue 0")
    assert start() is None
    assert capfd.readouterr().out.endswith(
        "study quickstart: stopped at quickstart; rerun the same command to resume\n"
    )
    (bench / "quickstart").unlink()
    assert start() is not None
    assert [call["name"] for call in calls(bench)][2:] == ["quickstart-reference", "quickstart", "quickstart-scratch"]


def test_study_file_may_use_recipes_beside_it_and_overrides(bench: Path) -> None:
    folder = bench.parent / "mine"
    folder.mkdir()
    text, _ = read_document("quickstart", "recipes")
    (folder / "own.yaml").write_text(text.replace("name: quickstart\n", "name: own\n"))
    runs = [
        {"recipe": "own.yaml", "role": "target", "label": "mine"},
        {"recipe": "quickstart", "role": "baseline", "overrides": ["seed=7", "name=quickstart"]},
    ]
    write_study(folder / "study.yaml", runs=runs)
    assert start("mine/study.yaml", "seed=8") == Path("runs/study-mine/report/report.md")
    first, second = calls(bench)
    assert first["name"] == "mine/own.yaml"
    assert second["arguments"][-3:] == ["seed=7", "name=quickstart", "seed=8"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"runs": []}, r"study.yaml: runs: \[\] is not accepted"),
        ({"runs": [{"recipe": "quickstart", "role": "baseline"}]}, "one of the runs must have the role target"),
        ({"runs": [{"recipe": "quickstart", "role": "teacher"}]}, r"runs.0.role: 'teacher' is not accepted"),
        ({"name": "../x"}, "name: '../x' is not accepted\n  allowed: a name of letters, digits"),
        ({"run": []}, "study.yaml: run: unknown key"),
        (
            {"runs": [{"recipe": "quickstart", "role": "target"}, {"recipe": "quickstart", "role": "baseline"}]},
            "study mine: 2 runs are called quickstart, so they would share a run folder\n.*name=",
        ),
        (
            {"runs": [{"recipe": "quickstrt", "role": "target"}, {"recipe": "quickstart-", "role": "baseline"}]},
            "2 problems found\n1. recipe 'quickstrt' cannot be read.*\n.*\n.*did you mean quickstart.*\n2. recipe",
        ),
    ],
)
def test_study_file_is_checked_before_anything_starts(bench: Path, changes: dict[str, Any], problem: str) -> None:
    write_study(bench.parent / "study.yaml", **changes)
    with pytest.raises(RecipeError, match=problem):
        start("study.yaml")
    assert calls(bench) == []


def test_study_lists_the_shipped_studies(bench: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"study 'quickstat' cannot be read: .*\n.*quickstart\n.*did you mean quickst"
    ):
        start("quickstat")


def test_overrides_are_checked_against_every_recipe_before_anything_starts(bench: Path) -> None:
    with pytest.raises(RecipeError, match="3 problems found"):
        start("quickstart", "training.seqlen=3")
    assert calls(bench) == []


def test_study_without_ranks_is_refused(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "quickstart", "--num_gpus", "0"]) == RecipeError.exit_code
    assert "--num_gpus 0 is not accepted\n  allowed: 1, 2, 3, ..." in capfd.readouterr().err
    assert calls(bench) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_study_lets_the_ranks_save_at_a_signal(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (bench / "quickstart").write_text("wait")
    thread = when_ready(lambda: os.kill(os.getpid(), number))
    assert start() is None
    thread.join()
    captured = capfd.readouterr()
    assert captured.out.endswith("study quickstart: stopped at quickstart; rerun the same command to resume\n")
    assert captured.err == ""
    assert json.loads(Path("runs/quickstart/status.json").read_text()) == {"state": "requeue"}
    assert survivors(bench) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_study_ends_at_once_at_a_second_interrupt(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench / "quickstart").write_text("wait")
    monkeypatch.setenv("SAVE_S", "60")

    def twice() -> None:
        interrupt_myself()
        deadline = time.monotonic() + 20
        while not (bench / "saving").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        interrupt_myself()

    began = time.monotonic()
    thread = when_ready(twice)
    with pytest.raises(KeyboardInterrupt):
        start()
    thread.join()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_study_stops_ranks_that_are_still_starting(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], capfd: pytest.CaptureFixture[str]
) -> None:
    (bench.parent / "train.py").write_text(
        f"import pathlib, time\npathlib.Path('{bench}/ready').touch()\ntime.sleep(60)"
    )
    began = time.monotonic()
    thread = when_ready(interrupt_myself)
    assert start() is None
    thread.join()
    assert time.monotonic() - began < 20
    assert "stopped at quickstart-reference" in capfd.readouterr().out


def test_study_distinguishes_a_failed_run_from_a_stopped_one(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    script = (bench.parent / "train.py").read_text()
    (bench.parent / "train.py").write_text(
        script.replace('status("requeue")\n    os._exit(0)', 'status("failed")\n    os._exit(5)')
    )
    (bench / "quickstart").write_text("wait")
    thread = when_ready(interrupt_myself)
    with pytest.raises(StudyRunError, match="run quickstart ended with exit code 5"):
        start()
    thread.join()


def has_ended(pid: int) -> bool:
    """Whether a process ends within seconds; a zombie has ended."""
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not stat.exists() or " Z " in stat.read_text()


ORPHAN = """
import os, pathlib, signal, subprocess
if os.environ["RANK"] == "0":
    pathlib.Path("orphan").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_study_kills_children_of_ranks_and_reports_the_signal(bench: Path) -> None:
    (bench.parent / "train.py").write_text(ORPHAN)
    with pytest.raises(StudyRunError, match="ended with exit code 137"):
        start()
    assert has_ended(int(Path("orphan").read_text()))


def test_study_kills_the_ranks_that_remain_after_a_failure(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys, time\ntime.sleep(60) if os.environ['RANK'] == '0' else sys.exit(6)\n"
    (bench.parent / "train.py").write_text(script)
    monkeypatch.setattr(processes, "GRACE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(StudyRunError, match="ended with exit code 6"):
        start()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_signal_before_the_ranks_start_is_forwarded(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench / "quickstart-reference").write_text("wait")
    started = processes._start

    def slowly(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return started(*given)

    monkeypatch.setattr(processes, "_start", slowly)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # one signal per rank
        start()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_signals_leave_an_ignored_hangup_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes._Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
