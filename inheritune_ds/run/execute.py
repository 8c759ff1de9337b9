"""The flow of one run: lock the folder, prepare, train, export, report. Rerun the same command to resume."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import read_layout
from inheritune_ds.distributed.coordination import MainRankLeftError
from inheritune_ds.distributed.failures import LostRankError, explain, is_out_of_memory, out_of_memory_text
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.distributed.signals import EXIT_INTERRUPTED
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.errors import InherituneError, MachineError, RunFolderError
from inheritune_ds.plan.memory import ways_to_save
from inheritune_ds.run.folder import FolderBusyError, RunFolder, finished_before
from inheritune_ds.run.launch import Launch
from inheritune_ds.run.prepare import RunSetup, prepare
from inheritune_ds.run.stages import (
    build_engine,
    finish,
    resume,
    score_reference,
    take_kernels,
    train,
    with_micro_batch,
)

logger = logging.getLogger(__name__)


def execute(
    recipe: Recipe, resolved: Resolved, launch: Launch, *, fresh: bool = False, waiting: Sequence[RunFolder] = ()
) -> bool:
    """Train a recipe to its end, its reference first if that is a recipe.

    Args:
        recipe: The experiment.
        resolved: Its DeepSpeed config on this machine.
        launch: The options and ranks of this process.
        fresh: Whether the run starts over; the earlier run folder is renamed.
        waiting: Folders of runs that wait for this reference; their status reports its failure.

    Returns:
        Whether it is finished; False if a signal stopped it (`requeue` in status.json).

    Raises:
        InherituneError: For everything a user can act on (`failed` in status.json).
    """
    folder = RunFolder(launch.runs_dir / recipe.name)
    if not fresh and launch.meeting.run_on_rank0(lambda: folder.has_finished(recipe)):
        logger.info(finished_before(folder.path))
        return True
    # Claimed before the reference trains, maybe for days: a folder of another recipe is refused first, and this run's
    # status.json reports the end of the reference.
    with _claimed(folder, recipe, launch, fresh=fresh):
        if not _train_reference(recipe, launch, [folder, *waiting]):
            return False
        setup = prepare(recipe, resolved, folder, launch)
        with closing(_watchdog(setup, waiting)) as watch:
            return _run(setup, watch)


def _run(setup: RunSetup, watch: Watchdog) -> bool:
    """Train a prepared run."""
    if setup.launch.machine.kind == "cpu":
        logger.info("starting DeepSpeed (it builds its CPU operator on first use: about half a minute)")
    with watch.phase("start", setup.folder.newest_step()):
        start_process_group(setup.launch.world, timeout_s=setup.resolved.reliability.group_timeout_s)
    with watch.phase("validation", setup.folder.newest_step()):
        score_reference(setup)
    with watch.phase("start", setup.folder.newest_step()):
        kernels = take_kernels(setup)
        setup = with_micro_batch(setup, kernels)
    try:
        with watch.phase("start", setup.folder.newest_step()):
            engine = build_engine(setup, kernels)
            saver, state = resume(setup, engine)
        outcome = train(setup, engine, saver, state, watch)
        with watch.phase("finish", outcome.state.step):
            finished = finish(setup, engine, outcome)
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(setup, error) from None
        raise
    # After success only: it waits for the device, which may wait for a rank that has failed.
    engine.close()
    return finished


def _out_of_memory(setup: RunSetup, error: Exception) -> MachineError:
    """The error of a training that needs more memory than its plan, with the changes that save some."""
    recipe, resolved, world = setup.recipe, setup.resolved, setup.launch.world
    action = 'use a smaller train_micro_batch_size_per_gpu, or kernels.activation_checkpointing "full"'
    if resolved.shape is not None:
        action = ways_to_save(
            *resolved.shape,
            micro_batch_size=resolved.micro_batch_size,
            accumulation=resolved.gradient_accumulation_steps,
            **read_layout(resolved.config, seq_len=recipe.training.seq_len, world_size=world.size),
        )
    return MachineError(
        out_of_memory_text(error),
        allowed=f"what other programs left of the device at the start: {setup.launch.machine.memory_gib:.1f} GiB",
        action=f"{action}; then rerun the same command to resume from the newest checkpoint",
    )


def _watchdog(setup: RunSetup, waiting: Sequence[RunFolder]) -> Watchdog:
    def on_hang(reason: str, exit_code: int) -> None:  # on a thread of its own
        for folder in (setup.folder, *waiting):
            if folder.is_claimed:
                folder.mark_failed(reason, exit_code=exit_code, rank=0)

    return Watchdog(setup.resolved.reliability, setup.launch.world, setup.folder.path, on_hang=on_hang)


@contextmanager
def _claimed(folder: RunFolder, recipe: Recipe, launch: Launch, *, fresh: bool) -> Iterator[None]:
    """Claim the run folder on rank 0; write the error that ends the launch to its status.json."""

    def claim() -> None:
        if fresh and (aside := folder.set_aside()) is not None:
            logger.info("--fresh: the earlier run folder is renamed to %s", aside)
        folder.claim(recipe)
        folder.mark("preparing")  # a failure in status.json is one of this launch from here on

    rank = launch.world.rank
    try:
        launch.meeting.run_on_rank0(claim)
        yield
    except MainRankLeftError:  # rank 0 has reported it
        raise
    except InherituneError as error:
        folder.mark_failed(error.problem, exit_code=error.exit_code, rank=rank)
        raise
    except KeyboardInterrupt:
        folder.mark("requeue", f"{launch.stop.requested}: stopped between stages", exit_code=EXIT_INTERRUPTED)
        raise
    except Exception as error:
        known = explain(error)
        if known is None:
            folder.mark_failed(f"{type(error).__name__}: {error}", exit_code=1, rank=rank)
            raise
        if not isinstance(known, LostRankError):
            folder.mark_failed(known.problem, exit_code=known.exit_code, rank=rank)
        elif folder.is_claimed:  # the lost rank's own report is the cause
            folder.mark_failed(known.problem, exit_code=known.exit_code, rank=0)
        raise known from None
    finally:
        folder.release()


def _train_reference(recipe: Recipe, launch: Launch, waiting: Sequence[RunFolder]) -> bool:
    """Train a `recipe:NAME` reference first; False if a signal stopped it (`requeue` in the waiting folder)."""
    if recipe.reference is None or recipe.reference.recipe_name is None or recipe.target.inherits_nothing:
        return True
    reference = load_recipe(recipe.reference.recipe_name)
    folder = waiting[0]
    folder.mark("preparing", f"waits for its reference {reference.name}")
    try:
        # Every recipe of the chain is resolved, and so checked, before the first one trains.
        if execute(reference, launch.resolve(reference), launch, waiting=waiting):
            return True
    except FolderBusyError as error:
        raise RunFolderError(
            f"{recipe.name} needs its reference {reference.name}, which another process is training: {error.problem}",
            action="rerun the same command when that process has finished",
        ) from None
    folder.mark("requeue", f"its reference {reference.name} was stopped")
    return False
