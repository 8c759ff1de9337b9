import errno
import io
import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from inheritune_ds.console import Meter, Screen, TrainingProgress, log_to_console

LINE = f"checkpoint [saved] {'/a/long/path' * 12}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, IO[str]]]:
    """A pseudo-terminal: the descriptor to read from, and the stream to write to."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield reader, stream
    os.close(reader)


def read_all(terminal: tuple[int, IO[str]]) -> str:
    """Close the stream and read the terminal; on Linux the end is an error instead of b""."""
    reader, stream = terminal
    stream.close()
    chunks = []
    with suppress(OSError):
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints_log_lines(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_console()
    log_to_console(is_main=rank == 0)
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)
    logger = logging.getLogger("inheritune_ds.data.tokens.prepare")
    logger.debug("nothing")
    logger.info("tokens: %s%%", 5)
    logger.warning("the disk is full")
    logging.getLogger().removeHandler(root)
    expected = "tokens: 5%\nWARNING: the disk is full\n" if rank == 0 else ""
    assert capsys.readouterr() == (expected, "")


def test_meter_prints_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("tokenizing", "tokens", 10_000) as meter:
        for _ in range(25):
            clock[0] += 1.0
            meter.advance(100, "3 documents")
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 1,000 of 10,000 tokens, 3 documents, 100 tokens/s, 90 s left",
        "tokenizing: 2,000 of 10,000 tokens, 3 documents, 100 tokens/s, 80 s left",
    ]


@pytest.mark.parametrize(
    ("total", "waited_s", "amount", "line"),
    [
        (None, 20.0, 4_000, "hashing: 4,000 files, 200 files/s\n"),
        (50, 15.0, 1, "hashing: 1 of 50 files, 0.067 files/s, 735 s left\n"),
        (None, 0.0, 1, ""),
    ],
    ids=["no total", "slow", "short"],
)
def test_meter_shows_rate_and_time_left(  # noqa: PLR0917 - fixtures are parameters
    total: int | None, waited_s: float, amount: int, line: str, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Meter("hashing", "files", total) as meter:
        clock[0] += waited_s
        meter.advance(amount)
    assert capsys.readouterr() == ("", line)


def test_meter_draws_a_bar_below_the_log_lines(monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, IO[str]]) -> None:
    monkeypatch.setattr(sys, "stdout", terminal[1])
    monkeypatch.setattr(sys, "stderr", terminal[1])
    log_to_console()
    with Meter("tokenizing", "tokens", 1000) as meter:
        meter.advance(500, "7 documents")
        logging.getLogger("inheritune_ds").info(LINE)
    text = read_all(terminal)
    assert "tokenizing" in text
    assert "500 of 1,000 tokens, 7 documents" in text
    assert f"{LINE}\r\n" in text


def test_meter_does_not_write_to_standard_output_in_a_file(
    monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, IO[str]], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal[1])
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        with Meter("tokenizing", "tokens", 1000) as meter:
            meter.advance(500, "7 documents")
            print(LINE)
    assert (tmp_path / "log").read_text() == f"{LINE}\n"
    assert "500 of 1,000" in read_all(terminal)


def test_progress_prints_a_plain_line_every_ten_seconds_and_the_last(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = TrainingProgress(40, 10, "quickstart")
    for step in range(11, 41):
        clock[0] = step * 1.0
        progress.update(step, 5.0, 12345.6)
    progress.close()
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "quickstart  step 11/40  loss 5.0000  12,346 tokens/s  time left unknown",
        "quickstart  step 21/40  loss 5.0000  12,346 tokens/s  0:00:19 left",
        "quickstart  step 31/40  loss 5.0000  12,346 tokens/s  0:00:09 left",
        "quickstart  step 40/40  loss 5.0000  12,346 tokens/s  done",
    ]


def test_progress_shows_hours_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    TrainingProgress(10, 10, "quickstart").close()
    assert capsys.readouterr() == ("", "")
    progress = TrainingProgress(1000, 0, "long")
    progress.update(1, 5.0, 1.0)
    clock[0] += 100.0
    progress.update(11, 5.0, 1.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith("2:44:50 left")


def test_progress_draws_a_bar_and_leaves_its_last_state(
    monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, IO[str]]
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal[1])
    progress = TrainingProgress(200, 0, "quickstart")
    progress.update(100, 4.25, 9876.0)
    print(LINE)
    progress.update(200, 4.0, 9876.0)
    progress.close()
    text = read_all(terminal)
    assert f"{LINE}\r\n" in text
    last = text[text.rindex("quickstart") :]
    assert "200/200" in last
    assert "loss 4.0000" in last
    assert "9,876 tokens/s" in last
    assert "━" in last


class Refusing(io.StringIO):
    """A stream that refuses texts with an error while `number` is set."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize(
    "number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.ENXIO, errno.ESTALE]
)
def test_a_refused_text_is_lost_and_later_ones_are_written(
    number: int, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    inner = Refusing(number)
    screen = Screen(inner, str.upper)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    log_to_console()
    logger, progress = logging.getLogger("inheritune_ds"), TrainingProgress(9, 0, "quickstart")
    with Meter("tokenizing", "tokens") as meter:
        for inner.number in (number, 0):
            clock[0] += 20.0
            logger.warning("the disk is full")
            progress.update(1, 5.0, 1.0)
            meter.advance(100)
            screen.writelines(["a", "b\n"])
            print(flush=True)
    left = inner.getvalue().splitlines()
    assert [line.split(" ")[0] for line in left] == ["WARNING:", "QUICKSTART", "TOKENIZING:", "AB", ""]


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "n\xf8", "n\\xf8"),
        ("latin-1", "\N{SNOWMAN} n\xf8", "\\u2603 n\xf8"),
        ("utf-8", "\N{SNOWMAN} \udcff", "\N{SNOWMAN} \\udcff"),
    ],
)
def test_a_character_that_the_locale_lacks_is_escaped(encoding: str, text: str, written: str) -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    screen = Screen(inner, str)
    screen.write(text)
    screen.flush()
    assert inner.buffer.getvalue() == written.encode(encoding)


PRINTER = r"""
import subprocess, sys
from inheritune_ds.console import own_screen
own_screen(str)
sys.stdin.readline()
for number in range(3):
    print("line", number, "\N{SNOWMAN} \udcff", flush=True)
    print("error", number, file=sys.stderr, flush=True)
assert subprocess.run(["cat"], input=b"a child", check=False).returncode >= 0, "killed by SIGPIPE"
print("at the exit" * 1000)
open(sys.argv[1], "w").write("done")
"""


def outputs(end: str) -> tuple[int, int | None]:
    """A descriptor for output that cannot be written, and one to close once the process runs."""
    if end == "closed pipe":
        reader, writer = os.pipe()
        return writer, reader
    if end == "closed terminal":
        reader, writer = pty.openpty()
        return writer, reader
    return os.open("/dev/full", os.O_WRONLY), None


@pytest.mark.parametrize("end", ["closed pipe", "closed terminal", "full disk"])
def test_a_process_outlives_its_output(end: str, tmp_path: Path) -> None:
    writer, reader = outputs(end)
    done = tmp_path / "done"
    command = [sys.executable, "-c", PRINTER, str(done)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    if reader is not None:
        os.close(reader)
    process.communicate(b"go\n", timeout=60)
    assert (process.returncode, done.read_text()) == (0, "done")


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_a_process_may_start_without_outputs(closed: tuple[int, ...], tmp_path: Path) -> None:
    program = f"""
import os, sys
from inheritune_ds.console import own_screen
own_screen(str)
with open({str(tmp_path / "data")!r}, "w") as stream:
    print("text", file=sys.stderr), print("text"), os.write(1, b"of C"), os.write(2, b"of C")
    stream.write("data")
"""
    shell = " ".join(f"{number}>&-" for number in closed)
    subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, program], check=True, timeout=60)
    assert (tmp_path / "data").read_text() == "data"


VERBS = {
    "recipes": ["recipes"],
    "help": ["train", "--help"],
    "plan": ["plan", "--recipe", "quickstart"],
    "dry run": ["train", "--recipe", "quickstart", "--dry-run"],
    "error": ["plan", "--recipe", "quickstar"],
    "usage error": ["plan", "--gpus"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_has_enough_changes_no_exit_code(verb: str) -> None:
    command = [sys.executable, "-m", "inheritune_ds", *VERBS[verb]]
    codes, reader = [], -1
    for stays in (True, False):
        reader, writer = os.pipe()
        if not stays:
            os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
        os.close(writer)
        assert "Traceback" not in done.stderr
        assert "Broken pipe" not in done.stderr
        codes.append(done.returncode)
        if stays:
            os.close(reader)
    assert codes[0] == codes[1] == {"error": 3, "usage error": 2}.get(verb, 0)
