"""A study file: several runs to compare with each other, and the recipe of each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from inheritune_ds.config.fields import ConfigModel, Name, Text
from inheritune_ds.config.loading import dump_recipe, load_recipe, read_document, shipped_names
from inheritune_ds.config.messages import validate
from inheritune_ds.config.model import RECIPE_PREFIX
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import InherituneError, RecipeError
from inheritune_ds.report.study_report import Role
from inheritune_ds.storage.files import storage_errors, write_text


class StudyRun(ConfigModel):
    """One run of a study."""

    recipe: Text
    """A shipped name, or a path relative to the study file."""
    role: Role
    label: Text | None = None
    """Its name in table and figure; the recipe's name if omitted."""
    overrides: list[Text] = Field(default_factory=list)
    """Such as `name=shallow`, `target.select=first:2`, so that several runs share one recipe."""


class StudyFile(ConfigModel):
    """Runs to compare with each other."""

    name: Name
    description: Text
    runs: Annotated[list[StudyRun], Field(min_length=1)]
    """In the order of training."""

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if not any(run.role == "target" for run in self.runs):
            raise ValueError("one of the runs must have the role target")
        return self


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study, ready to start."""

    run: StudyRun
    plain: Recipe
    """Its file, without overrides."""
    recipe: Recipe
    """With overrides."""
    arguments: list[str]
    """Of train.py."""

    @property
    def label(self) -> str:
        """Its name in table and figure."""
        return self.run.label or self.recipe.name

    @property
    def arm(self) -> str:
        """Fingerprint of its recipe without the seed: equal for runs that differ in the seed alone."""
        return self.recipe.model_copy(update={"seed": 0}).fingerprint


def load_study(name: str, overrides: Sequence[str], runs_dir: Path) -> tuple[StudyFile, list[PlannedRun]]:
    """Read a study and the recipe of every run.

    If the reference of a run is an earlier run of this study with overrides, its recipe is written to
    `study-NAME/recipes`, and the run's `reference.model` names that file. Raises a RecipeError with all problems of the
    study and its recipes.
    """
    text, origin = read_document(name, "studies")
    study = validate(StudyFile, parse_yaml(text, origin), origin)
    beside = Path() if name in shipped_names("studies") else Path(origin).parent
    folder = runs_dir / f"study-{study.name}" / "recipes"
    runs: list[PlannedRun] = []
    references: dict[Path, Recipe] = {}
    problems: list[InherituneError] = []
    for run in study.runs:
        words = [*run.overrides, *overrides]
        try:
            recipe = load_recipe(run.recipe, words, beside=beside)
            reference = _reference_in_study(recipe, runs)
            if reference is not None:
                path = folder / f"{reference.name}.yaml"
                references[path] = reference
                words.append(f"reference.model={RECIPE_PREFIX}{path}")
                recipe = load_recipe(run.recipe, words, beside=beside)
            which = run.recipe if run.recipe in shipped_names() else str(beside / Path(run.recipe).expanduser())
            plain = load_recipe(run.recipe, beside=beside)
            runs.append(PlannedRun(run, plain, recipe, ["--recipe", which, *words]))
        except RecipeError as problem:
            problems.append(problem)
    for shared, times in Counter(run.recipe.name for run in runs).items():
        if times > 1:
            text = f"study {study.name}: {times} runs are called {shared}, so they would share a run folder"
            problems.append(RecipeError(text, action="give one of them another name: `overrides: [name=...]`"))
    if problems:
        raise RecipeError.of(problems)
    for path, reference in references.items():
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_recipe(reference))
    return study, runs


def _reference_in_study(recipe: Recipe, before: Sequence[PlannedRun]) -> Recipe | None:
    """The reference of a recipe with an earlier run's overrides; None if no run changes it."""
    name = recipe.reference.recipe_name if recipe.reference else None
    if name is None:
        return None
    asked = load_recipe(name)
    trained = [run.recipe for run in before if run.plain == asked]
    if not trained or any((one.name, one.fingerprint) == (asked.name, asked.fingerprint) for one in trained):
        return None
    return trained[0]
