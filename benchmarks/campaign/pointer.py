"""Point 5: the pointer is never needed, and a run whose checkpoints are lost or damaged never starts over by itself."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.campaign.launching import Launcher, TinyRun, check_same, choose, publish_made, status
from benchmarks.campaign.part import Cases, Figures, Part, totals
from benchmarks.campaign.resumes import stopped_after
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import MANIFEST, POINTER, published
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import CheckpointError

FALLBACK_S = 5.0
_STEPS = (4, 8, 12)


def _to_folder(pointer: Path) -> None:
    pointer.unlink()
    pointer.mkdir()


def _to_loop(pointer: Path) -> None:
    pointer.unlink()
    pointer.symlink_to(pointer.name)


POINTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (partial(os.truncate, length=0), "is empty"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256))), "is not text"),
    "zeros": (lambda path: path.write_bytes(bytes(14)), "which is not the name of a checkpoint"),
    "other_name": (lambda path: path.write_bytes(b"global_step8"), "which is not the name of a checkpoint"),
    "outside": (lambda path: path.write_bytes(b"../../step-00000012"), "which is not the name of a checkpoint"),
    "absent_tag": (lambda path: path.write_bytes(b"step-00000099"), "which is not there"),
    "unreadable": (_to_folder, "cannot be read"),
    "loop": (_to_loop, "cannot be read"),
}
"""The change of the pointer, and the text of the warning."""


def _made(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder / "run" / "checkpoints", keep=9)
    for step in _STEPS:
        publish_made(store, step, {file_name(rank): f"{step} {rank}".encode() * 1000 for rank in range(2)})
    return store


def _pointer(folder: Path, *, harm: str) -> Figures:
    """The newest intact checkpoint is chosen, whatever the pointer says, also if the newest of all is damaged."""
    store = _made(folder)
    do, expected_text = POINTERS[harm]
    do(store.folder / POINTER)
    newest, before, *_ = published(store.folder)
    slowest_s = 0.0
    for expected in (newest, before):
        chosen, lines, took_s = choose(store)
        slowest_s = max(slowest_s, took_s)
        assert chosen == expected, f"{chosen} was chosen, not {expected}"
        assert expected_text in lines[0], f"not reported: {expected_text!r}: {lines}"
        (newest / file_name(1)).write_bytes(b"")
    assert slowest_s < FALLBACK_S, f"it took {slowest_s:.1f} s"
    return {"right_checkpoint_used": 2, "slowest_fallback_s": round(slowest_s, 3)}


def _without_manifest(checkpoint: Path) -> None:
    manifest = checkpoint / MANIFEST
    manifest.unlink()  # it may be a link: the other run's file must stay as it is
    manifest.write_text("{}", encoding="utf-8")


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "all_short_of_a_file": (lambda checkpoint: (checkpoint / file_name(0)).unlink(), "can be used: "),
    "all_without_manifest": (_without_manifest, "can be used: "),
    "emptied": (shutil.rmtree, "holds no checkpoint, but"),
    "gone": (lambda checkpoint: shutil.rmtree(checkpoint.parent, ignore_errors=True), "holds no checkpoint, but"),
}
"""The change of every checkpoint, and the text of the refusal."""


def _lose(checkpoints: Path, harm: str) -> str:
    """Change all checkpoints; the expected text of the refusal."""
    do, expected = LOSSES[harm]
    for checkpoint in list(published(checkpoints)):
        do(checkpoint)
    return expected


def _loss(folder: Path, *, harm: str) -> Figures:
    """A run whose checkpoints are lost is refused; one that has never saved is not."""
    store = _made(folder)
    assert CheckpointStore(folder / "other" / "checkpoints", keep=9).newest_intact() is None
    (folder / "run" / "status.json").write_text('{"state": "running", "step": 12}', encoding="utf-8")
    expected = _lose(store.folder, harm)
    refusal: CheckpointError | None = None
    try:
        chosen = store.newest_intact()
    except CheckpointError as error:
        refusal = error
    assert refusal is not None, f"not refused: {chosen} was chosen"
    assert expected in refusal.problem, refusal.problem
    assert "--fresh" in refusal.action, refusal.action
    return {"refused": 1}


class Trial(TinyRun):
    """One uninterrupted run, and the same command after its second checkpoint."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        super().__init__(folder, launcher)
        self.to_end()
        self._straight = self.set_aside()

    def _stop(self) -> Path:
        """Restore the run folder as it was after step 8; returns its checkpoints."""
        shutil.rmtree(self.path, ignore_errors=True)
        stopped_after(self._straight, self.path, 8)
        (self.path / "status.json").write_text('{"state": "running", "step": 8, "saved_step": 8}', encoding="utf-8")
        return self.path / "checkpoints"

    def resumes(self, harm: str) -> None:
        """The same command resumes from the newest checkpoint and ends like the uninterrupted run."""
        checkpoints = self._stop()
        do, expected = POINTERS[harm]
        do(checkpoints / POINTER)
        output = self.to_end()
        assert expected in output, f"{harm}: not reported: {expected!r}\n{output[-6000:]}"
        assert f"resumed from {checkpoints / 'step-00000008'} " in output, f"{harm}\n{output[-6000:]}"
        check_same(self.path, self._straight, harm)
        assert (checkpoints / POINTER).read_text(encoding="utf-8") == "step-00000012\n", harm

    def is_refused(self, harm: str) -> None:
        """The same command ends with the code of lost checkpoints, at every try; --fresh starts over."""
        expected = _lose(self._stop(), harm)
        for number in (1, 2):  # the files of the first refusal must not let the second pass
            output = self.to_end(expect=CheckpointError.exit_code)
            assert expected in output, f"{harm}, try {number}: not reported: {expected!r}\n{output[-6000:]}"
            left = status(self.path)
            assert (left["state"], left["exit_code"]) == ("failed", CheckpointError.exit_code), f"{harm}: {left}"
            assert not (self.path / "export").exists(), f"{harm}: trained again"

    def starts_over(self) -> None:
        """--fresh sets the lost run aside, whole, and ends as the straight run did."""
        before = sorted(path.name for path in self.path.iterdir())
        self.to_end("--fresh")
        (aside,) = self.path.parent.glob("tiny.before-*")
        assert sorted(path.name for path in aside.iterdir()) == before, "something of the old run is lost"
        check_same(self.path, self._straight, "--fresh")


def _launched_pointers(folder: Path, *, launcher: Launcher, harms: tuple[str, ...]) -> Figures:
    trial = Trial(folder, launcher)
    for harm in harms:
        trial.resumes(harm)
    return {"right_checkpoint_used": len(harms)}


def _launched_losses(folder: Path) -> Figures:
    trial = Trial(folder, "python")
    for harm in LOSSES:
        trial.is_refused(harm)
    trial.starts_over()
    return {"refused": 2 * len(LOSSES)}


_CASES: Cases = {
    **{f"pointer_{name}": partial(_pointer, harm=name) for name in POINTERS},
    **{name: partial(_loss, harm=name) for name in LOSSES},
    "launched_python": partial(_launched_pointers, launcher="python", harms=("missing", "empty", "garbage", "loop")),
    "launched_torchrun": partial(_launched_pointers, launcher="torchrun", harms=("absent_tag",)),
    "launched_losses": _launched_losses,
}


PART = Part(
    name="pointer",
    point=5,
    promise="Whatever the pointer says, the newest intact checkpoint is used; with none left, the run is refused",
    cases=_CASES,
    short=(*(f"pointer_{name}" for name in POINTERS), *LOSSES),
    summary=totals("right_checkpoint_used", "refused", most=("slowest_fallback_s",)),
)
