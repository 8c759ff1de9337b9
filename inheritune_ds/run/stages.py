"""The stages of a launch after its preparation, in their order: kernels, micro-batch, engine, resume, train, finish."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.deepspeed import MICRO_BATCH
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.distributed.coordination import agree
from inheritune_ds.distributed.environment import keep_freed_memory
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.errors import InherituneError, RecipeError, TrainingError
from inheritune_ds.evaluation.reference_loss import BATCH_SIZE, ReferenceLoss
from inheritune_ds.plan.gpus import identify, mfu
from inheritune_ds.plan.model_size import flops_per_token
from inheritune_ds.run import identity
from inheritune_ds.run.export import PROBE_TOKENS
from inheritune_ds.run.finish import write_results
from inheritune_ds.run.prepare import DS_CONFIG, RunSetup
from inheritune_ds.run.status import write_status
from inheritune_ds.storage.files import write_json
from inheritune_ds.surgery.load import load_config
from inheritune_ds.tracking.recorder import Recorder, RunRecorder
from inheritune_ds.training import loop, micro_batch
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels, choose_kernels
from inheritune_ds.training.load import load_target
from inheritune_ds.training.optimizer import parameter_groups
from inheritune_ds.training.requests import Controls

logger = logging.getLogger(__name__)

_TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_kernels(setup: RunSetup) -> Kernels:
    """Choose the kernels on this machine, as a function of the recipe, not of the step."""
    launch, resolved = setup.launch, setup.resolved
    tokens = setup.total_steps * setup.recipe.training.global_batch_tokens

    def choose() -> dict[str, Any]:
        kernels, notes = choose_kernels(
            identity.kept_kernels(setup.folder.path, resolved.kernels),
            config=load_config(setup.target.folder),
            device=torch.device(launch.machine.kind),
            dtype=_TORCH_TYPES[resolved.precision],
            zero_stage=resolved.zero_stage,
            offload=resolved.offloads_optimizer,
            run_flops=6.0 * setup.target.report["parameters"] * tokens / launch.world.size,
            documents=setup.data.packing is not None,
        )
        for note in notes:
            logger.info(note)
        return kernels.as_dict()

    kernels = Kernels(**launch.meeting.run_on_rank0(choose))  # the same on all ranks
    if launch.machine.kind == "cpu":
        logger.info("allocator: %s", keep_freed_memory())
    return kernels


def with_micro_batch(setup: RunSetup, kernels: Kernels) -> RunSetup:
    """With --auto-micro-batch, find the largest micro-batch that fits in real steps; all ranks call it together.

    A run with checkpoints keeps that of its first launch.

    Raises:
        MachineError: If none fits.
        RecipeError: Under ZeRO-3.
    """
    launch, resolved = setup.launch, setup.resolved
    if not launch.auto_micro_batch:
        return setup
    if resolved.zero_stage == 3:
        raise RecipeError(
            "--auto-micro-batch does not work with ZeRO-3: DeepSpeed does not free the memory of a trial",
            allowed="ZeRO-1 or 2",
            action=f"set {MICRO_BATCH} in the DeepSpeed config; inheritune-ds plan prints what fits",
        )
    run_dir, windows = setup.folder.path, setup.recipe.training.batch_windows // launch.world.size
    size = launch.meeting.run_on_rank0(lambda: identity.kept_micro_batch(run_dir, windows))
    if size:
        logger.info("%s: %d (found at this run's first launch)", MICRO_BATCH, size)
    else:
        limit_gib = micro_batch.USABLE_RATIO * launch.machine.memory_gib  # the same on all ranks
        logger.info("trying micro-batches with real steps (--auto-micro-batch)")
        size = micro_batch.find_largest(
            resolved,
            setup.recipe,
            setup.target.folder,
            kernels=kernels,
            packing=setup.data.packing,
            world=launch.world,
            limit_gib=limit_gib,
        )
        logger.info("%s: %d (the largest below %.1f GiB per rank)", MICRO_BATCH, size, limit_gib)
        launch.meeting.run_on_rank0(lambda: identity.keep_micro_batch(run_dir, size, limit_gib))
    return replace(setup, resolved=micro_batch.with_size(resolved, size, windows // size))


def score_reference(setup: RunSetup) -> None:
    """Write the reference's loss on the validation windows, unless it is there; all ranks call it together.

    The ranks share the windows, if all of them see the reference's folder.

    Raises:
        KeyboardInterrupt: On all ranks, if one was asked to stop.
    """
    if setup.reference is None:
        return
    launch, recipe, data = setup.launch, setup.recipe, setup.data
    scoring = ReferenceLoss(
        setup.folder.eval / "reference.json",
        setup.reference,
        setup.resolved.precision,
        settings={
            "tokens": data.tokens.fingerprint,
            "seq_len": recipe.training.seq_len,
            "max_tokens": recipe.validation.max_tokens,
            "packing": recipe.training.packing,
            "source_weights": recipe.corpus.weights,
        },
    )
    if launch.meeting.run_on_rank0(scoring.is_known):
        return
    device, world = torch.device(launch.machine.kind), launch.world

    def evaluate(rank: int, size: int, stop: Callable[[], bool]) -> bool:
        validator = data.validator(batch_size=BATCH_SIZE, rank=rank, size=size)
        return scoring.evaluate(validator, data.packing, device, write=rank == 0, stop=stop)

    def asked() -> bool:
        return launch.stop.requested is not None

    if agree(not setup.reference.folder.is_dir(), device):
        done = launch.meeting.run_on_rank0(lambda: evaluate(0, 1, asked))
    else:
        done = evaluate(world.rank, world.size, lambda: agree(asked(), device))
    if not done:
        raise KeyboardInterrupt


def build_engine(setup: RunSetup, kernels: Kernels) -> Engine:
    """Load the target into DeepSpeed's engine."""
    resolved, world = setup.resolved, setup.launch.world
    # DeepSpeed collects garbage several times while it builds an engine, which would search all imported modules.
    gc.collect()
    gc.freeze()
    model = load_target(setup.target.folder, resolved.config)
    carried = setup.carried.names if setup.carried is not None else ()
    groups = parameter_groups(model, setup.recipe.optimizer.weight_decay, carried)
    engine = Engine(
        model, resolved.config, world, kernels, setup.data.packing, target=setup.target.folder, carried=carried
    )
    for note in engine.notes:
        logger.info(note)
    refuse_replaced_loss(resolved.kernels, engine.kernels, "; ".join(engine.notes))
    if world.is_main:
        identity.keep_kernels(setup.folder.path, engine.kernels.as_dict())
        # DeepSpeed ignores unknown top-level keys, so its tools can read the file.
        listed = [
            {"weight_decay": group["weight_decay"], "parameters": group["names"]} for group in groups if group["names"]
        ]
        own = {"kernels": engine.kernels.as_dict(), "parameter_groups": listed}
        write_json(setup.folder.path / DS_CONFIG, {**resolved.config, **own})
    return engine


def refuse_replaced_loss(request: KernelRequest, kernels: Kernels, reason: str) -> None:
    """Refuse a named loss kernel that the model cannot use."""
    if request.loss not in ("auto", kernels.loss):
        raise RecipeError(
            f"kernels.loss: {request.loss} is named, but it cannot be used: {reason}",
            allowed='"auto" or "plain"',
            action='write "auto" for kernels.loss',
        )


def resume(setup: RunSetup, engine: Engine) -> tuple[Saver, TrainState | None]:
    """Restore the chosen checkpoint; the state is None at the start of a run, which may carry optimizer state."""
    saver = Saver(
        setup.resumption.store,
        layout=setup.resumption.layout,
        world=setup.launch.world,
        reliability=setup.resolved.reliability,
        fingerprints=setup.fingerprints,
    )
    if setup.checkpoint is None and setup.carried is not None and (source := setup.carried.opened()) is not None:
        engine.carry(source, setup.carried.names)
        logger.info("optimizer state: carried from %s (%d parameters)", source.path, len(setup.carried.names))
    return saver, setup.resumption.restore(engine, saver, setup.checkpoint)


@dataclass(frozen=True)
class Outcome:
    """The end of a launch's training."""

    state: TrainState
    """The last one, which is saved."""
    stopped: str
    """Why it ended before the last step; empty after the last step."""


def train(setup: RunSetup, engine: Engine, saver: Saver, state: TrainState | None, watch: Watchdog) -> Outcome:
    """Train to the last step or a stop; then close checkpoints and logs."""
    launch, folder, data = setup.launch, setup.folder, setup.data
    world, resumption, micro_batch_size = launch.world, setup.resumption, setup.resolved.micro_batch_size
    controls = Controls(folder.path, launch.stop, world, max_minutes=launch.max_minutes)
    with watch.phase("start", folder.newest_step()):
        recorder = _open_recorder(setup, state)
        folder.mark("running")
    parts = loop.LoopParts(
        recipe=setup.recipe,
        engine=engine,
        stream=data.stream,
        validator=data.validator(batch_size=micro_batch_size, rank=world.rank, size=world.size),
        saver=saver,
        restore=lambda: resumption.restore(engine, saver, launch.meeting.run_on_rank0(resumption.choose)),
        recorder=recorder,
        controls=controls,
        watch=watch,
        world=world,
        eval_dir=folder.eval,
        micro_batch_size=micro_batch_size,
        utilization=_utilization(setup),
        data_metrics=data.metrics,
    )
    failure: BaseException | None = None
    try:
        result = loop.train(parts, setup.total_steps, state)
    except BaseException as error:
        failure = error
        raise
    finally:
        with watch.phase("finish", folder.newest_step()):
            _close((saver.close, recorder.close), failure)
    return Outcome(result.state, "" if result.finished else controls.reason)


def _open_recorder(setup: RunSetup, state: TrainState | None) -> Recorder:
    if not setup.launch.world.is_main:
        return Recorder()
    run_dir = setup.folder.path
    return RunRecorder(
        run_dir,
        setup.recipe,
        setup.total_steps,
        state,
        on_saved=lambda step: write_status(run_dir, "running", step=step),
    )


def _utilization(setup: RunSetup) -> Callable[[float], float | None] | None:
    """tokens/s -> MFU, on GPUs of one kind with known peak; None for an impossible one, which is logged once."""
    launch, shape, gpu = setup.launch, setup.resolved.shape, identify(setup.launch.machine.name)
    if shape is None or gpu is None:
        return None
    flops = flops_per_token(*shape, setup.recipe.training.seq_len)
    logged = False

    def share(tokens_per_s: float) -> float | None:
        nonlocal logged
        try:
            return mfu(tokens_per_s, flops, gpu, launch.world.size)
        except TrainingError as error:
            if not logged:
                logger.warning("perf/mfu is not recorded: %s", error.problem)
            logged = True
            return None

    return share


def _close(closers: Sequence[Callable[[], None]], failure: BaseException | None) -> None:
    """Close everything; the first failure ends the run, a later one is logged."""
    for close in closers:
        try:
            close()
        except InherituneError as error:
            if failure is not None:
                logger.warning(error.problem)
            else:
                failure = error
    if isinstance(failure, InherituneError):
        raise failure


def finish(setup: RunSetup, engine: Engine, outcome: Outcome) -> bool:
    """Export a finished run and write its report; False for a stopped run. All ranks call it together."""
    step = outcome.state.step
    if outcome.stopped:
        done = f"saved at step {step}" if step else "before the first step"
        setup.folder.mark("requeue", f"{outcome.stopped}: {done}")
        logger.info("stopped %s%s; rerun the same command to resume", "and " if step else "", done)
        return False
    logger.info("exporting")
    probe = setup.data.held_out.read(np.zeros(1, dtype=np.int64))[:, :PROBE_TOKENS]
    logits = engine.probe_logits(probe)
    parameters = engine.full_parameters()

    def write() -> None:
        try:
            write_results(setup, engine, outcome.state, parameters, torch.from_numpy(probe), logits)
        finally:
            _gather(parameters)

    if not setup.launch.world.is_main:
        _gather(parameters)
    setup.launch.meeting.run_on_rank0(write)
    return True


def _gather(parameters: Iterator[object]) -> None:
    """Take part in gathering the rest, on all ranks even if the export on rank 0 fails."""
    for _ in parameters:
        pass
