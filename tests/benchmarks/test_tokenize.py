from pathlib import Path

import pytest

from benchmarks.tokenize import MEGABYTE, lines_of, missed, write_corpus
from tests.benchmarks.conftest import Rehearse
from tests.launching import ROOT

DATA = ROOT.parent / "shared" / "data"


def test_write_corpus_repeats_a_file_under_further_names(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path, ["a" * 989], 2500)
    assert Path(paths[0]).stat().st_size == 1002
    assert [Path(path).name for path in paths] == ["books-0000.jsonl", "books-0001.jsonl", "books-0002.jsonl"]
    assert all(Path(path).samefile(paths[0]) for path in paths)
    assert write_corpus(tmp_path, ["never written again"], 4000)[:3] == paths


def test_missed_names_the_missed_bars() -> None:
    held = {"corpus_bytes": 2000 * MEGABYTE, "workers": 2, "seconds": 9.0, "peak_pss_bytes": 1}
    ratio = {"median": 0.5, "interval_95": [0.4, 0.6]}
    figures = {
        "mb_per_s": {"project": ratio},
        "ratios": {"one": {**ratio, "verdict": "missed"}, "other": {**ratio, "verdict": "met"}},
        "memory_bar_bytes": 1000 * MEGABYTE,
        "memory": [{**held, "peak_rss_bytes": 1000 * MEGABYTE}, {**held, "peak_rss_bytes": 999 * MEGABYTE}],
    }
    assert missed(figures) == ["one", "memory at 2,000 MB"]
    lines = lines_of(figures)
    assert lines[2].split() == ["one", "0.50", "0.40", "to", "0.60", "missed"]
    assert lines[5].split() == ["2,000", "2", "9", "1,000", "0"]


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not DATA.is_dir(), reason="the real corpora (../shared/data) are not beside this checkout")
def test_rehearsal_measures_throughput_and_memory(rehearse: Rehearse) -> None:
    result, _ = rehearse("tokenize", "--data", str(DATA))
    assert set(result["mb_per_s"]) == {"project", "encode_batch", "encode_batch_fast"}
    (held,) = result["memory"]
    assert held["corpus_bytes"] > 8 * MEGABYTE
    assert held["processes"] >= 3, "no workers were started"
    assert 100 * MEGABYTE < held["peak_pss_bytes"] <= held["peak_rss_bytes"] < 1000 * MEGABYTE
