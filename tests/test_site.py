"""The built site: links, anchors and pictures lead somewhere, and nothing comes from elsewhere."""

import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(os.environ.get("MMSR_SITE") or Path(__file__).parents[1] / "_site/html")
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason=f"no site in {SITE}: make docs builds it"),
]


class Page(HTMLParser):
    """Collect what a page names: anchors, links, what it loads, pictures without words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.wordless: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes of a tag that matter here."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADING and LOADING[tag] in values and values.get("rel") != "canonical":
            self.loads.append(values[LOADING[tag]])
        if tag == "img" and not values.get("alt"):
            self.wordless.append(values.get("src", "?")[:80])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path.resolve(): Page(path.read_text(encoding="utf8")) for path in PAGES}


def broken(path: Path, links: list[str], pages: dict[Path, Page]) -> Iterator[str]:
    """Find links of a page to files or anchors that are not there; leave those to other hosts."""
    for link in links:
        scheme, host, file, _, anchor = urlsplit(link)
        if scheme in ("http", "https", "mailto", "data") or host:
            continue
        target = (path.parent / unquote(file)).resolve() if file else path
        known = pages[target].anchors if target in pages else set()
        if not target.is_file() or (anchor and target in pages and unquote(anchor) not in known):
            yield link


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    found = {p.name: [*broken(p, page.links + page.loads, pages)] for p, page in pages.items()}
    assert {name: links for name, links in found.items() if links} == {}


def test_nothing_is_asked_of_another_machine(pages: dict[Path, Page]) -> None:
    elsewhere = {one for page in pages.values() for one in page.loads if urlsplit(one).netloc}
    sheets = [path for path in SITE.rglob("*.css") if "url(http" in path.read_text("utf8")]
    assert not elsewhere
    assert not sheets


def test_pictures_have_words(pages: dict[Path, Page]) -> None:
    assert {p.name: page.wordless for p, page in pages.items() if page.wordless} == {}


def test_the_site_is_small_and_whole(pages: dict[Path, Page]) -> None:
    assert sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) < 40e6
    for name in ("index", "quickstart", "tour", "results", "evidence", "readings", "search"):
        assert (SITE / f"{name}.html").resolve() in pages
    for notebook in (Path(__file__).parents[1] / "nbs").glob("[1-8]_*/*.ipynb"):
        page = SITE / "book" / notebook.parent.name / f"{notebook.stem}.html"
        assert page.is_file(), f"{page} is missing: make docs builds the site anew"
