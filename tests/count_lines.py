"""Count lines of code and of docstrings: `make lines` prints them, `test_structure` holds them.

A line of code is neither blank nor a comment nor part of a docstring.
`make lines` lists modules; `python tests/count_lines.py limits > tests/size_limits.py` writes down
how long the package, and what is too long, may be: as long as now.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGE, CELL = 250, 60  # lines of code that a page and a cell may export
LONGEST, MEDIAN = 400, 150  # lines of code of modules
EXPORT = ("#| export", "#| exporti", "#|export", "#|exporti")


class Lines(NamedTuple):
    """How long a piece of Python is."""

    code: int
    docstrings: int


def count(source: str) -> Lines:
    """Count the lines of Python source."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    code = [n for n, line in lines if line.strip() and not line.lstrip().startswith("#")]
    return Lines(len(set(code) - docstrings), len(docstrings))


def modules() -> dict[str, Lines]:
    """Count each module of the package, but for the index that nbdev writes."""
    files = (f for f in sorted((ROOT / "mmsr").rglob("*.py")) if f.name != "_modidx.py")
    return {str(f.relative_to(ROOT)): count(f.read_text(encoding="utf8")) for f in files}


def exported(page: Path) -> Iterator[tuple[str, int]]:
    """Name each exported cell of a page, by the first thing that it defines, and count its code."""
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type != "code" or cell.source.split("\n")[0].rstrip() not in EXPORT:
            continue
        names = (getattr(node, "name", "") for node in ast.parse(cell.source).body)
        yield next(filter(None, names), "imports and constants"), count(cell.source).code


def sizes() -> dict[str, int]:
    """Sum up the package; the median is that of the modules that pages make."""
    table = modules()
    code = [lines.code for lines in table.values()]
    made = [lines.code for name, lines in table.items() if not name.endswith("__.py")]
    return {
        "CODE": sum(code),
        "DOCSTRINGS": sum(lines.docstrings for lines in table.values()),
        "LONGEST": max(code),
        "MEDIAN": int(statistics.median(made)),
    }


def too_long() -> dict[str, dict[str, int]]:
    """Find the pages and the exported cells that are longer than they should be."""
    pages, cells = {}, {}
    for page in sorted(NBS.rglob("*.ipynb")):
        name, cut = page.relative_to(NBS).as_posix(), list(exported(page))
        pages[name] = sum(code for _, code in cut)
        cells |= {f"{name}: {first}": code for first, code in cut if " " not in first}
    return {
        "LONG_PAGES": {name: code for name, code in pages.items() if code > PAGE},
        "LONG_CELLS": {name: code for name, code in cells.items() if code > CELL},
    }


def table() -> str:
    """List the modules, longest first."""
    rows = [f"{'module':<42}{'code':>7}{'docstrings':>12}"]
    for name, lines in sorted(modules().items(), key=lambda item: -item[1].code):
        rows.append(f"{name:<42}{lines.code:>7,}{lines.docstrings:>12,}")
    size = sizes()
    rows.append(f"{'total':<42}{size['CODE']:>7,}{size['DOCSTRINGS']:>12,}")
    rows += [f"{name.lower():<42}{size[name]:>7,}" for name in ("LONGEST", "MEDIAN")]
    return "\n".join(rows)


def limits() -> str:
    """Write what is allowed, as a Python module: as much as now, and some room for the whole."""
    now = sizes()
    allowed = {name: -(-now[name] // 100) * 100 for name in ("CODE", "DOCSTRINGS")}
    allowed |= {"LONGEST": max(LONGEST, now["LONGEST"]), "MEDIAN": max(MEDIAN, now["MEDIAN"])}
    rows = ['"""How long the package may be, and the exceptions, which only shrink."""', ""]
    rows += [f"{name} = {lines:_}" for name, lines in allowed.items()]
    for kind, found in too_long().items():
        rows += [f"{kind} = {{", *(f'    "{name}": {n},' for name, n in found.items()), "}"]
    return "\n".join(rows)


if __name__ == "__main__":
    print(limits() if sys.argv[1:] == ["limits"] else table())
