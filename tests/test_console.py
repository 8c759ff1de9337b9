import io
import sys
import time

import pytest

from inheritune_ds.console import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


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


def test_meter_is_silent_when_the_work_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("hashing", "bytes") as meter:
        meter.advance(1)
    assert capsys.readouterr() == ("", "")


def test_meter_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Meter("tokenizing", "tokens", 1000) as meter:
        meter.advance(500, "7 documents")
    assert "tokenizing" in terminal.getvalue()
    assert "500 of 1,000 tokens, 7 documents" in terminal.getvalue()
