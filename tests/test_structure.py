"""The architecture holds: imports point down, pages stay short, outputs are clean.

How long things may be stands in `size_limits.py`, which `count_lines.py` writes.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import size_limits
from count_lines import sizes, too_long

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = sorted([NBS / "00_core.ipynb", *NBS.glob("[0-9]_*/*.ipynb")])


def module_of(page: Path) -> str:
    """Name the module of a page: 1_data/02_phantom makes data.phantom."""
    parts = page.relative_to(NBS).with_suffix("").parts
    return ".".join(part.partition("_")[2] for part in parts)


PLACE = {module_of(page): page.relative_to(NBS).as_posix() for page in PAGES}
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()


@pytest.mark.parametrize("name", sorted(PLACE))
def test_imports_point_down(name: str) -> None:
    """A page imports from earlier parts, and from earlier pages of its own part."""
    file = ROOT / "mmsr" / f"{name.replace('.', '/')}.py"
    package = ["mmsr", *name.split(".")[:-1]]
    found = 0
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        other = ".".join([*above, *filter(None, [node.module])])
        if not other.startswith("mmsr"):
            continue
        assert all(alias.name != "*" for alias in node.names)
        if other != "mmsr":  # the package itself: its version
            part = other.removeprefix("mmsr.")
            pages = [part] if part in PLACE else [f"{part}.{alias.name}" for alias in node.names]
            found += len(pages)
            assert all(PLACE[page] < PLACE[name] for page in pages), f"{name} imports {pages}"
    assert found or name == "core"


def test_pages_are_where_their_modules_say() -> None:
    assert len(PAGES) > 35
    made = {p.relative_to(ROOT / "mmsr") for p in (ROOT / "mmsr").rglob("*.py")}
    made = {".".join(p.with_suffix("").parts) for p in made if not p.name.startswith("_")}
    assert made == set(PLACE)


@pytest.mark.slow
def test_training_side_needs_no_scan_library() -> None:
    """Networks, losses and loops import on a bare GPU image: no SimpleITK, Jupyter, pictures."""
    side = [name for name in PLACE if name.startswith(("networks", "losses", "training"))]
    assert len(side) > 10
    heavy = ["SimpleITK", "pydicom", "skimage", "cc3d", "IPython", "papermill", "matplotlib"]
    code = (
        f"import sys, {', '.join(f'mmsr.{n}' for n in side)}\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path", sorted(NBS.rglob("*.ipynb")), ids=lambda p: p.relative_to(NBS).as_posix()
)
def test_notebook_is_presentable(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 300_000, "over 300 kB"
    text = "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "Traceback" not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "one machine's path"
    assert not re.search(r"it/s|s/it", text), "a progress bar in an output"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert any(c.outputs for c in code), "no outputs are committed"


def test_versions_agree() -> None:
    """A release is one number, told in three places."""
    wanted = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text("utf8"), re.M)[1]
    assert f"\nversion: {wanted}\n" in (ROOT / "CITATION.cff").read_text("utf8")
    assert f'__version__ = "{wanted}"' in (ROOT / "mmsr/__init__.py").read_text("utf8")


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_no_data_is_tracked() -> None:
    data = (".dcm", ".nii", ".gz", ".mha", ".nrrd", ".tif", ".npy", ".pt")
    crop = ["docs/crop/clinical.nii.gz", "docs/crop/super_resolved.nii.gz"]  # public, 24 mm
    assert [p for p in TRACKED if p.endswith(data)] == crop
    assert [p for p in TRACKED if p.startswith("data/")] == ["data/README.md"]


@pytest.mark.parametrize("kind", ["LONG_PAGES", "LONG_CELLS"])
def test_size_of_pages_and_cells(kind: str) -> None:
    """An exception may shrink and go; it may not grow, and none may come."""
    found, allowed = too_long()[kind], getattr(size_limits, kind)
    grown = {name: lines for name, lines in found.items() if lines > allowed.get(name, 0)}
    assert not grown, "split these, or say less"
    assert found.keys() == allowed.keys(), f"no longer needed in {kind} of size_limits.py"


def test_size_of_the_package() -> None:
    """The package may grow by what it learns, and size_limits.py with it; a module may not."""
    for name, lines in sizes().items():
        assert lines <= getattr(size_limits, name), name
