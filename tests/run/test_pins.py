import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.config.corpus import HubSource
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import HubError, RunFolderError
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.pins import pin_revisions
from inheritune_ds.run.status import write_status
from inheritune_ds.storage import hub

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


def test_hub_revisions_keep_the_commit_of_the_first_launch(folder: RunFolder, resolve: Callable[[str], None]) -> None:
    recipe = load_recipe("openllama-3b-13l")
    assert set(revisions(recipe)) == {"main"}
    assert len(revisions(recipe)) == 1 + 7, "the reference, and a source for each domain"
    resolve(BRANCH)
    assert set(revisions(pin_revisions(recipe, folder.path))) == {BRANCH}
    resolve(PUSHED)
    assert set(revisions(pin_revisions(recipe, folder.path))) == {BRANCH}
    resolve("")
    assert set(revisions(pin_revisions(recipe, folder.path))) == {BRANCH}
    assert json.loads((folder.path / "pins.json").read_text()) == {
        "model openlm-research/open_llama_3b@main": BRANCH,
        "dataset togethercomputer/RedPajama-Data-1T-Sample@main": BRANCH,
    }


def test_resolved_recipe_names_the_commit_and_the_given_recipe_owns_the_folder(
    folder: RunFolder, resolve: Callable[[str], None]
) -> None:
    recipe = load_recipe("openllama-3b-13l")
    assert recipe.reference is not None
    resolve(BRANCH)
    folder.claim(recipe)
    folder.write_resolved(pin_revisions(recipe, folder.path))
    folder.release()
    resolved = load_recipe(str(folder.path / "recipe.resolved.yaml"))
    assert resolved.reference is not None
    assert resolved.reference.revision == BRANCH
    (folder.path / "metrics.jsonl").touch()
    for again in (recipe, resolved):
        folder.claim(again)
        folder.release()
        assert load_recipe(str(folder.path / "recipe.resolved.yaml")) == resolved
    other = recipe.model_copy(update={"reference": recipe.reference.model_copy(update={"revision": "v2"})})
    with pytest.raises(RunFolderError, match=r"reference\.revision"):
        folder.claim(other)
    folder.release()


def test_local_folders_and_recipes_are_not_pinned(folder: RunFolder, resolve: Callable[[str], None]) -> None:
    resolve("")
    quickstart = load_recipe("quickstart")
    assert pin_revisions(quickstart, folder.path) == quickstart
    local = load_recipe("quickstart", [f"reference.model={folder.path}"])
    assert pin_revisions(local, folder.path) == local
    assert not (folder.path / "pins.json").exists()


def test_pinned_run_has_finished_for_the_given_recipe(folder: RunFolder, resolve: Callable[[str], None]) -> None:
    recipe = load_recipe("openllama-3b-13l")
    resolve(BRANCH)
    pinned = pin_revisions(recipe, folder.path)
    folder.export.mkdir()
    write_status(folder.path, "finished")
    (folder.path / "run.json").write_text("{}")
    for trained in (pinned, recipe):  # earlier versions wrote the fingerprint of the recipe as it was given
        manifest = {"recipe_fingerprint": trained.fingerprint, "files": {}}
        (folder.export / "manifest.json").write_text(json.dumps(manifest))
        assert folder.has_finished(recipe)
    assert not folder.has_finished(load_recipe("openllama-3b-13l", ["seed=7"]))
