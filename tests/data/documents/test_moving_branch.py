"""A hub branch that moves while its corpus is prepared."""

from pathlib import Path

import pytest

from inheritune_ds.config.corpus import HubSource
from inheritune_ds.storage import hub
from tests.data.prepared import Prepare, corpus_of, files_source, make_texts, tokens_of, write_jsonl


def test_a_branch_that_moves_is_read_at_the_commit_that_was_identified(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
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
    found = prepared(corpus_of(source))
    assert found.manifest["sources"][0]["identity"]["commit"] == "a" * 40
    local = prepared(corpus_of(files_source(tmp_path / ("a" * 40))))
    assert tokens_of(found) == tokens_of(local, source="a" * 40)
