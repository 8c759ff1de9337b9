"""The flow of one run: claim the folder, prepare, train, export, report. The same command again goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inheritune_ds.checkpoints.manifest import newest_step, published
from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.store import require_space
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.environment import keep_freed_memory
from inheritune_ds.distributed.process_group import rank_is_gone, start_process_group
from inheritune_ds.distributed.signals import EXIT_INTERRUPTED
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.errors import InherituneError, RunFolderError, StorageError, TrainingError
from inheritune_ds.plan.budget import CHECKPOINTS_IN_HAND, checkpoints_staying
from inheritune_ds.plan.gpus import identify, mfu
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.plan.model_size import checkpoint_bytes, flops_per_token
from inheritune_ds.run.data import RECORD as DATA_RECORD
from inheritune_ds.run.data import RunData
from inheritune_ds.run.export import PROBE_TOKENS
from inheritune_ds.run.finish import RunResults
from inheritune_ds.run.folder import FolderBusyError, RunFolder, State, with_revisions
from inheritune_ds.run.kept_kernels import keep, kept_request, refuse_replaced_loss
from inheritune_ds.run.launch import Launch
from inheritune_ds.run.prepare import Prepared, open_prepared, prepare_run, validator_for
from inheritune_ds.run.resume import Resumption
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.surgery.load import load_model
from inheritune_ds.tracking.recorder import Recorder, RunRecorder
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels, choose_kernels
from inheritune_ds.training.loop import LoopParts, train
from inheritune_ds.training.micro_batch import with_tried_micro_batch
from inheritune_ds.training.optimizer import parameter_groups
from inheritune_ds.training.requests import Controls

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def execute(
    recipe: Recipe, resolved: Resolved, launch: Launch, *, fresh: bool = False, waiting: Sequence[RunFolder] = ()
) -> bool:
    """Bring a recipe to its end, its reference first if that is a recipe of its own.

    Args:
        recipe: The experiment.
        resolved: Its DeepSpeed config on this machine.
        launch: How this process was started.
        fresh: Whether the run starts over; what is there is set aside.
        waiting: Folders of the runs that this one is the reference of; their status tells how it ends.

    Returns:
        Whether it is finished; False if a signal stopped it (status.json then says `requeue`).

    Raises:
        InherituneError: For everything a user can act on; status.json then says `failed`.
    """
    folder = RunFolder(launch.runs_dir / recipe.name)
    if not fresh and launch.meeting.run_on_rank0(lambda: folder.has_finished(recipe)):
        launch.say(folder.finished_before)
        return True
    try:
        # Before the reference, which may take days: a folder that is another recipe's is told at once, and whoever
        # reads this run's status.json learns how the reference has ended.
        launch.meeting.run_on_rank0(lambda: _claim(recipe, folder, launch, fresh=fresh))
        if not _reference_ready(recipe, launch, [folder, *waiting]):
            return False
        return _Run(recipe, resolved, folder, launch, waiting).run()
    except InherituneError as error:
        _mark(folder, "failed", error.problem, exit_code=error.exit_code)
        raise
    except KeyboardInterrupt:
        _mark(folder, "requeue", f"{launch.stop.requested}: stopped between stages", exit_code=EXIT_INTERRUPTED)
        raise
    except Exception as error:
        if rank_is_gone(error):
            lost = TrainingError(
                f"another rank has gone: {str(error).strip().splitlines()[-1].partition('. ')[0]}",
                action="see how it has ended (memory, its machine, the network), then give the same command again: it "
                "goes on from the newest checkpoint",
            )
            _mark(folder, "failed", lost.problem, exit_code=lost.exit_code)
            raise lost from None
        _mark(folder, "failed", f"{type(error).__name__}: {error}", exit_code=1)
        raise
    finally:
        folder.release()


def _claim(recipe: Recipe, folder: RunFolder, launch: Launch, *, fresh: bool) -> None:
    """Make the run folder this launch's own; on rank 0."""
    if fresh and (aside := folder.set_aside()) is not None:
        launch.say(f"--fresh: the run that was there is set aside as {aside}")
    folder.claim(recipe)


def _mark(folder: RunFolder, state: State, reason: str, *, exit_code: int = 0) -> None:
    """Write how the run stands, with the step of its newest checkpoint; on the rank that has the folder."""
    if folder.is_claimed:
        with suppress(StorageError):  # a full disk: what ended the run matters more, and is told on the console
            folder.write_status(state, step=_newest_step(folder), reason=reason, exit_code=exit_code)


def _newest_step(folder: RunFolder) -> int:
    """Step of the newest checkpoint, for status.json and the watchdog; the last that was told if no disk answers."""
    try:
        return newest_step(folder.checkpoints)
    except OSError:
        return int(folder.status().get("step", 0))


def _reference_ready(recipe: Recipe, launch: Launch, waiting: Sequence[RunFolder]) -> bool:
    """Train a `recipe:NAME` reference first; False if that was stopped, and the folders that wait for it say so."""
    if recipe.reference is None or recipe.reference.recipe_name is None or recipe.target.inherits_nothing:
        return True
    reference = load_recipe(recipe.reference.recipe_name)
    folder = waiting[0]
    _mark(folder, "preparing", f"waits for its reference {reference.name}")
    try:
        # Every recipe of the chain is checked before any of them trains.
        if execute(reference, launch.resolve(reference), launch, waiting=waiting):
            return True
    except FolderBusyError as error:
        raise RunFolderError(
            f"{recipe.name} needs its reference {reference.name}, which another process is training: {error.problem}",
            action="give the same command again when that process has finished",
        ) from None
    _mark(folder, "requeue", f"its reference {reference.name} was stopped")
    return False


class _Run:
    """The stages of one run whose folder is claimed."""

    def __init__(
        self, recipe: Recipe, resolved: Resolved, folder: RunFolder, launch: Launch, waiting: Sequence[RunFolder]
    ) -> None:
        self._recipe, self._resolved, self._folder, self._launch = recipe, resolved, folder, launch
        self._waiting, self._world = waiting, launch.world
        self._layout = SavedLayout(launch.world.size, resolved.zero_stage, resolved.precision)
        self._resumption = Resumption(folder, recipe, self._layout, launch.say)

    def run(self) -> bool:
        launch = self._launch
        found = launch.meeting.run_on_rank0(self._prepare)
        prepared = open_prepared(found["prepared"], self._folder)
        if launch.machine.kind == "cpu":
            launch.say("starting DeepSpeed (it builds its CPU operator on first use: about half a minute)")
        watch = Watchdog(self._resolved.reliability, self._world, self._folder.path, on_hang=self._hung)
        try:
            with watch.phase("start", _newest_step(self._folder)):
                start_process_group(self._world)
                data = RunData(self._recipe, prepared.tokens)
                engine = self._build(prepared, data)
            try:
                return self._train(engine, data, prepared, found["checkpoint"], watch)
            finally:
                engine.close()
        finally:
            watch.close()

    def _hung(self, reason: str, exit_code: int) -> None:
        """Write down why the watchdog ends this launch; called on a thread of its own."""
        for folder in (self._folder, *self._waiting):
            _mark(folder, "failed", reason, exit_code=exit_code)

    def _prepare(self) -> dict[str, Any]:
        """Choose where to go on and make everything that training starts from; on rank 0."""
        launch, folder = self._launch, self._folder
        with launch.stop.interruptible():  # once the folder is claimed, status.json can tell of a signal
            self._resumption.begin()
            chosen = self._resumption.choose()
            folder.write_status("preparing", step=_newest_step(folder))
            folder.write_provenance({"world_size": self._world.size, "launcher": self._world.launcher})
            self._write_ds_config()
            prepared = prepare_run(
                self._recipe,
                folder,
                cache_dir=launch.cache_dir,
                export_of=lambda name: launch.runs_dir / load_recipe(name).name / "export",
            )
            parameters = prepared.target.report["parameters"]
            rule, there = self._recipe.checkpoint, sum(1 for _ in published(folder.checkpoints))
            missing = max(0, checkpoints_staying(rule, RunData(self._recipe, prepared.tokens).total_steps) - there)
            size = checkpoint_bytes(parameters)
            require_space(folder.checkpoints, size, count=missing + CHECKPOINTS_IN_HAND)
        return {"prepared": prepared.note, "checkpoint": chosen}

    def _build(self, prepared: Prepared, data: RunData) -> Engine:
        """The target under DeepSpeed, as the recipe and this machine want it."""
        launch, folder = self._launch, self._folder
        model = load_model(prepared.target.folder, dtype="float32")
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
        return engine

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
                kept_request(self._folder.path, resolved.kernels, launch.say),
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

        kernels = Kernels(**launch.meeting.run_on_rank0(choose))  # one choice for all ranks
        if launch.machine.kind == "cpu":
            launch.say(f"allocator: {keep_freed_memory()}")
        return kernels

    def _train(
        self, engine: Engine, data: RunData, prepared: Prepared, chosen: Mapping[str, Any] | None, watch: Watchdog
    ) -> bool:
        """Go on from the chosen checkpoint to the end, and export; False if the run was stopped before."""
        recipe, world, launch = self._recipe, self._world, self._launch
        resumption = self._resumption
        controls = Controls(self._folder.path, launch.stop, world, max_minutes=launch.max_minutes)
        with watch.phase("start", _newest_step(self._folder)):
            saver = Saver(
                resumption.store,
                layout=self._layout,
                world=world,
                reliability=self._resolved.reliability,
                fingerprints=self._fingerprints(),
                say=launch.say,
            )
            state = resumption.restore(engine, saver, chosen)
            recorder = (
                Recorder()
                if not world.is_main
                else RunRecorder(
                    self._folder.path,
                    recipe,
                    data.total_steps,
                    state,
                    on_saved=lambda step: self._folder.write_status("running", step=step),
                )
            )
            _mark(self._folder, "running", "")
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
            saver=saver,
            restore=lambda: resumption.restore(engine, saver, launch.meeting.run_on_rank0(resumption.choose)),
            recorder=recorder,
            controls=controls,
            watch=watch,
            world=world,
            eval_dir=self._folder.eval,
            micro_batch_size=self._resolved.micro_batch_size,
            utilisation=self._utilisation(),
            data_metrics=data.metrics,
        )
        failure: BaseException | None = None
        try:
            result = train(parts, data.total_steps, state)
        except BaseException as error:
            failure = error
            raise
        finally:
            with watch.phase("finish", _newest_step(self._folder)):
                self._close((saver.close, recorder.close), failure)
        if not result.finished:
            reached = result.state.step
            done = f"saved at step {reached}" if reached else "before the first step"
            with watch.phase("finish", reached):
                _mark(self._folder, "requeue", f"{controls.reason}: {done}")
            launch.say(f"stopped {'and ' if reached else ''}{done}; the same command goes on from there")
            return False
        with watch.phase("finish", result.state.step):
            self._finish(engine, prepared, data, result.state)
        return True

    def _close(self, ways: Sequence[Callable[[], None]], failure: BaseException | None) -> None:
        """Close everything; what has failed first ends the run, and what fails after it is a line."""
        for close in ways:
            try:
                close()
            except InherituneError as error:
                if failure is not None:
                    self._launch.say(f"WARNING: {error.problem}")
                else:
                    failure = error
        if isinstance(failure, InherituneError):
            raise failure

    def _fingerprints(self) -> dict[str, Any]:
        """What a checkpoint is of: recipe, data and code."""
        record = read_json(self._folder.path / DATA_RECORD) or {}
        provenance = read_json(self._folder.path / "provenance.json") or {}
        return {
            "recipe": with_revisions(self._recipe, self._folder.pin_of).fingerprint,
            "data": record.get("fingerprint"),
            "code": {key: provenance.get(key) for key in ("inheritune_ds", "git", "packages")},
        }

    def _utilisation(self) -> Any:
        """tokens/s -> MFU, on a GPU whose peak is known."""
        shape, gpus = self._resolved.shape, detect_gpus()
        gpu = identify(gpus[0].name) if gpus else None
        if self._launch.machine.kind != "cuda" or shape is None or gpu is None:
            return None
        flops = flops_per_token(*shape, self._recipe.training.seq_len)
        return lambda tokens_per_s: mfu(tokens_per_s, flops, gpu, self._world.size)

    def _finish(self, engine: Engine, prepared: Prepared, data: RunData, state: TrainState) -> None:
        """Gather the trained state, let rank 0 write everything, and leave together; all ranks."""
        self._launch.say("exporting")
        probe = data.held_out.read(np.zeros(1, dtype=np.int64))[:, :PROBE_TOKENS]
        logits = engine.probe_logits(probe)
        parameters = engine.full_parameters()
        results = RunResults(self._folder, self._recipe, self._resolved, prepared)

        def write() -> None:
            try:
                figures = results.figures(data, state, engine)
                results.write(figures, parameters, torch.from_numpy(probe), logits, say=self._launch.say)
            finally:
                _gather(parameters)

        if not self._world.is_main:
            _gather(parameters)
        self._launch.meeting.run_on_rank0(write)


def _gather(parameters: Iterator[object]) -> None:
    """Take part in gathering what is left: all ranks do, whatever happens to the export on rank 0."""
    for _ in parameters:
        pass
