"""Where the optimizer state of a run comes from."""

from pathlib import Path

import pytest

from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import CheckpointError, RecipeError
from inheritune_ds.run.carried import carried_state, names_in_reference
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.storage.files import write_json
from inheritune_ds.surgery.load import build_config
from tests import tiny


def test_names_follow_the_selection(tmp_path: Path) -> None:
    shape = tiny.recipe().target.shape
    assert shape is not None
    build_config(shape).save_pretrained(tmp_path)
    names = names_in_reference(tmp_path, [0, 5, 2])
    assert names["model.layers.1.mlp.up_proj.weight"] == "model.layers.5.mlp.up_proj.weight"
    assert names["model.layers.2.input_layernorm.weight"] == "model.layers.2.input_layernorm.weight"
    assert names["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert len(names) == 3 * 9 + 3


def test_source_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint, so the optimizer state cannot be carried") as caught:
        carried_state(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "source"), {})
    assert "target.inherit: all" in caught.value.action


def test_run_with_checkpoints_needs_the_names_alone(tmp_path: Path) -> None:
    """The source may be gone by then."""
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    write_json(folder.path / "carried.json", {"checkpoint": "gone", "names": {"a": "b"}})
    found = carried_state(folder, RunFolder(tmp_path / "source"), {"other": "names"})
    assert (found.names, found.opened()) == ({"a": "b"}, None)


@pytest.mark.parametrize(
    ("reference", "target", "problem"),
    [
        ({"model": "owner/name"}, {}, "needs a reference that is a recipe"),
        ({"model": "recipe:quickstart-reference"}, {"width": "half"}, "needs width: full"),
    ],
)
def test_moments_that_do_not_exist_are_refused(reference: dict[str, str], target: dict[str, str], problem: str) -> None:
    document = tiny.document(reference=reference, target={"select": "first:2", "inherit": "moments", **target})
    with pytest.raises(RecipeError, match=problem):
        validate(Recipe, document, "test")
