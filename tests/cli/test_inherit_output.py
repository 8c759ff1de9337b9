"""`inheritune-ds inherit`: the output folder, new, in use, built before or damaged."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.surgery import inherit as surgery
from inheritune_ds.surgery import reference as origin
from tests.cli.inheriting import inherit
from tests.launching import environment
from tests.surgery import tiny
from tests.surgery.tiny import contents
from tests.warm_python import WarmPython

WEIGHTS = "model.safetensors"
BUILT = "holds a target that was built from something else"


pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def unhashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a weight is read before the refusal."""

    def refuse(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(origin, "sha256_file", refuse)


def while_proving(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    """Let something happen while the target is built."""
    prove: Callable[..., object] = vars(surgery)["prove"]

    def proven(*args: object, **named: object) -> object:
        happen()
        return prove(*args, **named)

    monkeypatch.setattr(surgery, "prove", proven)


@pytest.mark.parametrize("kind", ["file", "other files", "foreign manifest", "no manifest", "dangling loop"])
@pytest.mark.usefixtures("unhashed")
def test_output_in_use_is_refused(
    kind: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "target"
    if kind == "file":
        output.write_text("mine", encoding="utf-8")
    elif kind == "dangling loop":
        output.symlink_to(output)
    else:
        output.mkdir()
        (output / "inheritance.json").write_text("{}", encoding="utf-8")
        if kind != "other files":
            (output / "manifest.json").write_text("[]" if kind == "no manifest" else '{"files": {}}', encoding="utf-8")
    what = BUILT if kind == "foreign manifest" else "exists and is not empty"
    before = contents(tmp_path)
    capsys.readouterr()
    assert inherit(reference, output) == 8
    assert capsys.readouterr().err == (
        f"inheritune-ds: error: --output {output} {what}\n  do: name a new folder, or remove this one\n"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["selection", "weights"])
def test_another_target_is_refused(
    change: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "target"
    assert inherit(reference, output) == 0
    if change == "weights":
        tiny.make_model("llama", seed=6).save_pretrained(reference)
    before = contents(tmp_path)
    assert inherit(reference, output, select="last:2" if change == "selection" else "first:2") == 8
    assert BUILT in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_empty_output_folder_is_filled(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    assert inherit(reference, tmp_path / "target") == 0
    assert (tmp_path / "target" / WEIGHTS).is_file()


def test_files_that_appear_during_the_build_are_kept(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "target"

    def appear() -> None:
        output.mkdir()
        (output / "thesis.txt").write_text("mine", encoding="utf-8")

    while_proving(monkeypatch, appear)
    assert inherit(reference, output) == 8
    assert f"{output} was created by another process in the meantime" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"models", "target"}


@pytest.mark.parametrize(("select", "code"), [("first:2", 0), ("last:2", 8)], ids=["the same", "another"])
def test_target_of_a_faster_command_is_kept(
    select: str, code: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    assert inherit(reference, elsewhere, select=select) == 0
    before = contents(elsewhere)
    while_proving(monkeypatch, lambda: elsewhere.rename(output))
    assert inherit(reference, output) == code
    assert contents(output) == before
    assert {path.name for path in tmp_path.iterdir()} == {"models", "target"}


def flip_weights(output: Path) -> None:
    """Change one byte; the file keeps its size."""
    content = bytearray((output / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (output / WEIGHTS).write_bytes(content)


def forget_files(output: Path) -> None:
    document = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    del document["files"]
    (output / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda output: (output / WEIGHTS).unlink(), WEIGHTS),
        (flip_weights, WEIGHTS),
        (lambda output: (output / "inheritance.json").unlink(), "inheritance.json"),
    ],
    ids=["missing", "flipped", "report"],
)
def test_damaged_target_is_rebuilt(
    harm: Callable[[Path], object], named: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "target"
    assert inherit(reference, output) == 0
    before = contents(output)
    harm(output)
    capsys.readouterr()
    assert inherit(reference, output) == 0
    shown = capsys.readouterr().out
    assert f"DAMAGED: {output} holds this target with damaged files ({named}); it is rebuilt\n" in shown
    assert "built before" not in shown
    assert contents(output) == before
    assert {path.name for path in tmp_path.iterdir()} == {"models", "target"}


@pytest.mark.parametrize("harm", ["other file", "no list"])
def test_damaged_target_beside_other_files_is_refused(
    harm: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "target"
    assert inherit(reference, output) == 0
    if harm == "other file":
        (output / "notes.txt").write_text("mine", encoding="utf-8")
        flip_weights(output)
    else:
        forget_files(output)
    before = contents(tmp_path)
    assert inherit(reference, output) == 8
    assert "holds other files beside this target, and it is damaged (" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["empty folder", "dangling"])
def test_output_link_is_followed(kind: str, reference: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if kind == "empty folder":
        (disk / "target").mkdir()
    (tmp_path / "link").symlink_to(disk / "target")
    assert inherit(reference, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (disk / "target" / WEIGHTS).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"models", "disk", "link"}
    assert [path.name for path in disk.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "--output is empty"),
        (".", "--output . is the current folder"),
        ("new/..", "--output new/.. is the current folder"),
    ],
)
@pytest.mark.usefixtures("unhashed")
def test_current_folder_is_refused(
    output: str, words: str, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reference)
    before = contents(reference)
    assert inherit(reference, output) == (8 if output else 3)
    assert words in capsys.readouterr().err
    assert contents(reference) == before


@pytest.mark.parametrize("role", ["reference", "previous"])
@pytest.mark.parametrize("place", ["", "target", "deep/target"])
@pytest.mark.usefixtures("unhashed")
def test_output_inside_a_source_is_refused(
    role: str, place: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, more = reference, []
    if role == "previous":
        source = tmp_path / "small"
        more = ["--previous", str(source)]
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(source)
    assert inherit(reference, tmp_path / "link" / place, *more) == 8
    assert f"is inside the folder of --{role}, {source}" in capsys.readouterr().err
    assert {name for name in contents(tmp_path) if not name.startswith("link")} == set(before)


@pytest.mark.parametrize("select", ["first:9", "by:rank:2"])
@pytest.mark.usefixtures("unhashed")
def test_selection_is_checked_before_the_reference_is_read(
    select: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inherit(reference, tmp_path / "target", select=select) in (3, 9)
    assert f"select {select}: " in capsys.readouterr().err


HELD = """
import os, sys, time
import signal
from inheritune_ds.cli import main
from inheritune_ds.surgery import inherit

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

def wait(*_, **__):
    print("building", flush=True)
    time.sleep(60)

inherit.prove = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_signal_removes_the_unfinished_target(
    number: signal.Signals, reference: Path, tmp_path: Path, warm: WarmPython
) -> None:
    words = ["inherit", "--reference", str(reference), "--select", "first:2", "--output", str(tmp_path / "target")]
    reader, writer = os.pipe()
    with os.fdopen(reader) as output:
        process = warm.start(["-c", HELD, *words], cwd=tmp_path, env=environment(), stdout=writer)
        os.close(writer)
        assert output.readline() == "building\n"
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_signal_handlers_are_restored(reference: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert inherit(reference, tmp_path / "target") == 0
    assert [signal.getsignal(number) for number in numbers] == before
