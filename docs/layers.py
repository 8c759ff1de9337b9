"""Draw the wings of the package and the imports between them, as a picture (SVG) and as a table.

The order of the wings is that of `.importlinter`; the imports are read from the source.
"""
# ruff: noqa: INP001  # a script beside the docs, not a package

import ast
import configparser
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from tables import table

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "inheritune_ds"
ROW, BOX, HALF, LANE, MARGIN, PORT = 40, 580, 15, 20, 10, 7
"""Pixels: distance of two rows, width and half the height of a box, distance of two lanes, margin, distance from the
middle of a box's right side down to the start of its own imports and up to the end of others."""
DOWN, UP = "#0072B2", "#D55E00"
"""Colors of an import from a wing below, as the rule demands, and from a wing above."""


def wings() -> list[str]:
    """Return the wings, high to low, as the contract of import-linter lists them."""
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / ".importlinter", encoding="utf-8")
    layers = parser["importlinter:contract:wings"]["layers"].replace("|", "\n").split("\n")
    return [name for layer in layers if (name := layer.strip(" ()")) and name != "__main__"]


def purpose(wing: str) -> str:
    """Return the first line of a wing's docstring."""
    folder = PACKAGE / wing
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].rstrip(".")


def imports() -> dict[str, set[str]]:
    """Return the other wings that each wing imports, without imports for type checkers only."""
    found: dict[str, set[str]] = {wing: set() for wing in wings()}
    for path in PACKAGE.rglob("*.py"):
        wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if wing in found:
            names = {name.split(".")[1] for name in _imported(ast.parse(path.read_text(encoding="utf-8")))}
            found[wing] |= (names & found.keys()) - {wing}
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield `inheritune_ds.X...` for every import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("inheritune_ds."))
        elif isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "inheritune_ds":
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imported(child)


def overview() -> str:
    """A row per wing: its purpose and its imports."""
    order, found = wings(), imports()
    imported = {wing: ", ".join(other for other in order if other in found[wing]) for wing in order}
    return table(("wing", "what it is", "imports"), [(f"`{wing}`", purpose(wing), imported[wing]) for wing in order])


def picture() -> str:
    """Return the SVG: a box per wing, a lane down from each wing, an arrow into each imported wing."""
    order, found = wings(), imports()
    lanes = [wing for wing in reversed(order) if found[wing]]
    x = {wing: MARGIN + BOX + LANE * (2 + place) for place, wing in enumerate(lanes)}
    y = {wing: MARGIN + HALF + ROW * place for place, wing in enumerate(order)}
    width, height = MARGIN + BOX + LANE * (len(lanes) + 2), 2 * (MARGIN + HALF) + ROW * (len(order) - 1)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="13"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>']
    lines += ["<title>The wings of inheritune_ds and the imports between them</title>"]
    lines += ['<rect width="100%" height="100%" fill="white"/>', *_arrows(found, x, y)]
    box = f'x="{MARGIN}" width="{BOX}" height="{2 * HALF}" rx="4" fill="#f3f6f9" stroke="#8a97a5"'
    for wing in order:
        lines += [
            f'<rect y="{y[wing] - HALF}" {box}/>',
            f'<text x="{MARGIN + 10}" y="{y[wing] + 5}" font-weight="bold" fill="#222222">{wing}</text>',
            f'<text x="{MARGIN + 110}" y="{y[wing] + 5}" fill="#444444">{escape(purpose(wing))}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _arrows(found: Mapping[str, set[str]], x: Mapping[str, int], y: Mapping[str, int]) -> Iterator[str]:
    """Yield a line into each imported wing, a lane along each importing wing, and a dot at each connection."""
    edge = MARGIN + BOX
    for wing in y:
        arriving = [x[other] for other in x if wing in found[other]]
        if arriving:
            port = y[wing] - PORT
            yield f'<path d="M{max(arriving)} {port}H{edge + 6}" stroke="#9aa7b4" fill="none"/>'
            yield f'<path d="M{edge} {port}l9 -4v8z" fill="#5d6b79"/>'
    for wing, lane in x.items():
        for above, color in ((False, f'"{DOWN}"'), (True, f'"{UP}" stroke-dasharray="5 3"')):
            joined = sorted(y[other] - PORT for other in found[wing] if (y[other] < y[wing]) is above)
            if joined:
                end = joined[0] if above else joined[-1]
                yield f'<path d="M{edge} {y[wing] + PORT}H{lane}V{end}" stroke={color} fill="none"/>'
                yield from (f'<circle cx="{lane}" cy="{port}" r="3" fill={color}/>' for port in joined)
