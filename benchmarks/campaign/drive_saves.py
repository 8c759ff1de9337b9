"""Launched by the part `publish`: one rank that saves repeatedly, with a slow, refused or killed writer.

`python drive_saves.py FOLDER PLAN.json` once a rank. The plan holds the ZeRO stage, whether saves are asynchronous,
whether DeepSpeed's own save follows, and for every save, from step 2 on, the fault in the middle of a file of a rank.
Rank R writes result-R.json: the results of its saves.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.ranks import Case, build_engine, build_saver, join_ranks
from inheritune_ds.checkpoints import store as checkpoint_store
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.console import log_to_console
from inheritune_ds.errors import InherituneError
from inheritune_ds.storage.files import write_exact
from inheritune_ds.storage.safetensors import SafetensorsWriter

if TYPE_CHECKING:
    from inheritune_ds.training.engine import Engine

SLOW_S = 0.3
NATIVE_SLOW_S = 1.0


@dataclass(frozen=True)
class Fault:
    """Interrupts the write of a file, named by the end of its path, of one rank: `delay`, `refuse` or `kill`."""

    rank: int
    file: str
    action: str

    def happen(self) -> None:
        """Let it happen, here and now."""
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "refuse":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(SLOW_S)


class Writers:
    """This rank's writers of fragments, manifest and pointer, with a fault in one of them."""

    def __init__(self, rank: int) -> None:
        from inheritune_ds.checkpoints import fragments, saver

        self._rank = rank
        self._fault: Fault | None = None
        self._half: Fault | None = None
        self._write: Callable[..., dict[str, Any]] = fragments.write
        self._append = SafetensorsWriter.append
        patch.object(saver, "write", self._fragments).start()
        patch.object(checkpoint_store, "write_exact", self._text).start()
        half_way = self._half_way
        patch.object(SafetensorsWriter, "append", lambda file, view: half_way(file, view)).start()  # noqa: PLW0108 - binds

    def arm(self, fault: Fault | None) -> None:
        """Name the fault of the next save."""
        self._fault = fault if fault is not None and fault.rank == self._rank else None

    def _hit(self, path: Path) -> Fault | None:
        fault = self._fault
        return fault if fault is not None and path.as_posix().endswith(fault.file) else None

    def _fragments(self, tensors: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        self._half = self._hit(path)
        return self._write(tensors, path, needed_bytes=needed_bytes)

    def _half_way(self, file: SafetensorsWriter, view: memoryview) -> None:
        fault = None
        if file._stream.tell():  # noqa: SLF001 - a fault comes behind the header, in the middle of a tensor
            fault, self._half = self._half, None
        if fault is not None:
            self._append(file, view[: len(view) // 2])
            view = view[len(view) // 2 :]
            fault.happen()
        self._append(file, view)

    def _text(self, path: Path, text: str) -> None:
        fault = self._hit(path)
        if fault is not None:
            half = path.with_name(f".{path.name}.half.tmp")
            try:
                half.write_text(text[: len(text) // 2], encoding="utf-8")
                fault.happen()
            finally:
                half.unlink()
        write_exact(path, text)


def native_save(engine: "Engine", folder: Path, rank: int) -> None:
    """DeepSpeed's own save, pointer and all, while rank 1's writer is slow."""
    import torch

    own: Callable[..., None] = torch.save

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(NATIVE_SLOW_S if rank == 1 else 0.0)
        own(*arguments, **options)

    with patch.object(torch, "save", slow):
        engine._engine.save_checkpoint(str(folder), tag="step-00000001")  # noqa: SLF001 - the call of a user


def main(folder: Path, plan: dict[str, Any]) -> int:
    """Save as planned; the exit code."""
    world = join_ranks()
    log_to_console()
    engine, _ = build_engine(Case(stage=plan["stage"], hidden_size=32, blocks=2, vocab_size=300, seq_len=16), world)
    store = CheckpointStore(folder / "checkpoints", keep=1000)
    checkpoints = build_saver(world, store, stage=plan["stage"], async_save=plan["async"])
    writers = Writers(world.rank)
    answers = []
    try:
        for step, fault in enumerate([None, *plan["faults"]], 1):
            writers.arm(None if fault is None else Fault(**fault))
            saved = checkpoints.save(engine, TrainState(step=step))
            answers.append(saved and checkpoints.wait())
        checkpoints.close()
    except InherituneError as error:
        print(error, flush=True)
        return error.exit_code
    if plan["native"]:
        native_save(engine, folder / "native", world.rank)
    (folder / f"result-{world.rank}.json").write_text(json.dumps(answers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
