"""Prove what docs/explanation/reliability.md promises, part by part.

`python -m benchmarks.campaign` runs every part, `python -m benchmarks.campaign pointer flips` the named ones; `--list`
lists them. A case that has passed with the code as it is now is not run again, so an interrupted campaign goes on with
the same command. The outcome of every part that is done is merged into docs/results/reliability.json; ends with 1 if
any case failed.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.campaign.cases import Part
from benchmarks.campaign.running import CampaignFolder, run_part
from benchmarks.record import REPOSITORY, RESULTS

MODULES = {
    "exact": "exact",
    "kills_sync": "kills",
    "kills_async": "kills",
    "publish": "publish",
    "flips": "flips",
    "pointer": "pointer",
    "storage": "storage",
    "elastic": "elastic",
    "faults": "faults",
    "hangs": "hangs",
    "signals_python": "signals",
    "signals_deepspeed": "signals",
    "signals_torchrun": "signals",
    "secrets": "secrecy",
    "saving": "saving",
}
"""Name of every part, in the order of the promises, and its module, which has it as PART or among its PARTS."""


def load(names: Sequence[str]) -> Iterator[Part]:
    """Import the named parts."""
    for name in names:
        module = importlib.import_module(f"benchmarks.campaign.{MODULES[name]}")
        parts: Sequence[Part] = getattr(module, "PARTS", None) or (module.PART,)
        yield next(part for part in parts if part.name == name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"(default: all) {', '.join(MODULES)}")
    parser.add_argument("--list", action="store_true", help="list the parts with their promises, run nothing")
    parser.add_argument("--short", action="store_true", help="only the cases of `make test-all`; writes no result")
    parser.add_argument("--again", action="store_true", help="run cases that have passed already, too")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".campaign", help="journals, and failed cases")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="files of running cases")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json", help="where results are merged")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.parts if name not in MODULES]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(MODULES)}")
    parts = load(args.parts or list(MODULES))
    if args.list:
        for part in parts:
            print(f"{part.point:>2}  {part.name:<18} {len(part.cases()):>4} cases  {part.promise}")
        return 0
    folder = CampaignFolder(args.folder, args.scratch)
    failed = [
        failure
        for part in parts
        for failure in run_part(part, folder, short=args.short, again=args.again, out=None if args.short else args.out)
    ]
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
