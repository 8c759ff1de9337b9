import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from inheritune_ds import cli
from tests.surgery import tiny
from tests.surgery.families import tiny_config
from tests.surgery.tiny import Build, SaveReference


def test_another_tokenizer_sets_its_special_ids(folder: Path, build: Build) -> None:
    tiny.make_tokenizer(40).save_pretrained(folder)
    same = build(folder, to="same", select="first:2", words=40).folder
    assert AutoConfig.from_pretrained(same).pad_token_id == 0
    assert GenerationConfig.from_pretrained(same).repetition_penalty == 1.25
    tiny.edit_config(folder, bos_token_id=7, eos_token_id=8, pad_token_id=9)
    other = build(folder, to="other", select="first:2", words=33).folder
    assert AutoTokenizer.from_pretrained(other)("w3 w28")["input_ids"] == [7, 32]
    assert AutoConfig.from_pretrained(other).use_cache is True
    for found in (AutoConfig.from_pretrained(other), GenerationConfig.from_pretrained(other)):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
    kept = AutoConfig.from_pretrained(build(folder, to="kept", select="first:2", words=40).folder)
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (7, 8, 9)


def test_inherit_copies_the_reference_s_tokenizer_files(folder: Path, tmp_path: Path) -> None:
    target, tokenizer = tmp_path / "out", tiny.make_tokenizer(40)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert cli.main(["inherit", "--reference", str(folder), "--select", "first:2", "--output", str(target)]) == 0
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    copied, given = (json.loads((at / "tokenizer_config.json").read_text()) for at in (target, folder))
    of_one_machine = {"backend", "is_local", "local_files_only"}
    assert copied == {key: value for key, value in given.items() if key not in of_one_machine} | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    theirs, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(target)
    assert ours.padding_side == theirs.padding_side
    assert ours.get_vocab() == theirs.get_vocab()


def test_generation_settings_of_an_old_config_are_kept(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("gpt2")
    (folder / "generation_config.json").unlink()
    tiny.edit_config(folder, do_sample=True, temperature=0.5)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config
    ours = AutoModelForCausalLM.from_pretrained(build(folder, select="first:2").folder).generation_config
    assert (ours.do_sample, ours.temperature) == (theirs.do_sample, theirs.temperature) == (True, 0.5)


@pytest.mark.parametrize(
    ("front", "license_name"),
    [
        ("license: mit", "mit"),
        ("license: mit # as the code", "mit"),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\ntags:\n- x", "its card names none"),
        ("license: [", "its card names none"),
    ],
)
def test_the_card_names_the_reference_s_license(front: str, license_name: str, folder: Path, build: Build) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Model\n", encoding="utf-8")
    (folder / "LICENSE").write_text("terms", encoding="utf-8")
    target = build(folder, select="first:2").folder
    assert f"the reference's ({license_name})" in (target / "README.md").read_text(encoding="utf-8")
    assert (target / "LICENSE").read_text(encoding="utf-8") == "terms"


@pytest.mark.parametrize(("files", "config"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_target_and_reference_load_in_the_same_dtype(
    files: str, config: str, reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder("llama", dtype=files)
    tiny.edit_config(folder, dtype=config)
    built = build(folder, select="first:2")
    assert {tensor["dtype"] for tensor in built.report["tensors"]} == {files}
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(built.folder)
    assert ours.dtype == theirs.dtype == getattr(torch, config)


def test_buffers_are_not_counted_as_inherited_parameters(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    AutoModelForCausalLM.from_config(tiny_config("deepseek_v3")).save_pretrained(folder)
    report = build(folder, select="first:3").report
    assert report["inherited_parameters"] == report["parameters"]
    assert report["inherited_block_parameters"] == report["block_parameters"]
