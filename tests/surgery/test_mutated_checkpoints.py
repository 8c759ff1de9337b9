"""A short form of `python -m benchmarks.mutated_checkpoints`, and tests of its judge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.mutated_checkpoints import LAYOUTS, MUTATIONS, NEED_SHARDS, lay_out, make_bases, make_case, run_cases
from benchmarks.mutation_judge import hashes, judge_refusal, judge_target
from tests.surgery import tiny

SEED = 11
CASES = range(2 * len(MUTATIONS))


@pytest.mark.timeout(180)
def test_every_mutated_checkpoint_ends_as_a_correct_target_or_as_one_error(tmp_path: Path) -> None:
    lines, wrong = run_cases(CASES, SEED, tmp_path)
    assert wrong == []
    assert [int(line.split(" | ")[0]) for line in lines] == list(CASES)
    assert {line.split(" | ")[3] for line in lines} == set(MUTATIONS)
    endings = {line.split(" | ")[5] for line in lines}
    assert {"refusal (exit code 9)", "target (tensors, hidden state)"} <= endings
    assert "traceback" not in endings


def test_a_case_follows_from_its_seed_and_number(tmp_path: Path) -> None:
    make_bases(tmp_path / "bases")
    found = []
    for attempt in ("one", "two"):
        for number in (1, 5, 9):
            case, chance = make_case(number, SEED)
            folder = tmp_path / attempt / str(number)
            folder.parent.mkdir(exist_ok=True)
            lay_out(tmp_path / "bases" / case.family, folder, case.layout)
            MUTATIONS[case.mutation](folder, chance)
            found.append((case, hashes(folder)))
    assert found[:3] == found[3:]
    assert make_case(1, SEED)[0] != make_case(1, SEED + 1)[0]


@pytest.mark.parametrize("mutation", sorted(set(MUTATIONS) - {"none"}))
def test_every_mutation_changes_files(mutation: str, tmp_path: Path) -> None:
    make_bases(tmp_path / "bases")
    number = list(MUTATIONS).index(mutation)
    changed = 0
    for attempt in range(3):
        case, chance = make_case(number + attempt * len(MUTATIONS), SEED)
        assert case.mutation == mutation
        assert mutation not in NEED_SHARDS or "shards" in case.layout
        folder = tmp_path / str(attempt)
        lay_out(tmp_path / "bases" / case.family, folder, case.layout)
        before = hashes(folder)
        MUTATIONS[mutation](folder, chance)
        changed += hashes(folder) != before
    assert changed >= 2  # a swap may find no other tensor


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS)))
def test_every_layout_holds_the_same_model(layout: str, tmp_path: Path) -> None:
    make_bases(tmp_path / "bases")
    lay_out(tmp_path / "bases" / "llama", tmp_path / "model", layout)
    expected = tiny.plain(tmp_path / "bases" / "llama").state_dict()
    found = tiny.plain(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert (tmp_path / "model" / "manifest.json").exists() == ("hash" in layout)


def turn_one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 2] ^= 1


def exchange_blocks(tensors: dict[str, torch.Tensor]) -> None:
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def halve_precision(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda _: None, ""),
        (lambda folder: tiny.edit_weights(folder, turn_one_bit), "model.layers.1.mlp.up_proj.weight is another"),
        (lambda folder: tiny.edit_weights(folder, exchange_blocks), "model.layers.0.mlp.up_proj.weight is another"),
        (lambda folder: tiny.edit_weights(folder, drop), "transformers cannot use the target: missing_keys"),
        (lambda folder: tiny.edit_weights(folder, halve_precision), "model.layers.0.mlp.up_proj.weight is another"),
        (lambda folder: tiny.edit_config(folder, rms_norm_eps=0.1), "config: rms_norm_eps is 0.1"),
        (lambda folder: tiny.edit_config(folder, num_hidden_layers=1), "unexpected_keys"),
    ],
    ids=["none", "bit", "order", "drop", "type", "config", "depth"],
)
def test_the_judge_detects_a_wrong_target(
    harm: Callable[[Path], object], problem: str, folder: Path, tmp_path: Path
) -> None:
    target = tiny.cut(folder, tmp_path / "target", select="1,3").folder
    assert judge_target(folder, target, (1, 3)) == ("tensors, hidden state", [])
    harm(target)
    _, wrong = judge_target(folder, target, (1, 3))
    assert bool(wrong) == bool(problem)
    assert problem in " ".join(wrong)


def test_the_judge_detects_other_blocks_and_a_wrong_report(folder: Path, tmp_path: Path) -> None:
    target = tiny.cut(folder, tmp_path / "target", select="1,3").folder
    assert "the hidden state is another" in judge_target(folder, target, (3, 1))[1]
    assert any("other tensors" in problem for problem in judge_target(folder, target, (1, 2, 3))[1])
    path = target / "inheritance.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report["tensors"][0] |= {"inherited": False, "source": None}
    report["tensors"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(report), encoding="utf-8")
    wrong = judge_target(folder, target, (1, 3))[1]
    assert any("is fresh" in problem for problem in wrong)
    assert any("has another hash than the report says" in problem for problem in wrong)


def test_the_judge_detects_an_invalid_refusal(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    good = "inheritune-ds: error: it is broken\n  do: mend it\n"
    assert judge_refusal(9, good, tmp_path) == []
    assert judge_refusal(1, good, tmp_path) == ["exit code 1"]
    assert len(judge_refusal(9, "Traceback", tmp_path)) == 1
    assert len(judge_refusal(9, good + good, tmp_path)) == 1
    (tmp_path / "target").mkdir()
    assert judge_refusal(9, good, tmp_path) == ["files were left"]
    shutil.rmtree(tmp_path / "target")
