"""The ranks of a run, from the environment of any launcher."""

import fcntl
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from inheritune_ds.errors import MachineError

logger = logging.getLogger(__name__)

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that the kernel gives to outgoing connections, which may use one just before rank 0 listens."""
_DEFAULT_RANGE = "32768 60999"  # Linux's own
_FIRST_PORT, _END_PORT, _FEWEST_PORTS = 10000, 2**16, 1000
_ANYWHERE = "192.0.2.1"  # TEST-NET-1, RFC 5737: no host has it, so that the default route leads to it
_SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface
_START = "start with deepspeed, torchrun, srun or python; unset RANK (or SLURM_PROCID) to run a single process"


@dataclass(frozen=True)
class World:
    """This process among all of the run; `local` means on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str
    """`env` (deepspeed, torchrun), `slurm` (srun) or `single` (python alone)."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def detect(environ: Mapping[str, str]) -> World:
    """Read the launcher's variables: RANK (deepspeed, torchrun), else SLURM's, else none.

    Source of the SLURM names: srun(1). A batch shell has SLURM_PROCID and the job's SLURM_NTASKS, too; only a step has
    SLURM_STEP_NUM_TASKS.

    Raises:
        MachineError: If a launcher's variables are incomplete or not numbers.
    """
    if "RANK" in environ:
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local = _number(environ, "LOCAL_RANK")
        # torchrun names the ranks of this machine LOCAL_WORLD_SIZE, DeepSpeed's launch.py LOCAL_SIZE
        name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
        return _checked(World(rank, size, local, _number(environ, name, size), "env"))
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        size = _number(environ, "SLURM_STEP_NUM_TASKS")
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)).partition("(")[0]
        local = _number(environ, "SLURM_LOCALID")
        local_size = int(tasks) if tasks.isdecimal() else size
        return _checked(World(_number(environ, "SLURM_PROCID"), size, local, local_size, "slurm"))
    return World(0, 1, 0, 1, "single")


def _checked(world: World) -> World:
    if 0 <= world.rank < world.size and world.local_rank >= 0 and world.local_size >= 1:
        return world
    raise MachineError(
        f"the environment says rank {world.rank} of {world.size}, local rank {world.local_rank} of {world.local_size}",
        allowed=f"ranks 0 to {world.size - 1}" if world.size > 0 else "at least one rank",
        action=_START,
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]  # None is a user's half-set environment
    except (TypeError, ValueError):
        problem = f"the environment variable {name} is {value!r}"
        raise MachineError(problem, allowed="a whole number", action=_START) from None


def export(world: World, environ: MutableMapping[str, str]) -> None:
    """Set the variables of `deepspeed.init_distributed` that the launcher has not set; without them it looks for MPI.

    Raises:
        MachineError: If the ranks' meeting point is not known, or its port is invalid.
    """
    environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
    )
    if world.launcher == "slurm":
        if "MASTER_ADDR" not in environ:  # a given one must not depend on scontrol
            environ["MASTER_ADDR"] = _first_host(environ)
        # The job id stays the same over a requeue and differs between jobs that share a node.
        ports = _ports()
        environ.setdefault("MASTER_PORT", str(ports[_number(environ, "SLURM_JOB_ID", 0) % len(ports)]))
    elif world.launcher == "single":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(free_port()))
    _check_meeting_point(environ)
    if world.size > world.local_size and "GLOO_SOCKET_IFNAME" not in environ:
        _choose_interface(environ)


def _check_meeting_point(environ: Mapping[str, str]) -> None:
    if not environ.get("MASTER_ADDR"):
        problem = f"the environment variable MASTER_ADDR is {environ.get('MASTER_ADDR')!r}, but RANK is set"
        raise MachineError(problem, allowed="the host of rank 0", action=_START)
    if not 1 <= _number(environ, "MASTER_PORT") < 2**16:
        raise MachineError(
            f"the environment variable MASTER_PORT is {environ['MASTER_PORT']!r}",
            allowed="1 to 65535",
            action="set it to a port that is free on the host of rank 0",
        )


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "[" not in nodes:
        return nodes.partition(",")[0] or "127.0.0.1"
    line = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise MachineError(
            f"the first host of SLURM's node list {nodes!r} cannot be found: scontrol does not answer",
            allowed="a host that every rank reaches",
            action="export MASTER_ADDR in the batch script, before srun",
        ) from None


def _ports() -> range:
    """Ports that no outgoing connection uses; all nodes of a cluster are expected to have the same range."""
    try:
        text = PORT_RANGE.read_text(encoding="ascii")
    except OSError:  # not Linux
        text = _DEFAULT_RANGE
    low, high = (int(word) for word in text.split())
    below, above = range(_FIRST_PORT, low), range(max(high + 1, _FIRST_PORT), _END_PORT)
    ports = max(below, above, key=len)
    return ports if len(ports) >= _FEWEST_PORTS else range(_FIRST_PORT, _END_PORT)


def free_port() -> int:
    """A port of this machine that nothing listens on and no outgoing connection uses.

    Raises:
        MachineError: If there is none.
    """
    ports = _ports()
    first = os.getpid() % len(ports)
    for port in chain(ports[first:], ports[:first]):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise MachineError(f"no port from {ports[0]} to {ports[-1]} is free", action="export MASTER_PORT")


def _choose_interface(environ: MutableMapping[str, str]) -> None:
    """Make gloo listen on the way to rank 0; it takes this host's name, which is 127.0.1.1 on Debian."""
    name = None
    with suppress(OSError):  # without a route or a known host the ranks cannot meet, which is reported then
        address = _source_address(environ["MASTER_ADDR"])
        if address.startswith("127."):  # on the host of rank 0, by its own name
            address = _source_address(_ANYWHERE)
        name = _interfaces().get(address)
    if name is None:
        logger.warning(
            "no network interface was found for MASTER_ADDR %s: if the ranks do not connect, export GLOO_SOCKET_IFNAME "
            "with the one that the other nodes reach",
            environ["MASTER_ADDR"],
        )
    else:
        environ["GLOO_SOCKET_IFNAME"] = name


def _source_address(host: str) -> str:
    """This machine's address in connections to a host."""
    family, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])


def _interfaces() -> dict[str, str]:
    """The network interfaces of this machine by their IPv4 address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[socket.inet_ntoa(answer[20:24])] = name
    return found
