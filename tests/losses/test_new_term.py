"""A fifth term in the page of the MMSR loss, and nowhere else, is trained, written and drawn."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmsr

# What a person would add to `losses/mmsr`: a term, its weight, its formula.
EDITS = (
    ("    up: Tensor\n", "    up: Tensor\n    mean_grey: Tensor\n"),
    (
        "    up: float = pydantic.Field(default=1.0, ge=0)\n",
        "    up: float = pydantic.Field(default=1.0, ge=0)\n"
        "    mean_grey: float = pydantic.Field(default=0.5, ge=0)\n",
    ),
    (
        "distance(f_x_sr, x), up)",
        "distance(f_x_sr, x), up, (f_x_sr.mean() - x.mean()).abs())",
    ),
)
TRAIN = """
import sys
from pathlib import Path
import pytest

import mmsr
from test_resume import SYSTEMS, start_anew, train, write_banks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from mmsr.evaluation.figures import training_curves
from mmsr.training.run_folder import read_history

folder = Path(sys.argv[1])
assert Path(mmsr.__file__).is_relative_to(folder), mmsr.__file__
write_banks(folder)
for name, settings in SYSTEMS.items():
    (folder / name).mkdir()
    place = start_anew(folder, folder / name, settings)
    short = settings.model_copy(update={"steps": 3, "history_every": 1, "ema": 0.0})
    train(place, short, progress=True)
    history = read_history(place / "run/history.csv")
    assert all(value > 0 for value in history["mean_grey"]), history["mean_grey"]
    twice = short.model_copy(update={"mmsr": short.mmsr.model_copy(update={"mean_grey": 0.0})})
    other = start_anew(folder, folder / f"{name} without", twice)
    train(other, twice)
    without = read_history(other / "run/history.csv")
    gap = history["total"][0] - without["total"][0] - 0.5 * history["mean_grey"][0]
    assert abs(gap) < 1e-3, gap  # it is in the total, with its weight
    curves = EventAccumulator(str(place / "run")).Reload()
    assert len(curves.Scalars("mean_grey")) == 3
    axes = training_curves(place / "run/history.csv", title=f"phantom: {name}").axes
    panel = next(ax for ax in axes if ax.get_title().startswith("MMSR terms"))
    assert "mean grey" in str([text.get_text() for text in panel.get_legend().get_texts()])
"""


@pytest.mark.slow
def test_a_term_that_is_added_in_one_page_appears_everywhere(tmp_path: Path) -> None:
    package = tmp_path / "mmsr"
    shutil.copytree(
        Path(mmsr.__file__).parent, package, ignore=shutil.ignore_patterns("weights", "__pycache__")
    )
    page = package / "losses/mmsr.py"
    text = page.read_text()
    for old, new in EDITS:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    page.write_text(text)
    tests = Path(__file__).parent.parent / "training"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tests}", "MMSR_PROGRESS": "text"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean_grey=" in done.stderr  # the progress bar
