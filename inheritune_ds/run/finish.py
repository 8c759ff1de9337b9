"""The last stage of a run: the exported model, its figures, its report."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from inheritune_ds import __version__
from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.report.run_report import write_run_report
from inheritune_ds.run.export import check_logits, export_model, model_card, write_probe
from inheritune_ds.run.prepare import RunSetup
from inheritune_ds.run.status import write_status
from inheritune_ds.storage.files import write_json
from inheritune_ds.training.engine import Engine

logger = logging.getLogger(__name__)


def write_results(  # noqa: PLR0913, PLR0917 - the parts of the last state
    setup: RunSetup,
    engine: Engine,
    state: TrainState,
    parameters: Iterable[tuple[str, torch.Tensor]],
    probe: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """Export, compare the export with the engine's last state, and write the report; on rank 0.

    Args:
        setup: The run.
        engine: The trained target.
        state: The last one.
        parameters: Names and fp32 masters of `Engine.full_parameters`.
        probe: Token ids, (1, T).
        logits: The engine's logits of the probe, (1, T, V).
    """
    folder, recipe = setup.folder, setup.recipe
    figures = _figures(setup, engine, state)
    export_model(
        folder.export,
        target_folder=setup.target.folder,
        tokenizer_folder=setup.data.tokens.tokenizer_dir,
        parameters=parameters,
        dtype=recipe.export.dtype,
        card=model_card(recipe.model_dump(mode="json"), setup.target.report, figures),
        recipe_fingerprint=recipe.fingerprint,
    )
    if setup.resolved.precision == "fp32" and recipe.export.dtype == "float32":
        # In half precision the engine computes with rounded weights, so only the weights are compared.
        check_logits(folder.export, probe, logits, engine.kernels, engine.device)
    write_probe(folder.eval / "probe.safetensors", probe, logits)
    write_json(folder.path / "run.json", figures)
    places: dict[str, Path] = {
        "report": write_run_report(folder.path),
        "metrics": folder.path / "metrics.jsonl",
        "inheritance": folder.path / "inheritance.json",
        "checkpoints": folder.checkpoints,
        "model": folder.export,
    }
    write_status(folder.path, "finished", step=state.step)
    lines = [f"  {name:<12} {os.path.relpath(path)}" for name, path in places.items()]
    logger.info("\n".join([f"finished: {folder.path.name}", *lines]))


def _figures(setup: RunSetup, engine: Engine, state: TrainState) -> dict[str, Any]:
    """The figures of run.json."""
    path = setup.folder.eval / f"validation-step-{state.step:08d}.json"
    final = json.loads(path.read_text(encoding="utf-8"))
    recipe, data, report = setup.recipe, setup.data, setup.target.report
    return {
        "name": recipe.name,
        "version": __version__,
        "recipe_fingerprint": recipe.fingerprint,
        "parameters": report["parameters"],
        "block_parameters": report["block_parameters"],
        "blocks": report["blocks"],
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "rollbacks": state.faults.rollbacks,
        "left_out_batches": [list(part) for part in state.skipped_batches],
        "tokens_seen": state.tokens,
        "unique_tokens": data.unique_tokens(state),
        "corpus_tokens": data.tokens.train_tokens,
        "epochs": state.tokens / (data.stream.num_windows * recipe.training.seq_len),
        "sources": data.by_source(state),
        "train_seconds": state.train_seconds,
        "world_size": engine.world.size,
        "zero_stage": setup.resolved.zero_stage,
        "precision": setup.resolved.precision,
        "master_weights": engine.master_weights,
        "kernels": engine.kernels.as_dict(),
        "kind": "inherited" if report["reference"] else "scratch",
        "export": "export",
        "val_loss": final["loss"],
        "val_stderr": final["stderr"],
    }
