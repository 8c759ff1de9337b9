"""The identity of a run: recipe, data, target, kernels and micro-batch.

The first launch writes it to the run folder. Once there are checkpoints, a later launch is refused with every key
that differs.
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
"""The recipe with all defaults."""
DATA = "data.json"
"""The fingerprint of the data, its parts, and the marks of verified token files."""
MOVED = "moved.json"
"""The fingerprints that the recipe of this run had when its models and data were at other places."""
KERNELS = "kernels.json"
"""The kernels of the last launch."""
MICRO_BATCH = "micro_batch.json"
"""The micro-batch that --auto-micro-batch found."""
_OTHER_NAME = "give this run another name: name=OTHER"


def has_begun(run_dir: Path) -> bool:
    """Whether a run folder holds a checkpoint, so that the run's identity may not change."""
    return newest_step(run_dir / "checkpoints") > 0


def refuse_difference(
    problem: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    action: str,
    error: type[InherituneError] = RunFolderError,
) -> None:
    """Refuse a launch if its document differs from an earlier one, with every key that differs."""
    if before != now:
        lines = "\n".join(f"    {line}" for line in differences(_by_name(before), _by_name(now)))
        raise error(f"{problem}; it differs in\n{lines}", action=action)


def _by_name(value: Any) -> Any:
    """Key lists of named items by name, so that a difference names source and file."""
    if isinstance(value, Mapping):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: _by_name(item) for item in value}
    return value


def fingerprints(run_dir: Path, recipe: Recipe) -> tuple[str, str]:
    """The fingerprints of a recipe without and with the pins of the run folder."""
    return recipe.fingerprint, with_known_pins(recipe, run_dir).fingerprint


def check_recipe(run_dir: Path, owner: Recipe, recipe: Recipe) -> bool:
    """Refuse a recipe that differs from the owner of a run folder in more than the places of models and data.

    Returns:
        Whether places differ. The content is compared later, by its hashes (`keep_data`, `check_target`).

    Raises:
        RunFolderError: With every key that differs.
    """
    if owner.fingerprint in fingerprints(run_dir, recipe):
        return False
    pinned = with_known_pins(recipe, run_dir)
    before, now = owner.content_identity, pinned.content_identity
    if owner.reference and pinned.reference and owner.reference.model == pinned.reference.model:
        # In the same place another revision is other content.
        before["reference"], now["reference"] = owner.identity["reference"], pinned.identity["reference"]
    refuse_difference(
        f"{run_dir} belongs to another recipe",
        before,
        now,
        action="give this run another name or folder: name=OTHER or --runs-dir DIR",
    )
    for line in differences(_by_name(owner.identity), _by_name(pinned.identity)):
        logger.info("moved: %s; the run resumes if the content is the same", line)
    former = read_json(run_dir / MOVED) or []
    if owner.fingerprint not in former:
        write_json(run_dir / MOVED, [*former, owner.fingerprint])
    return True


def check_checkpoint(run_dir: Path, checkpoint: Path, saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a checkpoint of another run, which would load if its shapes are equal.

    Args:
        run_dir: The run folder.
        checkpoint: For the message.
        saved: The fingerprints in its manifest.
        recipe: Of this launch.

    Raises:
        CheckpointError: With the fingerprints that differ.
    """
    given, pinned = fingerprints(run_dir, recipe)
    former = [given, *(read_json(run_dir / MOVED) or [])]
    data = (read_json(run_dir / DATA) or {}).get("fingerprint")
    refuse_difference(
        f"{checkpoint} was made by another run",
        {"recipe": pinned if saved["recipe"] in former else saved["recipe"], "data": saved["data"]},
        {"recipe": pinned, "data": data if None not in (data, saved["data"]) else saved["data"]},
        action="remove it, and rerun the same command",
        error=CheckpointError,
    )


def check_target(run_dir: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Refuse another reference, cut or tokens than those of the existing target, once there are checkpoints.

    Raises:
        RunFolderError: With every key that differs.
    """
    if before is not None and has_begun(run_dir):
        refuse_difference(
            f"{run_dir} holds checkpoints that were made from another target",
            before,
            now,
            action=f"restore the old files, or {_OTHER_NAME}",
        )


def find_new_damage(run_dir: Path, tokens: TokenSet) -> str | None:
    """Verify the hashes of token files that this run has not verified before; the first fault."""
    written = read_json(run_dir / DATA) or {}
    return None if written.get("verified") == _marks(tokens) else find_damage(tokens)


def keep_data(run_dir: Path, recipe: Recipe, tokens: TokenSet) -> str:
    """Compare verified data with data.json and write it there; the fingerprint of the data.

    Raises:
        RunFolderError: There are checkpoints and the data differs; with every key that differs.
    """
    identity, written = _data_identity(recipe, tokens), read_json(run_dir / DATA) or {}
    if "identity" in written and has_begun(run_dir):
        refuse_difference(
            f"{run_dir} holds checkpoints that were made from other data",
            written["identity"],
            identity,
            action=f"restore the old data and settings, or {_OTHER_NAME}",
        )
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    document = {"fingerprint": fingerprint, "identity": identity, "verified": _marks(tokens)}
    if document != written:
        write_json(run_dir / DATA, document)
    return fingerprint


def _data_identity(recipe: Recipe, tokens: TokenSet) -> dict[str, Any]:
    """Corpus, tokenizer and stream, which determine the tokens of each step."""
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
        "validation_windows": "evenly strided",
    }


def _marks(tokens: TokenSet) -> dict[str, Any]:
    """Size and modification time of every token file."""
    stats = {name: (tokens.folder / name).stat() for name in sorted(tokens.manifest["files"])}
    return {
        "fingerprint": tokens.fingerprint,
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
    }


def kept_kernels(run_dir: Path, request: KernelRequest) -> KernelRequest:
    """Replace `auto` by the kernels of the first launch, once there are checkpoints; warn if a named kernel differs.

    Raises:
        RunFolderError: If the named optimizer differs from that of the checkpoints.
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
                "kernels.%s is %s, and was %s before: later steps round differently from an uninterrupted run",
                *(key, value, taken[key]),
            )
    if kept["optimizer"] == OFFLOADED_OPTIMIZER:  # it cannot be named: offload_optimizer selects it
        kept["optimizer"] = "auto"
    return KernelRequest(**kept)


def keep_kernels(run_dir: Path, kernels: Mapping[str, Any]) -> None:
    """Write the kernels of a launch."""
    write_json(run_dir / KERNELS, kernels)


def kept_micro_batch(run_dir: Path, windows: int) -> int:
    """The micro-batch of the first launch, once there are checkpoints, since another one sums in another order.

    Returns:
        Sequences; 0 if none is kept that divides the `windows` of a rank and step.
    """
    size = (read_json(run_dir / MICRO_BATCH) or {}).get("train_micro_batch_size_per_gpu", 0)
    return size if has_begun(run_dir) and isinstance(size, int) and size > 0 and windows % size == 0 else 0


def keep_micro_batch(run_dir: Path, size: int, usable_gib: float) -> None:
    """Write the micro-batch that was found, and the usable memory of a rank."""
    write_json(run_dir / MICRO_BATCH, {"train_micro_batch_size_per_gpu": size, "usable_gib": usable_gib})
