"""Everything before the process group: checkpoint, tokens, target. Rank 0 builds, the other ranks open it."""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.checkpoints.manifest import published
from inheritune_ds.checkpoints.store import require_space
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.config.block_scores import read_scores
from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.prepare import prepare as prepare_tokens
from inheritune_ds.data.tokens.token_set import TokenSet, open_finished
from inheritune_ds.data.tokens.tokenizer import load_tokenizer, tokenizer_of
from inheritune_ds.errors import RunFolderError
from inheritune_ds.plan.budget import CHECKPOINTS_IN_HAND, checkpoints_staying
from inheritune_ds.plan.model_size import checkpoint_bytes
from inheritune_ds.run import identity
from inheritune_ds.run.carried import CarriedState, carried_state, names_in_reference
from inheritune_ds.run.data import RunData
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.launch import Launch
from inheritune_ds.run.pins import pin_revisions
from inheritune_ds.run.provenance import write_provenance
from inheritune_ds.run.resume import Resumption
from inheritune_ds.run.status import write_status
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.storage.known_hashes import known_hashes
from inheritune_ds.surgery.inherit import MANIFEST, Cut, TargetModel, build_target, content_of, find_target, make_config
from inheritune_ds.surgery.load import load_config
from inheritune_ds.surgery.reference import ReferenceModel, locate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

POLL_S = 0.2
VISIBLE_S = 60.0
"""Limit until a rank sees the files of rank 0, which network file systems delay."""
DS_CONFIG = "ds_config.resolved.json"


@dataclass(frozen=True)
class RunSetup:
    """One launch of a run, ready to train; made once."""

    recipe: Recipe
    """With pinned revisions."""
    resolved: Resolved
    launch: Launch
    folder: RunFolder
    """Claimed by rank 0."""
    data: RunData
    total_steps: int
    target: TargetModel
    """The model to start from."""
    reference: ReferenceModel | None
    """The model that it was cut from; None from scratch."""
    carried: CarriedState | None
    """Optimizer state of another run to start from."""
    resumption: Resumption
    checkpoint: Mapping[str, Any] | None
    """From `Resumption.choose`; None at the start of the run."""
    fingerprints: Mapping[str, Any]
    """Of recipe, data and code, for the manifest of checkpoints."""


def prepare(recipe: Recipe, resolved: Resolved, folder: RunFolder, launch: Launch) -> RunSetup:
    """Find or build everything that training starts from; all ranks call it together."""
    layout = SavedLayout(launch.world.size, resolved.zero_stage, resolved.precision)
    resumption = Resumption(folder, recipe, layout)
    built: list[tuple[RunData, TargetModel]] = []

    def build() -> dict[str, Any]:
        with launch.stop.interruptible():  # the folder is claimed, so status.json can report a signal
            note, data, target = _build(recipe, resolved, folder, launch, resumption)
        built.append((data, target))
        return note

    note = launch.meeting.run_on_rank0(build)
    pinned = validate(Recipe, note["recipe"], "the recipe of rank 0")
    data, target = built[0] if built else _open(note, pinned, folder)
    return RunSetup(
        recipe=pinned,
        resolved=resolved,
        launch=launch,
        folder=folder,
        data=data,
        total_steps=data.total_steps,
        target=target,
        reference=ReferenceModel.of(note["reference"]) if note["reference"] is not None else None,
        carried=CarriedState(**note["carried"]) if note["carried"] is not None else None,
        resumption=resumption,
        checkpoint=note["checkpoint"],
        fingerprints=note["fingerprints"],
    )


def _build(
    recipe: Recipe, resolved: Resolved, folder: RunFolder, launch: Launch, resumption: Resumption
) -> tuple[dict[str, Any], RunData, TargetModel]:
    """Choose the checkpoint, then prepare tokens and target; on rank 0.

    Returns:
        What the other ranks need to open the same, as JSON; the data; the target.
    """
    resumption.begin()
    checkpoint = resumption.choose()
    write_status(folder.path, "preparing", step=folder.newest_step())
    world = launch.world
    provenance = write_provenance(folder.path, {"world_size": world.size, "launcher": world.launcher})
    write_json(folder.path / DS_CONFIG, resolved.config)
    recipe = pin_revisions(recipe, folder.path)
    reference = _find_reference(recipe, launch)
    tokens, data_fingerprint = _prepare_tokens(recipe, reference, folder, launch.cache_dir)
    data = RunData(recipe, tokens)
    data.log()
    target = _prepare_target(recipe, reference, tokens, folder)
    carried = _find_moments(recipe, target, folder, launch)
    folder.write_resolved(recipe)
    there = sum(1 for _ in published(folder.checkpoints))
    missing = max(0, checkpoints_staying(recipe.checkpoint, data.total_steps) - there)
    size = checkpoint_bytes(target.report["parameters"])
    require_space(folder.checkpoints, size, count=missing + CHECKPOINTS_IN_HAND)
    code = {key: provenance[key] for key in ("inheritune_ds", "git", "packages")}
    note = {
        "recipe": recipe.model_dump(mode="json"),
        "tokens": str(tokens.folder.resolve()),
        "tokens_fingerprint": tokens.fingerprint,
        "reference": reference.document() if reference is not None else None,
        "checkpoint": checkpoint,
        "carried": asdict(carried) if carried is not None else None,
        "fingerprints": {"recipe": recipe.fingerprint, "data": data_fingerprint, "code": code},
    }
    return note, data, target


def _open(note: Mapping[str, Any], recipe: Recipe, folder: RunFolder) -> tuple[RunData, TargetModel]:
    """Open what rank 0 has built.

    Raises:
        RunFolderError: If this rank cannot see the files.
    """
    deadline_s = time.monotonic() + VISIBLE_S
    while True:
        tokens = open_finished(Path(note["tokens"]), note["tokens_fingerprint"])
        report = read_json(folder.path / "inheritance.json")
        if tokens is not None and report is not None and (folder.target / MANIFEST).exists():
            return RunData(recipe, tokens), TargetModel(folder.target, report)
        if time.monotonic() > deadline_s:
            raise RunFolderError(
                f"this rank does not see the files that rank 0 has prepared in {folder.path} and {note['tokens']}",
                allowed="run and cache folders on a file system that all ranks share",
                action="choose such folders: --runs-dir DIR --cache-dir DIR",
            )
        time.sleep(POLL_S)


def _find_reference(recipe: Recipe, launch: Launch) -> ReferenceModel | None:
    """Find or download the reference; a `recipe:NAME` has been trained."""
    if recipe.reference is None or recipe.target.inherits_nothing:
        return None
    logger.info("reference: %s", recipe.reference.model)
    with known_hashes(launch.cache_dir) as hashes:
        return locate(recipe.reference, lambda name: launch.runs_dir / load_recipe(name).name / "export", hashes)


def _prepare_tokens(
    recipe: Recipe, reference: ReferenceModel | None, folder: RunFolder, cache_dir: Path
) -> tuple[TokenSet, str]:
    """Find or make the token files; also the fingerprint of the data."""
    tokenizer, revision = tokenizer_of(recipe, reference.folder if reference is not None else None)
    tokens = prepare_tokens(
        recipe.corpus,
        tokenizer,
        cache_dir,
        revision=revision,
        damage_of=lambda found: identity.find_new_damage(folder.path, found),
        rows=_vocabulary(recipe, reference, folder),
    )
    fingerprint = identity.keep_data(folder.path, recipe, tokens)
    counts = f"{tokens.train_tokens:,} training and {tokens.validation_tokens:,} held-out tokens"
    logger.info("tokens: %s in %s", counts, tokens.folder)
    return tokens, fingerprint


def _prepare_target(
    recipe: Recipe, reference: ReferenceModel | None, tokens: TokenSet, folder: RunFolder
) -> TargetModel:
    """Find or build the target."""
    wanted: dict[str, Any] = {
        "reference": reference.identity if reference else None,
        "target": recipe.target.model_dump(mode="json"),
        "block_scores": read_scores(recipe.target.block_scores),
        "tokens": tokens.fingerprint,
        "seed": recipe.seed,
    }
    built = (read_json(folder.target / MANIFEST) or {}).get("identity")
    identity.check_target(folder.path, content_of(built), content_of(wanted))
    target = find_target(folder.target, wanted)
    if target is None:
        cut = Cut(
            target=recipe.target,
            seed=recipe.seed,
            identity=wanted,
            command=f"python train.py --recipe {folder.path / identity.RESOLVED_RECIPE}",
            reference=reference,
            reference_config=_reference_config(recipe, reference),
            tokenizer=load_tokenizer(str(tokens.tokenizer_dir), "main"),
        )
        target = build_target(cut, folder.target)
    report = target.report
    write_json(folder.path / "inheritance.json", report)
    kept = sum(tensor["inherited"] for tensor in report["tensors"])
    parts = f"{report['blocks']} blocks, {report['parameters']:,} parameters"
    logger.info("target: %s, %d of %d tensors inherited", parts, kept, len(report["tensors"]))
    return target


def _find_moments(recipe: Recipe, target: TargetModel, folder: RunFolder, launch: Launch) -> CarriedState | None:
    """The optimizer state of the reference, if the target inherits it."""
    if not recipe.target.inherits_moments:
        return None
    assert recipe.reference is not None
    assert recipe.reference.recipe_name is not None
    source = RunFolder(launch.runs_dir / load_recipe(recipe.reference.recipe_name).name)
    return carried_state(folder, source, names_in_reference(target.folder, target.report["selection"]))


def _vocabulary(recipe: Recipe, reference: ReferenceModel | None, folder: RunFolder) -> int:
    """The entries of the target's vocabulary, before it is built."""
    if identity.has_begun(folder.path):
        return int(load_config(folder.target).vocab_size)
    return int(make_config(recipe.target, _reference_config(recipe, reference))[0].vocab_size)


def _reference_config(recipe: Recipe, reference: ReferenceModel | None) -> "PreTrainedConfig | None":
    """The config that the target's is cut from; None from scratch."""
    if reference is not None:
        return load_config(reference.folder)
    if recipe.reference is None:
        return None
    # inherit: none needs the architecture only, so a recipe:NAME reference need not be trained.
    if recipe.reference.recipe_name is not None:
        inner = load_recipe(recipe.reference.recipe_name)
        return make_config(inner.target, _reference_config(inner, None))[0]
    return load_config(locate(recipe.reference, Path).folder)
