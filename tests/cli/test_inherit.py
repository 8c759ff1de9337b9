"""`inheritune-ds inherit`: its output, and one error for every bad input, which leaves all files as they were."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.cli.inheriting import inherit
from tests.surgery import tiny
from tests.surgery.tiny import contents, plain

Harm = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


pytestmark = pytest.mark.usefixtures("own_environment")


def test_target_is_built_once_and_summarized(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (reference / "LICENSE").write_text("as you like", encoding="utf-8")
    (reference / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n", encoding="utf-8")
    before, output = contents(reference), tmp_path / "new" / "target"
    assert inherit(reference, output, select="0,3") == 0
    shown = capsys.readouterr()
    report = json.loads((output / "inheritance.json").read_text(encoding="utf-8"))
    assert {line.split("  ")[1].strip(): line.split("  ", 2)[2].strip() for line in shown.out.splitlines()} == {
        "blocks": "2: blocks [0, 3] of the reference",
        "parameters": f"{report['parameters']:,}, {report['block_parameters']:,} of them in blocks",
        "inherited": f"21 of 21 tensors, {report['parameters']:,} parameters",
        "hidden state": "equal, bit for bit",
        "target": str(output),
        "report": str(output / "inheritance.json"),
    }
    assert plain(output).config.num_hidden_layers == 2
    assert (output / "LICENSE").read_text(encoding="utf-8") == "as you like"
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert f"inheritune-ds inherit --reference {reference} --select 0,3 --output DIR" in card
    assert contents(reference) == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["target"]
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert inherit(reference, output, select="0,3") == 0
    assert capsys.readouterr().out == f"{shown.out}  state         built before, files verified\n"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times


def test_every_option_reaches_the_report_and_the_card(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, output = tmp_path / "scores.json", tmp_path / "target"
    scores.write_text('{"rank": [4, 1, 3, 2]}', encoding="utf-8")
    options = ["--inherit", "attention,norms,head", "--dropout", "0.25", "--seed", "9", "--block-scores", str(scores)]
    assert inherit(reference, output, *options, select="by:rank:2") == 0
    report = json.loads((output / "inheritance.json").read_text(encoding="utf-8"))
    assert (report["selection"], report["inherit"], report["seed"]) == ([0, 2], ["attention", "norms", "head"], 9)
    assert AutoConfig.from_pretrained(output).attention_dropout == 0.25
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "--select by:rank:2 --inherit attention,norms,head --dropout 0.25 --seed 9 --block-scores" in card
    assert "not comparable: fresh tensors in the blocks" in capsys.readouterr().out


def test_spelling_of_the_folder_does_not_change_the_reference(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reference.parent)
    for number, name in enumerate(("tiny-llama", "tiny-llama/", "./tiny-llama", "tiny-llama/.")):
        assert inherit(name, tmp_path / "target") == 0
        assert ("built before, files verified" in capsys.readouterr().out) == (number > 0)
    assert inherit("tiny-llama", tmp_path / "other", "--revision", "v1") == 3
    assert "--revision v1 is for models of the hub, --reference tiny-llama is a folder" in capsys.readouterr().err


def test_growth_keeps_the_previous_target(reference: Path, tmp_path: Path) -> None:
    assert inherit(reference, tmp_path / "small") == 0
    assert inherit(reference, tmp_path / "large", "--previous", str(tmp_path / "small"), select="first:3") == 0
    report = json.loads((tmp_path / "large/inheritance.json").read_text(encoding="utf-8"))
    assert [tensor["source"]["model"] for tensor in report["tensors"]].count("previous") == 21
    assert report["previous_blocks"] == 2


def test_tensors_without_a_place_are_printed(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {f"v_head.{number}": torch.ones(2) for number in range(4)}
    tiny.edit_weights(reference, lambda tensors: tensors.update(more))
    assert inherit(reference, tmp_path / "target") == 0
    shown = capsys.readouterr().out
    assert "  skipped       v_head.0, v_head.1, v_head.2, ...: no place in the model, or second copies\n" in shown


def remove(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Harm:
    return lambda folder: tiny.edit_config(folder, **changes)


def text(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def not_a_number(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    tiny.edit_weights(folder, spoil)


def missing_shard(folder: Path) -> None:
    tiny.shard(folder)[0].unlink()


def pickled(folder: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Exception}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


OPTIONS = [
    (["--select", "first:5"], 9, "select first:5: 5 is not possible, the reference has 4 blocks"),
    (["--select", ""], 3, "--select: String should have at least 1 character"),
    (["--inherit", "everything"], 3, "--inherit: inherit: 'everything': neither preset nor part"),
    (["--dropout", "1.0"], 3, "--dropout: Input should be less than 1"),
    (["--dropout", "nan"], 3, "--dropout: Input should be a finite number"),
    (["--seed", "-1"], 3, "--seed -1 is not a seed"),
    (["--seed", str(2**70)], 3, f"--seed {2**70} is not a seed"),
    (["--block-scores", "/no.json"], 3, "--select: block_scores is for select: by:NAME:n: remove it"),
    (["--previous", "/nowhere"], 3, "--previous '/nowhere' is not a model folder"),
    (["--previous", ""], 3, "--previous '' is not a model folder"),
    (["--inherit", ""], 3, "--inherit is empty\n  allowed: all, "),
    (["--inherit", "moments"], 3, "--inherit moments is for training: a cut model has no optimizer state"),
    (["--reference", ""], 3, "--reference: String should have at least 1 character"),
    (["--reference", "/no/where"], 3, "--reference /no/where: there is no folder /no/where\n  allowed: a model's fo"),
    (["--reference", "recipe:tiny"], 3, "train it first: inheritune-ds train --recipe tiny --runs-dir runs"),
    (["--reference", "recipe:../tiny"], 3, "--reference recipe:../tiny is not the name of a recipe"),
    (["--reference", "recipe:"], 3, "--reference recipe: is not the name of a recipe"),
    (["--revision", "v1"], 3, "--reference: revision v1 is for models of the hub"),
    (["training.seq_len=8"], 3, "inherit takes no overrides: training.seq_len=8"),
]
HARMS: list[tuple[str, Harm, int, str]] = [
    ("missing shard", missing_shard, 9, "model-00001-of-00002.safetensors is missing"),
    ("truncated", truncate, 9, "model.safetensors is damaged or cut short"),
    ("not a number", not_a_number, 9, "model.layers.1.mlp.up_proj.weight of the reference holds a non-finite number"),
    ("too deep", config(num_hidden_layers=5), 9, "model.layers.4.input_layernorm.weight is not in the files"),
    ("vocabulary", config(vocab_size=39), 6, "embeddings, which have 39: w35 (id 39)"),
    ("unknown family", config(model_type="nobody"), 9, "config.json cannot be loaded"),
    ("pickle with code", pickled, 9, "pickles that run code are not loaded"),
    ("no config", remove("config.json"), 3, "config.json is missing"),
    ("broken tokenizer", text("tokenizer.json", "{"), 6, "its files cannot be read"),
]
CASES: list[tuple[str, Harm | list[str], int, str]] = [
    *((" ".join(more)[:40], more, code, words) for more, code, words in OPTIONS),
    *HARMS,
]


@pytest.mark.parametrize(("fault", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_one_error(  # noqa: PLR0917 - fixtures are parameters
    fault: Harm | list[str], code: int, words: str, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not isinstance(fault, list):
        fault(reference)
    before = contents(tmp_path)
    capfd.readouterr()
    assert inherit(reference, tmp_path / "target", *(fault if isinstance(fault, list) else [])) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("inheritune-ds: error: ")
    assert shown.err.count("error: ") == 1
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_single_weight_file_takes_precedence_over_an_index(reference: Path, tmp_path: Path) -> None:
    (reference / INDEX).write_text("{", encoding="utf-8")
    assert inherit(reference, tmp_path / "target") == 0
    AutoModelForCausalLM.from_pretrained(reference)


def test_unwritable_output_is_reported(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    assert inherit(reference, tmp_path / "file" / "target") == 5
    assert "cannot be written: " in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [200, 1000, 12_000], ids=["config", "tokenizer", "weights"])
def test_full_disk_leaves_nothing(
    limit: int, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files cuts one of them short, as a full disk does."""
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = inherit(reference, tmp_path / "target", select="first:4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr()
    assert (code, shown.err.count("error: ")) == (5, 1), shown.err
    assert "cannot be written: File too large" in shown.err
    assert contents(tmp_path) == before
