import logging
import os
import pty
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from inheritune_ds.console import Meter, TrainingProgress, log_to_console

LINE = f"checkpoint [saved] {'/a/long/path' * 12}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, IO[str]]]:
    """A pseudo-terminal: the end to read from, and a stream of the other one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield reader, stream
    os.close(reader)


def read_all(terminal: tuple[int, IO[str]]) -> str:
    """Read what is on a terminal after closing its other end; Linux ends it with an error instead of b""."""
    reader, stream = terminal
    stream.close()
    chunks = []
    with suppress(OSError):
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("rank", [0, 1])
def test_lines_of_rank_0_are_printed_as_they_are_on_standard_output(
    rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_meter_says_no_time_left_without_a_total(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("hashing", "bytes") as meter:
        clock[0] += 20.0
        meter.advance(4_000)
    assert capsys.readouterr().err == "hashing: 4,000 bytes, 200 bytes/s\n"


def test_meter_tells_a_slow_rate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("reference validation", "batches", 50) as meter:
        clock[0] += 15.0
        meter.advance(1)
    assert capsys.readouterr().err == "reference validation: 1 of 50 batches, 0.067 batches/s, 735 s left\n"


def test_meter_is_silent_when_the_work_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("hashing", "bytes") as meter:
        meter.advance(1)
    assert capsys.readouterr() == ("", "")


def test_meter_draws_a_bar_on_a_terminal_and_lines_go_above_it(
    monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, IO[str]]
) -> None:
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


def test_meter_leaves_a_standard_output_that_is_a_file_alone(
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
    progress = TrainingProgress(1000, 0, "long")
    progress.update(1, 5.0, 1.0)
    clock[0] += 100.0
    progress.update(11, 5.0, 1.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith("2:44:50 left")


def test_progress_prints_nothing_without_an_update(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingProgress(10, 10, "quickstart").close()
    assert capsys.readouterr() == ("", "")


def test_progress_draws_a_bar_on_a_terminal_and_leaves_its_last_state(
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
