"""Build the site: pages and notebooks become a source folder, of which Sphinx makes _site/html.

`make docs` calls it. Notebooks are shown as they are committed and are not run. What no reader
needs (directives, hidden cells, exported imports) is left out; exported code and checks are folded.
"""

import ast
import json
import os
import re
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import files
from pathlib import Path
from typing import Any

from sphinx.cmd.build import main as sphinx_build

sys.path.insert(0, str(Path(__file__).parent))
from reference import reference_pages

ROOT = Path(__file__).parents[1]
WORK = ROOT / "_site"  # the site itself is in `html`
SOURCE, STATIC = WORK / "source", WORK / "static"
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf8")
REPOSITORY = f"{config['DEFAULT']['git_url']}/blob/{config['DEFAULT']['branch']}"

RENAMED = {
    "nbs/index.ipynb": "tour.ipynb",
    "nbs/quickstart.ipynb": "quickstart.ipynb",
    "nbs/evidence.ipynb": "evidence.ipynb",
    "data/README.md": "data.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"```.*?```|`[^`\n]*`|(?<=\]\()([^)\s]+)", re.DOTALL)
FOLDED_FROM = 17  # lines: a lesson as long as that is folded; on pages that report, all code is


def place(path: Path) -> Path:
    """Say where a file of the repository lies in the source of the site."""
    name = path.relative_to(ROOT).as_posix()
    return Path(RENAMED.get(name) or re.sub("^nbs/", "book/", name.removeprefix("docs/")))


def pages() -> Iterator[Path]:
    """List the files that become pages."""
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_" not in p.as_posix())
    yield from (ROOT / name for name in RENAMED if name.endswith(".md"))


def with_links(text: str, page: Path) -> str:
    """Turn links between files into links between pages; those to other files lead to GitHub."""

    def turned(match: re.Match[str]) -> str:
        link = match[1]
        if link is None or re.match(r"[a-z]+:|#", link):
            return match[0].lower() if link and link[0] == "#" else match[0]
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / file))
        if target.suffix in (".png", ".webp", ".jpg", ".svg"):
            put(place(target), target.read_bytes())
        elif target not in PAGES:
            return f"{REPOSITORY}/{target.relative_to(ROOT).as_posix()}".replace(
                "/blob/", "/tree/" if target.is_dir() else "/blob/"
            )
        there = os.path.relpath(place(target), place(page).parent)
        return f"{there}#{anchor.lower()}" if anchor else there

    return LINK.sub(turned, text)


def put(name: Path, content: bytes) -> None:
    """Write a file of the source, if it changed: Sphinx does again what is newer."""
    target = SOURCE / name
    WRITTEN.add(target)
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def summary(source: str, module: str | None, exported: bool, shown: bool, limit: int) -> str | None:
    """Say under which words a cell of code is folded; None where it stays open.

    `shown` says that it has a result; one of `limit` lines or more is folded then.
    """
    try:
        body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    except SyntaxError:
        return None
    if all(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
        return "imports"
    if exported:
        defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        names = [node.name for node in body if isinstance(node, defined)]
        public = [name for name in names if not name.startswith("_")] or names
        return f"code of {module}" + (f": {', '.join(public)}" if public else "")
    if not shown:
        checks = re.search(r"^\s*(assert|test_\w+\(|with ExceptionExpected)", source, re.M)
        return "checks" if checks else "code" if limit == 1 else None
    return "code of this result" if source.count("\n") + 1 >= limit else None


def picture_text(source: str, heading: str) -> str:
    """Describe the picture that a cell draws: its titles, and the section that it stands in."""
    titles = re.findall(r"(?:title|suptitle|set_title)(?:=|\()\s*\"([^\"{}]+)\"", source)
    words = ". ".join([f"Figure of the section “{heading}”", *dict.fromkeys(titles)])
    return words.replace("`", "")


def shown_cell(cell: dict[str, Any], module: str | None, heading: str, limit: int) -> bool:
    """Prepare a cell of code; say whether a reader needs it."""
    lines = "".join(cell["source"]).splitlines()
    directives = [line[2:].strip() for line in lines if line.startswith("#|")]
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    cell["source"], meta = source, cell["metadata"]
    exported, shown = "export" in directives, bool(cell["outputs"])
    folded = summary(source, module, exported, shown, limit)
    if folded and "parameters" not in meta.get("tags", []):
        meta["tags"] = [*meta.get("tags", []), "hide-input"]
        meta["mystnb"] = {"code_prompt_show": folded, "code_prompt_hide": folded}
    words = picture_text(source, heading)
    for data in (output.get("data", {}) for output in cell["outputs"]):
        if "image/png" in data:
            meta.setdefault("mystnb", {})["image"] = {"alt": words}
        if "text/html" in data:
            html = "".join(data["text/html"])
            data["text/html"] = re.sub("<img (?![^>]*alt=)", f'<img alt="{words}" ', html)
    plumbing = "hide" in directives or (folded == "imports" and exported)
    return bool(source) and not plumbing


def convert(path: Path) -> bytes:
    """Make a notebook a page of the site."""
    notebook = json.loads(path.read_text(encoding="utf8"))
    exports = re.search(r"#\| ?default_exp ([\w.]+)", json.dumps(notebook["cells"]))
    module = f"mmsr.{exports[1]}" if exports else None
    limit = FOLDED_FROM if module or path.name == "quickstart.ipynb" else 1
    cells, heading, headed = [], "", False
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            if shown_cell(cell, module, heading, limit):
                cells.append(cell)
            continue
        text = with_links("".join(cell["source"]), path)
        heading = (re.findall(r"^#+ +(.*)$", text, re.M) or [heading])[-1]
        if not headed:
            links = [f"[notebook]({REPOSITORY}/{path.relative_to(ROOT).as_posix()})"]
            links += [f"{{doc}}`reference of {module} </reference/api/{module}>`"] if module else []
            text, headed = f"{text}\n\n:::{{container}} page-links\n{' · '.join(links)}\n:::", True
        cells.append(cell | {"source": text})
    notebook["cells"] = cells
    return json.dumps(notebook, ensure_ascii=False, sort_keys=True).encode()


def copy_static() -> None:
    """Copy what pages load beside Sphinx's own: MathJax, NiiVue where npm has it, and the crop."""
    STATIC.mkdir(parents=True, exist_ok=True)
    (mathjax,) = (f for f in files("sphinx-mathjax-offline") or () if f.name == "tex-svg.js")
    shutil.copy(Path(str(mathjax.locate())), STATIC)
    niivue = WORK / "node_modules/@niivue/niivue/dist/niivue.umd.js"
    if niivue.exists():
        shutil.copy(niivue, STATIC)
    else:
        print("note: without npm the scan on the page of results cannot be turned")
    crops = {p.name: b64encode(p.read_bytes()).decode() for p in (ROOT / "docs/crop").glob("*.gz")}
    (STATIC / "crop.js").write_text(f"window.mmsrCrop = {json.dumps(crops)};\n")


WRITTEN: set[Path] = set()
PAGES = set(pages())


def main() -> int:
    """Write the source, build the site; warnings are errors."""
    for page in sorted(PAGES):
        notebook = page.suffix == ".ipynb"
        text = convert(page) if notebook else with_links(page.read_text("utf8"), page).encode()
        put(place(page), text)
    for name, text in reference_pages(ROOT):
        put(Path(name), text.encode())
    put(Path("CITATION.cff"), (ROOT / "CITATION.cff").read_bytes())
    for left in {path for path in SOURCE.rglob("*") if path.is_file()} - WRITTEN:
        left.unlink()
    copy_static()
    options = ["-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs")]
    failed = sphinx_build([*options, "-d", str(WORK / "doctrees"), str(SOURCE), str(WORK / "html")])
    for unread in (WORK / "html/_static").rglob("*.map"):  # for those who change the theme
        unread.unlink()
    return failed


if __name__ == "__main__":
    sys.exit(main())
