import json
from pathlib import Path

import pytest

from inheritune_ds.checkpoints.manifest import read_manifest
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import CheckpointError
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.resume import Resumption
from tests.checkpoints.saved import LAYOUT, fields_of, written


def saved(run: Path, *overrides: str, data: str | None = "d" * 64, precision: str = "bf16") -> Path:
    """A run folder with one checkpoint, that of step 4."""
    store = CheckpointStore(run / "checkpoints", keep=3)
    temporary = store.begin(4)
    layout = {"world_size": 4, "zero_stage": 3, "precision": precision}
    recipe = load_recipe("quickstart", list(overrides)).fingerprint
    fields = {**fields_of(4), "layout": layout, "fingerprints": {"recipe": recipe, "data": data, "code": {}}}
    return store.publish(temporary, 4, fields, written(temporary, "state"))


def resumption(run: Path, *overrides: str) -> Resumption:
    return Resumption(RunFolder(run), load_recipe("quickstart", list(overrides)), LAYOUT)


def test_newest_checkpoint_of_any_layout_is_chosen(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({"fingerprint": "d" * 64}))
    chosen = resumption(tmp_path).choose()
    assert chosen is not None
    assert chosen == {"path": str(checkpoint), "manifest": read_manifest(checkpoint)}
    assert json.loads(json.dumps(chosen)) == chosen  # rank 0 sends it to the others as JSON
    assert resumption(tmp_path / "other").choose() is None


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"data": "e" * 64}, r"step-00000004 was made by another run.*\n    data: 'e+' -> 'd+'\n"),
        ({"recipe": "optimizer.lr=5e-3"}, r"step-00000004 was made by another run.*\n    recipe: '\w+' -> '\w+'\n"),
        ({"precision": "fp32"}, "was saved in fp32, and this launch computes in bf16"),
    ],
    ids=["data", "recipe", "precision"],
)
def test_checkpoint_of_another_run_is_refused(fault: dict[str, str], problem: str, tmp_path: Path) -> None:
    overrides = [fault["recipe"]] if "recipe" in fault else []
    saved(tmp_path, *overrides, **{key: value for key, value in fault.items() if key != "recipe"})
    (tmp_path / "data.json").write_text(json.dumps({"fingerprint": "d" * 64}))
    with pytest.raises(CheckpointError, match=problem):
        resumption(tmp_path).choose()
    if overrides:
        assert resumption(tmp_path, *overrides, "checkpoint.keep=1").choose() is not None


def test_recipe_may_forbid_to_resume(tmp_path: Path) -> None:
    resumption(tmp_path / "new", "checkpoint.resume=never").begin()
    saved(tmp_path)
    resumption(tmp_path).begin()
    with pytest.raises(CheckpointError, match=r"checkpoint.resume: never\n.*without checkpoints\n.*--fresh"):
        resumption(tmp_path, "checkpoint.resume=never").begin()
