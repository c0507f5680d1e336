"""Make the real scan of the site: a cube of 24 mm of an NLST chest CT, and its super-resolution.

`MMSR_REAL_DATA=FOLDER python docs/make_crop.py`; FOLDER holds `nlst_chest_dicom` (data/README.md).
Writes docs/crop/*.nii.gz and docs/images/nlst_*.webp; five minutes on one core. National Lung
Screening Trial, doi 10.7937/TCIA.HMQ8-J677, CC BY 4.0; cropped, HU rounded to 8, super-resolved.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import mmsr
from mmsr.inference.two_grids import enlarge_bicubic

DOCS = Path(__file__).parent
SLICES, Y, X, SIDE = (60, 72), 265, 340, 44  # a lower-lobe bronchus and its vessels
SHOWN, WINDOW = 4, (-1000.0, 200.0)  # which of the slices the pictures show, and in which HU


def cropped(volume: mmsr.Volume, scale: int) -> mmsr.Volume:
    """Cut the cube out of a volume whose pixels are `scale` times finer than the scan's."""
    y, x, side = scale * Y, scale * X, scale * SIDE
    cube = np.asarray(volume.array)[:, y : y + side, x : x + side]
    rounded = (np.round(np.clip(cube, -1024, 600) / 8) * 8).astype(np.int16)
    origin = tuple(float(one) for one in volume.world_mm([[0, y, x]])[0])
    return volume._replace(array=rounded, origin_mm=origin, source=None, notes=())


def picture(name: str, hu: np.ndarray, side: int, frame: tuple[int, ...] | None = None) -> None:
    """Write a picture of `side` pixels in the window, without smoothing."""
    low, high = WINDOW
    grey = Image.fromarray((255 * np.clip((hu - low) / (high - low), 0, 1)).astype(np.uint8))
    if frame:
        grey = grey.convert("RGB")
        ImageDraw.Draw(grey).rectangle(frame, outline=(255, 200, 0), width=2)
    shown = grey.resize((side, side), Image.Resampling.NEAREST)
    shown.save(DOCS / f"images/{name}.webp", quality=80)


def main() -> None:
    """Read the scan, super-resolve twelve slices, write crops and pictures."""
    path = Path(os.environ["MMSR_REAL_DATA"], "nlst_chest_dicom")
    scan = mmsr.read_volume(path, slices=SLICES)
    lung = mmsr.lung_mask(mmsr.read_volume(path), slices=SLICES)
    g1, card = mmsr.load_generator()
    result = mmsr.super_resolve(scan, g1, card, mmsr.SROptions(exact_means=True), mask=lung)
    clinical, fine = cropped(scan, 1), cropped(result.volume, 8)
    mmsr.write_volume(DOCS / "crop/clinical.nii.gz", clinical)
    mmsr.write_volume(DOCS / "crop/super_resolved.nii.gz", fine)
    frame = (X, Y, X + SIDE, Y + SIDE)
    picture("nlst_slice", np.asarray(scan.array[SHOWN]), 512, frame)
    bicubic = enlarge_bicubic(scan.array[SHOWN])[8 * Y : 8 * (Y + SIDE), 8 * X : 8 * (X + SIDE)]
    picture("nlst_clinical", clinical.array[SHOWN], 704)
    picture("nlst_bicubic", bicubic, 704)
    picture("nlst_super_resolved", fine.array[SHOWN], 704)
    print(mmsr.measure(result.volume, scan, masks=lung))


if __name__ == "__main__":
    main()
