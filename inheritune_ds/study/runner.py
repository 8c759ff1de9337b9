"""Studies: several runs, one after the other, and the report that compares them.

Each run is an ordinary `deepspeed train.py ...` in a process of its own, echoed before it starts,
so that a reader can give the same command by hand. A finished run ends at once when it is started
again: the study after an interruption is the same command again.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from inheritune_ds.config.fields import ConfigModel, Name, Text
from inheritune_ds.config.loading import dump_recipe, load_recipe, read_document, shipped_names
from inheritune_ds.config.messages import validate
from inheritune_ds.config.model import RECIPE_PREFIX
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import InherituneError, MachineError, RecipeError, TrainingError
from inheritune_ds.report.results import run_result
from inheritune_ds.report.study_report import Role, StudyRow, study_tables, write_study_report
from inheritune_ds.storage.files import storage_errors, write_text

_LAUNCHER_PORT = 29500
"""Where DeepSpeed's launcher lets the ranks meet (deepspeed/constants.py, TORCH_DISTRIBUTED_DEFAULT_PORT)."""
_LEAVE_S = 60.0
"""Seconds that processes get to leave after their launcher has; then they are killed."""


class StudyRun(ConfigModel):
    """One run of a study."""

    recipe: Text
    """A shipped name, or a path relative to the study file."""
    role: Role
    label: Text | None = None
    """What the table and the figure call it; the recipe's name when left out."""
    overrides: list[Text] = Field(default_factory=list)
    """Such as `name=shallow`, `target.select=first:2`: one recipe can serve several runs."""


class StudyFile(ConfigModel):
    """Runs to compare with each other."""

    name: Name
    description: Text
    runs: Annotated[list[StudyRun], Field(min_length=1)]
    """In the order in which they are trained."""

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if not any(run.role == "target" for run in self.runs):
            raise ValueError("one of the runs must have the role target")
        return self


class StudyRunError(InherituneError):
    """A run of a study has failed; its own message stands above.

    Args:
        problem: Which run, and how it ended.
        exit_code: The exit code of the run, passed on.
    """

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem, action="mend what the run's own message above says, then the same command again")
        self.exit_code = exit_code


@dataclass(frozen=True)
class _Plan:
    """A run, ready to start."""

    run: StudyRun
    name: str
    folder: Path
    command: list[str]


def run_study(  # noqa: PLR0913 (by keyword: the options of the command line, one for one)
    name: str,
    *,
    deepspeed_config: Path,
    num_ranks: int,
    runs_dir: Path,
    cache_dir: Path,
    overrides: Sequence[str] = (),
) -> Path | None:
    """Train every run of a study and write its report.

    Args:
        name: A shipped study, or the path of a study file.
        deepspeed_config: How this machine runs it, for all runs.
        num_ranks: Processes of each run.
        runs_dir: Where the run folders are; the report goes to `runs_dir`/study-NAME/report.
        cache_dir: Where the token shards are.
        overrides: `key.path=value` items for every run.

    Returns:
        Path of report.md; None when a signal stopped the study, which the same command continues.

    Raises:
        RecipeError: When the study or one of its recipes is wrong; nothing has been started then.
        MachineError: When train.py or the deepspeed launcher cannot be found.
        StudyRunError: When a run has failed.
        KeyboardInterrupt: At a second Ctrl-C, when all processes have ended.
    """
    text, origin = read_document(name, "studies")
    study = validate(StudyFile, parse_yaml(text, origin), origin)
    beside = Path() if name in shipped_names("studies") else Path(origin).parent
    launcher = [
        _deepspeed(),
        *_port(),
        "--num_gpus",
        str(num_ranks),
        _train_script(),
        "--deepspeed_config",
        str(deepspeed_config),
    ]
    folders = ["--runs-dir", str(runs_dir), "--cache-dir", str(cache_dir)]
    own_folder = runs_dir / f"study-{study.name}"
    plans = []
    for run, loaded in zip(study.runs, _load_recipes(study, beside, overrides, own_folder), strict=True):
        which = run.recipe if run.recipe in shipped_names() else str(beside / Path(run.recipe).expanduser())
        command = [*launcher, "--recipe", which, *folders, *loaded.overrides]
        plans.append(_Plan(run, loaded.recipe.name, runs_dir / loaded.recipe.name, command))
    print(f"study {study.name}: {study.description}")
    for number, plan in enumerate(plans, 1):
        print(f"\n[{number}/{len(plans)}] {plan.name} ({plan.run.role})\n{shlex.join(plan.command)}\n", flush=True)
        if not _train(plan):
            print(f"\nstudy {study.name}: stopped at {plan.name}; the same command goes on", flush=True)
            return None
    rows = [StudyRow(plan.run.label or plan.name, plan.run.role, run_result(plan.folder)) for plan in plans]
    report = write_study_report(own_folder, f"Study {study.name}", rows)
    _print_end(report, rows)
    return report


@dataclass(frozen=True)
class _Loaded:
    """A run's recipe: as its file has it, as the study trains it, and the overrides between the two."""

    plain: Recipe
    recipe: Recipe
    overrides: list[str]


def _load_recipes(study: StudyFile, beside: Path, overrides: Sequence[str], folder: Path) -> list[_Loaded]:
    """Load the recipe of every run; all problems at once, before the first run starts.

    Where a run's reference is a run of this study, it is that run with its overrides: its recipe is written
    into `folder`, and the run's `reference.model` names that file.
    """
    runs: list[_Loaded] = []
    references: dict[Path, Recipe] = {}
    problems: list[InherituneError] = []
    for run in study.runs:
        words = [*run.overrides, *overrides]
        try:
            recipe = load_recipe(run.recipe, words, beside=beside)
            reference = _reference_in_study(recipe, runs)
            if reference is not None:
                path = folder / "recipes" / f"{reference.name}.yaml"
                references[path] = reference
                words.append(f"reference.model={RECIPE_PREFIX}{path}")
                recipe = load_recipe(run.recipe, words, beside=beside)
            runs.append(_Loaded(load_recipe(run.recipe, beside=beside), recipe, words))
        except RecipeError as problem:
            problems.append(problem)
    _check_loaded(study, runs, problems)
    for path, reference in references.items():
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_recipe(reference))
    return runs


def _reference_in_study(recipe: Recipe, before: Sequence[_Loaded]) -> Recipe | None:
    """The reference of a recipe as an earlier run of the study trains it; None if its own recipe says it all."""
    name = recipe.reference.recipe_name if recipe.reference else None
    if name is None:
        return None
    asked = load_recipe(name)
    trained = [run.recipe for run in before if run.plain == asked]
    if not trained or any((one.name, one.fingerprint) == (asked.name, asked.fingerprint) for one in trained):
        return None
    return trained[0]


def _check_loaded(study: StudyFile, runs: Sequence[_Loaded], problems: list[InherituneError]) -> None:
    for name, times in Counter(run.recipe.name for run in runs).items():
        if times > 1:
            problems.append(
                RecipeError(
                    f"study {study.name}: {times} runs are called {name}, so they would share a run folder",
                    action="give one of them another name: `overrides: [name=...]`",
                )
            )
    if problems:
        raise RecipeError.of(problems)


def _deepspeed() -> str:
    """Return the launcher of this Python, written as the user's shell finds it."""
    own = Path(sys.executable).parent / "deepspeed"
    found = shutil.which("deepspeed")
    if own.is_file():
        return "deepspeed" if found and Path(found).samefile(own) else _as_typed(own)
    if found:
        return "deepspeed"
    raise MachineError(
        f"the launcher `deepspeed` is neither at {own} nor on the PATH",
        action="install this package with its dependencies into the Python that runs it: `make install`",
    )


def _port() -> list[str]:
    """Words that choose a port where the ranks meet, when another run has the launcher's default."""
    with socket.socket() as probe:
        try:
            probe.bind(("", _LAUNCHER_PORT))
        except OSError:
            probe.bind(("", 0))
            return ["--master_port", str(probe.getsockname()[1])]
    return []


def _train_script() -> str:
    places = [Path(__file__).parents[2] / "train.py", Path.cwd() / "train.py"]
    for place in places:
        if place.is_file():
            return _as_typed(place)
    raise MachineError(
        f"train.py is neither at {places[0]} nor at {places[1]}",
        action="clone the repository and give this command in its folder",
    )


def _as_typed(path: Path) -> str:
    """Shorten a path inside the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _train(plan: _Plan) -> bool:
    """Run one command to its end; False when a signal stopped it and the same command goes on.

    Raises:
        StudyRunError: When the run has failed.
        KeyboardInterrupt: After a second signal, which the ranks do not survive.
    """
    code, signals = _run_to_end(plan.command)
    # Launchers change exit codes, and a killed one exits with 0: only status.json says that a run is done.
    state = _state(plan.folder)
    if state == "requeue" and (code == 0 or signals == 1):
        return False
    if signals > 1:
        raise KeyboardInterrupt
    if signals == 1 and state != "failed":
        return False
    if code:
        raise StudyRunError(f"run {plan.name} ended with exit code {code}", code)
    if state != "finished":
        raise StudyRunError(f"run {plan.name} left without finishing (its state: {state})", TrainingError.exit_code)
    return True


def _state(folder: Path) -> str:
    try:
        status: Any = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return str(status["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _run_to_end(command: Sequence[str]) -> tuple[int, int]:
    """Start a command and wait until it and all it started have ended.

    The command gets a process group of its own, so that signals reach what they are meant for: the
    DeepSpeed launcher gives its ranks 30 seconds after a Ctrl-C and then kills them, in the middle
    of a save if need be (deepspeed/launcher/launch.py, terminate_process_tree). So only the ranks
    are told; the launcher leaves by itself after them.

    Returns:
        Its exit code (128 + n when signal n ended it), and how many signals came meanwhile.
    """
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])}
    with _Signals() as signals:
        child = subprocess.Popen(command, env=environment, process_group=0)
        try:
            signals.pass_to(child.pid)
            child.wait()
            deadline = time.monotonic() + _LEAVE_S
            while _group(child.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            if _group(child.pid):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    code = child.returncode
    return (code if code >= 0 else 128 - code), signals.count


class _Signals:
    """While it is open, a Ctrl-C, SIGTERM or SIGHUP goes to the ranks of a launcher, not to this process."""

    def __init__(self) -> None:
        self.count = 0
        self._launcher: int | None = None
        self._last = signal.SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # nohup has a SIGHUP ignored
                self._before[number] = handler
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_to(self, launcher: int) -> None:
        """Name the process group that signals go to; one that has come already goes now."""
        self._launcher = launcher
        if self.count:
            self._pass_on(launcher)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        # The ranks know SIGINT and SIGTERM (distributed/signals.py, StopSignal).
        self._last = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self._launcher is not None:
            self._pass_on(self._launcher)

    def _pass_on(self, launcher: int) -> None:
        members = _group(launcher)
        starters = [pid for pid, parent in members.items() if parent == launcher]
        ranks = [pid for pid, parent in members.items() if parent in starters]
        for pid in ranks:
            _send(pid, self._last)
        if not ranks:
            # Nothing is trained yet. SIGTERM, since a Python launcher prints a traceback at SIGINT.
            for pid in members:
                _send(pid, signal.SIGTERM)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just left by itself


def _group(group: int) -> dict[int, int]:
    """Return the living processes of a process group with their parents, from /proc (Linux)."""
    members = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended since the folder was listed
        # pid (name, which may hold anything) state parent group ...: proc_pid_stat(5)
        state, parent, member_of = text[text.rindex(")") + 2 :].split()[:3]
        if int(member_of) == group and state not in "ZX":
            members[int(path.parent.name)] = int(parent)
    return members


def _print_end(report: Path, rows: Sequence[StudyRow]) -> None:
    print(f"\n{study_tables(rows)}\n")
    print(f"report  {report}")
    print(f"figure  {report.with_name('curves.png')}")
    for row in rows:
        print(f"model   {row.result.folder / row.result.summary.export}  ({row.label})", flush=True)
