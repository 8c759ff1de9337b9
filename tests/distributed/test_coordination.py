import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.distributed import coordination
from inheritune_ds.distributed.coordination import Coordinator, MainRankLeftError, open_store
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import ExportError, MachineError
from tests.launching import environment, free_port, torchrun_variables
from tests.warm_python import WarmPython

MAIN, SECOND = World(0, 2, 0, 2, "env"), World(1, 2, 1, 2, "env")

RANK = """
import os, sys, time
from inheritune_ds.distributed.coordination import MainRankLeftError, Coordinator
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import detect
world = detect(os.environ)
coordinator = Coordinator(world, StopSignal())
print(coordinator.run_on_rank0(lambda: {"from": world.rank}), flush=True)
try:
    coordinator.run_on_rank0(lambda: os._exit(9))
except MainRankLeftError as error:
    print(error, error.exit_code)
"""


class Notes:
    """A stub of the launcher's store."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def set(self, key: str, value: str) -> None:
        self.notes[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.notes for key in keys)

    def get(self, key: str) -> bytes:
        return self.notes[key].encode()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    store = Notes()
    monkeypatch.setattr(coordination, "open_store", lambda: store)
    monkeypatch.setattr(coordination, "POLL_S", 0.01)
    return store


def never() -> None:
    pytest.fail("only rank 0 works")


def test_one_rank_alone_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "open_store", never)
    alone = Coordinator(World(0, 1, 0, 1, "single"), StopSignal())
    assert alone.run_on_rank0(lambda: {"a": 1}) == {"a": 1}


def test_every_rank_gets_what_rank_0_found(notes: Notes) -> None:
    main, second = Coordinator(MAIN, StopSignal()), Coordinator(SECOND, StopSignal())
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.extend([second.run_on_rank0(never), second.run_on_rank0(never)]))
    waiting.start()
    assert main.run_on_rank0(lambda: {"tokens": "here"}) == {"tokens": "here"}
    time.sleep(0.1)
    assert found == []
    main.run_on_rank0(lambda: None)
    waiting.join(timeout=10)
    assert found == [{"tokens": "here"}, None]


def test_rank_0_leaves_only_when_its_note_is_read_and_does_not_wait_for_the_dead(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.Thread(target=lambda: Coordinator(MAIN, StopSignal()).run_on_rank0(lambda: 5))
    main.start()
    time.sleep(0.2)
    assert main.is_alive()
    assert Coordinator(SECOND, StopSignal()).run_on_rank0(int) == 5
    main.join(timeout=10)
    assert not main.is_alive()
    monkeypatch.setattr(coordination, "READ_S", 0.1)
    notes.counts.clear()
    assert Coordinator(MAIN, StopSignal()).run_on_rank0(lambda: 6) == 6


def fail(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "words", "exit_code"),
    [
        (ExportError("it is not the same", action="look"), "it is not the same", 12),
        (KeyboardInterrupt(), "it was interrupted", 130),
        (ValueError("a defect"), "ValueError: a defect", 1),
    ],
)
def test_every_rank_exits_when_rank_0_fails(
    error: BaseException, words: str, exit_code: int, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "READ_S", 0.1)
    with pytest.raises(type(error)):
        Coordinator(MAIN, StopSignal()).run_on_rank0(fail(error))
    with pytest.raises(MainRankLeftError) as caught:
        Coordinator(SECOND, StopSignal()).run_on_rank0(never)
    assert str(caught.value) == f"rank 0 has ended the run: {words}"
    assert caught.value.exit_code == exit_code


def test_a_rank_that_is_asked_to_stop_notifies_rank_0_and_waits_for_it(notes: Notes) -> None:
    asked, working = StopSignal(), StopSignal()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            Coordinator(SECOND, asked).run_on_rank0(never)
        except MainRankLeftError as error:
            caught.append(error)

    def work() -> None:
        deadline_s = time.monotonic() + 10
        while working.requested is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert waiting.is_alive()
        raise KeyboardInterrupt

    asked.pass_on("SIGUSR1")
    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        Coordinator(MAIN, working).run_on_rank0(work)
    waiting.join(timeout=10)
    assert working.requested == "SIGUSR1 on rank 1"
    assert [str(error) for error in caught] == ["rank 0 has ended the run: it was interrupted"]


def test_a_rank_that_is_asked_to_stop_waits_shortly_for_the_others(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "_LATECOMERS_S", 0.2)
    monkeypatch.setattr(coordination, "open_store", lambda: time.sleep(60))
    stop = StopSignal()
    stop.pass_on("SIGTERM")
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Coordinator(MAIN, stop)
    assert 0.2 < time.monotonic() - begun < 5.0


@pytest.mark.launch
def test_ranks_get_rank_0_s_result_and_notice_that_it_was_killed(warm: WarmPython, tmp_path: Path) -> None:
    port, ranks = free_port(), []
    for rank in range(2):
        environ = environment(**torchrun_variables(rank, 2, port))
        with (tmp_path / str(rank)).open("wb") as log, (tmp_path / f"{rank}.errors").open("wb") as errors:
            ranks.append(warm.start(["-c", RANK], cwd=tmp_path, env=environ, stdout=log, stderr=errors))
    assert [rank.wait(timeout=60) for rank in ranks] == [9, 0]
    assert (tmp_path / "0").read_text() == "{'from': 0}\n"
    assert (tmp_path / "1").read_text() == "{'from': 0}\nrank 0 has ended the run: it was killed 11\n"


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in torchrun_variables(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MachineError) as caught:
            open_store()
    assert f"the ranks cannot meet at 127.0.0.1:{port}: " in caught.value.problem
    assert "deepspeed --master_port" in caught.value.action
