"""What a run is made from: recipe, data, target, kernels and micro-batch.

The first launch writes it to the run folder. Once there are checkpoints, a later launch must agree with it: the
difference is named key by key, and refused.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints.manifest import newest_step
from inheritune_ds.config.kernels import OFFLOADED_OPTIMIZER, KernelRequest
from inheritune_ds.config.loading import differences
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.token_set import TokenSet, find_damage
from inheritune_ds.errors import CheckpointError, InherituneError, RunFolderError
from inheritune_ds.run.pins import with_known_pins
from inheritune_ds.storage.files import read_json, write_json

logger = logging.getLogger(__name__)

RESOLVED_RECIPE = "recipe.resolved.yaml"
"""The recipe, with everything written out."""
DATA = "data.json"
"""The data: its fingerprint, what that covers, and which token files were found as they were written."""
KERNELS = "kernels.json"
"""The kernels of the last launch."""
MICRO_BATCH = "micro_batch.json"
"""The micro-batch that --auto-micro-batch found."""
_OTHER_NAME = "give this run a name of its own: name=OTHER"


def has_begun(run_dir: Path) -> bool:
    """Whether a run folder holds a checkpoint, so that what the run is made from may not change any more."""
    return newest_step(run_dir / "checkpoints") > 0


def refuse_difference(
    problem: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    action: str,
    error: type[InherituneError] = RunFolderError,
) -> None:
    """Refuse documents that differ, with every key that does.

    Args:
        problem: The first line of the message.
        before: The document of the earlier launch.
        now: The document of this launch.
        action: What the user can do.
        error: What is raised.
    """
    if before != now:
        lines = "\n".join(f"    {line}" for line in differences(_by_name(before), _by_name(now)))
        raise error(f"{problem}; it differs in\n{lines}", action=action)


def _by_name(value: Any) -> Any:
    """A document whose lists of named things are keyed by name, so that a difference names source and file."""
    if isinstance(value, Mapping):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: _by_name(item) for item in value}
    return value


def fingerprints(run_dir: Path, recipe: Recipe) -> tuple[str, str]:
    """The fingerprints of a recipe: as it is given, and with the pins of the run folder."""
    return recipe.fingerprint, with_known_pins(recipe, run_dir).fingerprint


def check_recipe(run_dir: Path, owner: Recipe, recipe: Recipe) -> None:
    """Refuse another recipe than the one that was trained in a run folder.

    Raises:
        RunFolderError: With every key that differs.
    """
    if owner.fingerprint not in fingerprints(run_dir, recipe):
        refuse_difference(
            f"{run_dir} belongs to another recipe",
            owner.identity,
            with_known_pins(recipe, run_dir).identity,
            action="give this run a name or folder of its own: name=OTHER or --runs-dir DIR",
        )


def check_checkpoint(run_dir: Path, checkpoint: Path, saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a checkpoint that was brought here from another run: with the same shapes it would load.

    Args:
        run_dir: The run folder.
        checkpoint: Its folder.
        saved: The fingerprints in its manifest.
        recipe: The recipe of this launch.

    Raises:
        CheckpointError: With the fingerprints that differ.
    """
    given, pinned = fingerprints(run_dir, recipe)
    data = (read_json(run_dir / DATA) or {}).get("fingerprint")
    refuse_difference(
        f"{checkpoint} was made by another run",
        {"recipe": pinned if saved["recipe"] == given else saved["recipe"], "data": saved["data"]},
        {"recipe": pinned, "data": data if None not in (data, saved["data"]) else saved["data"]},
        action="remove it, and rerun the same command",
        error=CheckpointError,
    )


def check_target(run_dir: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Refuse another reference, cut or tokens than the target was made from, once there are checkpoints.

    Args:
        run_dir: The run folder.
        before: The identity of the target in it; None if there is none.
        now: The identity that this launch asks for.

    Raises:
        RunFolderError: With every key that differs.
    """
    if before is not None and has_begun(run_dir):
        refuse_difference(
            f"{run_dir} holds checkpoints that were made from another target",
            before,
            now,
            action=f"bring the old files back, or {_OTHER_NAME}",
        )


def find_new_damage(run_dir: Path, tokens: TokenSet) -> str | None:
    """Say what is wrong with token files, by their hashes; files that this run has checked are not read again.

    Args:
        run_dir: The run folder.
        tokens: Token files of the right sizes.
    """
    written = read_json(run_dir / DATA) or {}
    return None if written.get("verified") == _marks(tokens) else find_damage(tokens)


def keep_data(run_dir: Path, recipe: Recipe, tokens: TokenSet) -> str:
    """Compare the data of a launch with data.json, and write it there.

    Args:
        run_dir: The run folder.
        recipe: The experiment, with pinned revisions.
        tokens: Its token files, found intact.

    Returns:
        The fingerprint of the data.

    Raises:
        RunFolderError: There are checkpoints, and the data differs; with every key that does.
    """
    identity, written = _data_identity(recipe, tokens), read_json(run_dir / DATA) or {}
    if "identity" in written and has_begun(run_dir):
        refuse_difference(
            f"{run_dir} holds checkpoints that were made from other data",
            written["identity"],
            identity,
            action=f"bring the old data and settings back, or {_OTHER_NAME}",
        )
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    document = {"fingerprint": fingerprint, "identity": identity, "verified": _marks(tokens)}
    if document != written:
        write_json(run_dir / DATA, document)
    return fingerprint


def _data_identity(recipe: Recipe, tokens: TokenSet) -> dict[str, Any]:
    """Corpus, tokenizer and stream: all that decides which tokens each step reads."""
    manifest, training = tokens.manifest, recipe.training
    return {
        "tokens": tokens.fingerprint,
        "sources": [
            {
                **entry["identity"],
                "train_tokens": entry["train_tokens"],
                "validation_tokens": entry["validation_tokens"],
            }
            for entry in manifest["sources"]
        ],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "corpus": manifest["corpus"],
        "stream": {
            "seed": recipe.seed,
            "seq_len": training.seq_len,
            "global_batch_tokens": training.global_batch_tokens,
            "sampling": training.sampling,
            "packing": training.packing,
            "weights": recipe.corpus.weights,
            "weight_changes": [change.model_dump(mode="json") for change in recipe.corpus.weight_changes],
        },
        "validation_tokens": recipe.validation.max_tokens,
    }


def _marks(tokens: TokenSet) -> dict[str, Any]:
    """Size and time of the last change of every token file, which change with its bytes."""
    stats = {name: (tokens.folder / name).stat() for name in sorted(tokens.manifest["files"])}
    return {
        "fingerprint": tokens.fingerprint,
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
    }


def kept_kernels(run_dir: Path, request: KernelRequest) -> KernelRequest:
    """Replace `auto` by the kernels of the first launch, once there are checkpoints.

    A named kernel replaces a kept one, with a warning; not the optimizer, whose state is its own.

    Args:
        run_dir: The run folder.
        request: The `kernels` block of this launch.

    Raises:
        RunFolderError: If another optimizer is named than the one whose state the checkpoints hold.
    """
    taken: dict[str, Any] | None = read_json(run_dir / KERNELS)
    if taken is None or not has_begun(run_dir):
        return request
    wanted, optimizer = request.model_dump(), taken["optimizer"]
    if wanted["optimizer"] != "auto":
        refuse_difference(
            f"{run_dir} holds checkpoints with the state of another optimizer",
            {"kernels": {"optimizer": optimizer}},
            {"kernels": {"optimizer": wanted["optimizer"]}},
            action=f'write "optimizer": "auto" or "{optimizer}" under kernels, or {_OTHER_NAME}',
        )
    kept = {key: taken.get(key, value) if value == "auto" else value for key, value in wanted.items()}
    for key, value in kept.items():
        if key in taken and value != taken[key]:
            logger.warning(
                "kernels.%s is %s, and was %s before: later steps round otherwise than an uninterrupted run",
                *(key, value, taken[key]),
            )
    if kept["optimizer"] == OFFLOADED_OPTIMIZER:  # it cannot be named: offload_optimizer asks for it
        kept["optimizer"] = "auto"
    return KernelRequest(**kept)


def keep_kernels(run_dir: Path, kernels: Mapping[str, Any]) -> None:
    """Write the kernels of a launch."""
    write_json(run_dir / KERNELS, kernels)


def kept_micro_batch(run_dir: Path, windows: int) -> int:
    """The micro-batch that the first launch of a run with checkpoints found: another one would sum in another order.

    Args:
        run_dir: The run folder.
        windows: Of a rank and step.

    Returns:
        Sequences; 0 if none is kept that divides the windows.
    """
    size = (read_json(run_dir / MICRO_BATCH) or {}).get("train_micro_batch_size_per_gpu", 0)
    return size if has_begun(run_dir) and isinstance(size, int) and size > 0 and windows % size == 0 else 0


def keep_micro_batch(run_dir: Path, size: int, usable_gib: float) -> None:
    """Write the micro-batch that was found, and the memory a rank may use."""
    write_json(run_dir / MICRO_BATCH, {"train_micro_batch_size_per_gpu": size, "usable_gib": usable_gib})
