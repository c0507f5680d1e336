"""Copy outputs of a plan into nbs/experiments: `python workflow/keep_outputs.py runs/demo`.

The experiments are committed with outputs, so that they can be read without running them. Progress
bars and the cell that papermill adds are left behind; sources stay as they are.
"""

import sys
from pathlib import Path

import nbformat

EXECUTED = {
    "prepare": "prepare/notebook.ipynb",
    "train": "train/with-mmsr/notebook.ipynb",
    "super_resolve": "super_resolve/bundled/notebook.ipynb",
    "evaluate": "evaluate/notebook.ipynb",
}

run = Path(sys.argv[1])
for name, executed in EXECUTED.items():
    path = Path(__file__).parents[1] / "nbs" / "experiments" / f"{name}.ipynb"
    notebook = nbformat.read(path, 4)
    outputs = {
        cell.source: cell.outputs
        for cell in nbformat.read(run / executed, 4).cells
        if cell.cell_type == "code"
    }
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            kept = outputs[cell.source]
            cell.outputs = [out for out in kept if out.get("name") != "stderr"]
    nbformat.write(notebook, path)
    print(path)
