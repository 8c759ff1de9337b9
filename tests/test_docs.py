"""The docs under test: commands parse, links and paths exist, generated text is current."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inheritune_ds import cli
from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe, shipped_names

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(path for folder in ("docs", "benchmarks") for path in (REPOSITORY / folder).rglob("*.md")),
]
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(?:docs|ds_configs|benchmarks|slurm|tests|inheritune_ds)/[\w./-]*\w/?")
MODULE_PATH = re.compile(r"(?<![\w./-])[a-z_]+(?:/\w+)+\.py")
PAGE = re.compile(r"docs/(?!source/)[\w/-]+\.md")
CODE = ("inheritune_ds", "benchmarks", "tests", "docs", "slurm")


def code_lines(path: Path) -> Iterator[str]:
    """Lines of fenced code, continued lines joined, and inline code."""
    text = path.read_text(encoding="utf-8")
    for block in FENCED.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(FENCED.sub("", text))


def command_of(line: str) -> list[str]:
    """The words of a command without prompt, comment, environment and launcher; empty for other text."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in output that is quoted
        return []
    while words and (words[0] == "$" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        del words[0]
    if not words:
        return []
    name = Path(words[0]).name
    if name == "inheritune-ds":
        return words[1:]
    if name in ("python", "python3", "deepspeed", "torchrun", "srun") and "train.py" in words:
        return ["train", *words[words.index("train.py") + 1 :]]
    return []


def commands() -> list[tuple[str, str]]:
    found = [(f"{path.relative_to(REPOSITORY)}", line) for path in DOCUMENTS for line in code_lines(path)]
    return [(where, line) for where, line in dict.fromkeys(found) if command_of(line)]


@pytest.mark.parametrize(("where", "line"), commands())
def test_docs_command_is_accepted(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[argparse.Namespace, list[str]]] = []

    def keep(args: argparse.Namespace, overrides: list[str]) -> int:
        seen.append((args, overrides))
        return 0

    monkeypatch.setattr(cli, "_run", keep)
    words = [word for word in command_of(line) if word != "..."]
    assert words == [] or cli.main(words) == 0
    for args, overrides in seen:
        recipe = getattr(args, "recipe", None) or DEFAULT_RECIPE
        if recipe in shipped_names():
            assert load_recipe(recipe, overrides)


def test_docs_commands_are_found() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docs_make_targets_exist(path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for line in code_lines(path) if re.match(r"make [a-z]", line)}
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docs_links_resolve(path: Path) -> None:
    broken = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docs_name_only_files_that_exist(path: Path) -> None:
    named = {name for line in code_lines(path) for name in REPOSITORY_PATH.findall(line)}
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docs_name_only_modules_that_exist(path: Path) -> None:
    named = {name for line in code_lines(path) for name in MODULE_PATH.findall(line)}
    roots = (REPOSITORY, REPOSITORY / "inheritune_ds")
    assert {name for name in named if not any((root / name).exists() for root in roots)} == set()


def test_docs_architecture_names_a_module_a_test_and_a_page_for_each_change() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    changes = text.partition("## Where do I change X?")[2].split("\n### ")[1:]
    assert len(changes) == 10
    for change in changes:
        places, _, rest = change.partition("\n- Tests: ")
        tests, _, pages = rest.partition("\n- Docs: ")
        assert MODULE_PATH.search(places), change
        assert re.search(r"`tests/[\w/]+\.py`", tests), change
        assert LINK.search(pages), change


def test_docs_picture_has_a_box_with_a_short_line_for_each_wing() -> None:
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    wings = {path.parent.name for path in (REPOSITORY / "inheritune_ds").glob("*/__init__.py")}
    assert wings | {"console", "errors"} == set(texts[::2])
    assert [text for text in texts[1::2] if not 0 < len(text) <= 70] == []


def test_docs_index_links_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {
        path for shelf in ("tutorials", "how-to", "reference", "explanation") for path in DOCS.glob(f"{shelf}/*.md")
    }
    assert pages
    assert pages - {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(index)} == set()


def test_docs_decision_records_are_all_listed() -> None:
    listed = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("decisions/0*.md") if f"]({path.name})" not in listed] == []


def test_code_names_only_pages_that_exist() -> None:
    files = [path for folder in CODE for path in (REPOSITORY / folder).rglob("*") if path.suffix in {".py", ".sbatch"}]
    files += [REPOSITORY / name for name in ("Makefile", "constraints.txt", ".importlinter", "setup.cfg", "train.py")]
    named = {page for path in files for page in PAGE.findall(path.read_text(encoding="utf-8"))}
    assert named
    assert {page for page in named if not (REPOSITORY / page).exists()} == set()


def test_docs_tables_are_current() -> None:
    checked = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_docs_recipe_keys_all_have_a_meaning() -> None:
    rows = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row.startswith("| `") and row.endswith("|  |")] == []


def test_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docs_hold_no_placeholder(path: Path) -> None:
    assert re.findall(r"@[A-Z_]+@", path.read_text(encoding="utf-8")) == []
