"""The flow of one run: claim the folder, prepare, train, export, report. The same command again goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from inheritune_ds import __version__
from inheritune_ds.analysis.report import write_run_report
from inheritune_ds.budget import flops_per_token
from inheritune_ds.errors import InherituneError, RunFolderError, StorageError
from inheritune_ds.export import PROBE_TOKENS, check_logits, export_model, model_card, write_probe
from inheritune_ds.files import write_json
from inheritune_ds.gpus import identify, mfu
from inheritune_ds.kept_kernels import keep, kept_request, refuse_replaced_loss
from inheritune_ds.machine import detect_gpus
from inheritune_ds.micro_batch_search import with_tried_micro_batch
from inheritune_ds.preparation import Prepared, open_prepared, prepare_run, validator_for
from inheritune_ds.recipe import Recipe
from inheritune_ds.recipe_file import load_recipe
from inheritune_ds.recorder import RunRecorder, SilentRecorder
from inheritune_ds.run_data import RunData
from inheritune_ds.run_folder import FolderBusyError, RunFolder, State
from inheritune_ds.shapes import target_shape
from inheritune_ds.surgery.reference import load_model
from inheritune_ds.training.allocator import keep_freed_memory
from inheritune_ds.training.checkpoints import Checkpoints, Layout, RunState, newest_step, refuse_other_layout
from inheritune_ds.training.ds_config import Machine, Resolved, resolve
from inheritune_ds.training.engine import Engine, start_process_group
from inheritune_ds.training.kernels import Kernels, choose_kernels
from inheritune_ds.training.loop import LoopParts, LoopResult, train
from inheritune_ds.training.meeting import Meeting
from inheritune_ds.training.optimizer import parameter_groups
from inheritune_ds.training.world import EXIT_INTERRUPTED, StopSignal, World

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """How this process was started: everything that is not the experiment.

    Attributes:
        ds_document: The user's DeepSpeed JSON.
        ds_origin: How to call it in messages.
        machine: What one rank has.
        world: This rank among all.
        stop: Its signals.
        runs_dir: Run folders stand below it.
        cache_dir: Token files stand below it.
        auto_micro_batch: Whether the micro-batch is found by trying.
    """

    ds_document: dict[str, Any]
    ds_origin: str
    machine: Machine
    world: World
    stop: StopSignal
    runs_dir: Path
    cache_dir: Path
    auto_micro_batch: bool = False

    @cached_property
    def meeting(self) -> Meeting:
        """Where the ranks wait for rank 0."""
        return Meeting(self.world)

    def resolve(self, recipe: Recipe) -> Resolved:
        """The DeepSpeed config of a recipe on this machine."""
        return resolve(
            self.ds_document,
            recipe,
            origin=self.ds_origin,
            shape=target_shape(recipe),
            world_size=self.world.size,
            machine=self.machine,
        )

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""
        if self.world.is_main:
            print(line, flush=True)


def execute(recipe: Recipe, launch: Launch) -> bool:
    """Bring a recipe to its end, its reference first if that is a recipe of its own.

    Returns:
        Whether it is finished; False if a signal stopped it (status.json then says `requeue`).

    Raises:
        InherituneError: For everything a user can act on; status.json then says `failed`.
    """
    resolved = launch.resolve(recipe)  # every recipe of the chain is checked before any of them trains
    folder = RunFolder(launch.runs_dir / recipe.name)
    if launch.meeting.by_main(lambda: folder.has_finished(recipe)):
        launch.say(folder.finished_before)
        return True
    if not _reference_ready(recipe, launch):
        return False
    try:
        return _Run(recipe, resolved, folder, launch).run()
    except InherituneError as error:
        _mark(folder, "failed", error.problem, exit_code=error.exit_code)
        raise
    except KeyboardInterrupt:
        _mark(folder, "requeue", f"{launch.stop.requested}: stopped between stages", exit_code=EXIT_INTERRUPTED)
        raise
    except Exception as error:
        _mark(folder, "failed", f"{type(error).__name__}: {error}", exit_code=1)
        raise
    finally:
        folder.release()


def _mark(folder: RunFolder, state: State, reason: str, *, exit_code: int = 0) -> None:
    """Write how the run ended, with the step of its newest checkpoint; on the rank that has the folder."""
    if folder.is_claimed:
        with suppress(StorageError):  # a full disk: what ended the run matters more, and is told on the console
            folder.write_status(state, step=newest_step(folder.checkpoints), reason=reason, exit_code=exit_code)


def _reference_ready(recipe: Recipe, launch: Launch) -> bool:
    """Train a `recipe:NAME` reference first; False if that was stopped."""
    if recipe.reference is None or recipe.reference.recipe_name is None or recipe.target.inherits_nothing:
        return True
    reference = load_recipe(recipe.reference.recipe_name)
    try:
        return execute(reference, launch)
    except FolderBusyError as error:
        raise RunFolderError(
            f"{recipe.name} needs its reference {reference.name}, which another process is training: {error.problem}",
            action="give the same command again when that process has finished",
        ) from None


class _Run:
    """The stages of one run whose folder is claimed."""

    def __init__(self, recipe: Recipe, resolved: Resolved, folder: RunFolder, launch: Launch) -> None:
        self._recipe, self._resolved, self._folder, self._launch = recipe, resolved, folder, launch
        self._world = launch.world
        self._layout = Layout(launch.world.size, resolved.zero_stage, resolved.precision)

    def run(self) -> bool:
        launch, folder = self._launch, self._folder
        prepared = open_prepared(launch.meeting.by_main(self._prepare), folder)
        if launch.machine.kind == "cpu":
            launch.say("starting DeepSpeed (it builds its CPU operator on first use: about half a minute)")
        start_process_group(self._world)
        model = load_model(prepared.target.folder, dtype="float32")
        data = RunData(self._recipe, prepared.tokens)
        run_tokens = data.total_steps * self._recipe.training.global_batch_tokens
        kernels = self._choose_kernels(model.config, 6.0 * model.num_parameters() * run_tokens / self._world.size)
        if launch.auto_micro_batch:
            self._resolved = with_tried_micro_batch(
                self._resolved,
                self._recipe,
                prepared.target.folder,
                folder.path,
                kernels=kernels,
                packing=data.packing,
                launch=launch,
            )
        groups = parameter_groups(model, self._recipe.optimizer.weight_decay)
        engine = Engine(model, self._resolved.config, self._world, kernels, data.packing)
        for note in engine.notes:
            launch.say(note)
        refuse_replaced_loss(self._resolved.kernels, engine.kernels, "; ".join(engine.notes))
        if self._world.is_main:
            keep(folder.path, engine.kernels)
            self._write_ds_config(engine.kernels, groups)
        try:
            result = self._train(engine, data)
            if not result.finished:
                reason = f"{launch.stop.requested or 'another rank'}: saved at step {result.state.step}"
                _mark(folder, "requeue", reason)
                launch.say(f"stopped and saved at step {result.state.step}; the same command goes on from there")
                return False
            self._finish(engine, prepared, data, result.state)
        finally:
            engine.close()
        return True

    def _prepare(self) -> dict[str, str]:
        """Claim the folder and make everything that training starts from; on rank 0."""
        launch, folder = self._launch, self._folder
        folder.claim(self._recipe)
        refuse_other_layout(folder.checkpoints, self._layout)
        folder.write_status("preparing", step=newest_step(folder.checkpoints))
        folder.write_provenance({"world_size": self._world.size, "launcher": self._world.launcher})
        self._write_ds_config()
        prepared = prepare_run(
            self._recipe,
            folder,
            cache_dir=launch.cache_dir,
            export_of=lambda name: launch.runs_dir / load_recipe(name).name / "export",
            say=launch.say,
        )
        return prepared.note

    def _write_ds_config(self, kernels: Kernels | None = None, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write ds_config.resolved.json, with kernels and parameter groups once the model is known."""
        document = dict(self._resolved.config)
        if kernels is not None:
            # DeepSpeed ignores a top-level key that it does not know, so the file stays readable by its tools.
            document["kernels"] = kernels.as_dict()
            document["parameter_groups"] = [
                {"weight_decay": group["weight_decay"], "parameters": group["names"]} for group in groups
            ]
        write_json(self._folder.path / "ds_config.resolved.json", document)

    def _choose_kernels(self, config: "PreTrainedConfig", flops: float) -> Kernels:
        """Settle what computes the model on this machine, and say why; a function of the recipe, not of the step."""
        resolved, launch = self._resolved, self._launch

        def choose() -> dict[str, Any]:
            kernels, notes = choose_kernels(
                kept_request(self._folder.path, resolved.kernels),
                config=config,
                device=torch.device(launch.machine.kind),
                dtype=_TORCH_TYPES[resolved.precision],
                zero_stage=resolved.zero_stage,
                offload=resolved.offloads_optimizer,
                run_flops=flops,
            )
            for note in notes:
                launch.say(note)
            return kernels.as_dict()

        kernels = Kernels(**launch.meeting.by_main(choose))  # one choice for all ranks
        if launch.machine.kind == "cpu":
            launch.say(f"allocator: {keep_freed_memory()}")
        return kernels

    def _train(self, engine: Engine, data: RunData) -> LoopResult:
        recipe, world, launch = self._recipe, self._world, self._launch
        checkpoints = Checkpoints(
            self._folder.checkpoints,
            layout=self._layout,
            world=world,
            keep=recipe.checkpoint.keep,
            say=launch.say,
        )
        state = checkpoints.resume(engine)
        recorder = RunRecorder(self._folder, recipe, data.total_steps, state) if world.is_main else SilentRecorder()
        parts = LoopParts(
            recipe=recipe,
            engine=engine,
            stream=data.stream,
            validator=validator_for(
                recipe,
                data,
                batch_size=self._resolved.micro_batch_size,
                rank=world.rank,
                size=world.size,
            ),
            checkpoints=checkpoints,
            recorder=recorder,
            stop=launch.stop,
            world=world,
            eval_dir=self._folder.eval,
            micro_batch_size=self._resolved.micro_batch_size,
            utilisation=self._utilisation(),
            data_metrics=data.metrics,
        )
        if world.is_main:
            self._folder.write_status("running", step=state.step if state else 0)
        launch.stop.deferred = True
        try:
            return train(parts, data.total_steps, state)
        finally:
            launch.stop.deferred = False
            recorder.close()

    def _utilisation(self) -> Any:
        """tokens/s -> MFU, on a GPU whose peak is known."""
        shape, gpus = target_shape(self._recipe), detect_gpus()
        gpu = identify(gpus[0].name) if gpus else None
        if self._launch.machine.kind != "cuda" or shape is None or gpu is None:
            return None
        flops = flops_per_token(*shape, self._recipe.training.seq_len)
        return lambda tokens_per_s: mfu(tokens_per_s, flops, gpu, self._world.size)

    def _finish(self, engine: Engine, prepared: Prepared, data: RunData, state: RunState) -> None:
        """Gather the trained state, let rank 0 write everything, and leave together; all ranks."""
        self._launch.say("exporting")
        probe = data.held_out.read(np.zeros(1, dtype=np.int64))[:, :PROBE_TOKENS]
        logits = engine.probe_logits(probe)
        # All ranks take part in gathering each tensor; rank 0 keeps it.
        parameters = {name: value for name, value in engine.full_parameters() if self._world.is_main}
        self._launch.meeting.by_main(
            lambda: self._write_results(
                prepared, self._result(prepared, data, state, engine), parameters, probe, logits
            )
        )

    def _write_results(
        self,
        prepared: Prepared,
        result: dict[str, Any],
        parameters: Mapping[str, torch.Tensor],
        probe: npt.NDArray[np.int64],
        logits: torch.Tensor,
    ) -> None:
        """Export, check the export against the engine's last state, and write the report; on rank 0."""
        launch, folder = self._launch, self._folder
        export_model(
            folder.export,
            target_folder=prepared.target.folder,
            tokenizer_folder=prepared.tokens.tokenizer_dir,
            parameters=parameters,
            dtype=self._recipe.export.dtype,
            card=model_card(self._recipe.model_dump(mode="json"), prepared.target.report, result),
            recipe_fingerprint=self._recipe.fingerprint,
        )
        if self._resolved.precision == "fp32" and self._recipe.export.dtype == "float32":
            # In half precision the engine computes with rounded weights, so only the weights are compared.
            check_logits(folder.export, torch.from_numpy(probe), logits)
        write_probe(folder.eval / "probe.safetensors", torch.from_numpy(probe), logits)
        write_json(folder.path / "run.json", result)
        report = write_run_report(folder.path)
        folder.write_status("finished", step=result["steps"])
        launch.say(_where(folder, report))

    def _result(self, prepared: Prepared, data: RunData, state: RunState, engine: Engine) -> dict[str, Any]:
        """The figures of run.json."""
        final = json.loads((self._folder.eval / f"validation-step-{state.step:08d}.json").read_text(encoding="utf-8"))
        return {
            "name": self._recipe.name,
            "version": __version__,
            "recipe_fingerprint": self._recipe.fingerprint,
            "parameters": prepared.target.report["parameters"],
            "block_parameters": prepared.target.report["block_parameters"],
            "blocks": prepared.target.report["blocks"],
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "tokens_seen": state.tokens,
            "unique_tokens": data.unique_tokens(state.step),
            "corpus_tokens": prepared.tokens.train_tokens,
            "epochs": state.tokens / (data.stream.num_windows * self._recipe.training.seq_len),
            "sources": data.by_source(state.step),
            "train_seconds": state.train_seconds,
            "world_size": self._world.size,
            "zero_stage": self._resolved.zero_stage,
            "precision": self._resolved.precision,
            "master_weights": engine.master_weights,
            "kernels": engine.kernels.as_dict(),
            "kind": "inherited" if prepared.target.report["reference"] else "scratch",
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
