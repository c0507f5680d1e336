"""Bodies whose lungs are known: on tables, under blankets, cropped, or without lungs."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from mmsr.data.volume import Volume

Planes = tuple[np.ndarray, np.ndarray]  # HU, and what of it is lung with air in it


class Situation(NamedTuple):
    """What is built; lengths in mm, z from 0 (below the lungs) to 300 (above them)."""

    name: str
    kind: str = "chest"  # abdomen, stool, head, shoulder, legs, nothing
    slices: int = 20
    centre: float = 130.0
    spacing: tuple[float, float, float] = (3.0, 2.2, 2.2)
    shape: tuple[int, int] = (180, 230)
    lung_hu: float = -860.0
    size: float = 1.0  # of the body
    noise_hu: float = 15.0
    lungs: tuple[int, ...] = (-1, 1)
    bullae: bool = False
    consolidation: bool = False
    effusion: bool = False
    lesions: bool = False
    arms: float = 0.0  # distance of the arms from the body's middle; 0 is overhead
    table: str = "foam"  # foam, cut foam, gap, double, mattress, none
    foam_hu: float = -930.0
    blanket: bool = False
    prone: bool = False
    feet_first: bool = False
    side: bool = False  # lies on the side
    field: float = 0.0  # radius of a round field of view; beyond it is padding
    moved: tuple[float, float] = (0.0, 0.0)  # the field's middle against the body's
    crop: tuple[float, float, float, float] | None = None  # y and x, first and last

    def build(self, seed: int = 0) -> tuple[Volume, np.ndarray]:
        """Return the scan and its lung."""
        planes = list(self.planes(np.random.default_rng(seed)))
        if self.feet_first:
            planes.reverse()
        hu, lung = (np.stack(part) for part in zip(*planes, strict=True))
        return Volume(hu, self.spacing), lung

    def planes(self, rng: np.random.Generator) -> Iterator[Planes]:
        """Give slice after slice."""
        dz, dy, dx = self.spacing
        y = (np.arange(self.shape[0])[:, None] - self.shape[0] / 2) * dy + self.moved[0] + 20
        x = (np.arange(self.shape[1])[None] - self.shape[1] / 2) * dx + self.moved[1]
        if self.crop:
            y0, y1, x0, x1 = self.crop
            y, x = y[(y >= y0) & (y < y1)][:, None], x[(x >= x0) & (x < x1)][None]
        vessels = rng.uniform((-75, -120, -0.3, -0.3, 1.2), (75, 120, 0.3, 0.3, 3.5), (40, 5))
        for i in range(self.slices):
            z = self.centre + (i - self.slices / 2) * dz
            body_y, body_x = (-x, y) if self.side else (-y if self.prone else y, x)
            body_y, body_x = np.broadcast_arrays(body_y / self.size, body_x / self.size)
            flat, lung = self.body(z, body_y, body_x, vessels)
            below = 110 * self.size if not self.side else 172 * self.size
            flat = self.surroundings(flat, below + 8, *np.broadcast_arrays(y, x))
            flat = ndimage.gaussian_filter(flat, 0.5)
            noise = ndimage.gaussian_filter(rng.standard_normal(flat.shape), 0.5)
            flat = flat + noise * self.noise_hu / noise.std()
            if self.field:
                seen = np.hypot(y - self.moved[0], x - self.moved[1]) < self.field
                flat, lung = np.where(seen, flat, -1000), lung & seen
            yield np.rint(flat).astype(np.int16), lung

    def body(self, z: float, y: np.ndarray, x: np.ndarray, vessels: np.ndarray) -> Planes:
        """Give one slice of the body in air."""
        air, none = np.full(x.shape, -1000.0), np.zeros(x.shape, bool)

        def disc(at_y: float, at_x: float, high: float, wide: float) -> np.ndarray:
            return ((y - at_y) / high) ** 2 + ((x - at_x) / wide) ** 2 < 1

        if self.kind == "nothing":
            return air, none
        if self.kind == "legs":
            for side in (-1, 1):
                air[disc(20, 85 * side, 80, 78)] = 40
                air[disc(20, 85 * side, 18, 18)] = 900
            return air, none
        if self.kind == "head":
            air[disc(10, 0, 95, 75)] = 40
            air[disc(10, 0, 90, 70) & ~disc(10, 0, 84, 64)] = 1000
            for side in (-1, 1):
                air[disc(-50, 24 * side, 16, 13)] = -1000  # a maxillary sinus
                for row in range(4):
                    for column in range(3):  # mastoid cells
                        air[disc(25 + 5 * row, (50 + 5 * column) * side, 1.9, 1.9)] = -900
            air[disc(-55, 0, 25, 5) & (y > -72)] = -1000
            return air, none
        air[disc(0, 0, 110, 172)] = 40
        air[disc(0, 0, 102, 164)] = 0
        air[disc(62, 0, 26, 24)] = 400
        if self.kind == "shoulder":
            air[disc(20, 0, 70, 235)] = 40
            air[disc(5, 0, 9, 9)] = -1000
            return air, none
        if self.kind in ("abdomen", "stool"):
            gas = -1000
            for at_y, at_x, high, wide in (
                (-70, 20, 12, 60),
                (-40, 110, 25, 22),
                (-30, -115, 28, 24),
            ):
                inside = disc(at_y, at_x, high, wide)
                air[inside] = gas
                if self.kind == "stool":
                    mottled = np.sin(y * 0.9 + z) * np.sin(x * 0.8 - z) > -0.1
                    air[inside & mottled] = 20
            return air, none
        wide = max(0.0, 1 - ((z - 110) / 165) ** 2) ** 0.5
        lung = none.copy()
        for side in self.lungs:
            lung |= disc(0, 70 * side, 84 * wide + 1e-3, 66 * wide + 1e-3)
        lung &= ~disc(-15, 14, 48, 50 * max(0.0, 1 - ((z - 80) / 70) ** 2) ** 0.5 + 1e-3)  # heart
        lung &= ~disc(62, 0, 34, 32)
        lung &= abs(x) > 22
        dome = max(0.0, 1 - ((z + 10) / 80) ** 2) ** 0.5
        lung &= ~disc(-8, -66, 72 * dome + 1e-3, 58 * dome + 1e-3)
        lung &= z > 12
        if self.consolidation:
            lung &= ~((x > 0) & (y > 15) & (z < 170))
        if self.effusion:
            lung &= ~((x < 0) & (y > 30))
        air[lung] = self.lung_hu
        if self.bullae:
            air[lung & (np.sin(y / 7) * np.sin(x / 7) * np.sin(z / 9) > 0.2)] = -990
        for at_y, at_x, slope_y, slope_x, radius in vessels:
            centre = at_y + slope_y * (z - 130), at_x + slope_x * (z - 130)
            air[lung & disc(*centre, radius, radius)] = 40
        if self.lesions:
            lesion = lung & disc(10, -128, 9, 9)
            air[lesion] = 30
        tubes = [(-5.0, 0.0, 9.0)] if z > 160 else []
        if 135 < z <= 160:
            tubes = [(0.0, side * (160 - z) * 0.5, 6.5) for side in (-1, 1)]
        for at_y, at_x, radius in tubes:
            air[disc(at_y, at_x, radius, radius)] = -1000
        return air, lung

    def surroundings(
        self, flat: np.ndarray, below: float, y: np.ndarray, x: np.ndarray
    ) -> np.ndarray:
        """Put arms, table and blanket around a body, in what is air there."""
        outside = ~ndimage.binary_fill_holes(np.pad(flat > -400, 1))[1:-1, 1:-1]
        if self.crop:
            shape = (y / (110 * self.size)) ** 2 + (x / (172 * self.size)) ** 2
            outside = shape > 1
        new = np.full(flat.shape, -1000.0)
        if self.blanket:
            away = ndimage.distance_transform_edt(outside) * self.spacing[1]
            wave = 9 + 5 * np.sin(np.arctan2(y, x) * 11)
            new[abs(away - wave) < 1.6] = -250
            new[abs(away - wave - 9) < 1.6] = -350
        top = below - 25 * (x / 250) ** 2 * (self.table != "mattress")
        if self.table == "foam":
            new[(y > top) & (y < top + 55)] = self.foam_hu
            new[(abs(y - top) < 1.6) | (abs(y - top - 55) < 1.6)] = 60
        elif self.table == "cut foam":
            new[y > top] = self.foam_hu
            new[abs(y - top) < 3] = 60
        elif self.table == "gap":  # two boards with air between them, closed at the sides
            box = (abs(x) < 220) & (y > top) & (y < top + 45)
            new[box] = 80
            new[ndimage.binary_erosion(box, iterations=2)] = -985
        elif self.table == "double":
            for low in (0, 30):
                new[(y > top + low) & (y < top + low + 22)] = self.foam_hu + low
                new[(abs(y - top - low) < 1.6) | (abs(y - top - low - 22) < 1.6)] = 60
        elif self.table == "mattress":
            new[(y > below - 25) & (y < below + 40)] = self.foam_hu
            new[abs(y - below - 40) < 2] = 60
            new[abs(y - below + 25) < 1.2] = -450
        if self.arms:
            for side in (-1, 1):
                far = np.hypot(y - 25, x - side * self.arms)
                new[far < 38] = 40
                new[far < 11] = 700
        return np.where(outside, new, flat)


S = Situation
NARROW = {"spacing": (3.0, 1.8, 1.8), "shape": (220, 280)}
WITH_LUNGS = [
    *(S(f"{n} slices on foam", slices=n) for n in (1, 2, 6, 60)),
    *(S(f"{n} slices on foam, cut", slices=n, table="cut foam") for n in (1, 3)),
    *(S(f"{n} slices over closed air", slices=n, table="gap") for n in (1, 3)),
    *(S(f"{n} slices on two boards", slices=n, table="double") for n in (1, 3)),
    *(S(f"{n} slices on a mattress", slices=n, table="mattress") for n in (1, 3)),
    S("foam as light as lung", slices=2, foam_hu=-860),
    S("foam as dark as air", slices=2, foam_hu=-975),
    S("arms down", slices=1, arms=205),
    S("arms down, blanket", slices=3, arms=213, blanket=True, table="mattress"),
    *(S(f"one lung, {n}", slices=n, lungs=(1,)) for n in (1, 4)),
    *(S(f"consolidation, {n}", slices=n, consolidation=True) for n in (1, 4)),
    S("effusion", slices=3, effusion=True),
    *(S(f"emphysema, {n}", slices=n, lung_hu=-935, bullae=True) for n in (1, 4)),
    S("emphysema on cut foam", slices=2, lung_hu=-935, bullae=True, table="cut foam"),
    S("lesions on the pleura", slices=6, lesions=True),
    S("expiration", slices=3, lung_hu=-700),
    S("prone", slices=2, prone=True),
    S("feet first", slices=6, feet_first=True),
    S("on the side", slices=2, side=True, shape=(230, 230)),
    S("round field", slices=2, field=150),
    S("round field beside the body", slices=2, field=150, moved=(0, 40)),
    S("round field, emphysema", slices=2, field=150, lung_hu=-935, bullae=True),
    S("cropped to the middle", slices=3, crop=(-70, 70, -110, 110)),
    S("cropped, emphysema", slices=3, crop=(-70, 70, -110, 110), lung_hu=-935, bullae=True),
    S("cropped to the right lung", slices=2, crop=(-130, 90, -200, 0)),
    S("cropped to its outer half", slices=2, crop=(-130, 120, -220, -60)),
    S("cropped above, with the table", slices=2, crop=(-20, 250, -250, 250)),
    S("cropped at both sides", slices=2, crop=(-100, 160, -160, 160), **NARROW),
    S("sharp kernel", slices=2, noise_hu=70),
    S("thick slices", slices=4, spacing=(10, 2.2, 2.2)),
    S("thin slices", slices=8, spacing=(0.6, 2.2, 2.2)),
    S("child", slices=4, size=0.55, spacing=(2, 0.9, 0.9), shape=(260, 260)),
    S("infant", slices=4, size=0.42, spacing=(1, 0.7, 0.7), shape=(260, 260)),
    S("large", slices=2, size=1.2, shape=(220, 250)),
    S("base", slices=5, centre=45),
    S("apex", slices=5, centre=255),
]
WITHOUT = [
    S(f"{kind} on {table}", kind, slices=n, table=table)
    for kind in ("abdomen", "stool", "head", "shoulder", "legs", "nothing")
    for n, table in ((1, "foam"), (2, "cut foam"), (3, "gap"), (2, "mattress"))
] + [
    S("abdomen with arms", "abdomen", slices=2, arms=205, blanket=True),
    S("abdomen in a round field", "abdomen", slices=2, field=150),
    S("abdomen on light foam", "abdomen", slices=2, foam_hu=-860),
    S("abdomen, cropped", "abdomen", slices=2, table="cut foam", crop=(-100, 160, -160, 160)),
]
FULL = [
    S("whole chest, 300 slices", slices=300, centre=150, spacing=(1, 1.1, 1.1), shape=(512, 512)),
    S("two of 512 pixels", slices=2, field=178, spacing=(3, 0.7, 0.7), shape=(512, 512)),
]
