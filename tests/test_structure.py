"""The architecture holds: imports point down, training needs no scan library, outputs are clean."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NUMBER = {p.stem.partition("_")[2]: p.stem.partition("_")[0] for p in LIBRARY}  # "04", "05a"
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()


@pytest.mark.parametrize("name", sorted(NUMBER))
def test_imports_point_down(name: str) -> None:
    tree = ast.parse((ROOT / "mmsr" / f"{name}.py").read_text(encoding="utf8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        other = (node.module or "").removeprefix("mmsr.")  # nbdev makes some imports relative
        if node.level or other != node.module:
            assert NUMBER.get(other, "") < NUMBER[name], f"{name} imports {other}"
            assert all(alias.name != "*" for alias in node.names)


def test_training_side_needs_no_scan_library() -> None:
    """Modules 10 to 31 import on a bare GPU image: no SimpleITK, no Jupyter, no pictures."""
    side = [name for name, number in NUMBER.items() if "10" <= number < "40"]
    heavy = ["SimpleITK", "pydicom", "skimage", "cc3d", "IPython", "papermill", "matplotlib"]
    code = (
        f"import sys, {', '.join(f'mmsr.{n}' for n in side)}\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_is_presentable(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 300_000, "over 300 kB"
    text = "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "Traceback" not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "one machine's path"
    assert not re.search(r"it/s|s/it", text), "a progress bar in an output"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert any(c.outputs for c in code), "no outputs are committed"


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_no_data_is_tracked() -> None:
    data = (".dcm", ".nii", ".gz", ".mha", ".nrrd", ".tif", ".npy", ".pt")
    assert [p for p in TRACKED if p.endswith(data)] == []
    assert [p for p in TRACKED if p.startswith("data/")] == ["data/README.md"]
