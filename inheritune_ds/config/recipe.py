"""A recipe: one experiment, checked and frozen, independent of the machine."""

import hashlib
import json
from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from inheritune_ds.config.corpus import Corpus
from inheritune_ds.config.fields import ConfigModel, Name, Text, is_local_path
from inheritune_ds.config.model import Reference, Target
from inheritune_ds.config.training import (
    Checkpointing,
    Export,
    Faults,
    Logging,
    Optimizer,
    Schedule,
    Training,
    Validation,
)


class PublishedClaim(ConfigModel):
    """A cost that a publication states for this recipe; the budget reports whether it is possible."""

    text: Text
    hours: PositiveFloat
    gpu: Text
    gpus: PositiveInt = 1
    source: Text


class Recipe(ConfigModel):
    """One experiment."""

    name: Name
    description: Text
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    reference: Reference | None = None
    target: Target
    corpus: Corpus
    training: Training
    optimizer: Optimizer
    schedule: Schedule
    validation: Validation
    checkpoint: Checkpointing
    faults: Faults = Faults()
    logging: Logging = Logging()
    export: Export = Export()
    published_claim: PublishedClaim | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference is None:
            if self.target.shape is None:
                raise ValueError("give a reference and target.select, or target.shape (from scratch)")
            if self.target.select is not None:
                raise ValueError("target.select needs a reference to select from")
            if self.corpus.tokenizer is None:
                raise ValueError("corpus.tokenizer is required without a reference")
        else:
            if self.target.shape is not None:
                raise ValueError("target.shape is for training from scratch: it excludes reference")
            if self.target.select is None:
                raise ValueError("target.select is required with a reference, such as first:4")
        if self.target.inherits_moments and (self.reference is None or self.reference.recipe_name is None):
            raise ValueError(
                "target.inherit: moments needs a reference that is a recipe (recipe:NAME): other models come without "
                "their optimizer state; write all instead"
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """The keys that determine the numbers of a run.

        Without `faults`: a run that its faults have ended may resume with another policy.
        """
        others = {"name", "description", "logging", "checkpoint", "faults", "published_claim"}
        return self.model_dump(mode="json", exclude=others)

    @property
    def content_identity(self) -> dict[str, Any]:
        """`identity` without the places of models and data: the run folder holds the hashes of their content."""
        found = self.identity
        if not self.target.inherits_nothing:
            found["reference"] = None
        found["target"]["block_scores"] = None
        corpus = found["corpus"]
        if isinstance(corpus["tokenizer"], str):
            corpus["tokenizer"] = None
        for source in [*corpus["sources"], *corpus["overlap_with"]]:
            for key in ("paths", "train", "validation"):
                source.pop(key, None)
            if is_local_path(source.get("dataset", "")):
                del source["dataset"]
        return found

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `identity`."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
