import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inheritune_ds.run import provenance
from inheritune_ds.run.provenance import PACKAGES, write_provenance


def test_provenance_tells_versions_and_command_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_VARIABLE"):
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--recipe", "quickstart"])
    written = write_provenance(tmp_path, {"world_size": 2})
    text = (tmp_path / "provenance.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert document == written
    assert document["command"] == ["train.py", "--recipe", "quickstart"]
    assert (document["world_size"], document["slurm_job_id"]) == (2, "123")
    assert set(document["packages"]) == set(PACKAGES)
    assert document["packages"]["torch"].startswith("2.")
    assert "value-of" not in text
    assert os.environ["PATH"] not in text


def test_git_state_is_none_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "inheritune_ds" / "run" / "folder.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance._git_state() is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert provenance._git_state() is None


def test_git_state_reports_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "inheritune_ds" / "run"
    package.mkdir(parents=True)
    (package / "folder.py").write_text("one\n", encoding="utf-8")
    monkeypatch.setattr(provenance, "__file__", str(package / "folder.py"))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert provenance._git_state() == {"commit": commit, "changed": False}
    (tmp_path / "untracked").touch()
    assert provenance._git_state() == {"commit": commit, "changed": False}
    (package / "folder.py").write_text("two\n", encoding="utf-8")
    assert provenance._git_state() == {"commit": commit, "changed": True}
