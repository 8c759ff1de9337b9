"""A reference that the real client downloads from a fake hub on the loopback interface, and its cut."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.storage.files import sha256_file
from tests import hub_client
from tests.hub_client import HubClient
from tests.hub_server import HubServer
from tests.surgery import tiny

PROVENANCE = {"inheritance.json", "manifest.json", "README.md"}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., Path]:
    """A tiny model in two shards with its tokenizer."""

    def make(seed: int, *, pickled: bool = False) -> Path:
        folder = tmp_path / "tiny-llama"
        tiny.make_model("llama", seed=seed).save_pretrained(folder)
        tiny.make_tokenizer(40).save_pretrained(folder)
        tiny.shard(folder, pickled=pickled)
        return folder

    return make


COMMANDS = """
import json, sys
from inheritune_ds.cli import main
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def weights(folder: Path) -> dict[str, str]:
    """Hashes of a target's files, except those about its origin."""
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.name not in PROVENANCE}


@pytest.mark.launch
def test_a_hub_model_and_its_folder_give_the_same_target(
    hub_server: HubServer, tmp_path: Path, sharded: Callable[..., Path]
) -> None:
    folder = sharded(11)
    commit = hub_server.publish("models", "org/tiny-llama", folder)
    calls = [
        ["inherit", "--reference", name, "--select", "first:2", "--output", str(tmp_path / output)]
        for name, output in (("org/tiny-llama", "of-hub"), (str(folder), "of-folder"))
    ]
    with hub_server.fault(f"GET /lfs/{sha256_file(folder / SHARDS[1])}", drop_after=4000, times=1) as fault:
        process = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(calls)],
            env=hub_client.environment(hub_server.endpoint, tmp_path / "home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert process.returncode == 0, process.stderr
    assert fault.hits == 1
    built = weights(tmp_path / "of-hub")
    assert built == weights(tmp_path / "of-folder")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= built.keys()
    assert commit in (tmp_path / "of-hub" / "inheritance.json").read_text(encoding="utf-8")


def test_a_hub_model_is_identified_by_commit_and_hashes(
    hub_server: HubServer, client: HubClient, offline_client: HubClient, sharded: Callable[..., Path]
) -> None:
    folder = sharded(12)
    extra = {"model.fp16.safetensors": b"a copy in another type" * 99, "onnx/model.onnx": b"yet another" * 200}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub_server.publish("models", "org/known", files | extra)
    hashes = {name: sha256_file(folder / name) for name in SHARDS}
    place, *found = client.ask("locate", model="org/known")
    assert found == [commit, hashes]
    assert not {"model.fp16.safetensors", "onnx"} & {path.name for path in Path(place).iterdir()}
    assert client.ask("locate", model="org/known", revision=commit) == [place, *found]
    assert offline_client.ask("locate", model="org/known") == [place, *found]


def test_pickle_files_are_downloaded_without_safetensors(
    hub_server: HubServer, client: HubClient, sharded: Callable[..., Path]
) -> None:
    folder = sharded(13, pickled=True)
    commit = hub_server.publish("models", "org/pickled", folder)
    _, *found = client.ask("locate", model="org/pickled")
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert found == [commit, {name: sha256_file(folder / name) for name in names}]


def test_a_hub_model_must_have_the_recipe_s_shape(
    hub_server: HubServer, client: HubClient, sharded: Callable[..., Path]
) -> None:
    hub_server.publish("models", "org/shaped", sharded(16))
    sizes = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "rope_theta": 5e5}
    answer = client.ask("locate", model="org/shaped", shape={**tiny.FAMILIES["llama"], **sizes})
    assert answer["exit_code"] == 3
    assert answer["message"] == (
        "reference.shape does not describe org/shaped: hidden_size: recipe 32, model 16; "
        "rope_theta: recipe 500000.0, model 10000.0\n  do: correct or remove reference.shape"
    )
