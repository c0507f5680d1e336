"""What the record of a run says of the libraries."""

import ast
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

from mmsr.core import DECIDING, environment

ROOT = Path(__file__).parents[1]
# they check settings, draw, count, move bytes or show: no number of a result depends on them
HARMLESS = {"pydantic", "pydantic-core", "matplotlib", "tqdm", "tensorboard", "psutil", "filelock"}


DISTRIBUTIONS = packages_distributions()


def imported(file: Path) -> set[str]:
    """Name the distributions that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    found -= {"mmsr", *sys.stdlib_module_names}
    return {
        name.lower().replace("_", "-")
        for module in found
        for name in DISTRIBUTIONS.get(module, [module])[:1]
    }


def test_every_library_that_decides_a_result_is_recorded() -> None:
    parts = ("data", "networks", "losses", "training", "scans", "inference", "evaluation")
    files = [file for part in parts for file in (ROOT / "mmsr" / part).glob("*.py")]
    assert len(files) > 30
    named = {name.lower() for name in DECIDING}
    assert {file.name: rest for file in files if (rest := imported(file) - named - HARMLESS)} == {}


def test_versions_are_those_of_the_installed_libraries() -> None:
    packages = environment()["packages"]
    assert list(packages) == list(DECIDING)
    for name in ("numpy", "torch", "pydicom", "connected-components-3d"):
        assert packages[name] == version(name)
