"""A volume goes to SimpleITK and comes back the same, however it lies; and says what it is."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mmsr.core import SettingsError, ShapeError
from mmsr.data.volume import Volume
from mmsr.scans.read import read_volume
from mmsr.scans.slices import SliceReader
from mmsr.scans.write import write_volume

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8")


def random_volume(seed: int) -> Volume:
    """Odd sizes and voxels, turned about all axes, and mirrored half of the time."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    kind = np.dtype(TYPES[seed % len(TYPES)])
    array = rng.integers(0, 120, rng.integers(1, 9, 3)).astype(kind)
    spacing, origin = rng.uniform(0.01, 3, 3), rng.uniform(-900, 900, 3)
    return Volume(
        array, tuple(spacing.tolist()), tuple(origin.tolist()), tuple(turn.ravel().tolist())
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_direction_comes_back_to_the_last_bit(seed: int) -> None:
    scan = random_volume(seed)
    image = scan.to_sitk()
    back = Volume.from_sitk(image, modality=scan.modality, unit=scan.unit)
    assert back.array.dtype == scan.array.dtype
    assert np.array_equal(back.array, scan.array)
    assert back[1:] == scan[1:]
    for zyx in np.ndindex(scan.shape):
        itk = image.TransformIndexToPhysicalPoint(tuple(int(n) for n in zyx[::-1]))
        assert np.allclose(scan.world_mm(zyx), itk, rtol=0, atol=1e-9)
        assert image[zyx[::-1]] == scan.array[zyx]


@pytest.mark.parametrize("diagonal", np.ndindex(2, 2, 2))
def test_flips_are_kept(diagonal: tuple[int, ...]) -> None:
    flip = np.diag(1.0 - 2.0 * np.array(diagonal))
    scan = random_volume(3)._replace(direction=tuple(flip.ravel().tolist()))
    assert Volume.from_sitk(scan.to_sitk(), modality="clinical", unit="HU")[1:] == scan[1:]


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_files_and_images_agree(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(1)
    hu = rng.integers(-1000, 400, (5, 20, 16)).astype(np.int16)
    scan = random_volume(7)._replace(array=hu, spacing_mm=(2.5, 0.7, 0.8))
    sitk.WriteImage(scan.to_sitk(), str(tmp_path / f"theirs{ending}"))
    write_volume(tmp_path / f"ours{ending}", scan)
    for name in ("theirs", "ours"):
        read = read_volume(tmp_path / f"{name}{ending}", force=True)  # its slices are not axial
        image = sitk.ReadImage(str(tmp_path / f"{name}{ending}"))
        again = Volume.from_sitk(image, modality="clinical", unit="HU")
        for other in (read, again):
            assert np.array_equal(other.array, hu)
            assert np.allclose(other.spacing_mm, scan.spacing_mm, rtol=1e-12)
            assert np.allclose(other.direction, scan.direction, atol=1e-12)
            assert np.allclose(other.origin_mm, scan.origin_mm, atol=1e-9)


def test_what_an_image_does_not_say_is_asked_for() -> None:
    image = random_volume(0).to_sitk()
    with pytest.raises(TypeError, match="modality"):
        Volume.from_sitk(image)  # type: ignore[call-arg]
    for words in ({"modality": "ct", "unit": "HU"}, {"modality": "micro", "unit": "mm"}):
        with pytest.raises(SettingsError, match="modality, unit"):
            Volume.from_sitk(image, **words)
    colour = sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3)
    for other in (sitk.Image([4, 5], sitk.sitkInt16), colour, sitk.JoinSeries([image] * 2)):
        with pytest.raises(ShapeError, match="3-D, one number per voxel"):
            Volume.from_sitk(other, modality="clinical", unit="HU")


def lazy(read: list[tuple[int, int]]) -> Volume:
    """A volume on disk that notes what is read of it."""

    def slices(first: int, last: int):
        read.append((first, last))
        return (np.full((30, 20), z, np.int16) for z in range(first, last))

    return Volume(SliceReader((50, 30, 20), np.dtype(np.int16), slices), (2.5, 0.7, 0.7))


def test_a_lazy_volume_is_not_read_to_show_it() -> None:
    read: list[tuple[int, int]] = []
    scan = lazy(read)
    assert scan.shape == (50, 30, 20)
    text = repr(scan)
    assert not read
    assert "50 × 30 × 20" in text
    assert "2.5 × 0.7 × 0.7 mm" in text
    assert text in scan._repr_html_()
    assert read == [(25, 26)]
    assert np.array_equal(sitk.GetArrayFromImage(scan.to_sitk())[:, 0, 0], np.arange(50))


@pytest.mark.parametrize("seed", range(10))
def test_it_says_what_it_is_in_five_lines(seed: int) -> None:
    scan = random_volume(seed)._replace(notes=("one", "two"), modality="micro", unit="grey")
    lines = repr(scan).splitlines()
    assert len(lines) == 5
    assert lines[0] == "Volume: micro CT in grey"
    assert f"{scan.array.min():g} to {scan.array.max():g} grey" in lines[3]
    html = scan._repr_html_()
    assert html.startswith("<img")
    assert len(html) < 60_000


def test_what_cannot_be_drawn_well_is_drawn_still() -> None:
    array = np.full((1, 4, 500), np.nan, np.float32)
    scan = Volume(array, (1.0, 0.02, 0.02), modality="micro", unit="grey")
    assert "nan" in repr(scan)
    assert "aspect-ratio:10/0.08" in scan._repr_html_()
