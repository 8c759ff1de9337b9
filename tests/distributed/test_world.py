import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.distributed import world
from inheritune_ds.distributed.environment import prepare_environment
from inheritune_ds.distributed.world import World, detect, export
from inheritune_ds.errors import MachineError

SLURM = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}


@pytest.mark.parametrize(
    ("local", "local_size"),
    [({"LOCAL_WORLD_SIZE": "4", **SLURM}, 4), ({"LOCAL_SIZE": "4"}, 4), ({}, 8)],
    ids=["torchrun", "deepspeed", "unknown"],
)
def test_detect_reads_torchrun_s_and_deepspeed_s_variables(local: dict[str, str], local_size: int) -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **local}
    assert detect(environ) == World(5, 8, 1, local_size, "env")


@pytest.mark.parametrize(
    ("tasks", "local_size"), [("3(x2)", 3), ("6", 6), ("2", 2), ("2,4", 6), (None, 6), ("12(x1)", 12)]
)
def test_detect_reads_slurm_s_variables(tasks: str | None, local_size: int) -> None:
    environ = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks}
    present = {key: value for key, value in environ.items() if value is not None}
    assert detect(present) == World(4, 6, 1, local_size, "slurm")


def test_detect_finds_one_process_in_a_batch_shell() -> None:
    batch_shell = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "6"}
    assert detect(batch_shell) == detect({}) == World(0, 1, 0, 1, "single")


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        ({"RANK": "0"}, "WORLD_SIZE", "None"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK", "None"),
        ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK", "''"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE", "'two'"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "SLURM_LOCALID", "'x'"),
    ],
)
def test_detect_refuses_a_half_set_environment(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(MachineError) as caught:
        detect(environ)
    assert caught.value.problem == f"the environment variable {name} is {value}"
    assert caught.value.allowed == "a whole number"
    assert "unset RANK" in caught.value.action


@pytest.mark.parametrize(
    ("rank", "size", "local_size"), [("2", "2", "2"), ("-1", "2", "2"), ("0", "0", "0"), ("0", "1", "0")]
)
def test_detect_refuses_ranks_outside_the_world(rank: str, size: str, local_size: str) -> None:
    with pytest.raises(MachineError, match=f"rank {rank} of {size}, local rank 0 of {local_size}"):
        detect({"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": local_size})


def test_only_rank_zero_is_main() -> None:
    assert World(0, 2, 0, 2, "env").is_main
    assert not World(1, 2, 0, 1, "env").is_main


def test_export_keeps_the_launcher_s_address() -> None:
    environ = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
    numbers = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    export(World(5, 8, 1, 8, "env"), environ)
    assert environ == {**numbers, "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("environ", "launcher", "problem"),
    [
        ({}, "env", "MASTER_ADDR is None, but RANK is set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": "1"}, "env", "MASTER_ADDR is '', but RANK is set"),
        ({"MASTER_ADDR": "a"}, "env", "MASTER_PORT is None"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "http"}, "env", "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "env", "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "0"}, "single", "MASTER_PORT is '0'"),
        ({"SLURM_JOB_ID": "abc"}, "slurm", "SLURM_JOB_ID is 'abc'"),
    ],
)
def test_export_refuses_an_unknown_or_invalid_meeting_point(
    environ: dict[str, str], launcher: str, problem: str
) -> None:
    with pytest.raises(MachineError) as caught:
        export(World(0, 1, 0, 1, launcher), environ)
    assert caught.value.problem == f"the environment variable {problem}"
    assert caught.value.exit_code == 10


def test_export_gives_a_single_process_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    export(World(0, 1, 0, 1, "single"), environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    port = int(environ["MASTER_PORT"])
    low, high = (int(word) for word in world.PORT_RANGE.read_text().split())
    assert not low <= port <= high, "an outgoing connection may use it"
    with socket.socket() as other:
        other.bind(("", port))
        assert world.free_port() != port


@pytest.mark.parametrize(
    ("job", "nodes", "address", "port"),
    [
        ("71234", {"SLURM_STEP_NODELIST": "alpha"}, "alpha", "12930"),
        ("3", {"SLURM_STEP_NODELIST": "alpha,beta", "SLURM_JOB_NODELIST": "gamma"}, "alpha", "10003"),
        ("22767", {"SLURM_JOB_NODELIST": "gamma"}, "gamma", "32767"),
        ("22768", {}, "127.0.0.1", "10000"),
    ],
)
def test_export_finds_slurm_s_first_host_and_a_port_of_the_job(
    job: str, nodes: dict[str, str], address: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "PORT_RANGE", Path("missing"))  # Linux's own range
    environ = {"SLURM_JOB_ID": job, **nodes}
    export(World(4, 6, 1, 6, "slurm"), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["RANK"]) == (address, port, "4")


@pytest.mark.parametrize(
    ("taken", "ports"),
    [("32768 60999", range(10000, 32768)), ("10240 60000", range(60001, 65536)), ("1024 65535", range(10000, 65536))],
)
def test_ports_are_outside_those_of_outgoing_connections(
    taken: str, ports: range, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(world, "PORT_RANGE", tmp_path / "range")
    world.PORT_RANGE.write_text(taken.replace(" ", "\t") + "\n")
    found = []
    for job in (0, len(ports) - 1, len(ports)):
        environ = {"SLURM_JOB_ID": str(job)}
        export(World(0, 2, 0, 2, "slurm"), environ)
        found.append(int(environ["MASTER_PORT"]))
    assert found == [ports[0], ports[-1], ports[0]]


@pytest.mark.parametrize(
    ("to_master", "default", "interface"),
    [
        ("10.0.0.7", "192.168.1.7", "ib0"),
        ("127.0.1.1", "192.168.1.7", "eth0"),  # the host of rank 0 under Debian, by its own name
        ("10.9.9.9", "192.168.1.7", None),
    ],
)
def test_several_nodes_let_gloo_listen_on_the_way_to_rank_0(
    to_master: str,
    default: str,
    interface: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    addresses = {"node7": to_master, "192.0.2.1": default}
    monkeypatch.setattr("inheritune_ds.distributed.world._source_address", addresses.__getitem__)
    interfaces = {"10.0.0.7": "ib0", "192.168.1.7": "eth0", "127.0.0.1": "lo"}
    monkeypatch.setattr("inheritune_ds.distributed.world._interfaces", lambda: interfaces)
    given = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
    environ = dict(given)
    export(World(5, 8, 1, 4, "env"), environ)
    assert environ.get("GLOO_SOCKET_IFNAME") == interface
    told = "no network interface was found for MASTER_ADDR node7"
    assert [message[: len(told)] for message in caplog.messages] == ([] if interface else [told])
    export(World(5, 8, 1, 8, "env"), one_node := dict(given))
    assert "GLOO_SOCKET_IFNAME" not in one_node
    export(World(5, 8, 1, 4, "env"), chosen := {**given, "GLOO_SOCKET_IFNAME": "mine"})
    assert chosen["GLOO_SOCKET_IFNAME"] == "mine"


def test_the_interface_of_an_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inheritune_ds.distributed.world._ANYWHERE", "127.0.0.1")
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    export(World(5, 8, 1, 4, "env"), environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a command named scontrol first on the PATH."""

    def put(body: str) -> None:
        command = tmp_path / "scontrol"
        command.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_export_asks_scontrol_for_a_bracketed_list(scontrol: Callable[[str], None]) -> None:
    scontrol('test "$*" = "show hostnames gpu[03-04],x1" && printf "gpu03\\ngpu04\\nx1\\n"')
    environ = {"SLURM_STEP_NODELIST": "gpu[03-04],x1"}
    export(World(0, 3, 0, 3, "slurm"), environ)
    assert environ["MASTER_ADDR"] == "gpu03"


@pytest.mark.parametrize("body", ["exit 1", "exit 0"])
def test_export_needs_scontrol_or_the_address(body: str, scontrol: Callable[[str], None]) -> None:
    scontrol(body)
    environ = {"SLURM_STEP_NODELIST": "gpu[03-04]"}
    with pytest.raises(MachineError) as caught:
        export(World(0, 3, 0, 3, "slurm"), environ)
    assert "SLURM's node list 'gpu[03-04]' cannot be found: scontrol does not answer" in caught.value.problem
    assert caught.value.action == "export MASTER_ADDR in the batch script, before srun"
    environ["MASTER_ADDR"] = "10.0.0.9"
    export(World(0, 3, 0, 3, "slurm"), environ)
    assert environ["MASTER_ADDR"] == "10.0.0.9"


def test_prepare_environment_finds_the_tools_beside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    scripts = str(Path(sys.executable).parent)
    environ = {"PATH": "/usr/bin"}
    for _ in range(2):
        prepare_environment(environ, kind="cuda")
        assert environ == {
            "PATH": f"{scripts}:/usr/bin",
            "GOMP_SPINCOUNT": "2000",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
    prepare_environment(environ, kind="cpu")
    assert environ["DS_ACCELERATOR"] == "cpu"


def test_prepare_environment_keeps_the_user_s_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    chosen = {
        "PATH": str(Path(sys.executable).parent),
        "OMP_WAIT_POLICY": "ACTIVE",
        "DS_ACCELERATOR": "cuda",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    }
    environ = dict(chosen)
    prepare_environment(environ, kind="cpu")
    assert environ == chosen
    prepare_environment(spinning := {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "99"}, kind="cpu")
    assert (spinning["GOMP_SPINCOUNT"], spinning["OMP_NUM_THREADS"]) == ("7", "99")
    assert "OMP_WAIT_POLICY" not in spinning
    bare: dict[str, str] = {}
    prepare_environment(bare, kind="cuda")
    assert bare["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_user_s_allocator_settings_stay(name: str) -> None:
    environ = {name: "max_split_size_mb:128"}
    prepare_environment(environ, kind="cuda")
    assert {key: value for key, value in environ.items() if "ALLOC_CONF" in key} == {name: "max_split_size_mb:128"}
    prepare_environment(bare := {"PATH": ""}, kind="cpu")
    assert "PYTORCH_ALLOC_CONF" not in bare


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "PCI_BUS_ID"),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "FASTEST_FIRST"),
    ],
)
def test_numbers_of_cards_are_those_of_nvidia_smi(given: dict[str, str], order: str | None) -> None:
    environ = dict(given)
    prepare_environment(environ, kind="cuda")
    assert environ.get("CUDA_DEVICE_ORDER") == order


@pytest.mark.parametrize(
    ("ranks", "given", "threads", "spins"),
    [
        ("1", None, None, True),
        ("2", None, "2", True),
        ("4", None, "1", True),
        ("8", None, "1", False),
        ("2", "3", "3", False),
        ("1", "4", "4", True),
        ("1", "4,2", "4,2", False),
    ],
)
def test_ranks_share_the_cores_and_spin_only_when_there_are_enough(
    ranks: str, given: str | None, threads: str | None, spins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    environ = {"LOCAL_WORLD_SIZE": ranks} | ({"OMP_NUM_THREADS": given} if given else {})
    prepare_environment(environ, kind="cpu")
    assert environ.get("OMP_NUM_THREADS") == threads
    assert ("GOMP_SPINCOUNT" in environ, "OMP_WAIT_POLICY" in environ) == (spins, not spins)
