"""Settings of the whole suite, and the stand-in of the hub."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hub_client import HubClient
from tests.hub_server import HubServer
from tests.launching import warm_python
from tests.warm_python import WarmPython

# On a busy machine an example may take any time, and a failure must be found again by everybody.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no worker is left alone with one at the end."""
    marks = ("slow", "launch")
    ranked = [
        (item.path, next((i for i, mark in enumerate(marks) if item.get_closest_marker(mark)), 2)) for item in items
    ]
    rank: dict[Path, int] = {}
    for path, number in ranked:
        rank[path] = min(number, rank.get(path, number))
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """What a test does to the signals of this process ends with it: a process inherits which ones are ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmPython]:
    """Forks processes that have imported what a rank needs."""
    python = warm_python()
    yield python
    python.close()


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """A stand-in of the hub; every test publishes under names of its own."""
    server = HubServer()
    server.start()
    yield server
    server.stop()
    assert server.unknown == [], "the clients asked for something that the stand-in does not know"


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME of the clients."""
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="session")
def client(hub_server: HubServer, hub_home: Path) -> Iterator[HubClient]:
    """A process that reads from the hub; `token=` with a question gives it one."""
    with HubClient(hub_server.endpoint, hub_home) as process:
        yield process


@pytest.fixture(scope="session")
def offline_client(hub_server: HubServer, hub_home: Path) -> Iterator[HubClient]:
    """A process that was told to stay off the network; its cache is that of the others."""
    with HubClient(hub_server.endpoint, hub_home, HF_HUB_OFFLINE="1") as process:
        yield process
