"""Secrets and foreign code: the short form, and that the search and the canaries are no blind ones."""

import ast
import gzip
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks.campaign.foreign_code import Evil, evil_pickle, evil_zip
from benchmarks.campaign.secrecy import MARKER, SECRETS, holders
from benchmarks.record import REPOSITORY
from inheritune_ds.storage.redaction import find_secret


def test_holders_finds_the_marker_in_every_kind_of_file(tmp_path: Path) -> None:
    content = f"text {MARKER} text".encode() * 50
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "plain").write_bytes(content)
    (tmp_path / "gzip").write_bytes(gzip.compress(content))
    (tmp_path / "zlib").write_bytes(zlib.compress(content))
    (tmp_path / f"{MARKER}.txt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", content)
    torch.save({"name": MARKER}, tmp_path / "torch")
    (tmp_path / "innocent").write_bytes(b"x\x9c and more")
    (tmp_path / "input").write_bytes(content)
    expected = ["below/plain", f"{MARKER}.txt", "gzip", "torch", "zip", "zlib"]
    assert holders(tmp_path, [tmp_path / "input"]) == expected


@pytest.mark.parametrize("name", SECRETS)
def test_every_canary_is_a_secret(name: str) -> None:
    assert find_secret(SECRETS[name], {name: SECRETS[name]}) is not None


def test_careless_loading_makes_the_canary(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "a")))
    evil_zip(tmp_path / "zip", tmp_path / "b")
    torch.load(tmp_path / "zip", weights_only=False)
    evil_pickle(tmp_path / "plain", tmp_path / "c")
    pickle.loads((tmp_path / "plain").read_bytes())
    assert all((tmp_path / name).is_dir() for name in "abc")


def test_evil_pickle_keeps_the_size_of_the_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    path.write_bytes(bytes(5000))
    evil_pickle(path, tmp_path / "canary")
    assert path.stat().st_size == 5000


def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted((REPOSITORY / "inheritune_ds").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(REPOSITORY)
        found += [(f"{where}:{node.lineno}", node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return found


def test_auto_classes_are_called_without_remote_code() -> None:
    """`from_pretrained` of the Auto classes; the other classes know no remote code."""
    plain = {"GenerationConfig", "PreTrainedTokenizerFast"}
    careless, careful = [], 0
    for where, call in calls():
        function = call.func
        if not (isinstance(function, ast.Attribute) and function.attr == "from_pretrained"):
            continue
        switch = next((word.value for word in call.keywords if word.arg in ("trust_remote_code", None)), None)
        if isinstance(switch, ast.Constant) and switch.value is False:
            careful += 1
        elif isinstance(function.value, ast.Name) and function.value.id not in plain and switch is None:
            careless.append(where)
    assert careless == []
    assert careful >= 2


def test_package_asks_for_no_remote_code_and_no_careless_pickle() -> None:
    asked = [where for where, call in calls() for word in call.keywords if _asks(word)]
    loads = [
        (where, call)
        for where, call in calls()
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "load"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("torch", "pickle")
    ]
    careless = [where for where, call in loads if not any(_is(word, "weights_only", True) for word in call.keywords)]
    assert asked == careless == []
    assert loads


def _asks(word: ast.keyword) -> bool:
    return _is(word, "trust_remote_code", True) or _is(word, "allow_pickle", True) or _is(word, "weights_only", False)


def _is(word: ast.keyword, name: str, value: bool) -> bool:  # noqa: FBT001
    return word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
