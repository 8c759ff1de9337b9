"""Settings of the whole suite, the stand-in of the hub, and resolving a DeepSpeed config against a small recipe."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from inheritune_ds.config.deepspeed import Machine, Resolved, resolve
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.console import log_to_console
from inheritune_ds.distributed.signals import SIGNALS
from inheritune_ds.plan.micro_batch import fit
from tests.hub_client import HubClient
from tests.hub_server import HubServer
from tests.launching import warm_python
from tests.warm_python import WarmPython

A6000 = Machine(kind="cuda", memory_gib=48.0, bf16=True)

# On a busy machine an example may take any time, and a failure must be found again by everybody.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no worker is left alone with one at the end."""
    launched = {item.path for item in items if "warm" in getattr(item, "fixturenames", ())}
    marked = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("launch")}
    items.sort(key=lambda item: (item.path not in launched, item.path not in marked))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """What a test does to the signals of this process ends with it: a process inherits which ones are ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb sets variables for the libraries that it loads; they are taken back."""
    monkeypatch.setenv("PATH", os.environ["PATH"])
    names = "DS_ACCELERATOR OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_NUM_THREADS HF_HUB_DISABLE_PROGRESS_BARS"
    for name in names.split():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


Logged = Callable[[], list[str]]


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Limits how long a file may grow: the system refuses in the middle of writing, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Logged:
    """Gives the lines that the package has logged since the last call."""
    log_to_console()

    def lines() -> list[str]:
        return capsys.readouterr().out.splitlines()

    return lines


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
    assert server.unknown == [], "the clients asked for something that the fake hub does not know"


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


@pytest.fixture
def wide() -> Shape:
    """A model of which a few GiB hold some windows, but not all."""
    return Shape(
        model_type="llama",
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )


@pytest.fixture
def recipe() -> Recipe:
    """quickstart's numbers, each of the optimizer's its own: 32 windows of 128 tokens a step."""
    numbers = ["lr=4e-4", "betas=[0.8, 0.9]", "eps=1e-7", "weight_decay=0.2", "max_grad_norm=0.5"]
    batch = ["training.seq_len=128", "training.global_batch_tokens=4096"]
    return load_recipe("quickstart", [*batch, *(f"optimizer.{number}" for number in numbers)])


@pytest.fixture
def resolved(recipe: Recipe, wide: Shape) -> Callable[..., Resolved]:
    def make(document: dict[str, Any], *, machine: Machine = A6000, world_size: int = 1, **options: Any) -> Resolved:
        given = options.get("recipe", recipe)
        on: dict[str, Any] = {"origin": "ds.json", "world_size": world_size, "machine": machine}
        return fit(resolve(document, given, shape=options.get("shape", (wide, 4)), **on), given, **on)

    return make
