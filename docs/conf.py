"""Settings of Sphinx; `docs/build.py` writes the pages that it reads."""

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf8")
values = settings["DEFAULT"]

project, author, release = values["title"], values["author"], values["version"]
project_copyright = values["copyright"]
language = "en"
exclude_patterns: list[str] = []
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "numpydoc",
]

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}  # nothing from another machine
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
default_role = "literal"  # `name` in a docstring is code
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "mmsr"
html_static_path = ["static", "../_site/static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_context = {
    "default_mode": "auto",
    "viewer": (ROOT / "_site/static/niivue.umd.js").exists(),
}
html_theme_options = {
    "navbar_persistent": [],
    "repository_url": values["git_url"],
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "collapse_navigation": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Leave out pydantic's own, and fields of named tuples, which Python merely counts."""
    counted = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return skip or counted or name == "model_config"


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show |x| as it stands: between bars reStructuredText looks for a substitution."""
    code_or_bar = re.compile(r"(`+.*?`+)|\|")
    lines[:] = [code_or_bar.sub(lambda found: found[1] or r"\|", line) for line in lines]


def plain_signature(app: Any, what: str, name: str, obj: Any, *signature: Any) -> Any:
    """Leave the fields of settings to their table; they make a signature of thirty lines."""
    return ("", None) if isinstance(obj, type) and issubclass(obj, BaseModel) else None


def add_viewer(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Load NiiVue and the crop of a scan on the page that shows it."""
    if page == "results" and context["viewer"]:
        for script in ("niivue.umd.js", "crop.js", "viewer.js"):
            app.add_js_file(script)


def setup(app: Any) -> None:
    """Connect the functions."""
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", escape_bars, priority=900)  # after numpydoc
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("html-page-context", add_viewer)
