import argparse
import json
import math
import runpy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from inheritune_ds import cli
from inheritune_ds.cli import VERBS, main
from inheritune_ds.cli.options import add_experiment, expected_machine, machine_for, read_experiment
from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.errors import CorpusError, RecipeError
from inheritune_ds.plan.machine import DetectedGpu

ROOT = Path(__file__).parents[2]
CPU = str(ROOT / "ds_configs" / "cpu.json")
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "pydantic", "numpy", "rich", "matplotlib")

LOADED = """
import sys
from inheritune_ds.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
loaded = sorted(name for name in {heavy!r} if name in sys.modules)
print("loaded:", *loaded)
"""


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_fast_and_imports_nothing_heavy(arguments: list[str]) -> None:
    # Half a second on a quiet machine; the fastest of three may take twice that.
    took_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        program = LOADED.format(arguments=arguments, heavy=HEAVY)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        took_s.append(time.perf_counter() - start_s)
        if took_s[-1] < 0.5:
            break
    assert min(took_s) < 1.0
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "usage: inheritune-ds" in done.stdout


@pytest.mark.parametrize("verb", ["plan", "train --dry-run"])
def test_plan_imports_no_torch(verb: str) -> None:
    arguments = [*verb.split(), "--recipe", "quickstart", "--deepspeed_config", CPU]
    program = LOADED.format(arguments=arguments, heavy=("torch", "transformers", "deepspeed", "datasets"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "quickstart" in done.stdout


def test_every_verb_has_a_module_and_a_summary() -> None:
    folder = Path(cli.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "options"} == set(VERBS)
    assert all(VERBS.values())


def test_the_program_needs_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "the following arguments are required: VERB" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "stray"),
    [
        (["quickstart"], "quickstart"),
        (["--recipe", "quickstart", "--dryrun"], "--dryrun"),
        (["--rec", "quickstart"], "--rec quickstart"),
        (["seed=7", "--batch=3", "extra"], "--batch=3 extra"),
    ],
)
def test_stray_argument_is_refused(words: list[str], stray: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dry-run", *words])
    assert caught.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("usage: inheritune-ds train [-h] [--recipe RECIPE]")
    assert f"[key.path=value ...] inheritune-ds train: error: unrecognized arguments: {stray} (an override is" in error


def parsed(*words: str) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_experiment(parser)
    return parser.parse_known_args(["--recipe", "quickstart", *words])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--deepspeed"],
        ["--deepspeed_config", CPU],
        ["--deepspeed-config", CPU],
        [f"--deepspeed_config={CPU}"],
        ["--deepspeed", CPU],
        [f"--deepspeed={CPU}"],
        ["--deepspeed", "--deepspeed_config", CPU],
        ["--deepspeed_config", CPU, "--deepspeed"],
        ["--deepspeed", "seed=7"],
        ["--deepspeed", "seed=7", "--deepspeed_config", CPU],
        ["--deepspeed_config", CPU, "seed=7"],
        ["seed=8", "--deepspeed", "seed=7"],
        ["seed=8", "--deepspeed", CPU, "seed=7"],
    ],
    ids=lambda words: " ".join(Path(word).name for word in words),
)
def test_every_spelling_of_the_deepspeed_config_is_accepted(words: list[str]) -> None:
    recipe, document, origin = read_experiment(*parsed(*words))
    assert (recipe.name, recipe.seed) == ("quickstart", 7 if "seed=7" in words else 1337)
    if any(CPU in word for word in words):
        assert (document, origin) == (json.loads(Path(CPU).read_text(encoding="utf-8")), CPU)
    else:
        assert (document, origin) == ({}, "DeepSpeed config")


def test_one_error_lists_the_problems_of_both_documents(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_experiment(*parsed("--deepspeed_config", str(tmp_path / "no.json"), "sede=7"))
    text = str(caught.value)
    assert text.startswith("2 problems found\n")
    assert "quickstart: sede: unknown key" in text
    assert "no.json cannot be read: no such file or directory" in text
    with pytest.raises(RecipeError, match=r"^DeepSpeed config .*no\.json cannot be read"):
        read_experiment(*parsed("--deepspeed", str(tmp_path / "no.json")))


def test_keys_of_the_deepspeed_config_are_checked_when_the_recipe_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimisation": {}, "bf16": {"enable": true}}', encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_experiment(*parsed("--deepspeed_config", str(path), "sede=7"))
    lines = [line for line in str(caught.value).splitlines() if not line.startswith("  ")]
    assert lines == [
        "3 problems found",
        "1. quickstart: sede: unknown key",
        f"2. {path}: bf16.enable: unknown key",
        f"3. {path}: zero_optimisation: unknown key",
    ]
    assert main(["plan", "--recipe", "quickstart", "--deepspeed", str(path), "target.select=first:99"]) == 3
    error = capsys.readouterr().err
    assert "3 problems found" in error
    assert "99 is not possible, the reference has 8 blocks" in error
    assert "zero_optimisation: unknown key" in error


@pytest.mark.parametrize("option", ["--recipe", "--deepspeed", "--deepspeed_config"])
def test_empty_name_is_not_the_default(option: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read: is a directory"):
        read_experiment(*parsed(option, ""))


def test_two_deepspeed_configs_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        read_experiment(*parsed("--deepspeed", "other.json", "--deepspeed_config", CPU))
    assert caught.value.problem == f"--deepspeed names other.json, --deepspeed_config names {CPU}"
    assert (caught.value.allowed, caught.value.action) == ("one of them", "remove the other")


def test_local_rank_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--local_rank=0", "--dry-run", "--recipe", "quickstart", "--deepspeed_config", CPU]
    assert main(words) == 0
    with_rank = capsys.readouterr().out
    assert main([word for word in words if "rank" not in word]) == 0
    assert capsys.readouterr().out == with_rank
    assert "1,840,256" in with_rank


def test_only_rank_zero_prints_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--dry-run", "--recipe", "quickstart"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["plan", "--recipe", "quikstart"], 3, "did you mean quickstart?"),
        (["plan", "--recipe", "quickstart", "--gpus", "0"], 3, "--gpus 0 is not accepted"),
        (["plan", "--recipe", "quickstart", "--gpus", "3"], 3, "which 3 ranks cannot share evenly"),
        (["plan", "--recipe", "quickstart", "--gpu", "h10"], 3, "h100"),
        (
            ["plan", "--recipe", "quickstart", "target.select=first:9"],
            9,
            "9 is not possible, the reference has 8 blocks",
        ),
        (["plan", "--recipe", "quickstart", "corpus.tokenizer.vocab_size=5000"], 6, "vocab_size 5000 is more than"),
        (["train", "--recipe", "quickstart", "--deepspeed", "nowhere.json"], 3, "nowhere.json cannot be read"),
        (["train", "--recipe", "quickstart", "training.duration=20 steps"], 3, "schedule.warmup_steps 20 is too long"),
        (["train", "--dry-run", "--recipe", "quickstart", "training.duration=9 steps"], 3, "schedule.warmup_steps 20"),
        (["plan", "--recipe", "quickstart", "validation.max_tokens=200"], 3, "less than 2 windows"),
    ],
)
def test_user_error_is_one_message_with_its_exit_code(
    words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    output = capsys.readouterr()
    assert output.err.startswith("inheritune-ds: error: ")
    assert text in output.err
    assert "Traceback" not in output.err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    from inheritune_ds.cli import recipes

    def fail_with(error: BaseException) -> None:
        def run(_args: argparse.Namespace, _overrides: list[str]) -> int:
            raise error

        monkeypatch.setattr(recipes, "run", run)

    return fail_with


def test_interrupt_ends_with_130_and_a_line(
    failing: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(KeyboardInterrupt())
    assert main(["recipes"]) == 130
    expected = "inheritune-ds: interrupted; finished stages are kept, rerun the same command to resume\n"
    assert capsys.readouterr().err == expected
    with monkeypatch.context() as patch:  # while a verb is imported
        patch.setattr("importlib.import_module", Mock(side_effect=KeyboardInterrupt))
        assert main(["plan"]) == 130
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "path", [ROOT / "train.py", ROOT / "inheritune_ds" / "__main__.py"], ids=lambda path: path.name
)
def test_interrupt_before_the_cli_is_imported_ends_with_130(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(ModuleType):
        def __getattr__(self, _name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "inheritune_ds.cli", Loading("inheritune_ds.cli"))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 130


def test_other_ranks_wait_before_they_print_an_error(
    failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(CorpusError("no text", action="add some"))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, rank in (("RANK", "0"), ("RANK", "3"), ("SLURM_PROCID", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, rank)
            assert main(["recipes"]) == 6
    assert capsys.readouterr().err == (
        "inheritune-ds: error: no text\n  do: add some\n"
        "inheritune-ds: rank 3: error: no text\n  do: add some\n"
        "inheritune-ds: rank 2: error: no text\n  do: add some\n"
    )
    assert slept == [cli.SIBLING_GRACE_S] * 2


def test_defect_raises_its_traceback(failing: Any) -> None:
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])


def test_recipes_prints_one_line_per_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from inheritune_ds.config.loading import load_recipe, shipped_names

    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert all(load_recipe(line.split()[0]).description in line for line in lines)
    assert [line.split()[0] for line in lines if line.endswith("(default)")] == ["openllama-3b-13l"]


def test_machine_for_prefers_the_named_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = [DetectedGpu("big", 80.0, (9, 0), 78.5), DetectedGpu("small", 16.0, (7, 0), 15.5)]
    monkeypatch.setattr("inheritune_ds.plan.machine.detect_gpus", lambda: found)
    assert machine_for("a6000", 1) == Machine("cuda", 48.0, bf16=True)
    assert machine_for(None, 1) == Machine("cuda", 78.5, bf16=True), "the display card beside it is not used"
    assert machine_for(None, 2) == Machine("cuda", 15.5, bf16=False)
    assert expected_machine(2) == Machine("cuda", math.inf, bf16=True), "torch tells the rest"
    monkeypatch.setattr("inheritune_ds.plan.machine.host_memory_gib", lambda: 24.0)
    monkeypatch.setattr("inheritune_ds.plan.machine.cpu_has_bf16", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("inheritune_ds.plan.machine.has_driver", lambda: True)
    assert machine_for(None, 2) == expected_machine(2) == Machine("cpu", 12.0, bf16=True)
    monkeypatch.delenv("DS_ACCELERATOR")
    found.clear()
    assert machine_for(None, 3) == Machine("cpu", 8.0, bf16=True)
    assert expected_machine(3) == Machine("cuda", math.inf, bf16=True), "nvidia-smi is not on the PATH"
    monkeypatch.setattr("inheritune_ds.plan.machine.has_driver", lambda: False)
    assert expected_machine(3) == Machine("cpu", 8.0, bf16=True)


@pytest.mark.parametrize(("words", "asked"), [(["--dry-run"], "a6000"), ([], "what is here")])
def test_named_gpu_is_used_for_plans_only(words: list[str], asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):  # noqa: N818 - it ends the run
        pass

    def machine(gpu_name: str | None, _local_size: int) -> Machine:
        raise Asked(gpu_name)

    monkeypatch.setattr("inheritune_ds.cli.train.machine_for", machine)
    monkeypatch.setattr("inheritune_ds.cli.train.expected_machine", partial(machine, "what is here"))
    with pytest.raises(Asked) as caught:
        main(["train", "--recipe", "quickstart", "--gpu", "a6000", *words])
    assert caught.value.args == (asked,)


def test_train_py_is_the_verb_train() -> None:
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    module = [sys.executable, "-m", "inheritune_ds", "train", "--help"]
    again = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--dry-run" in done.stdout
    assert done.stdout == again.stdout
