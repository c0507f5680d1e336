"""Tubes at any place, slant and size are measured to a fraction of a pixel; intervals are fair."""

import numpy as np
import pytest

from mmsr.core import seeded
from mmsr.data.foam import PIXEL_MM, coverage
from mmsr.data.phantom_scans import KnownTube
from mmsr.data.trees import capsules_of, tube_distances, wall_thickness
from mmsr.evaluation.intervals import interval
from mmsr.evaluation.structure import measure_bronchus, pattern_db, vessel_diameter_mm


def drawn(seed: int, kind: str) -> tuple[np.ndarray, KnownTube]:
    """Draw a straight tube as the phantom does, with the artery of a bronchus leaning on it."""
    rng = seeded(seed, "drawn", kind)
    size, radius = 160, rng.uniform(0.5, 1.4)
    at = np.array([0.0, *(size * PIXEL_MM / 2 + rng.uniform(-1, 1, 2))])
    axis = np.array([1.0, *rng.uniform(-0.8, 0.8, 2)])
    axis /= np.linalg.norm(axis)
    ends = np.array([at - 9 * axis, at + 9 * axis])
    rows, wall = [capsules_of(ends, np.array([radius] * 2), kind == "bronchus")], 0.0
    if kind == "bronchus":
        wall = wall_thickness(radius)
        aside = np.cross(axis, [0.0, 1.0, 0.0])
        aside *= (radius + wall + 0.1 + radius) / np.linalg.norm(aside)
        rows.append(capsules_of(ends + aside, np.array([radius] * 2)))
    vessel, lumen, outer = tube_distances(np.concatenate(rows), 0.0, size)
    hu = -1000 + 1050 * np.maximum(coverage(vessel), coverage(outer))
    hu = np.where(coverage(outer) > 0, hu - 1050 * coverage(lumen), hu)
    y, x = at[1:] / PIXEL_MM - 0.5
    return hu, KnownTube(kind, (0, y, x), tuple(axis), 2 * radius, wall)


@pytest.mark.parametrize("seed", range(8))
def test_bronchi_beside_their_artery(seed: int) -> None:
    hu, tube = drawn(seed, "bronchus")
    seen = measure_bronchus(hu, tube, pixel_mm=PIXEL_MM)
    assert seen.wall_mm == pytest.approx(tube.wall_mm, abs=0.03)
    assert 2 * np.sqrt(seen.lumen_mm2 / np.pi) == pytest.approx(tube.diameter_mm, abs=0.03)
    assert seen.gap_mm == 0
    assert seen.ring == 1


@pytest.mark.parametrize("seed", range(8))
def test_vessels(seed: int) -> None:
    hu, tube = drawn(seed, "vessel")
    assert vessel_diameter_mm(hu, tube, pixel_mm=PIXEL_MM) == pytest.approx(
        tube.diameter_mm, abs=0.03
    )


@pytest.mark.parametrize("pitch", [2, 4, 8, 16])
def test_the_pattern_of_its_own_pitch_alone(pitch: int) -> None:
    """Stripes count at each scale whose pitch they repeat at, and at no other."""
    stripes = 20 * np.tile(np.sin(2 * np.pi * (np.arange(320) + 0.3) / pitch), (320, 1))
    image = stripes + stripes.T + seeded(0, "pattern").normal(0, 20, (320, 320))
    for scale in (4, 8, 16):
        found = pattern_db(image, np.ones(image.shape, bool), scale=scale)
        assert (found > 2) == (scale % pitch == 0)


def test_an_interval_turns_with_its_sign_and_scale() -> None:
    table = seeded(1, "table").normal(0.5, 1, (12, 4))
    found, turned = interval(table), interval(-10 * table)
    assert turned.mean == pytest.approx(-10 * found.mean)
    assert (turned.t_low, turned.t_high) == pytest.approx((-10 * found.t_high, -10 * found.t_low))
    assert (turned.low, turned.high) == pytest.approx((-10 * found.high, -10 * found.low))
    narrow = interval(table, level=0.5)
    assert found.low < narrow.low < found.mean < narrow.high < found.high
    assert interval(table, seed=1).low == pytest.approx(found.low, abs=0.05)
