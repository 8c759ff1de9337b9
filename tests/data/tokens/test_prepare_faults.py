import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from inheritune_ds.cli import main
from inheritune_ds.config.corpus import Corpus
from inheritune_ds.data.tokens import token_set
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.shards import ShardWriter
from inheritune_ds.data.tokens.token_set import open_finished
from inheritune_ds.errors import CorpusError, StorageError
from tests.data.prepared import (
    Prepare,
    corpus_of,
    files_below,
    files_source,
    make_corpus,
    make_texts,
    names_in,
    recipe_file,
)

INTACT = "every file has the sha256 of the manifest"


class Ended(NamedTuple):
    """A command that has ended: exit code, lines of the standard output, text of the error output."""

    code: int
    output: list[str]
    error: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, bpe: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """`inheritune-ds prepare` of a corpus, into the folder `cache`."""

    def start(corpus: Corpus, *arguments: str) -> Ended:
        command = ["prepare", "--recipe", str(recipe_file(tmp_path, corpus, bpe)), "--workers", "1", *arguments]
        code = main([*command, "--cache-dir", str(tmp_path / "cache")])
        out, error = capsys.readouterr()
        return Ended(code, out.splitlines(), error)

    return start


def records(texts: list[str]) -> list[bytes]:
    """Lines of a jsonl file."""
    return [json.dumps({"text": text}).encode() + b"\n" for text in texts]


def bad_line(lines: list[bytes]) -> bytes:
    """The lines with one that is not UTF-8 at number 8."""
    return b"".join([*lines[:7], b'{"text": "caf\xe9"}\n', *lines[7:]])


BAD = {
    "a line that is not UTF-8": (
        bad_line(records(make_texts(40))),
        r"c\.jsonl:8: it is not UTF-8 text \(invalid continuation byte at byte 13 of the line\)\n.*\n  do: find",
    ),
    "only empty documents": (
        b"".join(records(["", " \n"])),
        r"the corpus has no document with text \(2 empty, filtered or bad ones were skipped\)\n  do: check",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_message_and_publishes_nothing(tmp_path: Path, run: Run, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / "c.jsonl").write_bytes(content)
    ended = run(corpus_of(files_source(tmp_path / "c.jsonl")))
    assert ended.code == CorpusError.exit_code == 6
    assert re.match(r"inheritune-ds: error: (corpus file )?.*" + message, ended.error), ended.error
    assert ended.error.count("error:") == 1
    assert ended.output == []
    folder = tmp_path / "cache" / "tokens"
    published = [name for name in names_in(folder) if not name.startswith(".")] if folder.exists() else []
    assert published == []


def test_skipped_records_are_counted_and_the_first_is_shown(tmp_path: Path, run: Run) -> None:
    texts = make_texts(40)
    lines = [*records(texts)[:20], b"\n", b"no json\n", *records(["", *texts[20:]]), b'{"body": "a cat"}\n']
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(bad_line(lines))
    ended = run(corpus_of(files_source(path, bad_records="skip")))
    assert ended.code == 0, ended.error
    assert ended.output[-1].startswith(
        f"skipped in corpus: 1 empty, 3 bad (first bad record: {path}:8: it is not UTF-8 text (invalid cont"
    )
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    tokens = open_finished(folder, folder.name)
    assert tokens is not None
    assert tokens.manifest["train_documents"] + tokens.manifest["validation_documents"] == len(texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, r"it vanished while the corpus was read \(no such file or directory\)\n  do: restore it"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"cat", b"dog")),
            r"it was changed while the corpus was read \(it had ([0-9,]+) bytes and has \1\)\n  do: let its writer",
        ),
    ],
)
def test_prepare_never_keeps_text_read_after_a_file_changed(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], message: str
) -> None:
    """Larger than any buffer, so that the change is read, too; many shards, so that it would be kept."""
    corpus = make_corpus(tmp_path, make_texts(9000, words=60))
    path = tmp_path / "corpus.jsonl"
    content = path.read_bytes()
    assert len(content) > 2**21
    expected = files_below(prepare(corpus, bpe, tmp_path / "whole", workers=1, shard_tokens=20_000).folder)
    append, documents = ShardWriter.append, iter(range(10**6))

    def watched(self: ShardWriter, ids: Any) -> bool:
        if next(documents) == 1500:
            change(path)
        return append(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", watched)
        with pytest.raises(CorpusError, match=message):
            prepare(corpus, bpe, tmp_path / "cache", workers=1, shard_tokens=20_000)
    path.write_bytes(content)
    again = prepare(corpus, bpe, tmp_path / "cache", workers=1, shard_tokens=20_000)
    assert files_below(again.folder) == expected
    assert names_in(tmp_path / "cache" / "tokens") == [again.fingerprint]


@pytest.mark.parametrize(
    ("size", "file"),
    [(5000, r"progress\.sqlite"), (13_000, r"corpus/train-00000\.bin"), (40_000, r"corpus/train-00000\.bin")],
)
def test_prepare_reports_a_full_disk_and_resumes(
    tmp_path: Path, run: Run, room: Callable[[int], None], size: int, file: str
) -> None:
    corpus = make_corpus(tmp_path, make_texts(4000))
    assert run(corpus).code == 0
    (whole,) = (tmp_path / "cache" / "tokens").iterdir()
    expected = files_below(whole)
    whole.rename(tmp_path / "whole")
    room(size)
    ended = run(corpus)
    room(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert ended.code == StorageError.exit_code == 5
    assert re.match(rf"inheritune-ds: error: .*{file}\S* cannot be written: .*\n  do: ", ended.error), ended.error
    assert ended.error.count("error:") == 1
    assert run(corpus).code == 0
    assert files_below(whole) == expected
    assert names_in(tmp_path / "cache" / "tokens") == [whole.name]


def flip(path: Path) -> None:
    """Turn one bit: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["corpus/train-00000.bin", "corpus/validation-00000.bin", "tokenizer/tokenizer.json"])
def test_verify_detects_a_flipped_bit_and_remakes_the_tokens(
    tmp_path: Path, corpus: Corpus, run: Run, name: str
) -> None:
    table = run(corpus).output
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    expected = files_below(folder)
    flip(folder / name)
    found = files_below(folder)[name]
    assert run(corpus).output == table, "without --verify sizes alone are compared"
    ended = run(corpus, "--verify")
    assert ended.code == 0
    damage = f"{name} has sha256 {found[:12]}... not {expected[name][:12]}..."
    warning = f"WARNING: the tokens in {folder} are damaged; they are remade from the corpus: {damage}"
    assert ended.output == [warning, *table, INTACT]
    assert files_below(folder) == expected
    assert names_in(folder.parent) == [folder.name]
    assert run(corpus, "--verify").output == [*table, INTACT]


def test_damaged_tokens_are_not_used_when_the_corpus_is_gone(tmp_path: Path, corpus: Corpus, prepared: Prepare) -> None:
    flip(prepared(corpus).sources[0].train[0].path)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"corpus\.jsonl"):
        prepared(corpus)


@pytest.mark.parametrize("name", ["corpus/train-00000.bin", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_prepare_remakes_incomplete_tokens(corpus: Corpus, prepared: Prepare, name: str, damage: str) -> None:
    first = prepared(corpus)
    content = (first.folder / name).read_bytes()
    (first.folder / name).unlink()
    if damage == "cut":
        (first.folder / name).write_bytes(content[:-2])
    assert prepared(corpus, damage_of=lambda _: None) == first
    assert (first.folder / name).read_bytes() == content
    assert names_in(first.folder.parent) == [first.fingerprint]


def test_a_token_file_that_cannot_be_read_is_named(
    corpus: Corpus, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prepared(corpus)

    def refuse(path: Path, _advance: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(token_set, "sha256_file", refuse)
    with pytest.raises(CorpusError, match=r"it cannot be read \(input/output error\)\n  do: .*to remake") as caught:
        prepared(corpus)
    assert str(tokens.folder) in caught.value.problem


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, bpe: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"(?s)file.* cannot be written: Not a directory"):
        prepare(make_corpus(tmp_path, make_texts(40)), bpe, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (5, {"validation_ratio": 0.999}, r"training part is empty: all 5 documents were held out.*\n  do: lower corpu"),
        (5, {"validation_ratio": 1e-9}, r"validation part is empty: none of 5 documents.*\n  do: raise corpus\.valid"),
        (60, {"validation_ratio": 0.001, "max_tokens": 10}, r"do: raise corpus\.validation_ratio or corpus\.max_tok"),
    ],
)
def test_prepare_refuses_an_empty_part_and_names_the_key(
    tmp_path: Path, prepared: Prepare, texts: int, settings: dict[str, Any], message: str
) -> None:
    corpus = make_corpus(tmp_path, make_texts(texts), **settings)
    with pytest.raises(CorpusError, match=message):
        prepared(corpus)
    assert [name for name in names_in(tmp_path / "cache" / "tokens") if not name.startswith(".")] == []
