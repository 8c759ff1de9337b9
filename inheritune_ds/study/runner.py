"""Studies: several runs, one after the other, and the report that compares them.

Each run is train.py in processes of its own; the equivalent `deepspeed` command is logged before. A finished run ends
at once when it is started again: rerun the same command to resume an interrupted study.
"""

import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from inheritune_ds.errors import InherituneError, MachineError, TrainingError
from inheritune_ds.report.results import run_result
from inheritune_ds.report.study_report import StudyRow, study_tables, write_study_report
from inheritune_ds.run.status import read_status
from inheritune_ds.study.processes import DEFAULT_PORT, choose_port, run_ranks
from inheritune_ds.study.spec import load_study

logger = logging.getLogger(__name__)


class StudyRunError(InherituneError):
    """A run of a study has failed; the study ends with its exit code."""

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem, action="see the run's own message above, then rerun the same command to resume")
        self.exit_code = exit_code


def run_study(  # noqa: PLR0913 (the options of the command line, by keyword)
    name: str,
    *,
    deepspeed_config: Path,
    num_ranks: int,
    runs_dir: Path,
    cache_dir: Path,
    overrides: Sequence[str] = (),
) -> Path | None:
    """Train every run of a study (a shipped name, or the path of a file) and write its report.

    `overrides` are `key.path=value` items for every run. Returns the path of report.md, in
    `runs_dir`/study-NAME/report; None if a signal stopped the study.

    Raises:
        RecipeError: If the study or one of its recipes is wrong; nothing has been started then.
        MachineError: If train.py cannot be found.
        StudyRunError: If a run has failed.
        KeyboardInterrupt: At a second Ctrl-C, after all processes have ended.
    """
    study, runs = load_study(name, overrides, runs_dir)
    script = _train_script()
    places = ["--runs-dir", str(runs_dir), "--cache-dir", str(cache_dir)]
    logger.info("study %s: %s", study.name, study.description)
    for number, run in enumerate(runs, 1):
        recipe, port = run.recipe, choose_port()
        option, which, *words = run.arguments
        command = [script, "--deepspeed_config", str(deepspeed_config), option, which, *places, *words]
        launcher = [_deepspeed(), *(() if port == DEFAULT_PORT else ("--master_port", str(port)))]
        line = shlex.join([*launcher, "--num_gpus", str(num_ranks), *command])
        logger.info("\n[%d/%d] %s (%s)\n%s\n", number, len(runs), recipe.name, run.run.role, line)
        if not _has_finished(recipe.name, runs_dir / recipe.name, run_ranks(command, num_ranks, port)):
            logger.info("\nstudy %s: stopped at %s; rerun the same command to resume", study.name, recipe.name)
            return None
    rows = [StudyRow(run.label, run.run.role, run_result(runs_dir / run.recipe.name), run.arm) for run in runs]
    report = write_study_report(runs_dir / f"study-{study.name}", f"Study {study.name}", rows)
    logger.info("\n%s\n\nreport  %s\nfigure  %s", study_tables(rows), report, report.with_name("curves.png"))
    for row in rows:
        logger.info("model   %s  (%s)", row.result.folder / row.result.summary.export, row.label)
    return report


def _has_finished(name: str, folder: Path, ended: tuple[int, int]) -> bool:
    """Check how a run ended: False after one signal, KeyboardInterrupt after a second one, StudyRunError if it failed.

    `ended` has its exit code and the number of signals.
    """
    code, signals = ended
    state = read_status(folder).get("state", "unknown")
    if state == "requeue" and (code == 0 or signals == 1):
        return False
    if signals > 1:
        raise KeyboardInterrupt
    if signals == 1 and state != "failed":
        return False
    if code:
        raise StudyRunError(f"run {name} ended with exit code {code}", code)
    if state != "finished":
        raise StudyRunError(f"run {name} ended without finishing (its state: {state})", TrainingError.exit_code)
    return True


def _deepspeed() -> str:
    """The launcher of this Python, as a word for the user's shell."""
    own, found = Path(sys.executable).with_name("deepspeed"), shutil.which("deepspeed")
    on_path = not own.is_file() or (found is not None and Path(found).samefile(own))
    return "deepspeed" if on_path else _as_typed(own)


def _train_script() -> str:
    places = [Path(__file__).parents[2] / "train.py", Path.cwd() / "train.py"]
    for place in places:
        if place.is_file():
            return _as_typed(place)
    raise MachineError(
        f"train.py is neither at {places[0]} nor at {places[1]}",
        action="clone the repository and run this command in its folder",
    )


def _as_typed(path: Path) -> str:
    """Shorten a path inside the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
