import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.tracking import wandb
from inheritune_ds.tracking.metrics import METRICS, read_metrics
from inheritune_ds.tracking.recorder import RunRecorder
from tests.conftest import Logged

RECIPE = load_recipe("quickstart")


class FakeRun:
    """A W&B run in memory; `broken` names a method that raises."""

    offline = False
    url = "https://example.invalid/run"

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float], *, step: int) -> None:
        if self.broken == "log":
            raise RuntimeError("service is gone\nsecond line")
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished += 1
        if self.broken == "finish":
            raise RuntimeError("no answer")


FakeWandb = Callable[[FakeRun | Exception], dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def wandb_gives(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """Make wandb.init return a fake run or raise; the dict receives its arguments."""

    def install(result: FakeRun | Exception) -> dict[str, Any]:
        import wandb

        arguments: dict[str, Any] = {}

        def init(**given: Any) -> FakeRun:
            arguments.update(given)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(wandb, "init", init)
        return arguments

    return install


def recorder(run_dir: Path, resume_step: int | None = None) -> RunRecorder:
    state = None if resume_step is None else TrainState(step=resume_step)
    return RunRecorder(run_dir, RECIPE, 100, state, on_saved=lambda _: None)


def track(run_dir: Path, rows: list[tuple[int, dict[str, float]]], resume_step: int | None = None) -> None:
    work = recorder(run_dir, resume_step)
    for step, values in rows:
        work.log(step, step * 4096, values)
    work.close()


def test_metrics_table_gives_each_name_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
    assert {name.split("/")[0] for name in METRICS} == {"train", "val", "data", "perf", "mem"}


def test_recorder_writes_floats_at_full_precision(tmp_path: Path) -> None:
    loss = math.pi / 3
    track(tmp_path, [(1, {"train/loss": loss, "train/skipped_steps": 0})])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == f'{{"step": 1, "train/tokens": 4096, "train/loss": {loss!r}, "train/skipped_steps": 0}}'


@pytest.mark.parametrize("name", ["train/los", "step", "train/tokens"])
def test_recorder_refuses_a_name_that_is_not_listed(tmp_path: Path, name: str) -> None:
    work = recorder(tmp_path)
    with pytest.raises(
        ValueError, match=f"{name}: not a metric that may be logged; tracking.metrics.METRICS lists them"
    ):
        work.log(1, 10, {name: 2.0})
    work.close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_not_in_its_row(tmp_path: Path, value: float, wandb_gives: FakeWandb) -> None:
    run = FakeRun()
    wandb_gives(run)
    track(tmp_path, [(7, {"train/lr": 0.1, "train/loss": value})])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 7, "train/tokens": 28672, "train/lr": 0.1}\n'
    assert run.rows == [(7, {"train/tokens": 28672, "train/lr": 0.1})]


def test_a_published_checkpoint_is_reported_and_a_refusal_of_the_disk_is_ignored(tmp_path: Path) -> None:
    seen: list[int] = []

    def refuse(step: int) -> None:
        seen.append(step)
        raise StorageError("status.json cannot be written", action="free some space")

    work = RunRecorder(tmp_path, RECIPE, 100, None, on_saved=refuse)
    work.saved(3)
    work.close()
    assert seen == [3]


def test_rows_are_flushed_and_those_after_a_step_are_dropped_at_a_rollback(tmp_path: Path) -> None:
    work = recorder(tmp_path)
    for step in (1, 2, 3):
        work.log(step, step, {"train/loss": 4.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    work.rewind(1)
    work.log(2, 2, {"train/loss": 3.0})
    work.close()
    work.close()
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == [(1, 4.0), (2, 3.0)]


def test_recorder_drops_rows_after_the_checkpoint_and_keeps_its_validation(tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, float]]] = [
        (0, {"val/loss": 8.0}), (1, {"train/loss": 7.0}), (2, {"train/loss": 6.0}), (2, {"val/loss": 6.5}),
        (3, {"train/loss": 5.0}),
    ]  # fmt: skip
    track(tmp_path, rows)
    track(tmp_path, [(3, {"train/loss": 4.0})], resume_step=2)
    assert [(row["step"], row.get("train/loss"), row.get("val/loss")) for row in read_metrics(tmp_path)] == [
        (0, None, 8.0), (1, 7.0, None), (2, 6.0, None), (2, None, 6.5), (3, 4.0, None),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))
    track(tmp_path, [])
    assert read_metrics(tmp_path) == [], "all rows are dropped without a checkpoint"


@pytest.mark.parametrize("tail", ['{"step": 2, "tra', '{"step": 2, "train/loss": 1.5', "\x00\x00\x00"])
def test_recorder_drops_the_incomplete_last_line_of_a_killed_writer(tmp_path: Path, tail: str) -> None:
    track(tmp_path, [(1, {"train/loss": 7.0})])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + tail)
    track(tmp_path, [(2, {"train/loss": 6.0})], resume_step=2)
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [7.0, 6.0]


def test_recorder_keeps_the_old_file_when_the_rewrite_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, [(1, {"train/loss": 7.0}), (2, {"train/loss": 6.0})])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(StorageError, match=r"metrics.jsonl cannot be written: No space left .*\n.*free some space"):
        recorder(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_recorder_keeps_rows_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    work = recorder(tmp_path)
    work.log(1, 10, {"train/loss": 3.0})
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        work.log(2, 20, {"train/loss": 2.0})
        work.log(3, 30, {"train/loss": 1.0})
    (line,) = logged()
    assert line.startswith("WARNING: ")
    assert "metrics.jsonl cannot be written: No space left on device. The run continues" in line
    assert [row["step"] for row in read_metrics(tmp_path)] == [1], "no partial row"
    work.log(4, 40, {"train/loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        work.log(5, 50, {"train/loss": 0.4})
        with pytest.raises(StorageError, match=r"cannot be written: No space left .*; 1 rows are missing\n.*rerun"):
            work.close()
    work.close()


def test_recorder_refuses_a_damaged_line_inside_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/tokens": 8}\n[2]\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics.jsonl, line 2 is not a row of metrics: '\[2\]'"):
        recorder(tmp_path, 3)


def test_wandb_gets_rows_by_step_with_tokens_as_axis(tmp_path: Path, wandb_gives: FakeWandb) -> None:
    run = FakeRun()
    arguments = wandb_gives(run)
    track(tmp_path, [(5, {"train/loss": 7.0})])
    assert run.rows == [(5, {"train/tokens": 20480, "train/loss": 7.0})]
    assert run.axes == [("train/tokens", None), ("*", "train/tokens")]
    assert run.finished == 1
    assert (arguments["project"], arguments["name"], arguments["resume"]) == ("inheritune_ds", "quickstart", "allow")
    assert arguments["dir"] == str(tmp_path)
    assert arguments["mode"] is None  # WANDB_MODE is set
    assert arguments["config"]["training"]["seq_len"] == RECIPE.training.seq_len


@pytest.mark.parametrize("named", ["", "mine"])
def test_wandb_id_is_new_or_from_the_environment_and_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_gives: FakeWandb, named: str
) -> None:
    arguments = wandb_gives(FakeRun())
    monkeypatch.setenv("WANDB_RUN_ID", named)
    track(tmp_path, [])
    first = arguments["id"]
    assert first == named or (not named and len(first) == 8)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    track(tmp_path, [], resume_step=0)
    assert arguments["id"] == first == (tmp_path / "wandb_id").read_text().strip()


@pytest.mark.parametrize(
    ("netrc", "variables", "mode"),
    [
        ("", {}, "offline"),
        ("", {"WANDB_API_KEY": "key"}, "online"),
        ("machine api.wandb.ai login user password key\n", {}, "online"),
        ("machine api.forge.coreweave.com login user password key\n", {}, "online"),
        ("machine w.example.com login u password k\n", {"WANDB_BASE_URL": "https://w.example.com:8080"}, "online"),
        ("machine example.com login user password key\n", {}, "offline"),
        ("", {"WANDB_API_KEY": "key", "WANDB_DISABLED": "true"}, "disabled"),
        ("", {"WANDB_API_KEY": "key", "WANDB_DISABLED": "ON", "WANDB_MODE": "online"}, "disabled"),
        ("", {"WANDB_API_KEY": "key", "WANDB_DISABLED": "1"}, "disabled"),
        ("", {"WANDB_API_KEY": "key", "WANDB_DISABLED": "false"}, "online"),
        ("machine\n", {}, "offline"),
        ("", {"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, None),
    ],
)
def test_wandb_mode_is_offline_unless_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, netrc: str, variables: dict[str, str], mode: str | None
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
    assert wandb._wandb_mode() == mode


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (ValueError("bad key\nlong story"), ["W&B could not start: bad key. The run continues; metrics.jsonl holds"]),
        (FakeRun("log"), ["W&B: https://example.invalid/run", "W&B stopped: service is gone."]),
        (FakeRun("finish"), ["W&B: https://example.invalid/run", "W&B did not finish: no answer."]),
    ],
    ids=["start", "log", "finish"],
)
def test_recorder_continues_when_wandb_breaks(
    tmp_path: Path, logged: Logged, given: FakeRun | Exception, messages: list[str], wandb_gives: FakeWandb
) -> None:
    wandb_gives(given)
    track(tmp_path, [(1, {"train/loss": 7.0}), (2, {"train/loss": 6.0})])
    lines = logged()
    assert [line[: len(message)] for line, message in zip(lines, messages, strict=True)] == messages
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    "reason", ["no such host", "Network error (ProxyError)", "user is not logged in (401)", "context deadline exceeded"]
)
def test_an_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    import wandb as library

    run, modes = FakeRun(), []
    run.offline = True
    monkeypatch.setenv("WANDB_MODE", "online")

    def init(**given: Any) -> FakeRun:
        modes.append(given["mode"])
        if len(modes) == 1:
            raise RuntimeError(f"{reason}\nlong story")
        return run

    monkeypatch.setattr(library, "init", init)
    monkeypatch.setattr(library, "teardown", lambda: modes.append("teardown"))
    track(tmp_path, [(1, {"train/loss": 7.0})])
    assert modes == [None, "teardown", "offline"]
    assert [step for step, _ in run.rows] == [1]
    assert logged() == [f"W&B: offline ({reason}); to upload later: wandb sync {tmp_path}/wandb/offline-run-*"]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("WANDB_MODE", "on-line", "Input should be 'online'"),
        ("WANDB_BASE_URL", "wandb.example.com", "Input should be a valid URL"),
        ("WANDB_RESUME", "yes", "Input should be 'allow'"),
        ("WANDB_SILENT", "perhaps", "Input should be a valid boolean"),
        ("WANDB_HTTP_TIMEOUT", "soon", "Input should be a valid number"),
    ],
)
def test_a_wrong_variable_of_wandb_is_named(name: str, value: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "WANDB_MODE": "offline", name: value}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"W&B could not start: {name}={value}: {problem}")
    assert done.stdout.endswith("The run continues; metrics.jsonl holds every metric.\n")


def test_real_wandb_writes_an_offline_run_when_its_server_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    impatient = "from inheritune_ds.tracking import wandb\nwandb.START_S = 2.0\n"
    command = [sys.executable, "-c", impatient + WRITER, str(tmp_path / "run"), "0"]
    environment = {**os.environ, **server}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "; to upload later: wandb sync " in done.stdout
    (record,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in record.read_bytes()


def test_wandb_can_be_switched_off(tmp_path: Path, logged: Logged) -> None:
    track(tmp_path, [(1, {"train/loss": 7.0})])
    assert logged() == []
    assert not (tmp_path / "wandb").exists()


WRITER = """
import sys
from pathlib import Path
from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.console import log_to_console
from inheritune_ds.tracking.recorder import RunRecorder
log_to_console()
state = TrainState(step=int(sys.argv[2])) if int(sys.argv[2]) else None
work = RunRecorder(Path(sys.argv[1]), load_recipe("quickstart"), 9, state, on_saved=print)
work.log(5, 500, {"train/loss": 7.0})
work.close()
"""


def test_real_wandb_writes_one_run_offline_and_no_secret(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    canaries = {
        "WANDB_API_KEY": "canary0123456789canary0123456789canary01",
        "HF_TOKEN": "hf_canarycanarycanary",
        "SOME_PASSWORD": "canary-password",
    }
    environment = {**os.environ, **canaries, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    for resume_step in ("0", "4"):  # the second launch resumes
        command = [sys.executable, "-W", "error", "-c", WRITER, str(run_dir), resume_step, "--key=canary-argument"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        assert done.stdout.startswith("W&B: offline; to upload later: wandb sync ")
    identity = (run_dir / "wandb_id").read_text().strip()
    records = list(run_dir.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert records
    content = b"".join(path.read_bytes() for path in records)
    assert b"train/loss" in content  # the record is not compressed: the search below is valid
    assert b"global_batch_tokens" in content
    holders = [path for path in run_dir.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert holders == []
    assert os.environ["PATH"].encode() not in content
