"""Mistakes planted in surgery, stream and schedule, each of which some test must catch.

Every mutation is one replacement in a copy of the package; the tests that mirror the module then run in
the copy and must fail, while in an unchanged copy they pass.
"""

import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutations import MUTATIONS, OTHER_TESTS
from tests.warm_python import WarmProcess, WarmPython

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
WHOLE = "whole"
CRASHES = {"aborts": "os.abort()", "leaves": "os._exit(1)", "passes": "pass", "fails": "assert False"}
CHILDREN = 2
# Neither the package nor its tests: a child finds those of its folder.
HEAVY = (
    "pytest",
    "hypothesis.internal.conjecture.engine",
    "hypothesis.strategies",
    "pydantic",
    "ruamel.yaml",
    "torch",
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# pytest would rewrite the assertions of its plugins, had they not been imported already.
IMPORTED_ALREADY = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
TESTS_FAILED = 1
"""pytest's exit code for failed tests; others, such as 4 for a conftest that does not import, prove nothing."""
CONFTEST = """
from pathlib import Path
import inheritune_ds
assert Path(inheritune_ds.__file__).is_relative_to(Path(__file__).parent), inheritune_ds.__file__
"""


class Mutation(NamedTuple):
    why: str
    old: str
    new: str
    only: str = ""


PLANTED = [(module, Mutation(*mutation)) for module, planted in MUTATIONS.items() for mutation in planted]


class Outcome(NamedTuple):
    """The result of a folder's tests: pytest's exit code, or minus the signal that ended it, and its output."""

    code: int
    output: str


def copy_to(folder: Path) -> Path:
    """Copy the package, the tests and pytest's settings; the copy refuses to test any other package."""
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "inheritune_ds", folder / "inheritune_ds", ignore=hidden)
    for tests in ("config", "data", "plan", "surgery", "training"):
        shutil.copytree(ROOT / "tests" / tests, folder / "tests" / tests, ignore=hidden)
    for name in ("conftest", "hub_client", "hub_server", "launching", "tiny", "warm_python"):
        shutil.copyfile(ROOT / f"tests/{name}.py", folder / f"tests/{name}.py")
    shutil.copyfile(ROOT / "setup.cfg", folder / "setup.cfg")
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    return folder


def arguments(files: list[str], only: str = "") -> list[str]:
    """Run without measuring coverage."""
    options = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=line"]
    return [*IMPORTED_ALREADY, *options, *files, *(["-k", only] if only else [])]


def own_tests(module: str) -> list[str]:
    folder, _, name = module.rpartition("/")
    return OTHER_TESTS.get(module, [f"tests/{folder}/test_{name}"])


def plant(module: str, mutation: Mutation, folder: Path) -> None:
    path = copy_to(folder) / "inheritune_ds" / module
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{module} has {mutation.old!r} {source.count(mutation.old)} times"
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")


def jobs(base: Path) -> Iterator[tuple[Path, list[str]]]:
    """Make one folder after the other: of what a crash must look like, of the package as it is, of every mistake."""
    for name, body in CRASHES.items():
        (base / name).mkdir()
        (base / name / "test_crash.py").write_text(f"import os\n\ndef test_crash():\n    {body}\n", encoding="utf-8")
        yield base / name, arguments(["test_crash.py"])
    yield copy_to(base / WHOLE), arguments(sorted({file for module in MUTATIONS for file in own_tests(module)}))
    for number, (module, mutation) in enumerate(PLANTED):
        plant(module, mutation, base / str(number))
        yield base / str(number), arguments(own_tests(module), mutation.only)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The results by folder; the folder of a mistake has its number as name."""
    base = tmp_path_factory.mktemp("mutations")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST_", "PYTHONPATH"))}
    environ["PYTHONDONTWRITEBYTECODE"] = "1"
    python, found = WarmPython(HEAVY, environ), {}
    running: deque[tuple[Path, WarmProcess]] = deque()

    def take_first() -> None:
        folder, process = running.popleft()
        code = process.wait()
        found[folder.name] = Outcome(code, (folder / "output").read_text(encoding="utf-8", errors="replace"))
        shutil.rmtree(folder)

    for folder, words in jobs(base):
        with (folder / "output").open("wb") as output:
            process = python.start(["-m", "pytest", *words], cwd=folder, env=environ, stdout=output)
        running.append((folder, process))
        if len(running) == CHILDREN:
            take_first()
    while running:
        take_first()
    python.close()
    return found


def is_caught(outcome: Outcome) -> bool:
    """Whether a test has failed; any other end of the child proves nothing."""
    return outcome.code == TESTS_FAILED and "1 failed" in outcome.output


@pytest.mark.parametrize(("name", "code"), [("aborts", -signal.SIGABRT), ("leaves", TESTS_FAILED), ("passes", 0)])
def test_other_exit_code_of_a_child_catches_nothing(name: str, code: int, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].code == code, outcomes[name].output
    assert not is_caught(outcomes[name])


def test_failing_test_in_a_child_is_caught(outcomes: dict[str, Outcome]) -> None:
    assert is_caught(outcomes["fails"]), outcomes["fails"].output


def test_unchanged_package_passes(outcomes: dict[str, Outcome]) -> None:
    assert outcomes[WHOLE].code == 0, outcomes[WHOLE].output


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[mutation.why for _, mutation in PLANTED])
def test_planted_mistake_is_caught(number: int, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[str(number)]
    assert is_caught(outcome), f"{PLANTED[number]} was not caught (code {outcome.code}):\n{outcome.output}"
