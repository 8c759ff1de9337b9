"""Everything before the first step: tokens, reference, target. Rank 0 builds, all ranks open what it has built."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from inheritune_ds.checkpoints.manifest import newest_step
from inheritune_ds.config.block_scores import read_scores
from inheritune_ds.config.loading import differences, load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.console import Meter
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.token_set import TokenSet, open_finished
from inheritune_ds.data.tokens.tokenizer import load_tokenizer, tokenizer_of
from inheritune_ds.errors import CorpusError, RunFolderError, SurgeryError
from inheritune_ds.run.data import DataRecord, RunData
from inheritune_ds.run.folder import RunFolder, with_revisions
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.surgery.inherit import MANIFEST, Cut, TargetModel, build_target, find_target, make_config
from inheritune_ds.surgery.load import load_config, load_model
from inheritune_ds.surgery.reference import ReferenceModel, locate
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, mean_losses
from inheritune_ds.training.validation import ValidationResult, Validator

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

POLL_S = 0.2
VISIBLE_S = 60.0
"""How long a rank waits until it sees files that rank 0 has written: network file systems take their time."""
REFERENCE_RESULT = "reference.json"


@dataclass(frozen=True)
class Prepared:
    """What training starts from."""

    tokens: TokenSet
    target: TargetModel

    @property
    def note(self) -> dict[str, str]:
        """What another rank needs in order to open the same."""
        return {"tokens": str(self.tokens.folder.resolve()), "fingerprint": self.tokens.fingerprint}


def prepare_run(recipe: Recipe, folder: RunFolder, *, cache_dir: Path, export_of: Callable[[str], Path]) -> Prepared:
    """Find or build every stage before training; only rank 0 calls it.

    Args:
        recipe: The experiment.
        folder: Its run folder, claimed.
        cache_dir: Where token files are shared between runs.
        export_of: Gives the exported folder of a `recipe:NAME` reference (trained by then).
    """
    recipe = with_revisions(recipe, folder.pin)
    folder.write_resolved(recipe)
    reference = None
    if recipe.reference is not None and not recipe.target.inherits_nothing:
        logger.info("reference: %s", recipe.reference.model)
        reference = locate(recipe.reference, export_of)
    record = DataRecord(folder.path)
    tokenizer, revision = tokenizer_of(recipe, reference.folder if reference is not None else None)
    tokens = prepare(recipe.corpus, tokenizer, cache_dir, revision=revision, damage_of=record.damage_of)
    record.settle(recipe, tokens, has_checkpoints=bool(newest_step(folder.checkpoints)))
    counts = f"{tokens.train_tokens:,} training and {tokens.validation_tokens:,} held-out tokens"
    logger.info("tokens: %s in %s", counts, tokens.folder)
    log_data(recipe, tokens)
    identity: dict[str, Any] = {
        "reference": reference.identity if reference else None,
        "target": recipe.target.model_dump(mode="json"),
        "block_scores": read_scores(recipe.target.block_scores),
        "tokens": tokens.fingerprint,
        "seed": recipe.seed,
    }
    _check_same_start(folder, identity)
    target = find_target(folder.target, identity)
    if target is None:
        cut = Cut(
            target=recipe.target,
            seed=recipe.seed,
            identity=identity,
            command=f"python train.py --recipe {folder.path / 'recipe.resolved.yaml'}",
            reference=reference,
            reference_config=_reference_config(recipe, reference),
            tokenizer=load_tokenizer(str(tokens.tokenizer_dir), "main"),
        )
        target = build_target(cut, folder.target)
    _check_ids(tokens, load_config(folder.target).vocab_size)
    write_json(folder.path / "inheritance.json", target.report)
    kept = sum(tensor["inherited"] for tensor in target.report["tensors"])
    parts = f"{target.report['blocks']} blocks, {target.report['parameters']:,} parameters"
    logger.info("target: %s, %d of %d tensors inherited", parts, kept, len(target.report["tensors"]))
    if reference is not None:
        _score_reference(reference, recipe, tokens, folder)
    return Prepared(tokens, target)


def log_data(recipe: Recipe, tokens: TokenSet) -> None:
    """Log what the validation reads; warn of parts of the corpus and of the mixture that the run does not use."""
    data = RunData(recipe, tokens)
    held_out = data.held_out
    count = min(len(held_out), recipe.validation.max_tokens // recipe.training.seq_len)
    used = held_out.used(count)
    by_source = f" ({', '.join(f'{name} {windows:,}' for name, windows in used.items())})" if len(used) > 1 else ""
    logger.info("validation: %s windows of %d tokens%s", f"{count:,}", recipe.training.seq_len, by_source)
    untrained = [source.name for source in tokens.sources if not source.train_tokens]
    if untrained:
        logger.warning("no token of %s is trained on: empty, held out, or behind max_tokens", ", ".join(untrained))
    unseen = [name for name, windows in used.items() if not windows and name not in untrained]
    if unseen:
        logger.warning("no window of %s is validated on: the loss tells nothing of it", ", ".join(unseen))
    for change in recipe.corpus.weight_changes:
        end = data.total_steps * recipe.training.global_batch_tokens
        if change.tokens >= end:
            logger.warning("weight_changes at %s never come: the run ends at %s tokens", change.at, f"{end:,}")


def _check_ids(tokens: TokenSet, vocabulary: int) -> None:
    """Refuse tokens that the model has no embedding for: a tokenizer's ids may have gaps.

    Raises:
        CorpusError: Naming both sizes.
    """
    if tokens.vocab_size > vocabulary:
        raise CorpusError(
            f"corpus.tokenizer has ids up to {tokens.vocab_size - 1}, the model's vocabulary {vocabulary} entries",
            allowed=f"a tokenizer whose ids are all below {vocabulary}",
            action="use the reference's own tokenizer (leave corpus.tokenizer out) or a larger vocab_size",
        )


def _check_same_start(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Refuse to go on from checkpoints that were made from other tokens or another reference.

    Raises:
        RunFolderError: Naming what differs.
    """
    before = read_json(folder.target / MANIFEST)
    if before is None or before["identity"] == identity or not newest_step(folder.checkpoints):
        return
    lines = "\n".join(f"    {line}" for line in differences(before["identity"], identity))
    raise RunFolderError(
        f"{folder.path} holds checkpoints that were made from something else; it differs in\n{lines}",
        action="bring the old files back, or give this run a name of its own: name=OTHER",
    )


def open_prepared(note: Mapping[str, str], folder: RunFolder) -> Prepared:
    """Open what rank 0 has prepared.

    Args:
        note: Its `Prepared.note`.
        folder: The run folder.

    Raises:
        RunFolderError: If this rank cannot see the files.
    """
    deadline_s = time.monotonic() + VISIBLE_S
    while True:
        tokens = open_finished(Path(note["tokens"]), note["fingerprint"])
        report = read_json(folder.path / "inheritance.json")
        if tokens is not None and report is not None and (folder.target / MANIFEST).exists():
            return Prepared(tokens, TargetModel(folder.target, report))
        if time.monotonic() > deadline_s:
            raise RunFolderError(
                f"this rank does not see what rank 0 has prepared in {folder.path} and {note['tokens']}",
                allowed="run and cache folders on a file system that all ranks share",
                action="choose such folders: --runs-dir DIR --cache-dir DIR",
            )
        time.sleep(POLL_S)


def _reference_config(recipe: Recipe, reference: ReferenceModel | None) -> "PreTrainedConfig | None":
    """Config that the target's is cut from; None from scratch."""
    if reference is not None:
        return load_config(reference.folder)
    if recipe.reference is None:
        return None
    # inherit: none needs the architecture only, so a reference that is a recipe is not trained for it.
    if recipe.reference.recipe_name is not None:
        inner = load_recipe(recipe.reference.recipe_name)
        return make_config(inner.target, _reference_config(inner, None))[0]
    located = locate(recipe.reference, _no_recipe)
    return load_config(located.folder)


def _no_recipe(name: str) -> Path:
    raise AssertionError(f"recipe:{name} is handled by its own branch")


class ReferenceScorer:
    """The bare reference in fp32 on rank 0's device, for its loss on the target's validation windows.

    Args:
        model: The reference.
        packing: How documents inside a window are kept apart, as for the target; None if they are not.
    """

    def __init__(self, model: "PreTrainedModel", packing: DocumentPacking | None = None) -> None:
        import torch

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module: torch.nn.Module = model  # the plain type: transformers' own `to` is a wrapper
        self._model = module.to(self._device).eval()
        self._windows = WindowInputs(packing, "sdpa")  # or eager, which takes the same: the default of transformers

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        """Mean loss of every window over its counted targets, in nats a token."""
        import torch
        from torch.nn import functional

        losses = []
        with Meter("reference validation", "batches", len(batches)) as meter:
            for batch in batches:
                tokens_BT1 = torch.from_numpy(batch)  # noqa: N806 - shape suffix
                inputs = self._windows.with_targets(tokens_BT1, self._device)
                targets = inputs.pop("targets").flatten()
                with torch.no_grad(), self._windows.apart():
                    logits_BTV = self._model(**inputs).logits  # noqa: N806
                    flat = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="none")
                losses.append(mean_losses(flat, tokens_BT1, self._windows.packing))
                meter.advance(1)
        return losses


def validator_for(recipe: Recipe, data: RunData, *, batch_size: int, rank: int = 0, size: int = 1) -> Validator:
    """The recipe's fixed validation windows."""
    return Validator(
        data.held_out,
        max_tokens=recipe.validation.max_tokens,
        batch_size=batch_size,
        rank=rank,
        size=size,
        packing=data.packing,
    )


def _score_reference(reference: ReferenceModel, recipe: Recipe, tokens: TokenSet, folder: RunFolder) -> None:
    """Write eval/reference.json: the reference's loss on the windows that the target is measured on.

    Raises:
        SurgeryError: If that loss is not a finite number.
    """
    path = folder.eval / REFERENCE_RESULT
    identity = {
        "weights": reference.weights_sha256,
        "settings": reference.settings_sha256,
        "tokens": tokens.fingerprint,
        "seq_len": recipe.training.seq_len,
        "max_tokens": recipe.validation.max_tokens,
        "packing": recipe.training.packing,
        "source_weights": recipe.corpus.weights,
    }
    written = read_json(path)
    if written is not None and written["identity"] == identity:
        return
    model = load_model(reference.folder, dtype="float32")
    data = RunData(recipe, tokens)
    scorer = ReferenceScorer(model, data.packing)
    result: ValidationResult = validator_for(recipe, data, batch_size=8).validate(scorer)
    if not math.isfinite(result.loss):
        bad = sum(not math.isfinite(loss) for loss in result.windows)
        raise SurgeryError(
            f"the reference {reference.name} is of no use: its loss on {bad} of {len(result.windows)} "
            f"validation windows is not a finite number",
            allowed="weights that are finite numbers, on which the model computes finite losses in fp32",
            action=f"look for NaN or infinite values in the weights in {reference.folder}, or take another reference",
        )
    result.write(path, identity=identity, model=reference.name, parameters=model.num_parameters())
    logger.info("reference: val loss %.4f +- %.4f", result.loss, result.stderr)
