"""Keep what a finished plan showed: `python workflow/keep_outputs.py runs/demo`.

Every plan leaves its numbers in nbs/results and its pictures in nbs/images, for the notebooks that
show them; of the evidence each case is kept, and one picture. The demo also gives nbs/experiments
their outputs, so that they can be read without running them (progress bars and the cell that
papermill adds are left behind; pictures are packed to few greys or colours), and prints the table
of the README.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from mmsr.core import read_json, write_json
from mmsr.networks.weights import load_generator

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
    packed = image.quantize(200 if colourful else 64, dither=Image.Dither.NONE)
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


def keep_notebooks(run: Path, nbs: Path) -> None:
    """Copy the outputs of a demo into the experiments."""
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


def keep_numbers(run: Path, nbs: Path) -> list[dict]:
    """Write the table of a plan, with what was trained, to three significant digits."""
    metrics, digits = read_json(run / "metrics.json"), 5 if run.name == "kept_evidence" else 3
    rows, by_case = (
        [
            {k: float(f"{v:.{digits}g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in metrics[name]
        ]
        for name in ("rows", "by_case")
    )
    trained = {}
    for config in sorted(run.glob("train/*/config.json")):
        record = load_generator(config.with_name("weights.safetensors"))[1]
        trained[config.parent.name] = {
            "method": record.method,
            "steps": record.training["steps"],
            "batch_size": record.training["batch_size"],
            "device": record.training["device"],
            "torch": record.training["torch"].split("+")[0],
        }
    facts = {"cases": metrics["cases"], "slices": metrics["slices"], "trained": trained}
    facts |= {"by_case": by_case} if run.name == "kept_evidence" else {}
    write_json(nbs / "results" / f"{run.name}.json", {**facts, "rows": rows})
    return rows


def keep_pictures(run: Path, nbs: Path) -> None:
    """Put the figures of a plan, one below the other, into one picture."""
    paths = sorted((run / "figures").glob("*.png"))
    if run.name == "kept_evidence":
        paths = [path for path in paths if path.stem.startswith(paths[0].stem.removesuffix("-1"))]
    figures = [Image.open(path).convert("RGB") for path in paths]
    size = max(figure.width for figure in figures), sum(figure.height for figure in figures)
    together = Image.new("RGB", size, "white")
    top = 0
    for figure in figures:
        together.paste(figure, (0, top))
        top += figure.height
    content = io.BytesIO()
    together.save(content, "png")
    (nbs / "images" / f"{run.name}.png").write_bytes(pack(content.getvalue()))


run, nbs = Path(sys.argv[1]).resolve(), Path(__file__).parents[1] / "nbs"
if run.name == "demo":
    keep_notebooks(run, nbs)
keep_pictures(run, nbs)
for row in keep_numbers(run, nbs):
    if row["method"] != "nearest":
        psnr = "∞" if row["psnr"] is None else f"{row['psnr']:.1f}"
        print(
            f"| {row['method']} | {row['corr_clinical']:.2f} | {row['hu_error']:.0f} "
            f"| {row['spectrum_error_db']:.1f} | {psnr} |"
        )
