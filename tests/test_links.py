"""Every link between pages leads somewhere, and what the texts call a path is one."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "data/README.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "nbs").rglob("*.ipynb")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
NAMED = re.compile(r"`((?:nbs|workflow|tests|docs|data|mmsr|\.github|\.ci)/[\w./*-]*)`")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()


def prose(path: Path) -> str:
    """Read a page as Markdown: of a notebook the cells of text."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf8")
    cells = nbformat.read(path, 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path: Path) -> set[str]:
    """List the places that a link into a page can name, as GitHub and as Jupyter write them."""
    titles = re.findall(r"^#+ +(.*?)\s*$", CODE.sub(lambda m: m[0].strip("`"), prose(path)), re.M)
    plain = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
    return plain | {title.replace(" ", "-") for title in titles}


def broken(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Find the links of a page that lead nowhere, and the paths that are none."""
    text = prose(path)
    for link in (a or b for a, b in LINK.findall(CODE.sub("", text))):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (path.parent / file).resolve() if file else path
        missing = not target.exists() or not target.is_relative_to(root)
        if missing or (anchor and target.is_file() and anchor not in anchors(target)):
            yield link
    for name in NAMED.findall(text):
        if not any(root.glob(name.rstrip("/") + "*")):  # a module may be named without its ending
            yield name


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(path: Path) -> None:
    assert list(broken(path)) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Over here\n\n## By `name`, too\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# A\n[1](b.md) [2](b.md#over-here) [3](#a) [4](b.md#by-name-too) [5](https://example.org)\n"
        "[6](c.md) [7](b.md#nowhere) ![8](d.png) `mmsr/none.py` `[9](e.md)`\n"
    )
    assert list(broken(page, tmp_path)) == ["c.md", "b.md#nowhere", "d.png", "mmsr/none.py"]


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_what_is_linked_is_tracked() -> None:
    """A link to a file that git ignores works on one machine alone."""
    for path in TEXTS:
        for link in (a or b for a, b in LINK.findall(CODE.sub("", prose(path)))):
            target = (path.parent / unquote(link).partition("#")[0]).resolve()
            if not re.match(r"[a-z]+:", link) and target.is_file() and target != path.parent:
                assert target.relative_to(ROOT).as_posix() in TRACKED, f"{path.name}: {link}"
