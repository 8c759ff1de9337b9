"""A fake train.py, and its calls and processes."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from inheritune_ds.console import log_to_console
from inheritune_ds.study.runner import run_study

# Replaces train.py: behaves as the file named after the recipe says.
RANK = """
import json, os, shutil, signal, sys, time
from pathlib import Path
bench = Path({bench!r})
arguments = sys.argv[1:]
name = arguments[arguments.index("--recipe") + 1]
folder = Path(arguments[arguments.index("--runs-dir") + 1]) / Path(name).stem
rank, ranks = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE"))
assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == (str(rank), str(ranks))
others = bench / "others"
if rank:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    others.touch()
    sys.exit(0)
while not others.exists():
    time.sleep(0.02)
others.unlink()
with (bench / "calls").open("a") as calls:
    calls.write(json.dumps({{"arguments": arguments, "name": name, "port": os.environ["MASTER_PORT"]}}) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
def status(state):
    (folder / "status.json").write_text(json.dumps({{"state": state}}))
def finish():
    shutil.copytree(bench / "finished", folder, dirs_exist_ok=True)
    status("finished")
    sys.exit(0)
def save_and_leave(*_):
    if (bench / "saving").exists():
        os._exit(130)
    (bench / "saving").touch()
    time.sleep(float(os.environ.get("SAVE_S", "0.2")))
    status("requeue")
    os._exit(0)
behavior = (bench / Path(name).stem).read_text() if (bench / Path(name).stem).exists() else "finish"
if behavior == "finish":
    finish()
if behavior == "wait":
    signal.signal(signal.SIGINT, save_and_leave)
    signal.signal(signal.SIGTERM, save_and_leave)
    status("running")
    (bench / "ready").touch()
    time.sleep(60)
state, code = behavior.split()
if state != "none":
    status(state)
sys.exit(int(code))
"""

SUMMARY = {
    "name": "run", "recipe_fingerprint": "f", "parameters": 1, "blocks": 1, "block_parameters": 1, "steps": 1,
    "tokens_seen": 8, "unique_tokens": 8, "epochs": 1.0, "train_seconds": 1.0, "world_size": 1, "zero_stage": 1,
    "precision": "fp32", "master_weights": "fp32 model", "kind": "scratch", "export": "export",
}  # fmt: skip


def start(name: str = "quickstart", *overrides: str) -> Path | None:
    log_to_console()
    return run_study(
        name,
        deepspeed_config=Path("ds_configs/cpu.json"),
        num_ranks=2,
        runs_dir=Path("runs"),
        cache_dir=Path("cache"),
        overrides=overrides,
    )


def calls(bench: Path) -> list[dict[str, Any]]:
    path = bench / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def survivors(bench: Path) -> list[str]:
    """Running processes with the folder of the bench in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile
            command = (process / "cmdline").read_bytes()
            if os.fsencode(bench.parent) in command:
                found.append(command.decode())
    return found


def interrupt_myself() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def write_study(path: Path, **changes: object) -> None:
    document = {"name": "mine", "description": "d", "runs": [{"recipe": "quickstart", "role": "target"}], **changes}
    path.write_text(json.dumps(document))  # JSON is YAML
