"""pins.json of a run folder: the hub commits of its recipe's revisions at the first launch.

A run keeps its reference and its data when a branch moves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import HubSource
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.storage import hub
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.storage.hub import RepoType

PINS = "pins.json"


def with_known_pins(recipe: Recipe, run_dir: Path) -> Recipe:
    """Replace the revisions that an earlier launch has pinned, without access to the hub."""
    pins = read_json(run_dir / PINS) or {}
    return _with_revisions(recipe, lambda kind, name, revision: pins.get(_key(kind, name, revision), revision))


def pin_revisions(recipe: Recipe, run_dir: Path) -> Recipe:
    """Replace every revision on the hub by its full commit; see `pin`.

    Raises:
        HubError: If the hub is needed and cannot be reached.
    """
    return _with_revisions(recipe, lambda *asked: pin(run_dir, *asked))


def pin(run_dir: Path, kind: RepoType, name: str, revision: str) -> str:
    """The full commit of a revision, from pins.json or from the hub, which is asked once.

    Raises:
        HubError: If the hub is needed and cannot be reached.
    """
    pins: dict[str, str] = read_json(run_dir / PINS) or {}
    key = _key(kind, name, revision)
    if key not in pins:
        pins[key] = hub.resolve(name, revision, kind).commit
        write_json(run_dir / PINS, pins)
    return pins[key]


def _key(kind: RepoType, name: str, revision: str) -> str:
    return f"{kind} {name}@{revision}"


def _with_revisions(recipe: Recipe, revision_of: Callable[[RepoType, str, str], str]) -> Recipe:
    """Replace the revisions of a recipe's hub models and datasets."""
    reference, corpus = recipe.reference, recipe.corpus
    if reference is not None and not (reference.recipe_name or _is_folder(reference.model)):
        revision = revision_of("model", reference.model, reference.revision)
        reference = reference.model_copy(update={"revision": revision})

    def pinned(sources: Sequence[Any]) -> list[Any]:
        return [
            source.model_copy(update={"revision": revision_of("dataset", source.dataset, source.revision)})
            if isinstance(source, HubSource) and not _is_folder(source.dataset)
            else source
            for source in sources
        ]

    sources = {"sources": pinned(corpus.sources), "overlap_with": pinned(corpus.overlap_with)}
    return recipe.model_copy(update={"reference": reference, "corpus": corpus.model_copy(update=sources)})


def _is_folder(name: str) -> bool:
    return is_local_path(name) or Path(name).is_dir()
