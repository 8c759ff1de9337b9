"""Mistakes planted in surgery, stream and schedule, each of which some test must catch.

Every mutation is one replacement in a copy of the package; the tests that mirror the module then run in
the copy and must fail, while in an unchanged copy they pass.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import data_mutations, mutations
from tests.mutations import Mutation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
MUTATIONS = [*mutations.MUTATIONS, *data_mutations.MUTATIONS]
TESTS = {**mutations.TESTS, **data_mutations.TESTS}
TESTS_FAILED = 1
"""pytest's exit code; another one, such as 4 for a conftest that does not import, proves nothing."""
CONFTEST = """
from pathlib import Path
import inheritune_ds
assert Path(inheritune_ds.__file__).is_relative_to(Path(__file__).parent), inheritune_ds.__file__
"""


def copy_to(folder: Path) -> Path:
    """Copy the package, the tests and pytest's settings; the copy refuses to test any other package."""
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "inheritune_ds", folder / "inheritune_ds", ignore=hidden)
    for tests in ("surgery", "data", "training"):
        shutil.copytree(ROOT / "tests" / tests, folder / "tests" / tests, ignore=hidden)
    helpers = ("tests/hub_client.py", "tests/hub_server.py")
    for name in ("setup.cfg", "tests/conftest.py", *helpers, "tests/test_selection.py", "tests/test_parts.py"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    return folder


def run_tests(folder: Path, files: list[str], only: str = "") -> subprocess.CompletedProcess[str]:
    """Run tests in a copy, without measuring its coverage: that is the package's own business."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST_"))}
    environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=line"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, *(["-k", only] if only else [])],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def mutate_and_test(mutation: Mutation, folder: Path) -> subprocess.CompletedProcess[str]:
    path = copy_to(folder) / "inheritune_ds" / mutation.file
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{mutation.file} has {mutation.old!r} {source.count(mutation.old)} times"
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    done = run_tests(folder, TESTS[mutation.file], mutation.only)
    shutil.rmtree(folder)
    return done


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the tests said to every mutation, and to the package as it is (""); two run at a time."""
    base = tmp_path_factory.mktemp("mutations")
    files = sorted({file for group in TESTS.values() for file in group})
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(lambda: run_tests(copy_to(base / "whole"), files))
        futures = {
            mutation.why: pool.submit(mutate_and_test, mutation, base / str(number))
            for number, mutation in enumerate(MUTATIONS)
        }
        return {"": whole.result(), **{why: future.result() for why, future in futures.items()}}


def test_the_package_as_it_is_passes(outcomes: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert outcomes[""].returncode == 0, outcomes[""].stdout + outcomes[""].stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.why)
def test_a_planted_mistake_is_caught(mutation: Mutation, outcomes: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = outcomes[mutation.why]
    assert done.returncode == TESTS_FAILED, f"{mutation} was not caught:\n{done.stdout}{done.stderr}"
    assert "1 failed" in done.stdout
