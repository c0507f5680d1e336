"""Super-resolution of a real scan: geometry, memory, HU; and tiles at awkward sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peak import PEAK_BYTES

from mmsr.core import MMSRError, ResourceError, seeded
from mmsr.generator_files import GeneratorRecord
from mmsr.generators import G1Settings, SRGenerator, build_g1
from mmsr.preprocess import CLINICAL_WINDOW
from mmsr.super_resolve import block_mean, enlarge_bicubic, sr_slice, super_resolve
from mmsr.volume import Volume

REAL = os.environ.get("MMSR_REAL_DATA")

# The job of a user, in a process of its own so that its memory can be measured.
JOB = (
    PEAK_BYTES
    + """
import json, sys
import torch
torch.set_num_threads(2)
from mmsr.generator_files import GeneratorRecord
from mmsr.generators import G1Settings, build_g1
from mmsr.preprocess import CLINICAL_WINDOW
from mmsr.super_resolve import super_resolve
from mmsr.volume import read_volume, write_volume
folder, out, apart = sys.argv[1:]
volume = read_volume(folder, slices=(60, 62))
g1 = build_g1(G1Settings(channels=32, blocks=6, norm="none", skip=True))
record = GeneratorRecord(
    g1=g1.settings, clinical_window=CLINICAL_WINDOW.to_dict(), micro_window={}, method="", data=""
)
result = super_resolve(volume, g1, record)
write_volume(out, result.volume)
write_volume(apart, result.consistency)
print(json.dumps({"peak": peak_bytes(), "clipped": result.clipped, "tile": result.tile}))
"""
)


class Job(NamedTuple):
    """What the job left."""

    out: Path
    apart: Path
    said: dict
    bar: str


@pytest.fixture(scope="module")
def real_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    if not REAL:
        pytest.skip("MMSR_REAL_DATA is not set: no real scan to read")
    folder = tmp_path_factory.mktemp("sr")
    out, apart = folder / "sr.mha", folder / "apart.mha"
    run = subprocess.run(
        [sys.executable, "-c", JOB, str(Path(REAL, "nlst_chest_dicom")), str(out), str(apart)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return Job(out, apart, json.loads(run.stdout.splitlines()[-1]), run.stderr)


def test_real_scan_stays_where_it_was(real_job: Job) -> None:
    import SimpleITK as sitk

    from mmsr.volume import read_volume

    sr = sitk.ReadImage(str(real_job.out))
    volume = read_volume(Path(REAL or "", "nlst_chest_dicom"), slices=(60, 62))
    z, y, x = volume.spacing_mm
    assert sr.GetSize() == (4096, 4096, 2)
    assert np.allclose(sr.GetSpacing(), (x / 8, y / 8, z))
    assert np.allclose(sr.GetSpacing(), (0.0675, 0.0675, 2.0), atol=1e-3)
    places = [(0, 0, 0), (1, 0, 0), (0, 511, 511), (1, 255, 37), (1, 511, 0)]
    for k, j, i in places:
        centre = sr.TransformContinuousIndexToPhysicalPoint((8 * i + 3.5, 8 * j + 3.5, float(k)))
        assert np.abs(centre - volume.world_mm((k, j, i))).max() < 1e-6


def test_real_scan_keeps_its_grey_values(real_job: Job) -> None:
    import SimpleITK as sitk

    from mmsr.volume import read_volume

    sr = sitk.GetArrayFromImage(sitk.ReadImage(str(real_job.out)))
    apart = sitk.GetArrayFromImage(sitk.ReadImage(str(real_job.apart)))
    hu = read_volume(Path(REAL or "", "nlst_chest_dicom"), slices=(60, 62)).array
    assert sr.dtype == np.int16
    assert np.allclose(apart, np.abs(block_mean(sr) - hu), atol=1e-3)
    assert apart.mean() < 30  # a skip with random weights is close to bicubic
    bone = hu > 900  # far above the window's 350 HU
    assert bone.sum() > 100
    assert np.corrcoef(block_mean(sr)[bone], hu[bone])[0, 1] > 0.95
    assert abs(block_mean(sr)[bone].mean() - hu[bone].mean()) < 40
    beyond = (hu < CLINICAL_WINDOW.low) | (hu > CLINICAL_WINDOW.high)
    assert real_job.said["clipped"] == beyond.sum()


def test_real_scan_needs_little_memory(real_job: Job) -> None:
    assert real_job.said["peak"] < 1.5e9
    assert "super-resolving: 100%" in real_job.bar


def tiny(norm: str = "none", skip: bool = True) -> SRGenerator:
    return build_g1(G1Settings(channels=16, blocks=1, norm=norm, skip=skip)).eval()  # type: ignore[arg-type]


def record_of(g1: SRGenerator) -> GeneratorRecord:
    return GeneratorRecord(
        g1=g1.settings,
        clinical_window=CLINICAL_WINDOW.to_dict(),
        micro_window={},
        method="untrained",
        data="none",
    )


def volume_of(array: np.ndarray) -> Volume:
    return Volume(np.asarray(array, np.int16), (2.0, 0.6, 0.6))


@pytest.mark.parametrize("norm", ["none", "channel"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("size", "tile"),
    [((4, 4), 1), ((5, 31), 3), ((5, 31), 30), ((29, 16), 7), ((33, 45), 16), ((33, 45), 64)],
)
def test_tiles_equal_the_whole(norm: str, skip: bool, size: tuple[int, int], tile: int) -> None:
    g1 = tiny(norm, skip).double()  # so that rounding cannot hide a small seam
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    whole = g1(x).detach()
    assert whole.shape[-2:] == (8 * size[0], 8 * size[1])
    assert (sr_slice(g1, x, tile=tile) - whole).abs().max() < 1e-9


def test_a_halo_one_smaller_would_show() -> None:
    """The halo is no larger than it must be for the test above to mean something."""
    g1 = tiny(skip=False)

    class Narrow:
        settings, halo, tiles_agree = g1.settings, g1.halo - 1, True
        body, upsample = g1.body, g1.upsample

    x = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    seams = (sr_slice(Narrow, x, tile=8) - sr_slice(g1, x)).abs()  # type: ignore[arg-type]
    assert seams.max() > 1e-4


def test_instance_norm_runs_whole_and_refuses_tiles() -> None:
    g1 = tiny("instance", skip=False)
    volume = volume_of(seeded(0, "instance").integers(-1000, 100, (1, 20, 20)))
    assert super_resolve(volume, g1, record_of(g1), progress=False).tile is None
    with pytest.raises(MMSRError, match="tile: 8 is refused"):
        super_resolve(volume, g1, record_of(g1), tile=8, progress=False)


def test_bone_and_metal_survive_the_window() -> None:
    hu = np.full((1, 24, 24), 40)
    hu[0, 8:16, 8:16] = 1200
    hu[0, 11:13, 11:13] = 3000
    g1 = tiny()
    result = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    means = block_mean(result.volume.array[0])
    assert np.abs(means[9:15, 9:15] - hu[0, 9:15, 9:15]).max() < 60
    assert (result.clipped, result.limited) == (64, 0)


def test_int16_ends_are_counted() -> None:
    hu = np.full((1, 16, 16), -1000)
    hu[0, 6:10, 6:10] = 32767
    g1 = tiny()
    result = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    assert result.limited > 0
    assert result.volume.array.max() == 32767
    assert result.volume.array.min() > -32768  # nothing wrapped around


def test_an_empty_mask_is_bicubic() -> None:
    hu = seeded(1, "mask").integers(-1000, 300, (2, 12, 9))
    g1 = tiny()
    mask = np.zeros(hu.shape, bool)
    result = super_resolve(volume_of(hu), g1, record_of(g1), mask=mask, progress=False)
    for z in range(2):
        assert np.array_equal(result.volume.array[z], np.rint(enlarge_bicubic(hu[z])))


def test_a_full_mask_changes_nothing() -> None:
    hu = seeded(2, "mask").integers(-1000, 300, (1, 12, 9))
    g1 = tiny()
    everywhere = np.ones(hu.shape, bool)
    a = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    b = super_resolve(volume_of(hu), g1, record_of(g1), mask=everywhere, progress=False)
    assert np.array_equal(a.volume.array, b.volume.array)


def test_the_bad_slice_is_named() -> None:
    g1 = tiny()
    with torch.no_grad():
        g1.last.weight.fill_(float("inf"))
    hu = seeded(3, "nan").integers(-1000, 300, (3, 8, 8))
    mask = np.zeros(hu.shape, bool)
    mask[2] = True  # the network sees the third slice only
    with pytest.raises(MMSRError, match=r"slice 2: .* not finite") as caught:
        super_resolve(volume_of(hu), g1, record_of(g1), mask=mask, progress=False)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmsr.super_resolve.available_memory", lambda: 900_000_000)
    g1 = tiny()
    volume = volume_of(np.zeros((20, 512, 512)))
    with pytest.raises(ResourceError, match=r"at most \d+ slices at a time") as caught:
        super_resolve(volume, g1, record_of(g1), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (20, 3)])
def test_a_slice_too_small_is_one_line(size: tuple[int, int]) -> None:
    g1 = tiny()
    with pytest.raises(MMSRError, match="at least 4") as caught:
        super_resolve(volume_of(np.zeros((1, *size))), g1, record_of(g1), progress=False)
    assert "\n" not in str(caught.value)
