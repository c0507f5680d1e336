"""Files of every format are read as their own libraries read them, or refused in one line."""

import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import zarr
from dicom_maker import chest, series
from peak import PEAK_BYTES

import mmsr.scans.read
from mmsr.core import (
    FileError,
    GeometryError,
    MMSRError,
    RangeError,
    ResourceError,
    SettingsError,
    ShapeError,
)
from mmsr.data.volume import Volume
from mmsr.scans.read import read_volume
from mmsr.scans.scan_summary import info_picture, info_text, scan_info
from mmsr.scans.write import WRITABLE, write_volume

REAL = Path(os.environ.get("MMSR_REAL_DATA", "/nowhere"))
real = pytest.mark.skipif(
    not (REAL / "nlst_chest_dicom").is_dir(), reason="MMSR_REAL_DATA does not name the real scans"
)
MICRO = {"modality": "micro", "voxel_um": 50}


def turn(rng):
    """Make a random rotation, by chance mirrored."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


def saved(
    path, hu, *, direction=None, spacing=(0.6, 0.5, 2.5), origin=(-150.7, -160.9, 928.1), **how
):
    """Write with SimpleITK."""
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.ravel(direction))
    sitk.WriteImage(image, str(path), **how)
    return path


def line_of(path, **options):
    """Return the line that refuses a scan, or None; anything else than a good line is an error."""
    line = None
    try:
        scan = read_volume(path, **options)
    except MMSRError as e:
        line = str(e)
    if line is None:
        assert np.asarray(scan.array).size
        return None
    assert "\n" not in line
    assert str(path.parent) not in line
    return line


# ---------------------------------------------------------------- against their own libraries


def corners(shape):
    """Return the indices of the eight corners, z y x."""
    return np.array(list(itertools.product(*[(0, n - 1) for n in shape])))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("way", ["sform", "qform", "nifti2", "pair", "big-endian"])
def test_nifti_lies_where_nibabel_puts_it(tmp_path, seed, way):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = turn(rng) * rng.uniform(0.3, 3, 3)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    hu = chest(4, 12, 16, seed)
    kind = {"nifti2": nibabel.Nifti2Image, "pair": nibabel.Nifti1Pair}.get(way, nibabel.Nifti1Image)
    image = kind(hu.T, None if way == "big-endian" else affine)
    if way == "big-endian":
        head = image.header.as_byteswapped(">")
        image = nibabel.Nifti1Image(hu.T.astype(">i2"), affine, head)
    image.set_sform(affine, 0 if way == "qform" else 1)
    image.set_qform(affine, 1 if way == "qform" else 0)
    path = tmp_path / ("v.hdr" if way == "pair" else "v.nii")
    nibabel.save(image, path)
    if way == "big-endian":
        assert path.read_bytes()[:4] == b"\0\0\x01\x5c"
    scan = read_volume(path, force=True)  # small voxels, slices that are not axial
    ras = nibabel.affines.apply_affine(nibabel.load(path).affine, corners(hu.shape)[:, ::-1])
    assert scan.world_mm(corners(hu.shape)) == pytest.approx(ras * (-1, -1, 1), abs=1e-3)
    assert np.array_equal(scan.array, hu)
    if way == "pair":
        assert np.array_equal(read_volume(tmp_path / "v.img", force=True).array, hu)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize("seed", range(6))
def test_nrrd_and_metaimage_lie_where_simpleitk_puts_them(tmp_path, seed, ending):
    rng = np.random.default_rng(seed)
    hu = chest(5, 8, 12, seed)
    place = {"spacing": tuple(rng.uniform(0.3, 3, 3)), "origin": tuple(rng.uniform(-300, 300, 3))}
    path = saved(tmp_path / f"v{ending}", hu, direction=turn(rng), **place)
    image, scan = sitk.ReadImage(str(path)), read_volume(path, force=True)  # not axial
    theirs = [image.TransformIndexToPhysicalPoint(c[::-1].tolist()) for c in corners(hu.shape)]
    assert scan.world_mm(corners(hu.shape)) == pytest.approx(np.array(theirs), abs=1e-9)
    assert np.array_equal(scan.array, hu)


NRRD = """NRRD0004
type: {type}
dimension: 3
space: {space}
sizes: 12 8 5
space directions: (0.6,0.1,0) (-0.1,0.6,0) (0,0,2.5)
kinds: domain domain domain
endian: {endian}
encoding: {encoding}
space origin: (10,-20,30)

"""


@pytest.mark.parametrize(
    "space", ["left-posterior-superior", "right-anterior-superior", "LAS", "RAS"]
)
@pytest.mark.parametrize(
    "kind", ["short", "signed short int", "int16_t", "int32_t", "long long int", "float"]
)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_nrrd_words_mean_what_they_mean_to_simpleitk(tmp_path, space, kind, endian):
    dtype = {"int32_t": "i4", "long long int": "i8", "float": "f4"}.get(kind, "i2")
    hu, order = chest(5, 8, 12), "<" if endian == "little" else ">"
    data = hu.astype(order + dtype).tobytes()
    for encoding in ("raw", "gzip"):
        head = NRRD.format(type=kind, space=space, endian=endian, encoding=encoding)
        path = tmp_path / f"{encoding}.nrrd"
        path.write_bytes(head.encode() + (data if encoding == "raw" else gzip.compress(data)))
        image, scan = sitk.ReadImage(str(path)), read_volume(path)
        theirs = [image.TransformIndexToPhysicalPoint(c[::-1].tolist()) for c in corners(hu.shape)]
        assert scan.world_mm(corners(hu.shape)) == pytest.approx(np.array(theirs), abs=1e-9)
        assert np.array_equal(scan.array, hu)


@pytest.mark.parametrize(
    ("slope", "inter"), [(1, 0), (1, -1024), (0.5, -1024), (0, 0), (np.nan, 0)]
)
@pytest.mark.parametrize("dtype", ["i2", "u1", "f4", "f8"])
def test_stored_numbers_are_rescaled_as_simpleitk_does(tmp_path, slope, inter, dtype):
    stored = np.random.default_rng(0).integers(0, 250, (4, 5, 6)).astype(dtype)
    image = nibabel.Nifti1Image(stored.T, np.diag([-0.05, -0.05, 0.05, 1]))
    nibabel.save(image, tmp_path / "v.nii")
    data = bytearray((tmp_path / "v.nii").read_bytes())
    data[112:120] = np.array([slope, inter], "<f4").tobytes()
    (tmp_path / "v.nii").write_bytes(data)
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "v.nii")))
    ours = read_volume(tmp_path / "v.nii", modality="micro")
    if np.isnan(slope):  # nibabel's way to say none
        theirs = np.asarray(nibabel.load(tmp_path / "v.nii").dataobj).T
    assert np.array_equal(ours.array, theirs)
    data[112:120] = np.array([0, 7], "<f4").tobytes()  # SimpleITK adds the 7, nibabel does not
    (tmp_path / "v.nii").write_bytes(data)
    assert "intercept of 7" in line_of(tmp_path / "v.nii", modality="micro")


def test_a_sheared_volume_is_resampled_when_asked(tmp_path):
    zz, yy, xx = np.mgrid[:24, :64, :64]
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[1, 2] = 0.9  # each slice moved 0.9 mm to the front
    moved = 0.9 * zz  # so what is upright in the world moves back in the slices
    way = np.hypot(yy - 20 - moved, xx - 32)
    hu = (-1000 + 1040 * np.exp(-((way / 6) ** 2) / 2)).round().astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu.T, affine), tmp_path / "v.nii.gz")
    line = line_of(tmp_path / "v.nii.gz")
    assert "--resample" in line
    scan = read_volume(tmp_path / "v.nii.gz", resample=True)
    assert any("sheared" in note for note in scan.notes)
    rows, columns = np.mgrid[: scan.array.shape[1], : scan.array.shape[2]]
    centres = []
    for k, plane in enumerate(scan.array.astype(float) + 1000):
        y, x = (float((plane * w).sum() / plane.sum()) for w in (rows, columns))
        centres.append(scan.world_mm((k, y, x)))
    assert np.ptp(centres, axis=0)[:2].max() < 0.1  # the rod stands upright again
    ras = nibabel.affines.apply_affine(affine, (32, 20, 0)) * (-1, -1, 1)
    assert centres[0] == pytest.approx(ras, abs=0.1)
    lazy = read_volume(tmp_path / "v.nii.gz", resample=True, lazy=True)
    assert np.array_equal(np.asarray(lazy.array), scan.array)


# ---------------------------------------------------------------- hostile files


def mutants(data, header, rng, count):
    """Yield files cut short, and with bits, bytes or words of the header changed."""
    for k in range(count):
        broken = bytearray(data)
        way = k % 4
        if way == 0:
            broken = broken[: rng.integers(0, len(broken))]
        elif way == 1:
            for at in rng.integers(0, header, rng.integers(1, 6)):
                broken[at] ^= 1 << rng.integers(0, 8)
        elif way == 2:
            for at in rng.integers(0, len(broken), 3):
                broken[at] = rng.integers(0, 256)
        else:
            at = rng.integers(0, header - 8)
            broken[at : at + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        if bytes(broken) != bytes(data):
            yield bytes(broken)


def reference(path):
    """Read with SimpleITK, and with nibabel where it speaks of NIfTI; None where they refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if ".nii" in path.name:
                image = nibabel.load(path)
                return np.asarray(image.dataobj).T.reshape(image.shape[2::-1])
            return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        except Exception:
            return None


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd", "z.mha", "z.nrrd"])
def test_malformed_volumes_are_refused_in_a_line_or_read_as_others_read_them(
    tmp_path, ending, capfd
):
    rng = np.random.default_rng(len(ending))
    path = tmp_path / f"v{ending}"
    hu = chest(6, 20, 24)
    saved(path, hu, useCompression=ending.startswith("z"))
    data = path.read_bytes()
    header = 200 if "nii" in ending else data.index(b"LOCAL" if "mha" in ending else b"\n\n")
    read = refused = 0
    for broken in mutants(data, header, rng, 60):
        path.write_bytes(broken)
        start = time.perf_counter()
        for modality in ("clinical", "micro"):
            options = {"modality": modality, "force": modality == "micro"}
            if line_of(path, **options) is not None:
                refused += 1
                continue
            read += 1
            scan, other = read_volume(path, **options), reference(path)
            if modality == "micro" and other is not None and not np.array_equal(scan.array, hu):
                assert np.array_equal(scan.array, other), "other voxels than another reader"
        assert time.perf_counter() - start < 10
    assert refused > 40
    assert read + refused > 80
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "mmsr" not in out + err


@pytest.mark.parametrize(
    "how", [{}, {"compression": "zlib"}, {"compression": "lzw", "bigtiff": True}, {"imagej": True}]
)
def test_malformed_tiffs_are_refused_in_a_line_or_read_as_others_read_them(tmp_path, how, capfd):
    rng = np.random.default_rng(len(how))
    grey = rng.integers(0, 60000, (5, 20, 24), dtype=np.uint16)
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, grey, **how)
    data = path.read_bytes()
    refused = 0
    for broken in mutants(data, min(600, len(data) - 9), rng, 80):
        path.write_bytes(broken)
        start = time.perf_counter()
        if line_of(path, **MICRO) is not None:
            refused += 1
        else:
            scan = read_volume(path, **MICRO)
            if not np.array_equal(scan.array, grey):
                theirs = tifffile.imread(path).reshape(scan.array.shape)
                white = any("white" in note for note in scan.notes)
                assert np.array_equal(
                    scan.array, np.iinfo(theirs.dtype).max - theirs if white else theirs
                )
        assert time.perf_counter() - start < 10
    assert refused > 20
    assert capfd.readouterr().err == ""


def test_headers_that_promise_too_much_take_no_memory(tmp_path):
    path = saved(tmp_path / "v.mha", chest())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"DimSize = 48 40 6", b"DimSize = 480000 400000 60000"))
    assert "cut short" in line_of(path)
    path = saved(tmp_path / "v.nii.gz", chest())
    plain = bytearray(gzip.decompress(path.read_bytes()))
    plain[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(plain)))
    start = time.perf_counter()
    assert "cut short" in line_of(path)
    bomb = bytes(plain[:352]) + bytes(200_000_000)  # packs to 200 kB, and is longer than promised
    bomb = bytearray(bomb)
    bomb[42:48] = np.array([48, 40, 6], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(bomb), 1))
    assert "longer than its header" in line_of(path)
    assert time.perf_counter() - start < 10


def test_a_header_that_shrinks_the_picture_is_no_sound_scan(tmp_path):
    path = saved(tmp_path / "v.mha", chest())
    path.write_bytes(path.read_bytes().replace(b"DimSize = 48 40 6", b"DimSize = 47 40 6"))
    assert "longer than its header" in line_of(path)
    forced = read_volume(path, force=True)
    assert any("longer than its header" in note for note in forced.notes)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("BinaryData = False", "binary"),
        ("ElementType = MET_WRONG", "element type"),
        ("BinaryDataByteOrderMSB = maybe", "byte order"),
        ("NDims = 2", "understood"),
        ("ElementDataFile = /etc/passwd", "beside it"),
        ("ElementSpacing = nan 1 1", "positive"),
        ("ElementSpacing = -0.6 1 1", "positive"),
        ("Offset = inf 0 0", "origin"),
        ("TransformMatrix = 1 0 0 0 nan 0 0 0 1", "right angles"),
        ("TransformMatrix = 1 0 0 0 1 0", "understood"),
        ("DimSize = 48 40", "understood"),
        ("DimSize = 48 -40 -6", "size"),
        ("DimSize = 48 40 6\nDimSize = 40 48 6", "twice"),
    ],
)
def test_metaimage_headers_that_are_wrong(tmp_path, line, word):
    path = saved(tmp_path / "v.mha", chest())
    data = path.read_bytes()
    field = line.split(" ")[0].encode() + rb" = [^\n]*"
    broken, count = re.subn(field, line.encode(), data)
    assert count == 1
    path.write_bytes(broken)
    assert word in line_of(path)


# ---------------------------------------------------------------- lazily


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", [".nii.gz", ".nii", ".mha", "z.nrrd", ".tif", "lzw.tif", ".ome.zarr"]
)
def test_memory_is_that_of_a_slice_whatever_the_depth(tmp_path, ending):
    options = MICRO if "tif" in ending else {}
    for count in (10, 100):
        path, hu = tmp_path / f"{count}{ending}", chest(count, 256, 256)
        if "tif" in ending:
            packing = "lzw" if "lzw" in ending else None
            tifffile.imwrite(path, (hu + 1024).astype(np.uint16), compression=packing)
        elif "zarr" in ending:
            write_volume(path, Volume(hu, (2.0, 0.6, 0.6)))
        else:
            saved(path, hu, useCompression="z" in ending)
    code = f"""{PEAK_BYTES}
from mmsr.scans.read import read_volume
for count in (10, 100):
    v = read_volume(f"{tmp_path}/{{count}}{ending}", lazy=True, **{options!r})
    assert sum(int(v.array[z].sum()) for z in range(count))
    print(peak_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=120
    )
    few, many = map(int, done.stdout.split())
    assert many < 1.1 * few
    assert few > 20e6, "nothing was measured"


def test_slices_may_be_asked_for_in_any_order_by_several_threads(tmp_path):
    hu = chest(24, 64, 64)
    grey = (hu + 1024).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", grey, compression="zlib")
    tifffile.imwrite(tmp_path / "b.tif", grey, imagej=True)
    saved(tmp_path / "c.nii.gz", hu)
    for name, truth in (("a.tif", grey), ("b.tif", grey), ("c.nii.gz", hu)):
        array = read_volume(tmp_path / name, **(MICRO if "tif" in name else {}), lazy=True).array
        wrong = []

        def look(seed, array=array, truth=truth, wrong=wrong):
            for z in np.random.default_rng(seed).permutation(len(truth)).tolist() * 3:
                if not np.array_equal(array[z], truth[z]):
                    wrong.append(z)

        threads = [threading.Thread(target=look, args=(s,)) for s in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_unpacking_leaves_nothing_and_says_when_there_is_no_room(tmp_path, monkeypatch):
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    path = saved(tmp_path / "v.nii.gz", chest())
    scan = read_volume(path, lazy=True)
    assert scan.array[3].shape == (40, 48)
    assert list(room.iterdir()) == []  # it has no name while it is open, either
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    assert "cut short" in line_of(path)
    assert list(room.iterdir()) == []
    path.write_bytes(data)
    usage = shutil.disk_usage(room)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="TMPDIR"):
        read_volume(path)


@pytest.mark.slow
def test_a_full_disk_while_unpacking_is_one_line(tmp_path):
    path = saved(tmp_path / "v.nii.gz", chest(20, 128, 128))
    code = f"""
import resource, signal, sys
from mmsr.core import ResourceError, FileError
from mmsr.scans.read import read_volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    read_volume({str(path)!r})
except (ResourceError, FileError) as e:
    sys.exit(0 if "\\n" not in str(e) else 3)
sys.exit(4)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_more_than_the_memory_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    path = saved(tmp_path / "v.mha", chest())
    monkeypatch.setattr("mmsr.core.available_memory", lambda: 10_000)
    with pytest.raises(ResourceError, match="lazy=True"):
        read_volume(path)
    assert np.array_equal(np.asarray(read_volume(path, lazy=True).array), chest())
    assert np.array_equal(read_volume(path, slices=(1, 3)).array, chest()[1:3])


# ---------------------------------------------------------------- TIFF


@pytest.mark.slow
@pytest.mark.parametrize("how", ["imagej", "bigtiff"])
def test_stacks_of_more_than_four_gigabytes(tmp_path, how):
    shape, marks = (2200, 1024, 1024), {0: 11, 1100: 22, 2150: 33, 2199: 44}
    path = tmp_path / "large.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "truncating ImageJ file": its way to write such files
        tifffile.imwrite(path, shape=shape, dtype="u2", photometric="minisblack", **{how: True})
    with tifffile.TiffFile(path) as tif:
        start = tif.series[0].dataoffset
        order = tif.byteorder
        if how == "imagej":
            assert len(tif.pages) == 1
    assert start is not None
    with path.open("r+b") as f:
        for z, value in marks.items():
            f.seek(start + (z * 1024 * 1024 + 1024 * 7 + 5) * 2)
            f.write(np.array([value], order + "u2").tobytes())
    assert path.stat().st_size > 4.5e9
    assert path.stat().st_blocks * 512 < 100e6, "the file should be sparse"
    code = f"""{PEAK_BYTES}
from mmsr.scans.read import read_volume
v = read_volume({str(path)!r}, **{MICRO!r}, lazy=True)
assert v.array.shape == {shape}
for z, value in {marks}.items():
    one = v.array[z]
    assert one[7, 5] == value and int(one.astype(int).sum()) == value
print(peak_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=100
    )
    assert int(done.stdout) < 400e6
    with path.open("r+b") as f:
        f.truncate(start + 1000 * 1024 * 1024 * 2)
    with pytest.raises(FileError, match="cut short"):
        read_volume(path, **MICRO, lazy=True)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("micron", 1), ("um", 1), ("\\u00B5m", 1), ("mm", 1e-3), ("nm", 1e3)],
)
def test_imagej_lengths(tmp_path, unit, factor):
    grey = np.random.default_rng(0).integers(0, 60000, (4, 20, 24), dtype=np.uint16)
    meta = {"axes": "ZYX", "unit": unit, "spacing": 60 * factor}
    pixel = (1 / (40 * factor), 1 / (50 * factor))
    tifffile.imwrite(tmp_path / "v.tif", grey, imagej=True, resolution=pixel, metadata=meta)
    scan = read_volume(tmp_path / "v.tif", modality="micro")
    assert scan.spacing_mm == pytest.approx((0.06, 0.05, 0.04), rel=1e-4)
    assert "ImageJ" in " ".join(scan.notes)
    with pytest.raises(GeometryError, match="leave voxel_mm"):
        read_volume(tmp_path / "v.tif", modality="micro", voxel_um=70)


@pytest.mark.parametrize("unit", ["inch", "cm", "pixel", None])
def test_printers_lengths_are_no_voxel_size(tmp_path, unit):
    grey = np.zeros((4, 20, 24), np.uint16)
    meta = {"axes": "ZYX", "spacing": 1.0} | ({"unit": unit} if unit else {})
    tifffile.imwrite(tmp_path / "v.tif", grey, imagej=True, resolution=(300, 300), metadata=meta)
    with pytest.raises(GeometryError, match="does not say its voxel size"):
        read_volume(tmp_path / "v.tif", modality="micro")


def test_ome_lengths_and_files_that_belong_to_others(tmp_path):
    grey = np.random.default_rng(0).integers(0, 60000, (4, 20, 24), dtype=np.uint16)
    meta = {
        "axes": "ZYX",
        "PhysicalSizeX": 40,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.05,
        "PhysicalSizeYUnit": "mm",
    }
    tifffile.imwrite(tmp_path / "v.ome.tif", grey, metadata=meta | {"PhysicalSizeZ": 60})
    scan = read_volume(tmp_path / "v.ome.tif", modality="micro")
    assert scan.spacing_mm == pytest.approx((0.06, 0.05, 0.04))
    assert np.array_equal(scan.array, grey)
    tifffile.imwrite(tmp_path / "w.ome.tif", grey, metadata=meta)  # no distance of slices
    with pytest.raises(GeometryError, match="does not say its voxel size"):
        read_volume(tmp_path / "w.ome.tif", modality="micro")
    data = (tmp_path / "v.ome.tif").read_bytes()  # half of the pages are said to be in another file
    (tmp_path / "v.ome.tif").write_bytes(data.replace(b'SizeZ="4"', b'SizeZ="8"'))
    assert line_of(tmp_path / "v.ome.tif", modality="micro") is not None


def test_side_files(tmp_path):
    grey = np.random.default_rng(0).integers(0, 60000, (4, 20, 24), dtype=np.uint16)
    folder = tmp_path / "stack"
    folder.mkdir()
    for k, plane in enumerate(grey):
        tifffile.imwrite(folder / f"s_rec{k:04d}.tif", plane)
    assert "does not say" in line_of(folder, modality="micro")
    (folder / "s.log").write_text("[Acquisition]\nImage Pixel Size (um)= 51.2\n")
    scan = read_volume(folder, modality="micro")
    assert scan.spacing_mm == pytest.approx((0.0512,) * 3)
    assert any("s.log" in note for note in scan.notes)
    (folder / "s_rec.log").write_text("[Reconstruction]\nPixel Size (um)=25.6\n")
    assert "expected one voxel size" in line_of(folder, modality="micro")
    assert "expected one voxel size" in line_of(folder, modality="micro", voxel_um=51.2)
    (folder / "s_rec.log").unlink()
    (folder / "s.log").write_text("Started at noon\nrotation=on\n")  # a log of something else
    assert "does not say" in line_of(folder, modality="micro")
    (folder / "s.xtekct").write_text(
        "[XTekCT]\nVoxelsX=24\nVoxelsY=20\nVoxelsZ=4\nVoxelSizeX=0.04\nVoxelSizeY=0.05\nVoxelSizeZ=0.06\n"
    )
    assert read_volume(folder, modality="micro").spacing_mm == pytest.approx((0.06, 0.05, 0.04))
    tifffile.imwrite(folder.parent / "one.tif", grey, photometric="minisblack")
    (folder.parent / "other.log").write_text("[Acquisition]\nImage Pixel Size (um)=51.2\n")
    assert "does not say" in line_of(folder.parent / "one.tif", modality="micro")
    (folder.parent / "one.log").write_text("[Acquisition]\nImage Pixel Size (um)=51.2\n")
    assert read_volume(folder.parent / "one.tif", modality="micro").spacing_mm[0] == 0.0512


@pytest.mark.parametrize(
    "how",
    [
        {"compression": "lzw"},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"rowsperstrip": 7},
    ],
)
def test_inverted_and_packed_grey(tmp_path, how):
    for dtype in (np.uint8, np.uint16):
        grey = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (3, 40, 50)).astype(dtype)
        tifffile.imwrite(tmp_path / "v.tif", grey, photometric="miniswhite", **how)
        scan = read_volume(tmp_path / "v.tif", **MICRO)
        assert np.array_equal(scan.array, np.iinfo(dtype).max - grey)
        assert any("white" in note for note in scan.notes)
    tifffile.imwrite(
        tmp_path / "v.tif",
        grey.astype(np.float32),
        photometric="miniswhite",
        **({} if "predictor" in how else how),
    )
    assert "grey" in line_of(tmp_path / "v.tif", **MICRO)


# ---------------------------------------------------------------- OME-Zarr


def zarr_of_others(path, grey, *, axes="zyx", version=2, unit="micrometer", chunk=8, **more):
    """Write an OME-Zarr 0.4 (Zarr 2) or 0.5 (Zarr 3) as other tools do; voxels of 40, 20, 10 µm."""
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    lead = len(axes) - 3
    keys = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if version == 2 else {}
    array = group.create_array(
        "0",
        shape=(1,) * lead + grey.shape,
        chunks=(1,) * lead + (chunk,) * 3,
        dtype=grey.dtype,
        **keys,
    )
    array[:] = grey.reshape(array.shape)
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    for axis in named[lead:]:
        axis |= {"unit": unit} if unit else {}
    own = [
        {"type": "scale", "scale": [1.0] * lead + [20.0, 10.0, 5.0]},
        {"type": "translation", "translation": [0.0] * lead + [3.0, 2.0, 1.0]},
    ]
    image = {"axes": named, "datasets": [{"path": "0", "coordinateTransformations": own}]}
    image["coordinateTransformations"] = [{"type": "scale", "scale": [1.0] * lead + [2.0] * 3}]
    page = {"multiscales": [image], **more}
    group.attrs.update(page if version == 2 else {"ome": {"version": "0.5", **page}})
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("axes", ["zyx", "czyx", "tczyx"])
def test_ome_zarr_of_others(tmp_path, version, axes):
    grey = np.random.default_rng(0).integers(1, 60000, (20, 24, 28), dtype=np.uint16)
    path = zarr_of_others(tmp_path / "v.ome.zarr", grey, axes=axes, version=version)
    scan = read_volume(path, modality="micro", lazy=True)
    assert np.array_equal(np.asarray(scan.array), grey)
    assert np.array_equal(read_volume(path, modality="micro", slices=(5, 9)).array, grey[5:9])
    assert scan.spacing_mm == pytest.approx((0.04, 0.02, 0.01))
    assert scan.origin_mm == pytest.approx((0.002, 0.004, 0.006))
    assert any("oriented" in note for note in scan.notes)
    info = scan_info(path)
    assert (info.modality, info.values) == ("micro", (float(grey.min()), float(grey.max())))
    assert "28 × 24 × 20 voxels" in info_text(info)
    assert info.refusals == ()  # that it is not oriented is no reason
    assert "is read as it is" in info_text(info)
    path.rename(tmp_path / "plain")  # known by what is in it, too
    assert np.array_equal(read_volume(tmp_path / "plain", modality="micro").array, grey)


def test_ome_zarr_with_empty_pieces_and_several_threads(tmp_path):
    grey = np.random.default_rng(0).integers(1, 60000, (20, 24, 28), dtype=np.uint16)
    grey[8:16] = 0  # pieces of zeros are not stored
    path = zarr_of_others(tmp_path / "v.zarr", grey)
    scan = read_volume(path, modality="micro", lazy=True)
    assert any("pieces are not there" in note for note in scan.notes)
    with ThreadPoolExecutor(4) as pool:
        order = np.random.default_rng(1).permutation(20).tolist()
        planes = list(pool.map(lambda z: scan.array[z], order))
    assert np.array_equal(planes, grey[order])
    for piece in (path / "0").iterdir():
        if piece.is_dir():
            shutil.rmtree(piece)
    assert "voxels are missing" in line_of(path, modality="micro")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"axes": "czyx", "two": True}, "'c' 2"),
        ({"axes": "tzyx", "two": True}, "'t' 2"),
        ({"axes": "xyz"}, "expected axes z, y, x"),
        ({"unit": None}, "voxel_mm"),
        ({"unit": "parsec"}, "in 'parsec', a unit not known here; give voxel_mm"),
        ({"image-label": {}}, "holds labels"),
        ({"only": {"labels": ["a"]}}, "list of labels"),
        ({"only": {"plate": {}}}, "plate of wells"),
        ({"only": {"well": {}}}, "a well"),
        ({"only": {"bioformats2raw.layout": 3}}, "collection of images"),
        ({"only": {}}, "otherwise packed or another Zarr"),
        ({"only": {"multiscales": []}}, "got 0"),
        ({"only": {"multiscales": [{"axes": ["z", "y", "x"], "datasets": []}]}}, "damaged"),
    ],
)
def test_ome_zarr_that_is_no_scan(tmp_path, how, word):
    how, grey = dict(how), np.ones((8, 8, 8), np.uint16)
    two, only = how.pop("two", False), how.pop("only", None)
    path = zarr_of_others(tmp_path / "v.zarr", grey, **how)
    if two:
        group = zarr.open_group(str(path), mode="a")
        group.create_array("0", shape=(2, 8, 8, 8), chunks=(1, 8, 8, 8), dtype="u2", overwrite=True)
    if only is not None:
        (path / ".zattrs").write_text(json.dumps(only))
    assert word in line_of(path, modality="micro")
    if "unit" in how:
        given = read_volume(path, modality="micro", voxel_um=20)
        assert given.spacing_mm == (0.02, 0.02, 0.02)
        assert all("voxel_mm" in line for line in scan_info(path).refusals)


@pytest.mark.parametrize("words", ["RAS", "LPS", "ASL", "AAS", "base-to-apex", None])
def test_ome_zarr_axes_that_name_sides_of_the_body(tmp_path, words):
    """As in RFC 4; ngff-zarr turns images to ITK's the same way."""
    ways = {"L": "right-to-left", "R": "left-to-right", "P": "anterior-to-posterior"}
    ways |= {"A": "posterior-to-anterior", "S": "inferior-to-superior"}
    lps = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1)}
    hu = chest(8, 24, 28)
    path = zarr_of_others(tmp_path / "v.zarr", hu, unit="millimeter")
    page = json.loads((path / ".zattrs").read_text())
    image = page["multiscales"][0]
    image["coordinateTransformations"] = [{"type": "scale", "scale": [0.1, 0.1, 0.1]}]
    sides = words if words in ("RAS", "LPS", "ASL", "AAS") else "LPS"
    for axis, side in zip(image["axes"], sides[::-1], strict=True):
        axis["orientation"] = {"type": "anatomical", "value": ways[side]}
    if sides != words:  # one of the three is not known: none is taken
        image["axes"][1]["orientation"] = words and {"type": "anatomical", "value": words}
    (path / ".zattrs").write_text(json.dumps(page))
    if sides != words or words == "AAS":
        assert "how the scan is oriented" in line_of(path)
        return
    if words == "ASL":  # its slices are sagittal
        assert "--reorient" in line_of(path)
    scan = read_volume(path, force=words == "ASL")
    assert np.array_equal(scan.array, hu)
    turn = np.array([lps[side] for side in words]).T
    assert np.array_equal(np.reshape(scan.direction, (3, 3)), turn)
    # along the axes or in space: tools differ, so only where it is the same is it taken
    assert scan.origin_mm == pytest.approx((0.1, 0.2, 0.3) if words == "LPS" else (0, 0, 0))
    assert any("tools differ" in note for note in scan.notes) == (words != "LPS")
    assert len(scan_info(path, modality="clinical").refusals) == (words == "ASL")
    assert scan_info(path, modality="clinical", reorient=True).refusals == ()


@pytest.mark.parametrize("separator", ["/", "."])
def test_our_ome_zarr_packed_anew_by_others(tmp_path, separator):
    hu = chest(12, 24, 28)
    notes = ("super-resolved 8x. Research only; fine detail is synthesised.",)
    write_volume(tmp_path / "a.ome.zarr", Volume(hu, (2.5, 0.5, 0.5), notes=notes))
    ours = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r")
    page = ours.attrs.asdict()
    page["mmsr"]["notice"] += " Jane Doe\n1970"
    theirs = zarr.open_group(str(tmp_path / "b.ome.zarr"), mode="w")
    theirs.attrs.update(page)
    keys = {"name": "default", "separator": separator}
    theirs.create_array("0", shape=hu.shape, chunks=(8, 8, 8), dtype="i2", chunk_key_encoding=keys)[
        :
    ] = ours["0"][:]
    if separator == "/":
        (tmp_path / "b.ome.zarr" / "0" / "c" / ".DS_Store").write_bytes(b"of a desktop")
    scan = read_volume(tmp_path / "b.ome.zarr")
    assert np.array_equal(scan.array, hu)
    assert scan.notes == ("Research only; fine detail is synthesised.",)
    if separator == "/":
        (tmp_path / "a.ome.zarr" / "0" / "c" / "12").mkdir()
        assert "expected 12 slices, got 13" in line_of(tmp_path / "a.ome.zarr")


def test_ome_zarr_keeps_one_layer_and_says_if_it_cannot(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    grey = rng.integers(1, 60000, (16, 20, 28), dtype=np.uint16)
    path = zarr_of_others(tmp_path / "v.zarr", grey)
    asked, level = [], mmsr.scans.ome_zarr._level
    monkeypatch.setattr(
        "mmsr.scans.ome_zarr._level", lambda p, cache=0: (asked.append(cache), level(p, cache))[1]
    )
    layer = 8 * 24 * 32 * 2  # whole pieces
    for free, enough in ((8 * layer, True), (2 * layer, False)):
        monkeypatch.setattr("mmsr.scans.ome_zarr.available_memory", lambda free=free: free)
        scan = read_volume(path, modality="micro", lazy=True)
        assert asked[-1] == pytest.approx(layer if enough else free // 4, rel=0.02)
        assert asked[-1] <= free // 4
        assert any("8 slices deep" in note for note in scan.notes) != enough
        assert np.array_equal(np.asarray(scan.array), grey)


@pytest.mark.slow
@pytest.mark.parametrize("mark", [".zattrs", "0/.zarray", "zarr.json", "0/zarr.json"])
def test_pipes_in_an_ome_zarr_are_not_waited_for(tmp_path, mark):
    version = 3 if "json" in mark else 2
    path = zarr_of_others(tmp_path / "v.zarr", np.ones((8, 8, 8), np.uint16), version=version)
    (path / mark).unlink()
    os.mkfifo(path / mark)
    read = f"from mmsr.scans.read import read_volume; read_volume({str(path)!r}, modality='micro')"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=60)
    assert "FileError: v.zarr: expected an OME-Zarr" in done.stderr


def test_a_folder_with_one_ome_zarr_is_that(tmp_path):
    grey = np.random.default_rng(0).integers(1, 60000, (8, 24, 28), dtype=np.uint16)
    (tmp_path / "f").mkdir()
    zarr_of_others(tmp_path / "f" / "v.zarr", grey)
    (tmp_path / "f" / "preview.png").write_bytes(b"\x89PNG")
    scan = read_volume(tmp_path / "f", modality="micro")
    assert np.array_equal(scan.array, grey)
    assert "1 other file in the folder left out" in scan.notes
    zarr_of_others(tmp_path / "f" / "w.zarr", grey)
    assert "got 2 OME-Zarr in it; name the one that is meant, such as 'v.zarr'" in line_of(
        tmp_path / "f", modality="micro"
    )
    (tmp_path / "f" / "preview.png").unlink()
    series(tmp_path / "f" / "dicom", chest(4))  # an output beside its scan is no second scan
    assert np.array_equal(read_volume(tmp_path / "f").array, chest(4))


@pytest.mark.slow
def test_malformed_ome_zarrs_are_refused_in_a_line_or_read_as_others_read_them(tmp_path, capfd):
    rng = np.random.default_rng(3)
    hu, c, s = chest(4, 20, 24), np.cos(0.3), np.sin(0.3)
    place = (2.5, 0.5, 0.6), (1.0, 2.0, 3.0), (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)
    write_volume(tmp_path / "ours.ome.zarr", Volume(hu, *place))
    zarr_of_others(tmp_path / "theirs.zarr", (hu + 1024).astype(np.uint16))
    refused = read = 0
    for name, pages in (
        ("ours.ome.zarr", ["zarr.json", "0/zarr.json"]),
        ("theirs.zarr", [".zattrs", "0/.zarray"]),
    ):
        truth = read_volume(tmp_path / name, modality="micro", force=True)
        pieces = [p for p in sorted((tmp_path / name / "0").rglob("[0-9]")) if p.is_file()]
        for k in range(60):
            broken = shutil.copytree(tmp_path / name, tmp_path / "b" / name, dirs_exist_ok=True)
            page = k % 3 and pages[k % 2]
            file = broken / (page or pieces[k % len(pieces)].relative_to(tmp_path / name))
            data = bytearray(file.read_bytes())
            if k % 5 == 0:
                data = data[: rng.integers(len(data))]
            elif page and k % 5 < 3:  # a number becomes another
                at = rng.choice([m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", bytes(data))])
                new = rng.choice(["-1", "0", "1e400", "NaN", "987654321", "3", '"x"', "[]"])
                data[at[0] : at[1]] = str(new).encode()
            else:
                for at in rng.integers(0, len(data), 2):
                    data[at] ^= 1 << rng.integers(0, 8)
            file.write_bytes(data)
            start = time.perf_counter()
            if line_of(broken, modality="micro", force=True) is not None:
                refused += 1
            else:
                scan = read_volume(broken, modality="micro", force=True)
                read += 1
                if not np.array_equal(scan.array, truth.array):
                    assert page or name == "theirs.zarr"  # our pieces carry a checksum
                    theirs = np.asarray(zarr.open_array(str(broken / "0"), mode="r"))
                    assert np.array_equal(scan.array, theirs), "other voxels than another reader"
                if "ours" in name:
                    assert scan.grid == truth.grid
            assert time.perf_counter() - start < 10
    assert refused > 60
    assert read > 10
    out, err = capfd.readouterr()
    assert out + err == ""


# ---------------------------------------------------------------- folders and odd things


def test_things_that_are_no_scan(tmp_path, monkeypatch):
    for name, word in (
        ("a.zip", "archive"),
        ("a.tar.gz", "archive"),
        ("a.jpg", "pictures"),
        ("a.png", "not a PNG"),
        ("a.raw", "header"),
        ("a.ome.zarr", "another file"),
        ("a.mha.unfinished", "unfinished"),
        ("a.txt", "another file"),
    ):
        (tmp_path / name).write_bytes(b"PK\3\4 anything")
        assert word in line_of(tmp_path / name)
    (tmp_path / "p").mkdir()
    for k in range(3):
        (tmp_path / "p" / f"{k}.jpg").write_bytes(b"\xff\xd8")
    assert "pictures" in line_of(tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    with pytest.raises(FileError, match=r"^p: expected"):
        read_volume(".")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "another file" in line_of(tmp_path / "pipe.nii")
    (tmp_path / "q").mkdir()
    os.mkfifo(tmp_path / "q" / "pipe")
    (tmp_path / "q" / "loop").symlink_to(tmp_path / "q")
    assert "no files" in line_of(tmp_path / "q")
    saved(tmp_path / "v.mha", chest())
    with pytest.raises(SettingsError, match="series"):
        read_volume(tmp_path / "v.mha", series=2)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "deep" / "er" / "a.tif", chest()[0])
    assert "1 TIFF" in line_of(tmp_path / "deep")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path):
    path = saved(tmp_path / "v.mha", chest())
    path.chmod(0)
    assert "permissions" in line_of(path)


SLICES = [(2, 4), [2, 4], range(2, 4), slice(2, 4), "2:4", (np.int64(2), np.int64(4))]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("which", SLICES, ids=str)
def test_slices_mean_what_they_say(tmp_path, which, lazy):
    hu = chest(6)
    scan = read_volume(saved(tmp_path / "v.mha", hu), slices=which, lazy=lazy)
    assert scan.shape == (2, 40, 48)
    assert np.array_equal(np.asarray(scan.array), hu[2:4])


@pytest.mark.parametrize(
    "which",
    [(1, 2, 3), 3, range(0, 6, 2), slice(4, 1, -1), "2-4", "2:4:1", (1.5, 3), np.arange(2, 4)],
)
def test_slices_that_may_mean_something_else_are_refused_in_a_line(tmp_path, which):
    path = saved(tmp_path / "v.mha", chest(6))
    with pytest.raises(SettingsError, match=r"slices: expected \(first, last \+ 1\)") as caught:
        read_volume(path, slices=which)
    assert "\n" not in str(caught.value)
    with pytest.raises(RangeError, match="6 slices"):
        read_volume(path, slices="5:9")


# ---------------------------------------------------------------- what mmsr info shows


def test_info_names_the_stored_type_and_does_not_repeat_the_list(tmp_path):
    folder = series(tmp_path / "f" / "a", chest(5), BitsStored=12, HighBit=11).parent
    series(folder / "b", chest(4))
    text = info_text(scan_info(folder))
    assert "uint16, 12 bits used" in text
    assert text.count("5 slices of 48 x 40") == 1
    assert "see above; choose one with --series" in text


def test_a_black_picture_says_why(tmp_path):
    hu = chest(6)
    hu[:, 20] = -1390 - np.arange(48) * 5  # outside the window, and too even for padding
    figure = info_picture(scan_info(saved(tmp_path / "v.mha", hu)))
    said = [[t.get_text() for t in ax.texts if "black" in t.get_text()] for ax in figure.axes]
    assert said == [[], ["black: all is -1625 to -1390 HU"], []]


def test_info_of_every_format_is_the_same(tmp_path):
    c, s = np.cos(0.35), np.sin(0.35)
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, -1]])
    hu = chest(8, 40, 48)
    hu[:, :, :4] = -2048
    seen = []
    for ending in WRITABLE[:-1]:
        path = tmp_path / f"v{ending}"
        write_volume(path, Volume(hu, (2.5, 0.5, 0.6), (-150.7, -160.9, 928.1), direction.ravel()))
        info = scan_info(path)
        assert info.refusals == ()
        assert info.padding == (pytest.approx(4 / 48), "-2048 HU")
        assert info.values == (float(hu[hu > -2000].min()), float(hu.max()))
        text = info_text(info)
        assert "oblique by 20.1°" in text
        assert "z to the feet" in text
        seen.append((np.round(info.grid.spacing_mm, 5).tolist(), [p.letters for p in info.planes]))
    assert all(s == seen[0] for s in seen)
    assert seen[0][1][0] == ("RA", "LP", "AL", "PR")


@pytest.mark.parametrize("what", ["sound", "tilted", "two series", "broken"])
def test_info_reads_every_header_once(tmp_path, monkeypatch, what):
    folder = tmp_path / "s"
    for name in ("a", "b") if what == "two series" else ("",):
        series(folder / name, chest(5), step=(0, what == "tilted", 2.5))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if what == "broken":
        files[2].write_bytes(files[2].read_bytes()[:140])
    seen, inspect = [], mmsr.scans.read.inspect_file
    monkeypatch.setattr(
        "mmsr.scans.scan_summary.inspect_file", lambda f, p: (seen.append(p), inspect(f, p))[1]
    )
    info = scan_info(folder)
    assert sorted(seen) == files
    assert len(info.planes) == 3
    assert bool(info.refusals) == (what != "sound")


def test_info_looks_at_part_of_a_long_scan_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsr.scans.scan_summary._MOST_SLICES", 10)
    info = scan_info(saved(tmp_path / "v.mha", chest(35)))
    assert info.seen == 4
    assert "in one of 4 slices" in info_text(info)
    assert info.planes[1].image.shape == (9, 48)
    assert info.planes[1].pixel_mm == pytest.approx((10.0, 0.6))


def test_info_of_scans_that_cannot_be_opened(tmp_path):
    path = saved(tmp_path / "v.nii.gz", chest())
    path.write_bytes(path.read_bytes()[:-500])
    info = scan_info(path)
    assert info_picture(info) is None
    assert "48 × 40 × 6" in info_text(info)
    assert "cut short" in info_text(info)
    with pytest.raises(FileError, match="no such file"):
        scan_info(tmp_path / "gone.nii")
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), np.eye(4)), tmp_path / "a.nii"
    )
    assert "4-D" in info_text(scan_info(tmp_path / "a.nii"))
    with pytest.raises(ShapeError):
        read_volume(tmp_path / "a.nii")


@pytest.mark.slow
@real
def test_info_of_real_scans():
    chest_info = scan_info(REAL / "nlst_chest_dicom")
    assert chest_info.refusals == ()
    assert chest_info.planes[1].letters == ("R", "L", "H", "F")
    lung = chest_info.planes[1].image[60:200]  # the heart lies to the left of the middle
    heart = lung[-60:] > -200
    assert heart[:, 256:].sum() > heart[:, :256].sum()
    assert chest_info.padding[0] == pytest.approx(0.215, abs=0.005)
    tilted = scan_info(REAL / "bad/gantry_tilt")
    assert "18.5°" in info_text(tilted)
    assert "--resample" in tilted.refusals[0]
    assert len(tilted.planes) == 3
    assert "got MR" in info_text(scan_info(REAL / "bad/wrong_modality"))
    assert "5: CT" in info_text(scan_info(REAL / "bad/dicom_misc"))
    for info in (chest_info, tilted):
        assert info_picture(info) is not None
