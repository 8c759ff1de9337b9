import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inheritune_ds.checkpoints.manifest import MANIFEST, manifest_text, published, read_manifest
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.cli import main
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.status import read_status, write_status
from tests.checkpoints.saved import flip, save

MODEL_FILE = "rank-00001.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 4, 8, 12, 16 and a rule that keeps all but the oldest."""
    folder = RunFolder(tmp_path / "runs" / "small")
    rule = ["name=small", "checkpoint.interval_steps=4", "checkpoint.keep=2", "checkpoint.keep_every=2"]
    folder.claim(load_recipe("quickstart", rule))
    store = CheckpointStore(folder.checkpoints, keep=9)
    for step in (4, 8, 12, 16):
        os.utime(save(store, step, text="s" * 1_500_000), (time.time() - 1800 * step,) * 2)
    write_status(folder.path, "finished", step=16)
    folder.release()
    return folder.path


def steps(run: Path) -> list[int]:
    return [int(path.name[-8:]) for path in published(run / "checkpoints")]


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str], str]:
    code = main(["checkpoints", *map(str, words)])
    out, error = capsys.readouterr()
    return code, out.splitlines(), error


def test_list_prints_what_is_kept_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, error = call(capsys, "small", "--runs-dir", run.parent)
    assert (code, error) == (0, "")
    assert [re.split(r"  +", line) for line in lines[:-1]] == [
        ["checkpoint", "tokens", "size", "age", "saved under", "kept"],
        ["step-00000016", "8,192", "1.5 MB", "8 h", "2 ranks, ZeRO-1, bf16", "newest 2"],
        ["step-00000012", "6,144", "1.5 MB", "6 h", "2 ranks, ZeRO-1, bf16", "newest 2"],
        ["step-00000008", "4,096", "1.5 MB", "4 h", "2 ranks, ZeRO-1, bf16", "every 8 steps"],
        ["step-00000004", "2,048", "1.5 MB", "2 h", "2 ranks, ZeRO-1, bf16", "no: prune deletes it"],
    ]
    assert lines[-1] == f"{run / 'checkpoints' / 'latest'} names step-00000016"


def test_list_prints_a_damaged_manifest_and_a_missing_pointer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step-00000012" / "manifest.json").write_text("{}")
    code, lines, _ = call(capsys, run, "list")
    assert code == 0
    assert re.fullmatch(r"step-00000012 .* DAMAGED: manifest missing or changed .*", lines[2])
    assert lines[-1].endswith("latest is missing")


def test_verify_names_damaged_files_and_ends_with_4(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, error = call(capsys, run, "verify")
    assert (code, error) == (0, "")
    assert lines == [f"step-000000{step:02}  intact (2 files, 1.5 MB)" for step in (16, 12, 8, 4)]
    flip(run / "checkpoints" / "step-00000012" / MODEL_FILE)
    (run / "checkpoints" / "step-00000004" / MODEL_FILE).unlink()
    code, lines, error = call(capsys, run, "verify")
    assert code == 4
    assert re.fullmatch(
        r"step-00000012  DAMAGED: rank-00001\.safetensors has blake3 [0-9a-f]{12}\.\.\. instead of [0-9a-f]{12}\.\.\.",
        lines[1],
    )
    assert lines[3] == "step-00000004  DAMAGED: rank-00001.safetensors is missing"
    assert f"2 of 4 checkpoints in {run / 'checkpoints'} are damaged" in error


def test_an_earlier_format_is_never_called_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run / "checkpoints" / "step-00000016" / MANIFEST
    document = read_manifest(manifest.parent)
    assert document is not None
    del document["format"]
    manifest.write_text(manifest_text(document))
    for verb in ("verify", "prune"):
        code, _, error = call(capsys, run, verb, *(["--keep", "1"] if verb == "prune" else []))
        assert code == 4
        assert "commit 318409b is the last that reads it" in error
        assert "damaged" not in error


def test_verify_of_nothing_reports_an_earlier_save(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list(published(run / "checkpoints")):
        path.rename(run / path.name)
    code, _, error = call(capsys, run, "verify")
    assert code == 4
    assert "holds no checkpoint, but latest is there, so this run has saved before" in error
    (run / "checkpoints" / "latest").unlink()
    (run / "status.json").unlink()
    assert call(capsys, run, "verify")[:2] == (0, [f"no checkpoint in {run / 'checkpoints'}"])
    assert call(capsys, run, "list")[:2] == (0, [f"no checkpoint in {run / 'checkpoints'}"])


@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_unreadable_folder_is_an_error(
    action: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, _, error = call(capsys, run, action)
    assert code == 4
    assert f"the checkpoints in {run / 'checkpoints'} cannot be read: Permission denied" in error


def test_missing_folder_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "status.json").write_text('{"step": 16, "saved_step": 16}')
    code, _, error = call(capsys, run, "verify")
    assert code == 4
    assert "holds no checkpoint, but status.json says that step 16 was saved" in error
    assert call(capsys, run, "prune")[:2] == (0, ["0 deleted"])
    code, _, error = call(capsys, run, "prune", "--after", "8")
    assert code == 4
    assert "the run cannot return to step 8: no checkpoint is that early" in error


def test_prune_applies_the_recipe_s_rule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, run, "prune", "--dry-run")[1] == ["step-00000004  would be deleted", "1 would be deleted"]
    assert steps(run) == [16, 12, 8, 4]
    code, lines, _ = call(capsys, run, "prune")
    assert (code, lines) == (0, ["step-00000004  deleted", "1 deleted; the run resumes from step 16"])
    assert steps(run) == [16, 12, 8]
    assert read_status(run)["state"] == "finished"
    assert call(capsys, run, "prune", "--keep", "1")[0] == 0
    assert steps(run) == [16, 8]  # keep_every keeps 8


def test_prune_after_a_step_returns_the_run_to_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, run, "prune", "--after", "9", "--dry-run")[1]
    assert lines == ["step-00000016  would be deleted", "step-00000012  would be deleted", "2 would be deleted"]
    code, lines, _ = call(capsys, run, "prune", "--after", "9")
    assert (code, lines[-1]) == (0, "2 deleted; the run resumes from step 8")
    assert steps(run) == [8, 4]
    status = read_status(run)
    assert (status["state"], status["step"]) == ("requeue", 8)
    assert status["reason"] == "returned to step 8 by `checkpoints prune`"
    for words in (["--dry-run"], []):
        code, _, error = call(capsys, run, "prune", "--after", "2", *words)
        assert code == 4
        assert "cannot return to step 2: no checkpoint is that early" in error
    assert steps(run) == [8, 4]


def test_prune_refuses_a_locked_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = RunFolder(run)
    holder.lock()
    try:
        code, _, error = call(capsys, run, "prune")
    finally:
        holder.release()
    assert code == 8
    assert f"another process is writing to {run}" in error
    assert steps(run) == [16, 12, 8, 4]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--keep", "2"], "--keep is an option of `prune`, not of `list`"),
        (["verify", "--after", "2"], "--after is an option of `prune`, not of `verify`"),
        (["verify", "--dry-run"], "--dry-run is an option of `prune`, not of `verify`"),
        (["prune", "--keep", "0"], "--keep 0 would delete every checkpoint"),
        (["list", "seed=3"], "checkpoints takes no overrides: seed=3"),
    ],
)
def test_options_without_effect_are_refused(
    words: list[str], problem: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, error = call(capsys, run, *words)
    assert (code, lines) == (3, [])
    assert problem in error


def test_unknown_run_is_refused_with_the_existing_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "smal", "--runs-dir", run.parent)
    assert code == 8
    assert f"smal is not a run: it has no recipe.resolved.yaml, neither there nor in {run.parent}" in error
    assert "allowed: a run folder, or one of small" in error
    assert "one of" not in call(capsys, "smal", "--runs-dir", run)[2]


def test_checkpoints_imports_no_torch(run: Path) -> None:
    code = (
        "import sys; from inheritune_ds.cli import main; "
        f"main(['checkpoints', {str(run)!r}, 'verify']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("words", [["--dry-run"], []], ids=["dry run", "prune"])
def test_prune_deletes_nothing_while_the_newest_is_damaged(
    words: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step-00000016" / MODEL_FILE).write_bytes(b"")
    code, lines, error = call(capsys, run, "prune", *words)
    assert (code, lines) == (4, [])
    assert "step-00000016 is damaged: rank-00001.safetensors has 0 bytes instead of 256" in error
    assert "until then nothing is deleted" in error
    assert steps(run) == [16, 12, 8, 4]


def test_list_marks_a_checkpoint_that_the_run_deletes_meanwhile(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = Path.lstat

    def vanished(path: Path) -> os.stat_result:
        if path.name == "step-00000008":
            raise FileNotFoundError(path)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", vanished)
    code, lines, _ = call(capsys, run)
    assert code == 0
    assert [line.split("  ")[0] for line in lines if "just deleted" in line] == ["step-00000008"]


@pytest.mark.parametrize("target", ["nowhere", "elsewhere"])
def test_link_among_the_checkpoints_is_reported_as_damaged(
    target: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = run / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").touch()
    link = run / "checkpoints" / "step-00000099"
    link.symlink_to(run / target)
    code, lines, _ = call(capsys, run)
    assert code == 0
    assert re.split(r"  +", lines[1])[4] == f"DAMAGED: a {'dangling ' if target == 'nowhere' else ''}symbolic link"
    code, lines, _ = call(capsys, run, "verify")
    assert (code, lines[0]) == (4, "step-00000099  DAMAGED: it is a symbolic link")
    code, _, error = call(capsys, run, "prune")
    assert code == 4
    assert "step-00000099 is damaged: it is a symbolic link" in error
    link.rename(run / "checkpoints" / "step-00000002")
    assert call(capsys, run, "prune")[1][:2] == ["step-00000004  deleted", "step-00000002  deleted"]
    assert sorted(path.name for path in run.glob("checkpoints/.*")) == []
    assert (elsewhere / "theirs").exists()
