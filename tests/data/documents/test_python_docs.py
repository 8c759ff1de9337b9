import sys
import sysconfig
from pathlib import Path

import pytest

from inheritune_ds.data.documents import python_docs
from inheritune_ds.data.documents.records import Cursor
from inheritune_ds.errors import CorpusError


def library(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_collect_heads_each_docstring_by_its_qualified_name(tmp_path: Path) -> None:
    source = '''"""The module."""
if True:
    class Box:
        """
        A box.

            indented
        """
        async def open(self):
            """Open it."""
            def inner():
                "Deep."
        def silent(self):
            pass
        def blank(self):
            "  "
'''
    found = python_docs.collect(library(tmp_path, pkg__things=source), topics={})
    expected = (
        "pkg.things\n\nThe module.\n\npkg.things.Box\n\nA box.\n\n    indented\n\n"
        "pkg.things.Box.open\n\nOpen it.\n\npkg.things.Box.open.inner\n\nDeep."
    )
    assert found.documents == (expected,)


def test_collect_puts_topics_first_and_names_a_package_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "__init__.py").write_text('"""B."""')
    library(tmp_path, a='"""A."""', c="x = 1")
    found = python_docs.collect(tmp_path, topics={"with": "   The with statement.\n", "assert": "Assert.\n"})
    assert found.documents == ("assert\n\nAssert.", "with\n\nThe with statement.", "a\n\nA.", "b\n\nB.")


def test_collect_keeps_a_docstring_once(tmp_path: Path) -> None:
    library(tmp_path, a='"""Same."""', b='"""Same."""\ndef f():\n    """Own."""', c='"""Same."""')
    assert python_docs.collect(tmp_path, topics={}).documents == ("a\n\nSame.", "b.f\n\nOwn.")


@pytest.mark.parametrize(
    "name", ["test__a", "x__tests__a", "idlelib__idle_test__a", "lib2to3__a", "test_a", "site-packages__a"]
)
def test_collect_excludes_tests_and_installed_packages(tmp_path: Path, name: str) -> None:
    library(tmp_path, **{name: '"""No."""', "a": '"""Yes."""'})
    assert python_docs.collect(tmp_path, topics={}).documents == ("a\n\nYes.",)


def test_collect_skips_and_counts_invalid_files(tmp_path: Path) -> None:
    library(tmp_path, a="def f(:", b='"""Yes."""', c="\0", d=r'"""Bad escape \d."""')
    found = python_docs.collect(tmp_path, topics={})
    assert found.unparsed_files == 2
    assert found.documents == ("b\n\nYes.", "d\n\nBad escape \\d.")


def test_documents_of_this_python_are_megabytes_of_text_without_duplicates() -> None:
    found = list(python_docs.documents())
    documents = [document.text for document in found]
    assert 1_000_000 < sum(map(len, documents)) < 5_000_000
    assert len(set(documents)) == len(documents) > 300
    assert any(text.startswith("with\n\n") for text in documents)
    assert any(text.startswith("argparse\n\n") for text in documents)
    assert not any(text.startswith(("test.", "unittest.test", "numpy")) for text in documents)
    assert [document.cursor for document in found] == [Cursor(0, number + 1) for number in range(len(found))]
    assert not any(document.skipped for document in found)
    assert list(python_docs.documents(Cursor(0, 7))) == found[7:]


def test_collect_imports_no_module(tmp_path: Path) -> None:
    library(tmp_path, this='"""The module."""', antigravity='"""Opens a browser when imported."""')
    before = set(sys.modules)
    python_docs.collect(tmp_path)
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}


def test_identity_follows_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, argparse='"""A."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    before = python_docs.identity()
    assert python_docs.identity() == before
    library(tmp_path, argparse='"""B."""')
    assert python_docs.identity()["sha256"] != before["sha256"]
    assert before["kind"] == "embedded"


def test_identity_names_an_action_without_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match=r"(?s)needs pydoc_data, which is missing in this Python .*kind: files"):
        python_docs.identity()


def test_collect_names_an_action_without_library_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(CorpusError, match=r"(?s)source of the standard library, which is missing in .*kind: files"):
        python_docs.collect()
