"""Copy outputs of a plan into nbs/experiments: `python workflow/keep_outputs.py runs/demo`.

The experiments are committed with outputs, so that they can be read without running them. Progress
bars and the cell that papermill adds are left behind; pictures are packed to few greys or colours.
README's picture is copied, too, and its table is printed.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from mmsr.core import read_json

EXECUTED = {
    "prepare": "prepare/notebook.ipynb",
    "train": "train/with-mmsr/notebook.ipynb",
    "super_resolve": "super_resolve/bundled/notebook.ipynb",
    "evaluate": "evaluate/notebook.ipynb",
}


def pack(png: bytes) -> bytes:
    """Reduce a picture to few greys, or more colours if it has any."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    r, g, b = (np.asarray(band, int) for band in image.split())
    colourful = (np.maximum(abs(r - g), abs(g - b)) > 16).mean() > 0.01
    small = io.BytesIO()
    packed = image.quantize(200 if colourful else 32, dither=Image.Dither.NONE)
    packed.save(small, "png", optimize=True)
    return small.getvalue()


def presentable(outputs: list) -> list:
    """Keep what a page needs: no progress bars, small pictures."""
    kept = [out for out in outputs if out.get("name") != "stderr"]
    for out in kept:
        if picture := out.get("data", {}).get("image/png"):
            small = pack(base64.b64decode(picture))
            out["data"]["image/png"] = base64.b64encode(small).decode()
    return kept


run, nbs = Path(sys.argv[1]), Path(__file__).parents[1] / "nbs"
for name, executed in EXECUTED.items():
    path = nbs / "experiments" / f"{name}.ipynb"
    notebook = nbformat.read(path, 4)
    outputs = {
        cell.source: cell.outputs
        for cell in nbformat.read(run / executed, 4).cells
        if cell.cell_type == "code"
    }
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            cell.outputs = presentable(outputs[cell.source])
    nbformat.write(notebook, path)

(figure,) = (run / "figures").glob("*.png")
(nbs / "images" / "demo.png").write_bytes(pack(figure.read_bytes()))
for row in read_json(run / "metrics.json")["rows"]:
    if row["method"] != "nearest":
        psnr = "∞" if row["psnr"] is None else f"{row['psnr']:.1f}"
        print(
            f"| {row['method']} | {row['corr_clinical']:.2f} | {row['hu_error']:.0f} "
            f"| {row['spectrum_error_db']:.1f} | {psnr} |"
        )
