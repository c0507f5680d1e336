"""Take out of committed notebooks what shows a widget of a kernel that is gone: `make check` does.

The picture that a viewer leaves beside it stays.
"""

import json
from pathlib import Path

VIEW = "application/vnd.jupyter.widget-view+json"

for page in (Path(__file__).parents[1] / "nbs").rglob("*.ipynb"):
    if VIEW in (text := page.read_text(encoding="utf8")):
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                output.get("data", {}).pop(VIEW, None)
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        page.write_text(text, encoding="utf8")
