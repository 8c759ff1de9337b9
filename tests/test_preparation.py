import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds import hub
from inheritune_ds.errors import HubError, RunFolderError
from inheritune_ds.preparation import _check_same_start, _pinned
from inheritune_ds.recipe import HubSource, Recipe
from inheritune_ds.recipe_file import load_recipe
from inheritune_ds.run_folder import RunFolder
from inheritune_ds.surgery.inherit import MANIFEST

BRANCH, PUSHED = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the hub's branches point to a commit, or the hub unreachable with an empty one."""

    def point_to(commit: str) -> None:
        def answer(name: str, revision: str, kind: hub.RepoType) -> hub.Repository:
            if not commit:
                raise HubError(f"{kind} {name} {revision}: no network")
            return hub.Repository(name, kind, commit, "")

        monkeypatch.setattr(hub, "resolve", answer)

    return point_to


def revisions(recipe: Recipe) -> list[str]:
    assert recipe.reference is not None
    sources = [source.revision for source in recipe.corpus.sources if isinstance(source, HubSource)]
    return [recipe.reference.revision, *sources]


def test_hub_revisions_stay_at_the_commit_of_the_first_launch(
    folder: RunFolder, resolve: Callable[[str], None]
) -> None:
    recipe = load_recipe("openllama-3b-13l")
    assert revisions(recipe) == ["main", "main"]
    resolve(BRANCH)
    assert revisions(_pinned(recipe, folder)) == [BRANCH, BRANCH]
    resolve(PUSHED)
    assert revisions(_pinned(recipe, folder)) == [BRANCH, BRANCH]
    resolve("")
    assert revisions(_pinned(recipe, folder)) == [BRANCH, BRANCH], "a later launch needs no answer"
    assert json.loads((folder.path / "pins.json").read_text()) == {
        "model openlm-research/open_llama_3b@main": BRANCH,
        "dataset togethercomputer/RedPajama-Data-1T-Sample@main": BRANCH,
    }


def test_local_folders_and_recipes_are_not_pinned(folder: RunFolder, resolve: Callable[[str], None]) -> None:
    resolve("")
    quickstart = load_recipe("quickstart")
    assert _pinned(quickstart, folder) == quickstart
    local = load_recipe("quickstart", [f"reference.model={folder.path}"])
    assert _pinned(local, folder) == local
    assert not (folder.path / "pins.json").exists()


def test_other_weights_under_old_checkpoints_are_refused(folder: RunFolder) -> None:
    before: dict[str, Any] = {"tokens": "1" * 64, "reference": {"weights_sha256": {"model.safetensors": "2"}}}
    changed = {**before, "reference": {"weights_sha256": {"model.safetensors": "3"}}}
    folder.target.mkdir()
    (folder.target / MANIFEST).write_text(json.dumps({"identity": before}))
    _check_same_start(folder, changed)  # nothing was trained from the old ones: the target is built anew
    (folder.checkpoints / "step-00000010").mkdir()
    _check_same_start(folder, before)
    with pytest.raises(RunFolderError) as caught:
        _check_same_start(folder, changed)
    assert "holds checkpoints that were made from something else" in caught.value.problem
    assert "reference.weights_sha256.model.safetensors: '2' -> '3'" in caught.value.problem
