"""Each notebook is one test; its exported cells count for the coverage of their module.

Cells marked `#| slow` run where MMSR_SLOW is set, those marked `#| cuda` where there is a GPU.
"""

import ast
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nbformat
import pytest
import torch
from IPython.display import display

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = sorted([*NBS.glob("*.ipynb"), *NBS.glob("[0-9]_*/*.ipynb")])
MODULES = [p for p in (ROOT / "mmsr").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
QUICK = ("00_core", "2_networks/", "3_losses/")  # pages that take a few seconds, for `make quick`
SKIPPED = re.compile(r"^#\| *(slow|cuda|eval: *false)", re.MULTILINE)
IS_CODE = re.compile(r"^(?!#\||\s*$)")


def exported_lines() -> dict[tuple[str, str], tuple[str, int]]:
    """Map (path of a notebook, cell id) to the file and line where the cell's code was exported."""
    places = {}
    for module in MODULES:
        for number, line in enumerate(module.read_text(encoding="utf8").splitlines(), 1):
            if match := re.fullmatch(r"# %% \S*?nbs/(\S+\.ipynb) #(\w+)", line):
                places[match[1], match[2]] = (str(module), number + 1)
    return places


EXPORTED = exported_lines()


def skipped(source: str) -> bool:
    """Tell whether a cell is left out, here and now."""
    allowed = {"slow": "MMSR_SLOW" in os.environ, "cuda": torch.cuda.is_available()}
    return any(not allowed.get(mark, False) for mark in SKIPPED.findall(source))


def page(path: Path) -> Any:
    """Make a parameter of a page; all but a few are slow."""
    name = path.relative_to(NBS).as_posix()
    return pytest.param(path, id=name, marks=[] if name.startswith(QUICK) else pytest.mark.slow)


def test_all_pages_are_found() -> None:
    """Each module comes from one page, and each page but the tour and the quick start makes one."""
    made = {name for name, _ in EXPORTED}
    pages = {p.relative_to(NBS).as_posix() for p in PAGES}
    assert len(made) == len(MODULES) - 1 > 35  # but for _modidx
    assert pages - made == {"index.ipynb", "quickstart.ipynb"}
    assert made <= pages


@pytest.mark.parametrize("path", map(page, PAGES))
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    monkeypatch.chdir(path.parent)
    module = types.ModuleType(f"notebook_{path.stem}")
    module.__dict__["display"] = display
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pydantic looks annotations up there
    name = path.relative_to(NBS).as_posix()
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        source = cell.source
        if cell.cell_type != "code" or skipped(source) or "nbdev_export()" in source:
            continue
        file, line = f"{name}, cell {number}", 1
        if place := EXPORTED.get((name, cell.id)):
            lines = source.splitlines()
            first = next(i for i, text in enumerate(lines) if IS_CODE.match(text))
            file, line = place[0], place[1] - first
        tree = ast.increment_lineno(ast.parse(source), line - 1)
        exec(compile(tree, file, "exec"), module.__dict__)
