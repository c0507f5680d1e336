"""Draw real_scan.png: a patient's scan beside bicubic and the bundled weights, with marks.

python nbs/images/real_scan.py FOLDER      the DICOM series of NLST that data/README.md names
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mmsr
from mmsr.inference.two_grids import enlarge_bicubic

PLACES = {"large bronchus": (0, 306, 345), "small bronchus": (0, 298, 207)}  # z, y, x of the scan
MARKS = {  # row; place of the number and of what it points at, y and x in the panel
    1: (0, (252, 22), (226, 52)),
    2: (0, (222, 92), (166, 140)),
    3: (0, (236, 222), (212, 168)),
    4: (1, (78, 68), (112, 100)),
}
MEANING = """\
Not to be believed:  1  the mesh, drawn where the scan shows little but noise;
2  the ragged inner edge of the bronchial wall;  3  dots at the pitch of the scan's pixels
inside a vessel;  4  the corners of this ring, and how thick its wall is.
NLST, doi 10.7937/TCIA.HMQ8-J677, CC BY 4.0. Research only; fine detail is synthesised."""

scan = mmsr.read_volume(sys.argv[1], slices=(60, 61))
lung = mmsr.lung_mask(mmsr.read_volume(sys.argv[1]), slices=(60, 61))
g1, card = mmsr.load_generator()
exact = mmsr.SROptions(exact_means=True, device="cpu")
result = mmsr.super_resolve(scan, g1, card, exact, mask=lung, progress=False)
columns = {
    "clinical CT, as measured": scan,
    "bicubic: enlarged, nothing added": enlarge_bicubic(scan.array[0])[None],
    "super-resolved: detail is drawn": result.volume,
}
title = "patient data (NLST), bundled weights, --lung-only --exact-means"
figure = mmsr.side_by_side(columns, PLACES, title=title, crop_mm=18, panel_in=3.4)
arrow = {"arrowstyle": "-|>", "color": "#ffd23f", "lw": 2, "shrinkA": 8}
for number, (row, at, tip) in MARKS.items():
    panel = figure.axes[len(columns) * row + 2]
    style = {"boxstyle": "circle,pad=0.2", "fc": "#ffd23f", "ec": "black"}
    how = {"fontsize": 10, "weight": "bold", "bbox": style, "ha": "center", "va": "center"}
    panel.annotate(str(number), tip[::-1], at[::-1], arrowprops=arrow, **how)
figure.supxlabel(MEANING, fontsize=10.5)
figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.7)
target = Path(__file__).with_suffix(".png")
figure.savefig(target, dpi=96)
Image.open(target).convert("RGB").quantize(250).save(target, optimize=True)
print(target.name, np.shape(result.volume.array), f"{target.stat().st_size / 1000:.0f} kB")
