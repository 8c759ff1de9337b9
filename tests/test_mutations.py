"""Mistakes planted in surgery, stream and schedule, each of which some test must catch.

Every mutation is one replacement in a copy of the package; the tests that mirror the module then run in
the copy and must fail, while in an unchanged copy they pass.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent
INHERIT, BLOCKS, SELECTION = "surgery/inherit.py", "surgery/blocks.py", "surgery/selection.py"
STREAM, SCHEDULE = "data/stream.py", "training/schedule.py"
TESTS = {
    INHERIT: ["tests/surgery/test_inherit.py", "tests/surgery/test_inherit_report.py"],
    BLOCKS: ["tests/surgery/test_blocks.py"],
    SELECTION: ["tests/surgery/test_selection.py"],
    STREAM: ["tests/data/test_stream.py"],
    SCHEDULE: ["tests/training/test_schedule.py"],
}
TESTS_FAILED = 1
"""pytest's exit code; another one, such as 4 for a conftest that does not import, proves nothing."""
CONFTEST = """
from pathlib import Path
import inheritune_ds
assert Path(inheritune_ds.__file__).is_relative_to(Path(__file__).parent), inheritune_ds.__file__
"""


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        why: What it would do to a run.
        file: Module, below the package.
        old: Text that stands there exactly once.
        new: What it becomes.
        only: Of the module's tests, those that pytest's -k selects; all when empty.
    """

    why: str
    file: str
    old: str
    new: str
    only: str = ""


MUTATIONS = [
    Mutation(
        "every selection would give the first blocks",
        INHERIT,
        "origin.renamed(name, selection[index])",
        "origin.renamed(name, index)",
        "any_selection",
    ),
    Mutation(
        "norms and biases would stay at their initial values, and the report say that they were inherited",
        INHERIT,
        "            tensor.copy_(available[source_name])\n",
        "            if tensor.ndim > 1:\n                tensor.copy_(available[source_name])\n",
        "holds_the_reference and llama",
    ),
    Mutation(
        "a half-precision reference would give a target twice as large",
        INHERIT,
        "dtype=source.dtype if source else torch.float32",
        "dtype=torch.float32",
        "keeps_the_reference_s_dtype",
    ),
    Mutation(
        "every seed would give the same baseline",
        INHERIT,
        "torch.manual_seed(seed)",
        "torch.manual_seed(0)",
        "depend_on_the_seed",
    ),
    Mutation(
        "the report would call fresh tensors inherited",
        INHERIT,
        '"inherited": name in inherited,',
        '"inherited": True,',
        "inherit_none",
    ),
    Mutation(
        "a changed recipe would train the old target",
        INHERIT,
        ' or manifest["identity"] != identity:',
        ":",
        "find_target",
    ),
    Mutation(
        "the reference's dropout would stay on",
        INHERIT,
        "set_dropout(config, target.dropout)",
        "config.use_cache = True",
        "says_its_dropout",
    ),
    Mutation(
        "a tied head would count twice",
        INHERIT,
        "named = list(model.named_parameters())",
        "named = list(model.named_parameters(remove_duplicate=False))",
        "counts_what_the_budget_counts",
    ),
    Mutation(
        "blocks would get the attention or rotary kind of other blocks",
        BLOCKS,
        "[value[index] for index in selection]",
        "value[: len(selection)]",
    ),
    Mutation(
        "the reference's own config would be changed under its feet",
        BLOCKS,
        "    depth = config.num_hidden_layers\n",
        "    depth = config.num_hidden_layers\n    config.num_hidden_layers = len(selection)\n",
    ),
    Mutation(
        "names that only begin like a block's would be renamed",
        BLOCKS,
        'startswith(f"{self.path}."):',
        "startswith(self.path):",
    ),
    Mutation("the last blocks would be kept", SELECTION, "range(count))", "range(depth - count, depth))"),
    Mutation("one block more than there is could be asked for", SELECTION, "count > depth:", "count > depth + 1:"),
    Mutation(
        "the last window would have no next token",
        STREAM,
        "return max(0, num_tokens - 1) // seq_len",
        "return num_tokens // seq_len",
    ),
    Mutation(
        "another number of ranks would see another order",
        STREAM,
        "for ids_B in ids_MRB[:, rank])",
        "for ids_B in ids_MRB.reshape(world_size, -1, micro_batch_size)[rank])",
    ),
    Mutation(
        "every epoch would have the same order",
        STREAM,
        "self._seed_state + epochs * _GOLDEN",
        "self._seed_state + np.zeros_like(epochs)",
    ),
    Mutation(
        "targets at the seams of windows would be left out",
        STREAM,
        "ids[:, None] * self.seq_len + self._columns",
        "np.minimum(ids[:, None] * (self.seq_len + 1) + self._columns, len(self._tokens) - 1)",
    ),
    Mutation(
        "neighbouring steps would share windows",
        STREAM,
        "first = step * self.batch_windows",
        "first = step * (self.batch_windows - 1)",
    ),
    Mutation(
        "the first update would not move",
        SCHEDULE,
        "return (step + 1) / (schedule.warmup_steps + 1)",
        "return step / schedule.warmup_steps",
    ),
    Mutation(
        "the last update would be above min_lr_ratio",
        SCHEDULE,
        "span = total_steps - 1 - start",
        "span = total_steps - start",
    ),
    Mutation(
        "the cosine would fall along a quarter of a period",
        SCHEDULE,
        "0.5 * (1.0 + math.cos(math.pi * progress))",
        "math.cos(0.5 * math.pi * progress)",
    ),
    Mutation(
        "the decay of wsd would be a share of the steps after the warm-up",
        SCHEDULE,
        "round(schedule.decay_ratio * total_steps)",
        "round(schedule.decay_ratio * (total_steps - start))",
    ),
]


def copy_to(folder: Path) -> Path:
    """Copy the package, the tests and pytest's settings; the copy refuses to test any other package."""
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "inheritune_ds", folder / "inheritune_ds", ignore=hidden)
    for tests in ("surgery", "data", "training"):
        shutil.copytree(ROOT / "tests" / tests, folder / "tests" / tests, ignore=hidden)
    shutil.copyfile(ROOT / "setup.cfg", folder / "setup.cfg")
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
        timeout=300,
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
    files = [file for group in TESTS.values() for file in group]
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
