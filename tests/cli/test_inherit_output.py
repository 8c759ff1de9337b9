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
    def refuse(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(origin, "sha256_file", refuse)


def while_proving(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    prove: Callable[..., object] = vars(surgery)["prove"]

    def proven(*args: object, **named: object) -> object:
        happen()
        return prove(*args, **named)

    monkeypatch.setattr(surgery, "prove", proven)


@pytest.fixture
def refused(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Cut into a folder, which is refused with a code and words, and leaves all files as they were."""

    def check(code: int, words: str, output: Path | str, *more: str, select: str = "first:2") -> None:
        before = contents(tmp_path)
        capsys.readouterr()
        assert inherit(reference, output, *more, select=select) == code
        error = capsys.readouterr().err
        assert error.startswith("inheritune-ds: error: ")
        assert words in error
        assert contents(tmp_path) == before

    return check


@pytest.mark.parametrize("kind", ["file", "other files", "foreign manifest", "no manifest", "dangling loop"])
@pytest.mark.usefixtures("unhashed")
def test_output_in_use_is_refused(kind: str, refused: Callable[..., None], tmp_path: Path) -> None:
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
    refused(8, f"error: --output {output} {what}\n  do: name a new folder, or remove this one\n", output)


@pytest.mark.parametrize("change", ["selection", "weights"])
def test_another_target_is_refused(change: str, refused: Callable[..., None], reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "target"
    assert inherit(reference, output) == 0
    if change == "weights":
        tiny.make_model("llama", seed=6).save_pretrained(reference)
    refused(8, BUILT, output, select="last:2" if change == "selection" else "first:2")


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
    content = bytearray((output / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (output / WEIGHTS).write_bytes(content)


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
    harm: str, refused: Callable[..., None], reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "target"
    assert inherit(reference, output) == 0
    if harm == "other file":
        (output / "notes.txt").write_text("mine", encoding="utf-8")
        flip_weights(output)
    else:
        document = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        del document["files"]
        (output / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    refused(8, "holds other files beside this target, and it is damaged (", output)


@pytest.mark.parametrize("kind", ["empty folder", "dangling", "no link"])
def test_output_link_is_followed(kind: str, reference: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if kind != "dangling":
        (disk / "target").mkdir()
    link = tmp_path / "link"
    link.symlink_to(disk / "target")
    assert inherit(reference, disk / "target" if kind == "no link" else link) == 0
    assert link.is_symlink()
    assert (disk / "target" / WEIGHTS).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"models", "disk", "link"}
    assert [path.name for path in disk.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("", 3, "--output is empty"),
        (".", 8, "--output . is the current folder"),
        ("new/..", 8, "--output new/.. is the current folder"),
    ],
)
@pytest.mark.usefixtures("unhashed")
def test_current_folder_is_refused(  # noqa: PLR0917 - fixtures are parameters
    output: str, code: int, words: str, refused: Callable[..., None], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reference)
    refused(code, words, output)


@pytest.mark.parametrize("role", ["reference", "previous"])
@pytest.mark.parametrize("place", ["", "target", "deep/target"])
@pytest.mark.usefixtures("unhashed")
def test_output_inside_a_source_is_refused(
    role: str, place: str, refused: Callable[..., None], reference: Path, tmp_path: Path
) -> None:
    source = reference if role == "reference" else tmp_path / "small"
    more = [] if role == "reference" else ["--previous", str(source)]
    (tmp_path / "link").symlink_to(source)
    refused(8, f"is inside the folder of --{role}, {source}", tmp_path / "link" / place, *more)


@pytest.mark.parametrize(("select", "code"), [("first:9", 9), ("by:rank:2", 9)])
@pytest.mark.usefixtures("unhashed")
def test_selection_is_checked_before_the_reference_is_read(
    select: str, code: int, refused: Callable[..., None], tmp_path: Path
) -> None:
    refused(code, f"select {select}: ", tmp_path / "target", select=select)


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
