"""A small export job, for this process or for one that is going to be killed.

``python export_job.py FOLDER ENDING I N SECONDS`` says "ready", waits for a line, does its part
with a pause after each slice, and says how many slices the finished job has, or "none".
"""

import sys
import time
from pathlib import Path

import numpy as np

from mmsr.core import seeded
from mmsr.data.volume import Volume
from mmsr.scans.output_plan import Output, placeholder, plan_outputs
from mmsr.scans.resumable_output import ResumableOutput, open_resumable_output

SLICES = 9
JOB = {"scan": "abc"}


def plane(z: int) -> np.ndarray:
    return seeded(z, "plane").integers(-1000, 1000, (300, 280)).astype(np.int16)


def outputs(folder: Path, ending: str) -> dict[str, Output]:
    """A volume, and a map beside it."""
    sr = Volume(placeholder((SLICES, 300, 280), np.int16), (2.5, 0.07, 0.07), notes=("super-res.",))
    apart = sr._replace(array=placeholder((SLICES, 30, 28), np.float32))
    return {"sr": Output(folder / f"sr{ending}", sr), "map": Output(folder / "map.nii.gz", apart)}


def begin(outputs: dict[str, Output], job: dict[str, str], **how: bool) -> ResumableOutput:
    """Plan a job and open it."""
    return open_resumable_output(plan_outputs(outputs, job), **how)


def fill(export: ResumableOutput, part: tuple[int, int] = (1, 1), pause_s: float = 0.0) -> None:
    for z in export.missing(part):
        one = plane(z)
        export.write(z, {"sr": one, "map": one[::10, ::10].astype(np.float32)}, {"z": z})
        time.sleep(pause_s)


def run(
    folder: Path, ending: str, part: tuple[int, int] = (1, 1), pause_s: float = 0.0
) -> list[dict] | None:
    with begin(outputs(folder, ending), JOB) as export:
        fill(export, part, pause_s)
    return export.finish()


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    i, n = map(int, sys.argv[3:5])
    done = run(Path(sys.argv[1]), sys.argv[2], (i, n), float(sys.argv[5]))
    print("none" if done is None else len(done), flush=True)
