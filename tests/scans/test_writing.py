"""Outputs: the same place in every format, and whole or not at all, whatever kills the job."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import zarr
from export_job import JOB, SLICES, begin, fill, outputs, plane, run
from peak import PEAK_BYTES

from mmsr.core import (
    RESEARCH_ONLY,
    FileError,
    GeometryError,
    MMSRError,
    RangeError,
    ResourceError,
    SettingsError,
    ShapeError,
    seeded,
)
from mmsr.data.volume import DicomSource, Volume, sr_geometry
from mmsr.scans import output_plan
from mmsr.scans.ome_zarr_writer import pyramid, pyramid_shapes
from mmsr.scans.output_plan import Output, placeholder, plan_outputs, share, unfinished
from mmsr.scans.read import read_volume
from mmsr.scans.slices import SliceReader
from mmsr.scans.write import (
    WRITABLE,
    check_writable,
    disk_needed,
    format_of,
    free_space,
    open_writer,
    write_volume,
)

KILLS = int(os.environ.get("MMSR_KILLS", "6"))
FILES = WRITABLE[:4]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")


def turns() -> dict[str, np.ndarray]:
    """Directions: none, 20° about z and flipped along z, and turned about two axes."""
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    oblique = np.array([[c, -s, 0], [s, c, 0], [0, 0, -1]])
    twice = oblique @ [[1, 0, 0], [0, c, -s], [0, s, c]]
    return {"upright": np.eye(3), "oblique, flipped": oblique, "twice": twice}


def scan(turn: str = "oblique, flipped", shape: tuple[int, int, int] = (4, 7, 9)) -> Volume:
    """A scan on an awkward grid; no two voxels of a small one are equal."""
    hu = (
        (seeded(4, "scan").permutation(np.prod(shape)) % 4000 - 1000)
        .astype(np.int16)
        .reshape(shape)
    )
    direction = tuple(turns()[turn].ravel().tolist())
    return Volume(hu, (2.5, 0.61, 0.53), (-150.7812, -160.9375, 928.125), direction)


def finer(volume: Volume, array: np.ndarray) -> Volume:
    """A volume on the super-resolved grid."""
    spacing_mm, origin_mm = sr_geometry(volume)
    notes = ("super-resolved 8x in plane",)
    return volume._replace(array=array, spacing_mm=spacing_mm, origin_mm=origin_mm, notes=notes)


def enlarged(volume: Volume) -> Volume:
    """Its super-resolved twin: the block means are the scan."""
    hu = np.repeat(np.repeat(volume.array, 8, 1), 8, 2)
    detail = seeded(5, "detail").integers(-300, 300, (*hu.shape[:2], hu.shape[2] // 2))
    hu[:, :, ::2] += detail.astype(np.int16)
    hu[:, :, 1::2] -= detail.astype(np.int16)
    return finer(volume, hu)


def grid_of(volume: Volume) -> np.ndarray:
    """World position of every voxel, shape (z, y, x, 3)."""
    return volume.world_mm(np.moveaxis(np.indices(volume.array.shape), 0, -1))


def by_simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, and their world positions."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    ends = [image.TransformIndexToPhysicalPoint(p) for p in [(0, 0, 0), (1, 0, 0), (0, 1, 0)]]
    far = image.TransformIndexToPhysicalPoint((0, 0, len(array) - 1))
    (o, x, y), z = map(np.array, ends), (np.array(far) - ends[0]) / (len(array) - 1)
    k, j, i = np.indices(array.shape)[..., None]
    return array, o + k * z + j * (y - o) + i * (x - o)


def by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same, from the affine; RAS turned into LPS."""
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).T
    xyz = np.moveaxis(np.indices(array.shape), 0, -1)[..., ::-1]
    return array, nibabel.affines.apply_affine(image.affine, xyz) * (-1, -1, 1)


def by_zarr(path: Path, level: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same, from OME's transforms and the direction beside them."""
    group = zarr.open_group(path, mode="r")
    scales = group.attrs["ome"]["multiscales"][0]
    assert [axis["unit"] for axis in scales["axes"]] == ["millimeter"] * 3
    dataset = scales["datasets"][level]
    scale, shift = dataset["coordinateTransformations"]
    array = group[dataset["path"]][:]
    zyx = np.moveaxis(np.indices(array.shape), 0, -1) * scale["scale"] + shift["translation"]
    turn = np.reshape(group.attrs["mmsr"]["direction"], (3, 3))
    return array, zyx[..., ::-1] @ turn.T


def by_mmsr(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same, as this package reads it."""
    volume = read_volume(path, force=True)
    return volume.array, grid_of(volume)


READERS = {
    **{ending: [by_simpleitk, by_mmsr] for ending in (".mha", ".nrrd", ".dicom")},
    **{ending: [by_simpleitk, by_nibabel, by_mmsr] for ending in (".nii", ".nii.gz")},
    ".ome.zarr": [by_zarr],
}


# ---------------------------------------------------------------- the place in the world


@pytest.mark.parametrize("turn", turns())
@pytest.mark.parametrize("ending", WRITABLE)
def test_overlay(tmp_path: Path, ending: str, turn: str) -> None:
    """Read back by others, each block of 8 x 8 lies on its voxel and averages to it."""
    volume = scan(turn)
    sr = enlarged(volume)
    path = tmp_path / f"sr{ending}"
    write_volume(path, sr)
    for read in READERS[ending]:
        array, place = read(path)
        if np.abs(place[0, 0, 0] - sr.origin_mm).max() > 1:  # DICOM is sorted along its normal
            array, place = array[::-1], place[::-1]
        assert np.array_equal(array, sr.array)
        assert np.abs(place - grid_of(sr)).max() < 1e-4
        z, y, x = volume.array.shape
        means = place.reshape(z, y, 8, x, 8, 3).mean((2, 4))
        assert np.abs(means - grid_of(volume)).max() < 1e-4
        blocks = array.reshape(z, y, 8, x, 8).mean((2, 4))
        assert np.array_equal(blocks, volume.array)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ending", [e for e in WRITABLE if e != ".dicom"])
def test_values_that_are_their_own_coordinate(tmp_path: Path, ending: str, axis: int) -> None:
    volume = scan()
    shape = (4, 56, 72)
    sr = finer(volume, placeholder(shape, np.float64))
    sr = sr._replace(array=grid_of(sr)[..., axis])
    path = tmp_path / f"sr{ending}"
    write_volume(path, sr)
    array, place = READERS[ending][0](path)
    assert np.ptp(array) > 4
    assert np.abs(array - place[..., axis]).max() < 1e-4
    means = array.reshape(4, 7, 8, 9, 8).mean((2, 4))
    assert np.abs(means - grid_of(volume)[..., axis]).max() < 1e-4


def test_level_3_lies_on_the_scan(tmp_path: Path) -> None:
    volume = scan(shape=(2, 150, 200))
    sr = enlarged(volume)
    write_volume(tmp_path / "sr.ome.zarr", sr)
    assert pyramid_shapes(sr.array.shape[1:])[3] == (150, 200)
    array, place = by_zarr(tmp_path / "sr.ome.zarr", 3)
    assert np.array_equal(array, volume.array)
    assert np.abs(place - grid_of(volume)).max() < 1e-9


@pytest.mark.parametrize("kind", ["int16", "uint8", "uint16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(257, 256), (16, 600), (511, 1025), (2048, 300)])
def test_pyramid_is_the_mean_of_blocks(kind: str, shape: tuple[int, int]) -> None:
    top = np.iinfo(kind).max if kind[0] in "iu" else 1000
    plane = (seeded(6, "pyramid").random(shape) * top).astype(kind)
    if kind == "int16":
        plane[::3] *= -1
    levels = pyramid(plane)
    assert [level.shape for level in levels] == pyramid_shapes(shape)
    assert max(levels[-1].shape) <= 256 < max(levels[-2].shape)
    for k, level in enumerate(levels):
        height, width = (side >> k for side in shape)  # whole blocks
        whole = plane[: height << k, : width << k].astype(np.float64)
        mean = whole.reshape(height, 1 << k, width, 1 << k).mean((1, 3))
        tolerance = 0.5 + 1e-6 if kind[0] in "iu" else 1e-4
        assert np.abs(level[:height, :width] - mean).max() <= tolerance
        assert level.dtype == plane.dtype


def test_pyramid_at_odd_sides_keeps_a_flat_plane() -> None:
    for shape in [(1, 600), (3, 1001), (777, 2), (2049, 1023)]:
        for level in pyramid(np.full(shape, -731, np.int16)):
            assert (level == -731).all()


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32"])
@pytest.mark.parametrize("ending", [*FILES, ".ome.zarr"])
def test_every_type_in_every_file(tmp_path: Path, ending: str, kind: str) -> None:
    low, high = (-5, 5) if kind == "float32" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = seeded(7, kind).uniform(low, high, (3, 5, 6)).astype(kind)
    path = tmp_path / f"v{ending}"
    write_volume(path, scan()._replace(array=values))
    back = READERS[ending][0](path)[0]
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)
    big = values.astype(values.dtype.newbyteorder(">"))
    write_volume(path, scan()._replace(array=big))
    assert np.array_equal(READERS[ending][0](path)[0], values)


def one_member(path: Path) -> bytes:
    """Unpack a file as browsers do: one gzip member, checked, and nothing behind it."""
    stream = zlib.decompressobj(31)
    plain = stream.decompress(path.read_bytes())
    assert stream.eof
    assert stream.unused_data == b""
    return plain


@pytest.mark.parametrize("kind", ["uint8", "int16", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 70), (5, 7, 9), (3, 1200, 1024)])
def test_packed_nifti_is_one_gzip_member(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """Whatever the sizes, whose bits decide how checksums are joined; the largest are in bands."""
    values = seeded(11, "gzip").integers(0, 250, shape).astype(kind)
    for ending in (".nii", ".nii.gz"):
        write_volume(tmp_path / f"v{ending}", scan()._replace(array=values))
    assert one_member(tmp_path / "v.nii.gz") == (tmp_path / "v.nii").read_bytes()


def test_no_output_is_a_chain_of_members(
    tmp_path: Path, whole: dict[str, dict[str, str]], begun: dict[str, Path]
) -> None:
    """Nor is one that went on where pieces of an earlier version lie."""
    folder = tmp_path / "job"
    shutil.copytree(begun[".nii.gz"], folder)
    pieces = unfinished(folder / "sr.nii.gz") / "sr.nii.gz.pieces"
    pieces.mkdir(exist_ok=True)
    for z in range(SLICES):
        (pieces / f"{z:06d}.gz").write_bytes(gzip.compress(plane(z).tobytes(), 1, mtime=0))
    (unfinished(folder / "sr.nii.gz") / "done-earlier.jsonl").write_text(
        "".join(f'{{"z": {z}, "facts": {{"z": {z}}}}}\n' for z in range(SLICES))
    )
    assert run(folder, ".nii.gz") is not None
    assert content(folder) == whole[".nii.gz"]
    for file in folder.glob("*.gz"):
        assert len(one_member(file)) > 352


def test_axes_of_ome_zarr_name_sides_where_they_can(tmp_path: Path) -> None:
    """Without what this package says beside it, a reader turns the voxels the right way."""
    for way in ((1.0, 1.0, 1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0)):
        volume = scan()._replace(direction=tuple(np.diag(way).ravel().tolist()))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ome.zarr"
        write_volume(path, volume)
        page = json.loads((path / "zarr.json").read_text())
        del page["attributes"]["mmsr"]
        (path / "zarr.json").write_text(json.dumps(page))
        theirs = read_volume(path, modality="clinical")
        assert theirs.direction == volume.direction
        assert np.array_equal(theirs.array, volume.array)
    for other in (scan(), scan("upright")._replace(modality="micro")):  # oblique; no patient
        write_volume(tmp_path / "other.ome.zarr", other)
        assert "orientation" not in (tmp_path / "other.ome.zarr" / "zarr.json").read_text()


# ---------------------------------------------------------------- DICOM


def test_dicom_says_what_it_is(tmp_path: Path) -> None:
    source = DicomSource(
        "1.2.3", tuple(("1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{z}", z % 2) for z in range(4))
    )
    write_volume(tmp_path / "sr.dicom", enlarged(scan())._replace(source=source))
    files = sorted((tmp_path / "sr.dicom").iterdir())
    slices = [pydicom.dcmread(file) for file in files]
    assert [file.suffix for file in files] == [".dcm"] * 4
    for z, data in enumerate(slices):
        assert list(data.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
        assert data.FrameOfReferenceUID == "1.2.3"
        (item,) = data.SourceImageSequence
        assert item.ReferencedSOPInstanceUID == f"1.2.3.{z}"
        assert item.get("ReferencedFrameNumber") == (1 if z % 2 else None)
        assert data.SeriesDescription == "AI super-resolution 8x, research only"
        assert RESEARCH_ONLY in data.DerivationDescription
        assert data.BurnedInAnnotation == "NO"
        assert data.PatientIdentityRemoved == "YES"
        for empty in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "AccessionNumber",
            "StudyDate",
        ):
            assert not data[empty].value
        for element in data.iterall():
            if element.VR == "UI":
                assert pydicom.uid.UID(element.value).is_valid
            if element.VR == "DS":
                assert all(
                    len(str(v)) <= 16 for v in np.atleast_1d(np.array(element.value, object))
                )
    assert len({data.SOPInstanceUID for data in slices}) == 4
    assert len({data.SeriesInstanceUID for data in slices}) == 1
    write_volume(tmp_path / "again.dicom", enlarged(scan()))
    again = pydicom.dcmread(sorted((tmp_path / "again.dicom").iterdir())[0])
    assert again.SOPInstanceUID != slices[0].SOPInstanceUID  # another object, another name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("unit", ["HU", "grey"])
def test_dciodvfy_finds_no_error(tmp_path: Path, unit: str) -> None:
    source = DicomSource(
        "1.2.3", tuple((pydicom.uid.CTImageStorage, f"1.2.3.{z}", 0) for z in range(4))
    )
    write_volume(tmp_path / "sr.dicom", enlarged(scan())._replace(source=source, unit=unit))
    for file in (tmp_path / "sr.dicom").iterdir():
        said = subprocess.run(["dciodvfy", file], capture_output=True, text=True).stderr
        assert "CTImage" in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []


# Of the modules of a CT image (DICOM PS3.3, table A.3-1): what has a value, and what is there.
TYPE_1 = """StudyInstanceUID Modality SeriesInstanceUID FrameOfReferenceUID ImagePositionPatient
ImageOrientationPatient PixelSpacing SamplesPerPixel PhotometricInterpretation Rows Columns
BitsAllocated BitsStored HighBit PixelRepresentation ImageType RescaleIntercept RescaleSlope
SOPClassUID SOPInstanceUID PixelData RescaleType DeidentificationMethod"""
TYPE_2 = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber
ReferringPhysicianName StudyID SeriesNumber PositionReferenceIndicator Manufacturer InstanceNumber
SliceThickness KVP AcquisitionNumber PatientPosition"""


@pytest.mark.parametrize("unit", ["HU", "grey"])
def test_dicom_has_what_a_ct_image_must_have(tmp_path: Path, unit: str) -> None:
    write_volume(tmp_path / "v.dicom", scan()._replace(unit=unit))
    for file in (tmp_path / "v.dicom").iterdir():
        data = pydicom.dcmread(file)
        assert [name for name in TYPE_1.split() if data.get(name) in (None, "")] == []
        assert [name for name in TYPE_2.split() if name not in data] == []
        assert data.RescaleType == {"HU": "HU", "grey": "US"}[unit]
        assert ("WindowCenter" in data) == (unit == "HU")
        assert data.SeriesDescription == "mmsr"  # nothing was super-resolved here
        assert (data.pixel_array.dtype, data.file_meta.TransferSyntaxUID) == (
            np.int16,
            pydicom.uid.ExplicitVRLittleEndian,
        )


def test_notes_stay_at_home(tmp_path: Path) -> None:
    """Notes may hold the names of files, which may be names of patients."""
    volume = enlarged(scan())._replace(notes=("Doe^Jane: padding", "super-resolved"))
    for ending in WRITABLE:
        write_volume(tmp_path / f"v{ending}", volume)
    export = begin({"sr": Output(tmp_path / "w.dicom", volume)}, {"scan": "0123"})
    export.write(0, {"sr": volume.array[0]}, {})
    export.close()
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    stored.append(gzip.decompress((tmp_path / "v.nii.gz").read_bytes()))
    assert len(stored) > 10
    assert not any(b"Doe" in data for data in stored)
    assert RESEARCH_ONLY.encode() in stored[-1]


# ---------------------------------------------------------------- refusals


def refused(kind: type[MMSRError], match: str, call: object, *args: object, **more: object) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(*args, **more)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    volume = scan()
    refused(FileError, "expected an ending of", format_of, tmp_path / "a.png")
    refused(FileError, "expected an ending of", format_of, tmp_path / ".nii.gz")
    refused(FileError, "create", format_of, tmp_path / "gone" / "a.nii")
    assert format_of(tmp_path / "A.NII.GZ").ending == ".nii.gz"
    half = volume._replace(array=volume.array.astype(np.float16))
    refused(RangeError, "float16", check_writable, tmp_path / "a.mha", half)
    grey = volume._replace(array=volume.array.astype(np.float32))
    refused(RangeError, "which holds int16", check_writable, tmp_path / "a.dicom", grey)
    torn = volume._replace(source=DicomSource("1.2", (("1.3", "1.4", 0),)))
    refused(ShapeError, "source for each", check_writable, tmp_path / "a.dicom", torn)
    long = volume._replace(array=placeholder((1, 8, 40000), np.int16))
    refused(ShapeError, "32767", check_writable, tmp_path / "a.nii.gz", long)
    check_writable(tmp_path / "a.mha", long)
    sheared = volume._replace(direction=(1.0, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    refused(GeometryError, "right angles", check_writable, tmp_path / "a.mha", sheared)
    lost = volume._replace(origin_mm=(np.nan, 0.0, 0.0))
    refused(GeometryError, "finite origin", check_writable, tmp_path / "a.mha", lost)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", WRITABLE)
def test_an_earlier_output_is_replaced_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"v{ending}"
    write_volume(path, scan(shape=(6, 7, 9)))
    after = scan()

    def read(first: int, last: int) -> Iterator[np.ndarray]:
        if last == 4 and failing:
            raise FileError("the scan breaks off")
        return iter(after.array[first:last])

    lazy = after._replace(array=SliceReader(after.array.shape, np.dtype(np.int16), read))
    before, failing = content(path), True
    refused(FileError, "breaks off", write_volume, path, lazy)
    assert content(path) == before
    failing = False
    write_volume(path, lazy)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    array = READERS[ending][0](path)[0]
    assert sorted(array[:, 0, 0]) == sorted(after.array[:, 0, 0])


@pytest.mark.parametrize("ending", WRITABLE)
def test_disk_needed_is_enough(tmp_path: Path, ending: str) -> None:
    noise = seeded(8, "noise").integers(-32768, 32767, (3, 600, 700)).astype(np.int16)
    writer = open_writer(tmp_path / f"v{ending}", scan()._replace(array=noise))
    for z, one in enumerate(noise):
        writer.put(z, one)
    writer.join()
    used = sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*"))
    assert used <= disk_needed(tmp_path / f"v{ending}", noise.shape, np.int16) < 3 * used
    assert free_space(tmp_path / "v.mha") > 0


# ---------------------------------------------------------------- jobs that are interrupted


def content(path: Path) -> dict[str, str]:
    """Hash every file of an output."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each format a job that has begun, so that copies of it have one identity."""
    folders = {}
    for ending in WRITABLE:
        folders[ending] = tmp_path_factory.mktemp("begun") / "job"
        folders[ending].mkdir()
        begin(outputs(folders[ending], ending), {"scan": "abc"}).close()
    return folders


@pytest.fixture(scope="module")
def whole(
    begun: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """For each format, what an uninterrupted job leaves."""
    left = {}
    for ending in WRITABLE:
        folder = tmp_path_factory.mktemp("whole") / "job"
        shutil.copytree(begun[ending], folder)
        assert run(folder, ending) == [{"z": z} for z in range(SLICES)]
        assert sorted(p.name for p in folder.iterdir()) == ["map.nii.gz", f"sr{ending}"]
        left[ending] = content(folder)
    return left


def is_finished(outputs: dict[str, Output], job: dict[str, str]) -> bool:
    return output_plan.is_finished(plan_outputs(outputs, job))


def child(
    folder: Path, ending: str, part: tuple[int, int] = (1, 1), pause_s: float = 0.0
) -> subprocess.Popen[str]:
    """Start the job in a process of its own, which waits for `go`."""
    script = Path(__file__).with_name("export_job.py")
    process = subprocess.Popen(
        [sys.executable, script, folder, ending, *map(str, part), str(pause_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.slow
@posix
def test_kill_9_at_random_moments(
    tmp_path: Path, begun: dict[str, Path], whole: dict[str, dict[str, str]]
) -> None:
    """After a kill at any moment the same call completes the job, byte for byte."""
    cut = 0
    for kill in range(KILLS):
        ending = WRITABLE[kill % len(WRITABLE)]
        folder = tmp_path / str(kill)
        shutil.copytree(begun[ending], folder)
        process = child(folder, ending, pause_s=0.03)
        go(process)
        time.sleep(seeded(kill, "kill").uniform(0.0, 0.4))
        process.kill()  # SIGKILL
        process.communicate()
        cut += process.returncode != 0
        if unfinished(folder / f"sr{ending}").exists():
            run(folder, ending)
        assert content(folder) == whole[ending], f"kill {kill}: {ending}"
    assert cut > 0  # else nothing was tried


STEPS = ("replace", "link", "unlink", "rmdir", "mkdir", "fsync", "open")


@pytest.mark.slow
@posix
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("ending", [".nrrd", ".nii.gz", ".dicom"])
def test_a_kill_before_every_single_step(
    tmp_path: Path, begun: dict[str, Path], whole: dict[str, dict[str, str]], ending: str
) -> None:
    """Die before each call that changes a folder, one after the other; then go on."""
    shutil.copytree(begun[ending], tmp_path / "count")
    steps = die_at(10**9, tmp_path / "count", ending)
    assert steps > 40
    every, ends = (9, 18) if "MMSR_SLOW" in os.environ else (23, 8)
    for step in sorted({*range(4), *range(0, steps, every), *range(steps - ends, steps)}):
        folder = tmp_path / str(step)
        shutil.copytree(begun[ending], folder)
        assert die_at(step, folder, ending) == -1
        if unfinished(folder / f"sr{ending}").exists():
            if any(unfinished(folder / f"sr{ending}").iterdir()):
                run(folder, ending)
            else:  # all but the removal of an empty folder is done
                assert is_finished(outputs(folder, ending), JOB)
        assert content(folder) == whole[ending], f"step {step} of {steps}"


def die_at(step: int, folder: Path, ending: str) -> int:
    """Run the job in a forked process that ends without a word before one of its steps.

    Returns how many steps there were, or −1 if it died.
    """
    count, (reading, writing) = 0, os.pipe()

    def counted(call):  # type: ignore[no-untyped-def]
        def replaced(*args, **more):  # type: ignore[no-untyped-def]
            nonlocal count
            if count == step:
                os._exit(9)
            count += 1
            return call(*args, **more)

        return replaced

    if not (pid := os.fork()):
        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            run(folder, ending)
            os.write(writing, str(count).encode())
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        steps = said.read()
    os.waitpid(pid, 0)
    return int(steps) if steps else -1


@pytest.mark.slow
@posix
@pytest.mark.parametrize("ending", [".ome.zarr", ".nii.gz"])
def test_three_processes_at_once(
    tmp_path: Path, begun: dict[str, Path], whole: dict[str, dict[str, str]], ending: str
) -> None:
    folder = tmp_path / "job"
    shutil.copytree(begun[ending], folder)
    processes = [child(folder, ending, (i, 3)) for i in (1, 2, 3)]
    for process in processes:
        go(process)
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert set(said) <= {"none", str(SLICES)}
    assert str(SLICES) in said  # the last one joined them
    assert content(folder) == whole[ending]


@pytest.mark.slow
@posix
def test_two_processes_at_the_same_slices(tmp_path: Path) -> None:
    holder = child(tmp_path, ".mha", (2, 3), 30.0)
    go(holder)
    while not list(unfinished(tmp_path / "sr.mha").glob("done-*")):
        time.sleep(0.01)
    with begin(outputs(tmp_path, ".mha"), {"scan": "abc"}) as export:
        assert export.missing((1, 3)) == [0, 1, 2]
        assert export.missing((3, 3)) == [6, 7, 8]
        for part in ((2, 3), (1, 1), (1, 2)):
            refused(FileError, "another process", export.missing, part)
    other = {"scan": "other"}
    refused(
        FileError,
        "another process",
        begin,
        outputs(tmp_path, ".mha"),
        other,
        overwrite=True,
    )
    holder.kill()
    holder.communicate()
    assert run(tmp_path, ".mha") is not None


def test_shares_are_all_slices_once() -> None:
    for slices in (1, 2, 7, 500):
        for n in (1, 2, 3, 16):
            parts = [share((i, n), slices) for i in range(1, n + 1)]
            assert [z for part in parts for z in part] == list(range(slices))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ((0, 3), (4, 3), (1, 0)):
        refused(SettingsError, "1 <= i <= n", share, wrong, 10)


def test_torn_journal(tmp_path: Path, whole: dict[str, dict[str, str]]) -> None:
    with begin(outputs(tmp_path, ".mha"), {"scan": "abc"}) as export:
        fill(export, (1, 3))
    (journal,) = unfinished(tmp_path / "sr.mha").glob("done-*.jsonl")
    text = journal.read_text()
    for keep in range(len(text)):
        journal.write_text(text[:keep])
        stored = text[:keep].count("\n")
        assert len(begin(outputs(tmp_path, ".mha"), {"scan": "abc"}).missing()) == SLICES - stored
    journal.write_bytes(
        text.encode() + b'[]\n\x00\x00\n{"z": 8}\n\xff\n'
    )  # damaged by something else
    assert len(begin(outputs(tmp_path, ".mha"), {"scan": "abc"}).missing()) == SLICES - text.count(
        "\n"
    )
    assert run(tmp_path, ".mha") is not None
    assert content(tmp_path) == whole[".mha"]


def test_slices_in_any_order_and_again(tmp_path: Path, whole: dict[str, dict[str, str]]) -> None:
    with begin(outputs(tmp_path, ".ome.zarr"), {"scan": "abc"}, sync=True) as export:
        for z in (8, 0, 3, 8, 2, 1, 3, 4, 5, 6, 7, 0):
            one = plane(z)
            export.write(z, {"sr": one, "map": one[::10, ::10].astype(np.float32)}, {"z": z})
        assert export.finish() == [{"z": z} for z in range(SLICES)]
    assert content(tmp_path) == whole[".ome.zarr"]


def test_jobs_that_are_not_the_same(tmp_path: Path) -> None:
    with begin(outputs(tmp_path, ".mha"), {"scan": "abc", "weights": "w1"}) as export:
        fill(export, (1, 2))
        assert export.finish() is None
    assert not (tmp_path / "sr.mha").exists()
    before = content(tmp_path)
    for job, text in {
        "w2": "weights: w1 there, w2 here",
        None: "weights: w1 there, nothing",
    }.items():
        other = {"scan": "abc"} | ({"weights": job} if job else {})
        refused(FileError, text, begin, outputs(tmp_path, ".mha"), other)
    wider = outputs(tmp_path, ".mha")
    wider["sr"] = Output(wider["sr"].path, wider["sr"].volume._replace(spacing_mm=(2.5, 0.1, 0.1)))
    refused(FileError, "sr.grid", begin, wider, {"scan": "abc", "weights": "w1"})
    assert content(tmp_path) == before
    with begin(outputs(tmp_path, ".mha"), {"scan": "abc"}, overwrite=True) as export:
        assert len(export.missing()) == SLICES  # nothing of the other job is taken over
    shutil.rmtree(unfinished(tmp_path / "map.nii.gz"))
    with begin(outputs(tmp_path, ".mha"), {"scan": "abc"}) as export:
        fill(export)
    shutil.rmtree(unfinished(tmp_path / "map.nii.gz"))
    refused(FileError, "map.nii.gz.unfinished is gone", run, tmp_path, ".mha")
    one = outputs(tmp_path, ".mha")
    with begin({"map": one["map"]}, {"scan": "x"}) as export:
        assert len(export.missing()) == SLICES
    refused(FileError, "belongs to another", begin, one, {"scan": "abc"})


@pytest.mark.parametrize("ending", WRITABLE)
def test_what_is_finished_knows_its_job(tmp_path: Path, ending: str) -> None:
    made = outputs(tmp_path, ending)
    assert not is_finished(made, JOB)
    with begin(made, JOB) as export:
        fill(export)
        assert not is_finished(made, JOB)
        assert export.finish() is not None
    assert is_finished(made, JOB)
    assert not is_finished(made, {"scan": "other"})
    for reader in READERS[ending]:  # nobody minds the word
        assert reader(made["sr"].path)[0].shape == (SLICES, 300, 280)
    (tmp_path / f"link{ending}").symlink_to(made["sr"].path.name)  # another name of the same
    assert is_finished(made | {"sr": made["sr"]._replace(path=tmp_path / f"link{ending}")}, JOB)
    cited = made["sr"].volume._replace(source=DicomSource("1.2", (("1.3", "1.4", 0),) * SLICES))
    assert not is_finished(made | {"sr": made["sr"]._replace(volume=cited)}, JOB)
    for file in sorted(p for p in tmp_path.rglob("*") if p.is_file() and "link" not in p.name):
        if file.name != "zarr.json":  # cut short, or gone
            held = file.read_bytes()
            file.write_bytes(held[: 0 if ending == ".ome.zarr" else len(held) - 10])
            assert not is_finished(made, JOB), file
            file.unlink()
            assert not is_finished(made, JOB), file
            file.write_bytes(held)
    assert is_finished(made, JOB)
    write_volume(made["map"].path, scan())  # one of them is somebody else's
    assert not is_finished(made, JOB)
    made["map"].path.write_bytes(b"\x1f\x8bnothing")
    assert not is_finished(made, JOB)


RECORD = {"uid": "x", "plan": [], "created": None, "facts": [], "plan.slices": "nine"}


@pytest.mark.parametrize("field", RECORD)
def test_a_record_changed_by_hand_is_one_line(tmp_path: Path, field: str) -> None:
    with begin(outputs(tmp_path, ".mha"), JOB) as export:
        fill(export, (1, 3))
    path = unfinished(tmp_path / "sr.mha") / "job.json"
    whole = json.loads(path.read_text())
    wrong = whole | {field: RECORD[field]}
    if "." in field:
        wrong = whole | {"plan": whole["plan"] | {"slices": RECORD[field]}}
    for record in (wrong, {k: v for k, v in whole.items() if k != field}):
        if record != whole:
            path.write_text(json.dumps(record))
            before = content(tmp_path)
            refused(FileError, "by hand; remove it", run, tmp_path, ".mha")
            assert content(tmp_path) == before
    path.write_text(json.dumps(whole))
    assert run(tmp_path, ".mha") is not None


def test_what_exists_is_not_replaced_by_accident(tmp_path: Path) -> None:
    (tmp_path / "map.nii.gz").write_bytes(b"precious")
    refused(FileError, "exists already", run, tmp_path, ".dicom")
    (tmp_path / "map.nii.gz").unlink()
    (tmp_path / "sr.dicom").mkdir()
    (tmp_path / "sr.dicom" / "old").write_bytes(b"old")
    refused(FileError, "exists already", run, tmp_path, ".dicom")
    assert [p.name for p in tmp_path.iterdir()] == ["sr.dicom"]
    made = outputs(tmp_path, ".dicom")
    refused(FileError, "other things in it", begin, made, {}, overwrite=True)
    (tmp_path / "sr.dicom" / "old").unlink()
    write_volume(tmp_path / "sr.dicom", scan())
    before = (tmp_path / "sr.dicom" / "000001.dcm").read_bytes()
    with begin(made, {"scan": "abc"}, overwrite=True) as export:
        fill(export)  # the earlier one stays until the new one is whole
        assert (tmp_path / "sr.dicom" / "000001.dcm").read_bytes() == before
        assert export.finish() is not None
    assert len(list((tmp_path / "sr.dicom").iterdir())) == SLICES
    stranger = unfinished(tmp_path / "v.mha")
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    lone = {"sr": Output(tmp_path / "v.mha", scan())}
    refused(FileError, "something else", begin, lone, {}, overwrite=True)
    assert (stranger / "thesis.txt").exists()


def test_wrong_slices_are_refused(tmp_path: Path) -> None:
    with begin(outputs(tmp_path, ".mha"), {}) as export:
        good = {"sr": plane(0), "map": np.zeros((30, 28), np.float32)}
        refused(RangeError, "expected 0 to 8", export.write, SLICES, good, {})
        refused(ShapeError, "planes of sr, map", export.write, 0, {"sr": plane(0)}, {})
        export.write(0, good | {"map": np.zeros((30, 28))}, {})
        refused(ShapeError, "float32", export.close)
    assert export.journal.read() == {}  # a slice that was not stored is not said to be
    many = outputs(tmp_path, ".nrrd")
    many["map"] = Output(many["map"].path, scan())
    refused(ShapeError, "same number", begin, many, {})


# ---------------------------------------------------------------- disk and memory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, unmounted afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as e:
        pytest.skip(f"no small disk to fill: {e}")
    if made.returncode:
        pytest.skip(f"no small disk to fill: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("ending", WRITABLE)
def test_full_disk(
    small_disk: Path, begun: dict[str, Path], whole: dict[str, dict[str, str]], ending: str
) -> None:
    """One line; what is stored stays; with more room the same call goes on."""
    shutil.copytree(begun[ending], small_disk, dirs_exist_ok=True)
    refused(ResourceError, "disk is full; free some space and run again", run, small_disk, ending)
    assert not (small_disk / f"sr{ending}").exists()
    with begin(outputs(small_disk, ending), {"scan": "abc"}) as export:
        stored = len(export.journal.read())
        assert 0 < stored < SLICES
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert run(small_disk, ending) is not None
    assert content(small_disk) == whole[ending]


@pytest.mark.slow
@pytest.mark.parametrize("ending", WRITABLE)
def test_full_disk_leaves_the_earlier_volume(small_disk: Path, ending: str) -> None:
    path = small_disk / f"v{ending}"
    write_volume(path, scan())
    before = content(path)
    noise = seeded(9, "full").integers(-1000, 1000, (20, 256, 256)).astype(np.int16)
    refused(ResourceError, "disk is full", write_volume, path, scan()._replace(array=noise))
    assert content(path) == before
    assert [p.name for p in small_disk.iterdir()] == [path.name]


MEMORY = (
    PEAK_BYTES
    + f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import json, shutil
from export_job import *
peaks = []
plane = np.arange(160 * 160, dtype=np.int16).reshape(160, 160)
for slices in (10, 100, 1000):
    path = Path(sys.argv[1]) / f"{{slices}}{{sys.argv[2]}}"
    volume = Volume(placeholder((slices, 160, 160), np.int16), (2.0, 0.07, 0.07))
    with begin({{"sr": Output(path, volume)}}, {{}}) as export:
        for z in export.missing():
            export.write(z, {{"sr": plane + np.int16(z)}}, {{"clipped": z}})
        export.finish()
    shutil.rmtree(path, ignore_errors=True)
    peaks.append(peak_bytes())
print(json.dumps(peaks))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".mha", ".nii.gz", ".ome.zarr"])
def test_memory_does_not_grow_with_the_slices(tmp_path: Path, ending: str) -> None:
    """1000 slices are 51 MB: kept, they would show."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), ending],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ten, hundred, thousand = json.loads(done.stdout.splitlines()[-1])
    assert ten > 20e6
    assert hundred < 1.1 * ten
    assert thousand < 1.1 * ten


@pytest.mark.skipif("MMSR_REAL_DATA" not in os.environ, reason="MMSR_REAL_DATA: no real scan")
def test_a_real_scan_in_every_format(tmp_path: Path) -> None:
    """Slices of a real series, enlarged, read back and laid over their source."""
    folder = Path(os.environ["MMSR_REAL_DATA"], "nlst_chest_dicom")
    volume = read_volume(folder, slices=(70, 72))
    part = volume._replace(array=volume.array[:, 200:260, 100:180])
    x, y, z = map(float, volume.world_mm((0, 200, 100)))
    part = part._replace(origin_mm=(x, y, z))
    sr = finer(part, np.repeat(np.repeat(part.array, 8, 1), 8, 2))
    uid = pydicom.dcmread(next(folder.iterdir()), stop_before_pixels=True)
    for ending in WRITABLE:
        write_volume(tmp_path / f"sr{ending}", sr)
        array, place = READERS[ending][0](tmp_path / f"sr{ending}")
        assert np.array_equal(array, sr.array)
        means = place.reshape(2, 60, 8, 80, 8, 3).mean((2, 4))
        assert np.abs(means - grid_of(part)).max() < 1e-4
    derived = [pydicom.dcmread(file) for file in sorted((tmp_path / "sr.dicom").iterdir())]
    for data in derived:
        assert data.FrameOfReferenceUID == uid.FrameOfReferenceUID
        assert data.StudyInstanceUID != uid.StudyInstanceUID
        (item,) = data.SourceImageSequence
        assert item.ReferencedSOPClassUID == uid.SOPClassUID
    for path in tmp_path.rglob("*"):
        stored = path.read_bytes() if path.is_file() else b""
        assert str(uid.PatientID).encode() not in stored
