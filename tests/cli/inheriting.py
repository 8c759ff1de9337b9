"""Run the verb `inherit`."""

from pathlib import Path

from inheritune_ds.cli import main


def inherit(reference: Path | str, output: Path | str, *more: str, select: str = "first:2") -> int:
    return main(["inherit", "--reference", str(reference), "--select", select, "--output", str(output), *more])
