"""Each notebook is one test; its exported cells count for the coverage of their module.

Cells marked `#| slow` run where MMSR_SLOW is set; those marked `#| cuda` say it themselves if there
is no GPU. Some pages also run as Jupyter runs them, all cells twice in one kernel; where MMSR_SLOW
is set all do, the benchmarks without their slow cells, which `make bench` runs.
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
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = sorted([*NBS.glob("*.ipynb"), *NBS.glob("[0-9]_*/*.ipynb")])
MODULES = [p for p in (ROOT / "mmsr").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
# pages that take a few seconds, for `make quick`
QUICK = ("00_core", "2_networks/03", "2_networks/05", "3_losses/")
RUN_ALL = ("00_core", "1_data/03_trees", "5_scans/11_ome_zarr", "5_scans/17_output_plan")  # too
SLOW = "MMSR_SLOW" in os.environ
SKIPPED = re.compile(r"^#\| *(slow|eval: *false)", re.MULTILINE)
CUDA = re.compile(r"^#\| *cuda", re.MULTILINE)
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


def run_cells(path: Path, slow: bool) -> list[Any]:
    """Return the cells of code that run here and now, but for the one that exports."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    left_out = {"slow": not slow}
    return [
        cell
        for cell in cells
        if "nbdev_export()" not in cell.source
        and not any(left_out.get(mark, True) for mark in SKIPPED.findall(cell.source))
    ]


def page(path: Path) -> Any:
    """Make a parameter of a page; all but a few are slow."""
    name = path.relative_to(NBS).as_posix()
    return pytest.param(path, id=name, marks=[] if name.startswith(QUICK) else pytest.mark.slow)


def test_names_of_pages_are_of_today() -> None:
    """A page that was renumbered does not leave a list by that."""
    names = [p.relative_to(NBS).as_posix() for p in PAGES]
    assert [part for part in (*QUICK, *RUN_ALL) if not any(n.startswith(part) for n in names)] == []


def test_all_pages_are_found() -> None:
    """Each module comes from one page, and each page but three makes one."""
    made = {name for name, _ in EXPORTED}
    pages = {p.relative_to(NBS).as_posix() for p in PAGES}
    assert len(made) == len(MODULES) - 1 > 35  # but for _modidx
    assert pages - made == {"index.ipynb", "quickstart.ipynb", "evidence.ipynb"}
    assert made <= pages


@pytest.mark.parametrize("path", map(page, PAGES))
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    monkeypatch.chdir(path.parent)
    module = types.ModuleType(f"notebook_{path.stem}")
    module.__dict__["display"] = display
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pydantic looks annotations up there
    name = path.relative_to(NBS).as_posix()
    for number, cell in enumerate(run_cells(path, SLOW)):
        source = cell.source
        file, line = f"{name}, cell {number}", 1
        if place := EXPORTED.get((name, cell.id)):
            lines = source.splitlines()
            first = next(i for i, text in enumerate(lines) if IS_CODE.match(text))
            file, line = place[0], place[1] - first
        tree = ast.increment_lineno(ast.parse(source), line - 1)
        exec(compile(tree, file, "exec"), module.__dict__)


def run_all() -> list[Any]:
    """List the pages that run as in Jupyter."""
    if SLOW:
        return [*PAGES, *sorted((NBS / "benchmarks").glob("*.ipynb"))]
    return [path for path in PAGES if path.relative_to(NBS).as_posix().startswith(RUN_ALL)]


@pytest.mark.slow
@pytest.mark.parametrize("path", run_all(), ids=lambda path: path.relative_to(NBS).as_posix())
def test_run_all_cells_twice_in_one_kernel(path: Path) -> None:
    """As the menu does: with or without a GPU, and again over what the first run left."""
    cells = run_cells(path, SLOW and path.parent.name != "benchmarks")
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell.source) for cell in cells * 2]  # ids of their own
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(book, timeout=1800, kernel_name="python3", resources=place).execute()
    for cell in book.cells:
        said = "".join(output.get("text", "") for output in cell.outputs)
        tree = ast.parse(cell.source)
        if CUDA.search(cell.source) and not all(isinstance(n, ast.FunctionDef) for n in tree.body):
            assert torch.cuda.is_available() or said == "left out: no GPU here\n"


@pytest.mark.slow
def test_a_page_that_cannot_run_twice_is_seen(tmp_path: Path) -> None:
    page = nbformat.v4.new_notebook()
    page.cells = [nbformat.v4.new_code_cell(s) for s in ("assert 'x' not in globals()", "x = 1")]
    nbformat.write(page, tmp_path / "page.ipynb")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        test_run_all_cells_twice_in_one_kernel(tmp_path / "page.ipynb")
