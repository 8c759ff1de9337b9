"""Contents of an installation: package data, dependencies, pins, the console script."""

import ast
import configparser
import sys
from fnmatch import fnmatch
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "inheritune_ds"
UNIMPORTED = {
    "accelerate": "transformers needs it to load large models piece by piece",
    "lm-eval": "the evaluation of exports on benchmarks",
    "ninja": "DeepSpeed compiles its C++ ops with it",
    "protobuf": "sentencepiece tokenizers (LLaMA) are converted with it",
}
"""Dependencies that no module imports by name, with the reason for each."""


def read_setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def requirements(section: str, key: str) -> dict[str, Requirement]:
    lines = read_setup()[section][key].split("\n")
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in parsed}


PROBED = {"apex", "liger_kernel"}
"""Optional kernels: imported on first use."""


def imported_packages() -> dict[str, str]:
    """Third-party top-level names that the package imports, with a file that does it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "inheritune_ds":
                    found[top] = str(path.relative_to(REPOSITORY))
    return found


def test_package_data_ships_every_file_that_is_not_python() -> None:
    patterns = [p.strip() for p in read_setup()["options.package_data"]["inheritune_ds"].split(",")]
    files = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    data = [path for path in files if path.suffix not in (".py", ".pyc")]
    assert data
    assert [str(path) for path in data if not any(fnmatch(str(path), pattern) for pattern in patterns)] == []


def test_package_finds_every_folder_that_holds_modules() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", ["py.typed", "recipes/quickstart.yaml", "studies/quickstart.yaml"])
def test_package_data_is_found_as_a_resource(name: str) -> None:
    assert resources.files("inheritune_ds").joinpath(name).is_file()


def test_dependencies_are_what_the_package_imports() -> None:
    declared = requirements("options", "install_requires")
    distributions = metadata.packages_distributions()
    found = imported_packages()
    assert found.keys() >= PROBED
    imported = {
        canonicalize_name(distribution): place
        for name, place in found.items()
        if name not in PROBED
        for distribution in distributions[name]
    }
    assert {name: place for name, place in imported.items() if name not in declared} == {}
    assert sorted(set(declared) - set(imported) - set(UNIMPORTED)) == []
    assert sorted(set(UNIMPORTED) & set(imported)) == []


def test_constraints_pin_a_version_in_each_range() -> None:
    wanted = requirements("options", "install_requires") | requirements("options.extras_require", "dev")
    pinned = pins()
    outside = {name: pinned.get(name) for name, r in wanted.items() if not r.specifier.contains(pinned.get(name, ""))}
    assert outside == {}


def test_console_script_points_at_a_function() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="inheritune-ds")
    assert callable(script.load())
