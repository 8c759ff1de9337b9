from pathlib import Path

import pytest

from inheritune_ds.config.deepspeed_checks import problems, read
from inheritune_ds.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"bf16": {}, "bf16": {}}', "the key 'bf16' appears twice"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' appears twice"),
        ('{"a": 1,}', "Illegal trailing comma before end of object|Expecting property name"),
        ("", "it is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
        ("<!doctype html>", "it is an HTML page"),
        ('[{"bf16": {}', "it is one JSON array"),
        ("[1]", "the document is a list, not an object"),
        ("null", "the document is null, not an object"),
        ('{"a": ' * 100_000, "recursion|Expecting value"),
    ],
)
def test_read_refuses_anything_but_a_json_object(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=problem) as caught:
        read(path)
    assert caught.value.problem.startswith(f"DeepSpeed config {path}: ")
    assert caught.value.allowed
    assert caught.value.action


def test_read_accepts_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {}}', encoding="utf-8-sig")
    assert read(path) == {"bf16": {}}


def test_read_reports_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    assert read(None) == {}
    for path, reason in ((tmp_path / "none.json", "no such file or directory"), (tmp_path, "is a directory")):
        with pytest.raises(RecipeError) as caught:
            read(path)
        assert caught.value.problem == f"DeepSpeed config {path} cannot be read: {reason}"
        assert caught.value.action == "give an existing file, such as ds_configs/zero1.json"
    (tmp_path / "latin.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(RecipeError, match=r"latin\.json: .*decode"):
        read(tmp_path / "latin.json")


def test_problems_need_no_recipe() -> None:
    document = {"zero_optimisation": {}, "train_batch_size": 8, "bf16": {"enable": True}}
    found = [str(problem) for problem in problems(document, "ds.json")]
    assert [text.splitlines()[0] for text in found] == [
        "ds.json: bf16.enable: unknown key",
        "ds.json: zero_optimisation: unknown key",
        "ds.json: train_batch_size: 8 is set here, but the recipe owns it as training.global_batch_tokens",
    ]
    assert 'do: write "auto" here and set training.global_batch_tokens to 8 x training.seq_len' in found[2]
    assert problems({}, "ds.json") == []
