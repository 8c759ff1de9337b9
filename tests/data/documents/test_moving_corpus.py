"""A corpus that somebody changes while it is prepared."""

from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import Corpus, HubSource
from inheritune_ds.data.tokens import prepare as tokenize
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage import hub
from tests.data.prepared import files_source, make_texts, names_in, tokens_of, write_jsonl


def test_a_file_that_comes_while_the_corpus_is_read_is_not_read_in_silence(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "corpus" / "b.jsonl", make_texts(40))
    late = tmp_path / "corpus" / "a.jsonl"
    corpus = Corpus(sources=[files_source(tmp_path / "corpus")], validation_ratio=0.2)
    wanted = prepare(corpus, bpe, tmp_path / "undisturbed")
    index = tokenize._overlap_index  # after the files were identified, before they are read

    def index_late(*given: Any) -> Any:
        write_jsonl(late, make_texts(40, seed=2))
        return index(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_overlap_index", index_late)
        with pytest.raises(CorpusError, match=r"/corpus/a\.jsonl: it appeared while the corpus was read"):
            prepare(corpus, bpe, tmp_path / "cache")
    late.unlink()
    found = prepare(corpus, bpe, tmp_path / "cache")
    assert names_in(tmp_path / "cache" / "tokens") == [wanted.fingerprint]
    assert found.manifest == wanted.manifest


def test_a_branch_that_moves_is_read_at_the_commit_that_was_identified(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {letter * 40: make_texts(40, seed) for seed, letter in enumerate("ab")}
    for commit, documents in texts.items():
        write_jsonl(tmp_path / commit / "a.jsonl", documents)
    tips = iter(texts)

    def resolve(name: str, revision: str, repo_type: hub.RepoType) -> hub.Repository:
        return hub.Repository(name, repo_type, next(tips) if revision == "main" else revision, "")

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(hub, "list_files", lambda _repository: ["a.jsonl"])
    monkeypatch.setattr(hub, "snapshot", lambda repository, _patterns: tmp_path / repository.commit)
    source = HubSource(kind="hub", dataset="org/corpus", data_files="a.jsonl", streaming=False)
    found = prepare(Corpus(sources=[source], validation_ratio=0.2), bpe, tmp_path / "cache")
    assert found.manifest["sources"][0]["identity"]["commit"] == "a" * 40
    local = prepare(
        Corpus(sources=[files_source(tmp_path / ("a" * 40))], validation_ratio=0.2), bpe, tmp_path / "cache"
    )
    assert tokens_of(found) == tokens_of(local, source="a" * 40)
