"""What a finished run leaves: the exported model, its figures, its report."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from inheritune_ds import __version__
from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.report.run_report import write_run_report
from inheritune_ds.run.data import RunData
from inheritune_ds.run.export import check_logits, export_model, model_card, write_probe
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.prepare import Prepared
from inheritune_ds.storage.files import write_json
from inheritune_ds.training.engine import Engine


class RunResults:
    """The last stage of a run; on rank 0.

    Args:
        folder: The run folder.
        recipe: The experiment.
        resolved: How this machine has run it.
        prepared: What training started from.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, resolved: Resolved, prepared: Prepared) -> None:
        self._folder, self._recipe, self._resolved, self._prepared = folder, recipe, resolved, prepared

    def write(
        self,
        figures: dict[str, Any],
        parameters: Iterable[tuple[str, torch.Tensor]],
        probe: torch.Tensor,
        logits: torch.Tensor,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Export, check the export against the engine's last state, and write the report.

        Args:
            figures: Of run.json.
            parameters: Names and fp32 masters, as `Engine.full_parameters` gathers them.
            probe: Token ids (1, T).
            logits: What the engine's last state makes of them, (1, T, V).
            say: Prints one line.
        """
        folder = self._folder
        export_model(
            folder.export,
            target_folder=self._prepared.target.folder,
            tokenizer_folder=self._prepared.tokens.tokenizer_dir,
            parameters=parameters,
            dtype=self._recipe.export.dtype,
            card=model_card(self._recipe.model_dump(mode="json"), self._prepared.target.report, figures),
            recipe_fingerprint=self._recipe.fingerprint,
        )
        if self._resolved.precision == "fp32" and self._recipe.export.dtype == "float32":
            # In half precision the engine computes with rounded weights, so only the weights are compared.
            check_logits(folder.export, probe, logits)
        write_probe(folder.eval / "probe.safetensors", probe, logits)
        write_json(folder.path / "run.json", figures)
        report = write_run_report(folder.path)
        folder.write_status("finished", step=figures["steps"])
        say(_where(folder, report))

    def figures(self, data: RunData, state: TrainState, engine: Engine) -> dict[str, Any]:
        """The figures of run.json."""
        final = json.loads((self._folder.eval / f"validation-step-{state.step:08d}.json").read_text(encoding="utf-8"))
        report = self._prepared.target.report
        return {
            "name": self._recipe.name,
            "version": __version__,
            "recipe_fingerprint": self._recipe.fingerprint,
            "parameters": report["parameters"],
            "block_parameters": report["block_parameters"],
            "blocks": report["blocks"],
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "rollbacks": state.faults.rollbacks,
            "left_out_batches": [list(part) for part in state.skipped_batches],
            "tokens_seen": state.tokens,
            "unique_tokens": data.unique_tokens(state),
            "corpus_tokens": self._prepared.tokens.train_tokens,
            "epochs": state.tokens / (data.stream.num_windows * self._recipe.training.seq_len),
            "sources": data.by_source(state),
            "train_seconds": state.train_seconds,
            "world_size": engine.world.size,
            "zero_stage": self._resolved.zero_stage,
            "precision": self._resolved.precision,
            "master_weights": engine.master_weights,
            "kernels": engine.kernels.as_dict(),
            "kind": "inherited" if report["reference"] else "scratch",
            "export": "export",
            "val_loss": final["loss"],
            "val_stderr": final["stderr"],
        }


def _where(folder: RunFolder, report: Path) -> str:
    """Tell where everything of a finished run is."""
    places: Mapping[str, Path] = {
        "report": report,
        "metrics": folder.path / "metrics.jsonl",
        "inheritance": folder.path / "inheritance.json",
        "checkpoints": folder.checkpoints,
        "model": folder.export,
    }
    lines = [f"  {name:<12} {os.path.relpath(path)}" for name, path in places.items()]
    return "\n".join([f"finished: {folder.path.name}", *lines])
