"""InstanceNorm in the lung (R20), what is made around a mask, exact means in range."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_super_resolve import record_of, tiny, volume_of
from test_tiling import ARCHITECTURES, NORMS, slices, small_tiles  # noqa: F401

from mmsr.core import RangeError, seeded
from mmsr.data.volume import block_mean
from mmsr.inference import sr_slices, two_grids
from mmsr.inference.scan_job import ScanTargets, plan_scan
from mmsr.inference.sr_slices import SROptions, super_resolve_slices
from mmsr.inference.tiling import sr_slice
from mmsr.inference.two_grids import LEAST_HU, MIN_STATISTICS
from mmsr.networks.layers import InstanceNorm
from mmsr.networks.weights import build_g1

pytestmark = pytest.mark.slow

SOME = ("x2, skip", "noise", "deconvolution x8", "enlarged x2", "UNIT, halved")
LUNG = np.s_[:, 12:40, 10:44]


def chest() -> tuple[np.ndarray, np.ndarray]:
    """A body with a dark lung of 28 x 34 pixels, in noise, and where the lung is."""
    hu = seeded(0, "chest").normal(0, 20, (3, 56, 60)) - 1000
    hu[:, 4:50, 4:52] += 1040
    lung = np.zeros(hu.shape, bool)
    lung[LUNG] = True
    hu[lung] -= 890
    return hu.round(), lung


@pytest.mark.parametrize("name", SOME)
def test_statistics_are_those_of_what_is_inside(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Against the network's own forward pass, with a norm that weights the pixels by hand."""
    request.getfixturevalue("small_tiles")
    settings, how = ARCHITECTURES[name]
    g1 = build_g1(settings(norm="instance", **how)).double().eval()
    x, inside = slices(2, 1, 24, 20).double(), slices(2, 1, 24, 20, seed=4) > 0.2
    inside[:, :, 3:7] = False  # tiles without any
    tiled = sr_slice(g1, x, tile=6, inside=inside)
    assert (sr_slice(g1, x, inside=inside) - tiled).abs().max() < 1e-10

    def by_hand(self: InstanceNorm, x: torch.Tensor) -> torch.Tensor:
        weight = F.interpolate(inside.double(), size=x.shape[2:], mode="nearest")
        n = weight.sum((2, 3), keepdim=True)
        mean = (x * weight).sum((2, 3), keepdim=True) / n
        spread = ((x - mean).square() * weight).sum((2, 3), keepdim=True) / n
        return (x - mean) / (spread + 1e-5).sqrt()

    monkeypatch.setattr(InstanceNorm, "forward", by_hand)
    with torch.no_grad():
        assert (tiled - g1(x, g1.noise_of(x))).abs().max() < 1e-10


@pytest.mark.parametrize("norm", ["channel", "instance"])
@pytest.mark.parametrize("name", SOME)
def test_a_part_is_the_part_of_the_whole(name: str, norm: str) -> None:
    settings, how = ARCHITECTURES[name]
    g1 = build_g1(settings(norm=norm, **how)).double().eval()
    x = slices(1, 1, 67, 71).double()
    for box in (((49, 55), (37, 44)), ((0, 9), (60, 71))):
        (top, bottom), (left, right) = box
        inside = torch.zeros(1, 1, 67, 71, dtype=torch.bool)
        inside[..., top + 1 : bottom - 1, left:right] = True
        part = sr_slice(g1, x, inside=inside, box=box)
        fine = np.s_[..., top * g1.scale : bottom * g1.scale, left * g1.scale : right * g1.scale]
        assert (part - sr_slice(g1, x, inside=inside)[fine]).abs().max() < 1e-10


@pytest.mark.parametrize("norm", NORMS)
def test_around_a_mask_is_what_the_whole_slice_gives(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a slice without any of it is not given to the network."""
    hu, lung = chest()
    lung[1] = False
    g1, made = tiny(norm), []
    sr_slice = sr_slices.sr_slice
    monkeypatch.setattr(
        sr_slices, "sr_slice", lambda *a, **k: (made.append(k["box"]), sr_slice(*a, **k))[1]
    )
    options, volume = SROptions(tile=64), volume_of(hu)
    around = list(super_resolve_slices(volume, range(3), g1, record_of(g1), options, lung))
    assert len(made) == 2
    assert all((bottom - top) < 40 for (top, bottom), _ in made)
    monkeypatch.setattr(sr_slices, "box_of", lambda *regions: None)
    whole = list(super_resolve_slices(volume, range(3), g1, record_of(g1), options, lung))
    for one, other in zip(around, whole, strict=True):
        apart = np.abs(one.sr.astype(int) - other.sr)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 1e-2  # ties of rounding


def test_a_mask_in_a_part_of_the_lung_takes_the_whole_lungs_statistics() -> None:
    """They are those of the lung that was given, not of what lies near the mask."""
    hu, lung = (np.pad(one, ((0, 0), (0, 0), (0, 90))) for one in chest())
    hu[:, :, 60:] = -1000
    lung[:, 12:40, 100:140] = True
    hu[:, 12:40, 100:140] = seeded(0, "far").normal(-600, 90, (3, 28, 40)).round()
    mask = np.zeros_like(lung)
    mask[:, 20:24, 20:24] = True
    g1 = tiny("instance", skip=False)
    card = record_of(g1)
    near = next(super_resolve_slices(volume_of(hu), [0], g1, card, SROptions(), mask, lung)).sr
    whole = next(super_resolve_slices(volume_of(hu), [0], g1, card, SROptions(), None, lung)).sr
    deep = np.s_[160:192, 160:192]  # where the mask's weight is 1, and so is its neighbours'
    assert np.abs(near[deep].astype(int) - whole[deep])[8:-8, 8:-8].max() <= 1


def test_the_body_is_no_part_of_the_lungs_statistics() -> None:
    """What is outside the lung may be anything: far from it, its voxels stay."""
    hu, lung = chest()
    g1 = tiny("instance", skip=False)
    other = hu.copy()
    other[:, 50:] = 300  # a table
    lungs, slice_wise = (
        [
            next(super_resolve_slices(volume_of(one), [0], g1, record_of(g1), how, None, lung)).sr
            for one in (hu, other)
        ]
        for how in (SROptions(), SROptions(statistics="slice"))
    )
    deep = np.s_[8 * 16 : 8 * 30, 8 * 16 : 8 * 38]
    assert np.abs(lungs[0][deep].astype(int) - lungs[1][deep]).max() <= 1
    assert np.abs(slice_wise[0][deep].astype(int) - slice_wise[1][deep]).max() > 5


def test_a_small_lung_is_widened_and_none_is_the_slice() -> None:
    lung = np.zeros((64, 64), bool)
    assert two_grids.enough(lung).all()
    lung[30:33, 30:33] = True
    wide = two_grids.enough(lung)
    assert MIN_STATISTICS <= wide.sum() < 2 * MIN_STATISTICS
    assert wide[30:33, 30:33].all()
    lung[:32] = True
    assert two_grids.enough(lung) is lung
    assert two_grids.enough(np.zeros((4, 4), bool)).all()  # smaller than a patch


def test_which_statistics_are_taken_and_told(tmp_path) -> None:
    hu, lung = (np.pad(one, ((0, 0), (0, 0), (0, 90))) for one in chest())
    g1 = tiny("instance")

    def job(**how):
        options = SROptions(statistics=how.pop("statistics", "auto"))
        targets = ScanTargets(tmp_path / "sr.mha")
        return plan_scan(volume_of(how.pop("hu", hu)), targets, g1, record_of(g1), options, **how)

    small = np.zeros_like(lung)
    small[:, 22:24, 22:24] = True
    by_mask, by_slice = job(mask=small, lung=lung), job(mask=small, statistics="slice")
    assert job(mask=lung).inputs.lung is lung
    assert job(find_lung=lambda: lung).inputs.lung is lung  # as of some slices, in the whole scan
    assert by_mask.inputs.lung is lung
    assert by_slice.inputs.lung is None
    assert by_mask.output.stamp != by_slice.output.stamp
    assert by_mask.share < by_slice.share == 1
    assert "norm:   statistics of the lung (R20)" in by_mask.lines(1.0)
    assert "norm:   statistics of the whole slice (R20)" in by_slice.lines(1.0)
    water = np.zeros_like(hu)
    assert job(hu=water).inputs.options.statistics == "slice"
    with pytest.raises(RangeError, match="no lung"):
        job(hu=water, statistics="lung")
    plain = tiny("channel")
    kept = plan_scan(volume_of(hu), ScanTargets(tmp_path / "b.mha"), plain, record_of(plain))
    assert not any("norm:" in line for line in kept.lines(1.0))


def test_exact_means_stay_within_what_tissue_has() -> None:
    """Blocks that the scan itself puts elsewhere keep their mean, and are counted."""
    hu, lung = chest()
    hu[lung] -= 60  # emphysema: a third of the voxels would fall below air
    hu[0, 0, :5], hu[0, 50, :7] = -1100, 1500
    g1 = tiny("none")
    g1.last.weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    options, card = SROptions(exact_means=True), record_of(g1)
    one = next(super_resolve_slices(volume_of(hu), [0], g1, card, options))
    plain = next(super_resolve_slices(volume_of(hu), [0], g1, card, SROptions()))
    high = 350.0
    within = (hu[0] >= LEAST_HU) & (hu[0] <= high)
    fine = np.kron(within, np.ones((8, 8), bool))
    assert (plain.sr < LEAST_HU)[fine].mean() > 0.01  # there was something to do
    assert one.sr[fine].min() >= LEAST_HU
    assert one.sr[fine].max() <= np.ceil(sr_slices.Window.from_dict(card.clinical_window).high)
    assert np.abs(block_mean(one.sr) - hu[0]).max() <= 0.5
    assert one.beyond >= 12
    assert (
        one.beyond
        == (
            ~(
                (hu[0] >= LEAST_HU)
                & (hu[0] <= sr_slices.Window.from_dict(card.clinical_window).high)
            )
        ).sum()
    )
