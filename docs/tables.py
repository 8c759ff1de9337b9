"""Tables of results for the docs: tested model families, parts of the campaign."""
# ruff: noqa: INP001  # a script beside the docs, not a package

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inheritune_ds.storage.files import read_json

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # for the lists in the tests


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    heads = list(titles)
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]) + "\n"


def campaign() -> str:
    """A row per part of the campaign: its promise, outcome and duration."""
    results = read_json(DOCS / "results" / "reliability.json") or {}
    rows = []
    for name, part in sorted(results.items(), key=lambda item: (item[1]["point"], item[0])):
        named = (f"{key.replace('_', ' ')} {_figure(value)}" for key, value in part["figures"].items() if value != "")
        passed, minutes = f"{part['passed']} of {part['cases']}", f"{part['seconds'] / 60:.1f}"
        rows.append((f"{part['point']}", f"`{name}`", part["promise"], passed, minutes, "; ".join(named)))
    return table(("", "part", "promise", "cases passed", "minutes", "figures"), rows)


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_figure(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def families() -> str:
    """Model types that surgery cuts exactly, with exceptions, or not at all."""
    from tests.surgery.families import NOT_TINY, TINY
    from tests.surgery.refusals import IN_PLACE, REFUSED

    exact = [f"`{name}`" for name in TINY if name not in REFUSED and name not in IN_PLACE]
    in_place = []
    for name in sorted(set(IN_PLACE) & set(TINY)):
        by_reason: dict[str, list[str]] = {}
        for selection, reason in IN_PLACE[name].items():
            by_reason.setdefault(reason, []).append(f"`{selection}`")
        in_place += [(f"`{name}`", ", ".join(which), reason) for reason, which in by_reason.items()]
    not_cut = [(f"`{name}`", reason) for name, reason in sorted(REFUSED.items()) if name in TINY]
    not_cut += [(f"`{name}`", f"not tested: {reason}") for name, reason in sorted(NOT_TINY.items())]
    return "\n".join(
        [
            f"**Cut exactly ({len(exact)} types).** Each is tested with a tiny random model of 6 blocks and the "
            "selections `first:3`, `last:2`, `0,2,5` and `even:3`: " + ", ".join(exact) + ".",
            "",
            "**Cut, unless the selection changes what depends on a block's position.** Refused among the same four:",
            "",
            table(("type", "refused", "what the message names"), in_place),
            "**Not cut.**",
            "",
            table(("type", "the message says"), not_cut),
        ]
    )
