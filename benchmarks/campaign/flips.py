"""Point 4: a changed file is found before anything of it is loaded, named, and the checkpoint before it is used."""

import os
import random
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from benchmarks.campaign.launching import TinyRun, check_same, choose, publish_made
from benchmarks.campaign.part import Figures, Part, totals
from benchmarks.campaign.resumes import stopped_after
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import MANIFEST, published
from inheritune_ds.checkpoints.store import CheckpointStore

FLIPS = 250
"""In the newest checkpoint of each of the two runs."""
FALLBACK_S = 5.0
RANKS = 2


def _shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("rank-*.safetensors"))


class Trial:
    """Damages the newest of two or more checkpoints of two ranks in one way after the other, and restores it.

    `plain` is the folder of damaged files that are later loaded without any check.
    """

    def __init__(self, checkpoints: Path, plain: Path) -> None:
        self.newest, self.before = list(published(checkpoints))[:2]
        self._store = CheckpointStore(checkpoints, keep=9)
        self._kept = checkpoints.with_name("kept")
        shutil.copytree(self.newest, self._kept)
        self._plain = plain
        plain.mkdir()
        self.found = 0
        self.slowest_s = 0.0

    def harmed(self, name: str, path: Path, expected: str) -> None:
        """Check that a damaged file is found, with `expected` in the warning; restore the checkpoint."""
        if path.suffix == ".safetensors" and path.is_file():
            shutil.copyfile(path, self._plain / f"{self.found:04d}.safetensors")
        chosen, lines, took_s = choose(self._store)
        assert chosen == self.before, f"{name}: {chosen} was chosen, not {self.before}"
        wanted = f"WARNING: checkpoint {self.newest} is skipped: "
        assert [line[: len(wanted)] for line in lines] == [wanted], f"{name}: {lines}"
        assert path.name in lines[0], f"{name}: {path.name} is not named: {lines[0]}"
        assert expected in lines[0], f"{name}: not reported: {expected!r}: {lines[0]}"
        assert took_s < FALLBACK_S, f"{name}: {took_s:.1f} s until {chosen.name} was chosen"
        self.found += 1
        self.slowest_s = max(self.slowest_s, took_s)
        shutil.rmtree(self.newest)
        shutil.copytree(self._kept, self.newest)

    def flip(self, draw: random.Random, path: Path) -> None:
        """Flip one bit of a file."""
        content = bytearray(path.read_bytes())
        bit = draw.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
        expected = "not as it was written" if path.name == MANIFEST else "instead of"
        self.harmed(f"bit {bit} of {path.name}", path, expected)

    def tamper(self) -> int:
        """Replace, cut, delete and add whole files; returns the number of such changes."""
        done = self.found
        shards = _shards(self.newest)
        for path in shards:
            older = self.before / path.relative_to(self.newest)
            assert older.stat().st_size == path.stat().st_size, f"{older} has another size"
            for name, harm, expected in (
                ("stale file of the right size", partial(shutil.copy2, older, path), "instead of"),
                ("cut in half", partial(os.truncate, path, path.stat().st_size // 2), "bytes instead of"),
                ("emptied", partial(os.truncate, path, 0), "has 0 bytes instead of"),
                ("deleted", path.unlink, "is missing"),
                ("made a link", partial(_link, path, older), "is a symbolic link"),
            ):
                harm()
                self.harmed(f"{path.name} {name}", path, expected)
        self._swap(*shards)
        extra = self.newest / file_name(RANKS)
        shutil.copyfile(shards[-1], extra)
        self.harmed("a file too many", extra, f"is not in {MANIFEST}")
        manifest = self.newest / MANIFEST
        manifest.unlink()
        self.harmed("no manifest", manifest, "is missing")
        shutil.copyfile(self.before / MANIFEST, manifest)
        self.harmed("manifest of another step", manifest, f"{MANIFEST} is that of step")
        shutil.rmtree(self.newest)
        shutil.copytree(self.before, self.newest)
        self.harmed("another step under this name", manifest, f"{MANIFEST} is that of step")
        return self.found - done

    def _swap(self, one: Path, other: Path) -> None:
        aside = one.with_name("aside")
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        self.harmed("two ranks' files swapped", one, "instead of")

    def loaded_in_silence(self) -> tuple[int, int]:
        """How many of the harmed files the format's own checks let pass, and how many there were."""
        silent, paths = 0, list(self._plain.iterdir())
        for path in paths:
            with suppress(Exception):
                load_file(path)
                silent += 1
        return silent, len(paths)


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _try(checkpoints: Path, plain: Path, flips: int, seed: int) -> Figures:
    trial = Trial(checkpoints, plain)
    draw = random.Random(seed)  # noqa: S311 - which bits, no secret
    files = [*_shards(trial.newest), trial.newest / MANIFEST]
    for number in range(flips):
        trial.flip(draw, files[number % len(files)])
    silent, loads = trial.loaded_in_silence()
    assert silent > loads // 2, f"a plain load refuses {loads - silent} of {loads}: the trial proves nothing"
    return {
        "flips": flips,
        "tampered": trial.tamper(),
        "plain_loads": loads,
        "plain_loads_in_silence": silent,
        "slowest_fallback_s": round(trial.slowest_s, 3),
    }


def _launched(folder: Path, *, stage: int) -> Figures:
    """Harm the checkpoints of a launched run; then let a launch meet a flipped bit."""
    tiny = TinyRun(folder, "torchrun", config={"stage": stage})
    tiny.to_end()
    straight = tiny.set_aside()
    shutil.copytree(straight, folder / "trial")
    figures = _try(folder / "trial" / "checkpoints", folder / "plain", FLIPS, seed=stage)
    stopped_after(straight, tiny.path, 8)
    checkpoints = tiny.path / "checkpoints"
    shard = _shards(checkpoints / "step-00000008")[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.unlink()  # a link: the other run's file must stay as it is
    shard.write_bytes(content)
    output = tiny.to_end()
    places = [output.find(line) for line in (shard.name, f"resumed from {checkpoints / 'step-00000004'} ")]
    assert 0 <= places[0] < places[1], f"not logged in this order\n{output[-6000:]}"
    check_same(tiny.path, straight, "the run that fell back")
    return figures


def make_checkpoints(folder: Path) -> Path:
    """Publish two checkpoints that no run has made; their folder."""
    store = CheckpointStore(folder / "checkpoints", keep=9)
    for step in (4, 8):
        weights = [np.arange(3000.0, dtype=np.float32) * (rank + 1) / step for rank in range(RANKS)]
        files = {file_name(rank): save({f"w/fp32/{rank * 3000}": own}) for rank, own in enumerate(weights)}
        publish_made(store, step, files)
    return store.folder


def _made(folder: Path) -> Figures:
    return _try(make_checkpoints(folder), folder / "plain", 40, seed=0)


_COUNTED = ("flips", "tampered", "plain_loads", "plain_loads_in_silence")

PART = Part(
    name="flips",
    point=4,
    promise="A changed file is found before anything of it is loaded, and the checkpoint before it is used within 5 s",
    cases={"zero1": partial(_launched, stage=1), "zero3": partial(_launched, stage=3), "made": _made},
    short=("made",),
    summary=totals(*_COUNTED, most=("slowest_fallback_s",)),
)
