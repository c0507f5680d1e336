"""Each notebook is one test; its exported cells count for the coverage of their module."""

import ast
import re
import sys
import types
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
from IPython.display import display

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = sorted([*NBS.glob("*.ipynb"), *NBS.glob("[0-9]_*/*.ipynb")])
MODULES = [p for p in (ROOT / "mmsr").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
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


def test_all_pages_are_found() -> None:
    """Each module comes from one page, and each page but the tour and the quick start makes one."""
    made = {name for name, _ in EXPORTED}
    pages = {p.relative_to(NBS).as_posix() for p in PAGES}
    assert len(made) == len(MODULES) - 1 > 35  # but for _modidx
    assert pages - made == {"index.ipynb", "quickstart.ipynb"}
    assert made <= pages


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    monkeypatch.chdir(path.parent)
    module = types.ModuleType(f"notebook_{path.stem}")
    module.__dict__["display"] = display
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pydantic looks annotations up there
    name = path.relative_to(NBS).as_posix()
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        source = cell.source
        if cell.cell_type != "code" or SKIPPED.search(source) or "nbdev_export()" in source:
            continue
        file, line = f"{name}, cell {number}", 1
        if place := EXPORTED.get((name, cell.id)):
            lines = source.splitlines()
            first = next(i for i, text in enumerate(lines) if IS_CODE.match(text))
            file, line = place[0], place[1] - first
        tree = ast.increment_lineno(ast.parse(source), line - 1)
        exec(compile(tree, file, "exec"), module.__dict__)
