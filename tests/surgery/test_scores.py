import json
from pathlib import Path

import pytest

from inheritune_ds.config.block_scores import FORMAT, read_scores
from inheritune_ds.errors import RecipeError, SurgeryError
from tests.surgery.tiny import Build, SaveReference


def test_scores_are_read_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"rank": [3, 1.5, -2e1], "mass": []}', encoding="utf-8")
    assert read_scores(str(path)) == {"rank": [3.0, 1.5, -20.0], "mass": []}
    assert read_scores(None) == {}


VALUES = ["3", '["1"]', "[1, true]", "[null]", "[NaN]", "[Infinity]", "[1e999]", f"[{'9' * 400}]", '{"0": 1}']


@pytest.mark.parametrize("text", ["[]", "3", *(f'{{"mass": [1], "rank": {value}}}' for value in VALUES)], ids=str)
def test_invalid_scores_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_scores(str(path))
    assert caught.value.problem == f"block_scores: {path} does not hold scores"
    assert caught.value.allowed == FORMAT


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{'rank': [1]}", "cannot be read: it is not JSON"),
        ('{"rank": [1, 2], "rank": [2, 1]}', "names 'rank' twice"),
    ],
)
def test_an_unreadable_file_is_named(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_scores(str(path))
    assert caught.value.problem.startswith(f"block_scores: {path} {problem}")


def test_target_keeps_the_blocks_with_the_highest_scores(
    reference_folder: SaveReference, build: Build, tmp_path: Path
) -> None:
    folder, scores = reference_folder("llama"), tmp_path / "scores.json"
    scores.write_text(json.dumps({"rank": [0.5, 3.0, 1.0, 2.0], "short": [1.0, 2.0]}), encoding="utf-8")
    assert build(folder, select="by:rank:2", block_scores=str(scores)).report["selection"] == [1, 3]
    with pytest.raises(SurgeryError, match="2 scores named 'short', but the reference has 4 blocks"):
        build(folder, to="other", select="by:short:2", block_scores=str(scores))
    assert not (tmp_path / "other").exists()
