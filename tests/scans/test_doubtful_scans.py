"""What is read is what was asked for: no other slices, files, axes or voxel sizes.

Each test is of a kind of fault that is silent in other readers; a scan is right, or refused.
"""

import itertools
import json
import multiprocessing
import shutil

import imagecodecs
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from dicom_maker import chest, refused, series
from PIL import Image

from mmsr.app.training_cases import PrepareSettings, micro_cases
from mmsr.core import FileError, GeometryError, MMSRError, ResourceError, ShapeError
from mmsr.data.patches import PatchCase, open_bank, write_bank
from mmsr.data.volume import Volume
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.scans.read import FORMATS, find_scan, inspect_file, read_mask, read_volume
from mmsr.scans.scan_summary import info_text, scan_info
from mmsr.scans.write import write_volume

pytestmark = pytest.mark.slow

MICRO = {"modality": "micro", "voxel_um": 50}


def line_of(path, **options):
    """Return the line that refuses a scan; None if it is read."""
    try:
        read_volume(path, **options)
    except MMSRError as e:
        return str(e) if "\n" not in str(e) else pytest.fail("more than a line")
    return None


def grey(count=6, height=40, width=48, kind=np.uint16, seed=0):
    """Make slices that differ from each other."""
    most = np.iinfo(kind).max
    return np.random.default_rng(seed).integers(1, most, (count, height, width)).astype(kind)


# ---------------------------------------------------------------- workers that were forked


def forked(work, count=2):
    """Call a function in forked processes at once; return what they say."""
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    jobs = [fork.Process(target=lambda k=k: said.put(work(k))) for k in range(count)]
    for job in jobs:
        job.start()
    answers = [said.get(timeout=30) for _ in jobs]
    for job in jobs:
        job.join()
    return answers


def stored(folder, ending):
    """Write slices in a format; return the path and the slices."""
    hu, images = chest(24, 64, 64), grey(24, 64, 64)
    path = folder / f"v{ending}"
    if ending == ".dicom":
        return series(path, hu), hu
    if ending in (".png", "folder.tif"):
        path.mkdir()
        for k, plane in enumerate(images):
            image = path / f"{k:03d}{ending.removeprefix('folder')}"
            imagecodecs.imwrite(image, plane)
    elif "tif" in ending:
        tifffile.imwrite(path, images, compression="lzw" if "lzw" in ending else None)
    else:
        image = sitk.GetImageFromArray(hu)
        image.SetSpacing((0.6, 0.5, 2.5))
        sitk.WriteImage(image, str(path))
        return path, hu
    return path, images


KINDS = (".nii.gz", ".nii", ".nrrd", ".mhd", ".dicom", ".tif", "lzw.tif", "folder.tif", ".png")


@pytest.mark.parametrize("ending", KINDS)
def test_forked_workers_get_the_slices_they_ask_for(tmp_path, ending):
    path, truth = stored(tmp_path, ending)
    scan = read_volume(path, **(MICRO if truth.dtype == np.uint16 else {}), lazy=True)

    def wrong(seed):
        places = np.random.default_rng(seed).integers(len(truth), size=120).tolist()
        return [z for z in places if not np.array_equal(scan.array[z], truth[z])]

    assert np.array_equal(scan.array[3], truth[3])  # so that something is open and has a place
    assert forked(wrong) == [[]] * 2
    assert wrong(9) == []


def test_an_ome_zarr_in_a_forked_worker_is_one_line(tmp_path):
    hu = chest(6)
    write_volume(tmp_path / "v.ome.zarr", Volume(hu, (2.0, 0.5, 0.5)))
    scan = read_volume(tmp_path / "v.ome.zarr", lazy=True)
    assert np.array_equal(scan.array[3], hu[3])

    def said(k):
        try:
            return int((scan if k else read_volume(tmp_path / "v.ome.zarr")).array[3].sum())
        except ResourceError as e:
            return str(e)

    assert all("forked" in line and "'spawn'" in line for line in forked(said))


def test_a_patch_bank_in_forked_workers(tmp_path):
    hu = chest(4, 64, 64)
    case = PatchCase("a", Volume(hu, (2.0, 0.5, 0.5)), np.ones(hu.shape, bool))
    how = {"modality": "clinical", "size": 16, "per_case": 60, "seed": 0, "min_tissue": 0.0}
    write_bank(tmp_path / "bank", [case], window=CLINICAL_WINDOW, **how)
    bank = open_bank(tmp_path / "bank")
    (z, y, x), truth = bank.positions[:, 1:].T, np.array(bank.patches)

    def wrong(seed):
        places = np.random.default_rng(seed).integers(60, size=300).tolist()
        return [k for k in places if not np.array_equal(bank.patches[k], truth[k])]

    assert forked(wrong) == [[]] * 2
    assert np.array_equal(truth[5], hu[z[5], y[5] : y[5] + 16, x[5] : x[5] + 16])


# ---------------------------------------------------------------- data files of headers

NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 48 40 6
space directions: (.6,0,0) (0,.5,0) (0,0,2.5)
space origin: (0,0,0)
endian: little
encoding: raw
"""
META = """ObjectType = Image
NDims = 3
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = .6 .5 2.5
DimSize = 48 40 6
ElementType = MET_SHORT
"""
HEADS = {".nhdr": (NRRD, "data file: "), ".mhd": (META, "ElementDataFile = ")}


@pytest.mark.parametrize("ending", HEADS)
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("sub/v.raw", None),
        ("./sub/v.raw", None),
        ("v.raw", None),
        ("gone/v.raw", "not found there"),
        ("../v.raw", "beside it or in a folder there"),
        ("sub/../v.raw", "beside it or in a folder there"),
        ("sub/../../v.raw", "beside it or in a folder there"),
        ("ABSOLUTE", "beside it or in a folder there"),
        ("sub\\v.raw", "not found there"),
        ("v%03d.raw 1 6 1", "several files"),
        ("LIST", "several files"),
        ("LIST 2", "several files"),
        ("", "not found there"),
        ("sub", "not found there"),
    ],
)
def test_the_file_that_a_header_names_is_read_or_none(tmp_path, ending, name, word):
    """Namesakes lie everywhere that a careless reader may look."""
    folder = tmp_path / "in"
    places = {"v.raw": folder, "sub/v.raw": folder / "sub", "outside": tmp_path}
    for k, place in enumerate(places.values()):
        place.mkdir(exist_ok=True)
        for file in ("v.raw", "LIST", "LIST 2", "v%03d.raw 1 6 1", "v001.raw"):
            chest(seed=k).astype("<i2").tofile(place / file)
    text, field = HEADS[ending]
    meant = str(tmp_path / "v.raw") if name == "ABSOLUTE" else name
    (folder / f"v{ending}").write_text(f"{text}{field}{meant}\n")
    if word:
        refused(FileError, folder / f"v{ending}", word, force=True)
    else:
        seed = list(places).index(name.removeprefix("./"))
        assert np.array_equal(read_volume(folder / f"v{ending}").array, chest(seed=seed))


# ---------------------------------------------------------------- headers that say things twice


@pytest.mark.parametrize(
    ("ending", "old", "new", "word"),
    [
        (".nhdr", "endian", "spacings: .6 .5 2.5\nendian", None),
        (".nhdr", "endian", "spacings: nan nan nan\nendian", None),
        (".nhdr", "endian", "spacings: .6 .5 5\nendian", "space directions of"),
        (".nhdr", "endian", 'units: "um" "um" "um"\nendian', "voxel_mm"),
        (".nhdr", "endian", "byte skip: 0\nbyteskip: 2\nendian", "'byteskip' twice"),
        (".nhdr", "endian", "datafile: other.raw\nendian", "'data file' twice"),
        (".mhd", "DimSize", "ElementSize = .6 .5 2.5\nDimSize", None),
        (".mhd", "DimSize", "ElementSize = .6 .5 5\nDimSize", "elementspacing and elementsize"),
        (".mhd", "DimSize", "Position = 0 0 0\nOrigin = 0 0 9\nDimSize", "offset and position"),
        (
            ".mhd",
            "DimSize",
            "Rotation = 0 1 0 1 0 0 0 0 1\nDimSize",
            "transformmatrix and rotation",
        ),
        (".mhd", "DimSize", "BinaryDataByteOrderMSB = False\nDimSize", None),
        (
            ".mhd",
            "DimSize",
            "BinaryDataByteOrderMSB = False\nElementByteOrderMSB = True\nDimSize",
            "byte order",
        ),
    ],
)
def test_fields_for_one_thing_agree_or_are_doubted(tmp_path, ending, old, new, word):
    text, field = HEADS[ending]
    assert text.count(old) == 1
    chest().astype("<i2").tofile(tmp_path / "v.raw")
    path = tmp_path / f"v{ending}"
    path.write_text(f"{text.replace(old, new)}{field}v.raw\n")
    if word is None:
        assert np.array_equal(read_volume(path).array, chest())
        assert read_volume(path).spacing_mm == pytest.approx((2.5, 0.5, 0.6))
        return
    line = line_of(path)
    assert word in line
    if "overrule" in line:  # what is then taken is what others take
        assert read_volume(path, force=True).spacing_mm == pytest.approx((2.5, 0.5, 0.6))


def test_a_nifti_that_says_two_sizes_of_a_voxel(tmp_path):
    image = nibabel.Nifti1Image(chest().T, np.diag([-0.6, -0.5, 2.5, 1]))
    nibabel.save(image, tmp_path / "v.nii")
    data = bytearray((tmp_path / "v.nii").read_bytes())
    data[72:74] = np.array([32], "<i2").tobytes()  # bitpix
    (tmp_path / "v.nii").write_bytes(data)
    refused(FileError, tmp_path / "v.nii", "32 bits a voxel, but type int16")


def test_an_ome_zarr_with_one_scale_in_two_places(tmp_path):
    path = tmp_path / "v.ome.zarr"
    write_volume(path, Volume(chest(), (2.5, 0.5, 0.5)))
    page = json.loads((path / "zarr.json").read_text())
    page["attributes"].pop("mmsr")
    image = page["attributes"]["ome"]["multiscales"][0]
    (scale,) = (t for t in image["datasets"][0]["coordinateTransformations"] if "scale" in t)
    for common, word in ((scale["scale"], "the same scale"), ([2, 1, 1], None), ([1, 1, 1], None)):
        image["coordinateTransformations"] = [{"type": "scale", "scale": common}]
        (path / "zarr.json").write_text(json.dumps(page))
        if word:
            assert word in line_of(path, modality="micro")
        else:  # the format means their product
            scan = read_volume(path, modality="micro", force=True)
            assert scan.spacing_mm == pytest.approx((2.5 * common[0], 0.5, 0.5))


def test_files_of_a_stack_that_say_different_voxels(tmp_path):
    for k, plane in enumerate(grey(3)):
        how = {
            "resolution": (0.02, 0.02),
            "metadata": {"unit": "um", "spacing": 40 + 10 * (k == 1)},
        }
        tifffile.imwrite(tmp_path / f"{k}.tif", plane, imagej=True, **how)
    refused(GeometryError, tmp_path, "expected one voxel size", "1.tif", modality="micro")


# ---------------------------------------------------------------- slices that are not axial


def lie_alike(turned, scan):
    """Tell whether two volumes hold the same value at each place in the world."""
    apart = turned.world_mm(list(np.ndindex(turned.shape))) - scan.origin_mm
    at = np.rint(apart @ np.reshape(scan.direction, (3, 3)) / scan.spacing_mm[::-1]).astype(int)
    return np.array_equal(turned.array.ravel(), scan.array[tuple(at.T[::-1])])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("way", [(1, 1, 1), (-1, 1, -1)])
def test_scans_stored_along_other_axes_are_turned_or_refused(tmp_path, order, way):
    hu, spacing = chest(5, 9, 7), np.array([0.6, 0.5, 2.5])
    turn = np.eye(3)[:, order] * way  # the stored x, y, z run along these
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[list(order)].tolist())
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(turn.ravel().tolist())
    path = tmp_path / "v.nrrd"
    sitk.WriteImage(image, str(path))
    scan = read_volume(path, force=True)
    axial = order[2] == 2
    if not axial:
        kind = "sagittal" if order[2] == 0 else "coronal"
        line = refused(GeometryError, path, f"got {kind} ones", "--reorient", "reorient=True")
        assert info_text(scan_info(path)).count(line) == 1
        assert any(kind in note for note in scan.notes)
        assert scan_info(path, reorient=True).refusals == ()
    turned = read_volume(path, reorient=True)
    assert bool(turned.notes) != axial  # axial ones stay as they are
    assert lie_alike(turned, scan)
    assert axial or np.array_equal(turned.direction, np.eye(3).ravel())
    later = read_volume(path, reorient=True, lazy=True, slices=(1, 4))
    assert np.array_equal(later.array, turned.array[1:4])
    assert later.origin_mm == pytest.approx(turned.take(1, 4).origin_mm)
    mask = sitk.GetImageFromArray((hu > -500).astype(np.uint8))  # of the same storage
    mask.CopyInformation(image)
    sitk.WriteImage(mask, str(tmp_path / "mask.nrrd"))
    for one in (scan, turned, later):
        assert np.array_equal(read_mask(tmp_path / "mask.nrrd", one), np.asarray(one.array) > -500)


def test_sagittal_dicom_with_padding_is_turned(tmp_path):
    hu = chest()
    hu[:, :, :3] = -1050
    place = {"step": (-2.5, 0, 0), "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    how = {"intercepts": (-1100,), "PixelPaddingValue": 50}
    folder = series(tmp_path / "s", hu, **place, **how)
    turned, scan = read_volume(folder, reorient=True), read_volume(folder, force=True)
    assert turned.shape == (40, 48, 6)
    assert turned.spacing_mm == (0.5, 0.6, 2.5)
    assert lie_alike(turned, scan)
    assert (scan.array[:, :, :3] == -1000).all()
    assert {*scan.notes} ^ {*turned.notes} == {scan.notes[0], turned.notes[0]}  # how it was turned


# ---------------------------------------------------------------- the order of slices


def stack(folder, names, images=None, log=""):
    """Write one TIFF or picture for each name."""
    folder.mkdir()
    for name, plane in zip(names, grey(len(names)) if images is None else images, strict=True):
        imagecodecs.imwrite(folder / name, plane)
    if log:
        (folder / "scan.log").write_text(log)
    return folder


@pytest.mark.parametrize(
    "pattern", ["s{:04d}", "s{:04d}_8bit", "s{:04d}_50um", "scan2_{:04d}_rec1", "{}", "7_{}_7 (1)"]
)
@pytest.mark.parametrize("ending", ["tif", "png"])
def test_lost_slices_are_noticed_wherever_the_number_stands(tmp_path, pattern, ending):
    names = [f"{pattern.format(k)}.{ending}" for k in range(8, 14)]
    whole = read_volume(stack(tmp_path / "whole", names), **MICRO)
    assert np.array_equal(whole.array, grey(6))  # 10 comes after 9
    for lost in ([2], [1, 2], [3, 4]):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"lost{lost}")
        for k in lost:
            (folder / names[k]).unlink()
        line = refused(GeometryError, folder, "even numbering", names[max(lost) + 1], **MICRO)
        assert names[min(lost) - 1] in line
        forced = read_volume(folder, force=True, **MICRO)
        assert any("even numbering" in note for note in forced.notes)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a1", "a2", "b1", "b2"], "names that differ by their numbers only"),
        (["1", "2", "overview"], "names that differ by their numbers only"),
        (["apex", "base"], "names that differ by their numbers only"),
        (["z1_c1", "z1_c2", "z2_c1", "z2_c2"], "even numbering"),
        (["s1_at9", "s2_at8", "s3_at7"], "numbers that rise together"),
        (["s1", "s01"], "numbers that rise together"),
        (["s1_120000", "s2_120003", "s3_120009"], "even numbering"),
        (["s0", "s10", "s20"], "its numbers rise by 10"),
        (["s1_p10", "s2_p20", "s3_p30"], "its numbers rise by 10"),
    ],
)
def test_names_that_leave_the_order_open(tmp_path, names, word):
    folder = stack(tmp_path / "s", [f"{name}.tif" for name in names])
    refused(GeometryError, folder, word, **MICRO)
    assert any(word in note for note in read_volume(folder, force=True, **MICRO).notes)
    if "rise by" in word:  # whoever gives the distance of slices knows what is there
        how = {"modality": "micro", "voxel_um": (500, 50, 50)}
        assert read_volume(folder, **how).spacing_mm == (0.5, 0.05, 0.05)


RECONSTRUCTED = "[Acquisition]\nNumber of Rows=9\n[Reconstruction]\nPixel Size (um)=20\n"


@pytest.mark.parametrize(
    ("log", "step", "word"),
    [
        (RECONSTRUCTED + "Sections Count=6\n", 1, None),
        (RECONSTRUCTED + "Sections Count=8\n", 1, "expected 8 slices beside it, got 6"),
        (RECONSTRUCTED + "Sections Count=6\nSection to Section Step=3\n", 3, None),
        (RECONSTRUCTED + "Section to Section Step=2\n", 4, "its numbers rise by 4"),
        (RECONSTRUCTED, 2, "its numbers rise by 2"),
        ("[Acquisition]\nImage Pixel Size (um)=20\n", 1, None),
        (
            "[Acquisition]\nImage Pixel Size (um)=20\nNumber of Rows=40\nNumber of Columns=48\n",
            1,
            "projections",
        ),
    ],
)
def test_side_files_describe_the_stack_they_lie_beside(tmp_path, log, step, word):
    names = [f"s_rec{step * k:04d}.tif" for k in range(6)]
    folder = stack(tmp_path / "s", names, log=log)
    if word:
        refused(GeometryError, folder, word, modality="micro")
        assert any(word in note for note in read_volume(folder, modality="micro", force=True).notes)
    else:
        apart = 3 if "Step=3" in log else 1
        scan = read_volume(folder, modality="micro")
        assert scan.spacing_mm == pytest.approx((0.02 * apart, 0.02, 0.02))


def test_files_that_would_be_missing_without_a_word(tmp_path):
    names = [f"s{k}.png" for k in range(5)]
    folder = stack(tmp_path / "s", names)
    for name in (".DS_Store", "._s0.png", ".s5.png", "s_spr.png", "notes.txt"):
        (folder / name).write_bytes(b"hidden, an overview, a text")
    scan = read_volume(folder, **MICRO)
    assert "5 other files in the folder left out" in scan.notes
    (folder / "s5.png").symlink_to(tmp_path / "gone.png")
    refused(FileError, folder, "s5.png: a link to a file that is not there", **MICRO)
    (folder / "s5.png").unlink()
    (folder / "s5.png.gz").write_bytes(b"packed")
    refused(FileError, folder, "s5.png.gz: a packed slice", **MICRO)
    (folder / "s5.png.gz").unlink()
    (folder / "s5.png").write_bytes(b"")
    refused(FileError, folder, "s5.png", "cut short", **MICRO)
    folder = series(tmp_path / "d", chest())
    (folder / "06").symlink_to(folder / "gone")
    refused(FileError, folder, "06: a link")


# ---------------------------------------------------------------- PNG, BMP, JPEG 2000


def pictures(folder, ending, images):
    """Write one picture for each slice."""
    folder.mkdir(parents=True)
    for k, plane in enumerate(images):
        path = folder / f"bone_rec{k:04d}.{ending}"
        if ending in ("jp2", "j2k"):
            how = {"codecformat": ending, "level": 0, "reversible": True}
            path.write_bytes(imagecodecs.jpeg2k_encode(plane, **how))
        else:
            Image.fromarray(plane).save(path)
    return folder


CASES = [("png", np.uint8), ("png", np.uint16), ("bmp", np.uint8), ("jp2", np.uint8)]
CASES += [("jp2", np.uint16), ("j2k", np.uint16)]


@pytest.mark.parametrize(("ending", "kind"), CASES)
@pytest.mark.parametrize("width", [48, 47])
def test_pictures_of_a_scanner(tmp_path, ending, kind, width):
    images = grey(5, 40, width, kind)
    folder = pictures(tmp_path / "s", ending, images)
    refused(GeometryError, folder, "does not say its voxel size", modality="micro")
    scan = read_volume(folder, **MICRO, lazy=True)
    assert np.array_equal(scan.array, images)
    assert scan.array.dtype == kind
    assert np.array_equal(read_volume(folder, slices=(1, 3), **MICRO).array, images[1:3])
    one = read_volume(folder / f"bone_rec0002.{ending}", **MICRO)
    assert np.array_equal(one.array, images[2:3])
    size = f"Result Image Width (pixels)={width}\nResult Image Height (pixels)=40\n"
    (folder / "bone_rec.log").write_text(f"[Reconstruction]\nPixel Size (um)=19.5\n{size}")
    logged = read_volume(folder, modality="micro")
    assert logged.spacing_mm == pytest.approx((0.0195,) * 3)
    info = scan_info(folder)
    assert (info.modality, info.refusals) == ("micro", ())
    assert info.values == (images.min(), images.max())
    with pytest.raises(MMSRError):  # 8 bits, or hardly any air
        read_volume(folder)
    middle = folder / f"bone_rec0002.{ending}"
    data = middle.read_bytes()
    for keep in (0, 10, len(data) // 3, len(data) * 9 // 10, len(data) - 20):
        middle.write_bytes(data[:keep])
        refused(FileError, folder, middle.name, modality="micro")
    middle.write_bytes(data)
    other = pictures(tmp_path / "t", ending, grey(1, 40, 30, kind)) / f"bone_rec0000.{ending}"
    shutil.copy(other, middle)
    refused(ShapeError, folder, middle.name, "expected one page", modality="micro")


def test_pictures_that_are_not_grey(tmp_path):
    plane = grey(1, kind=np.uint8)[0]
    inverted = Image.fromarray(plane)
    inverted.putpalette(np.repeat(np.arange(256, dtype=np.uint8)[::-1], 3).tobytes())
    odd = {
        "rgb.png": Image.fromarray(np.dstack([plane] * 3)),
        "alpha.png": Image.fromarray(np.dstack([plane] * 2), "LA"),
        "bit.png": Image.fromarray(plane > 99),
        "palette.png": inverted,
        "palette.bmp": inverted,
        "rgb.bmp": Image.fromarray(np.dstack([plane] * 3)),
        "rgb.jp2": Image.fromarray(np.dstack([plane] * 3)),
    }
    for name, image in odd.items():
        image.save(tmp_path / name)
        refused(FileError, tmp_path / name, "grey of 8 or 16 bits", **MICRO)
    inverted.quantize(4).save(tmp_path / "few.png", bits=2)
    refused(FileError, tmp_path / "few.png", "grey of 8 or 16 bits", **MICRO)


def test_malformed_pictures_are_refused_in_a_line_or_read_as_they_were(tmp_path, capfd):
    rng = np.random.default_rng(0)
    for ending, kind in CASES[1:5]:
        images = grey(2, 20, 24, kind)
        folder = pictures(tmp_path / ending / str(kind.__name__), ending, images)
        path = folder / f"bone_rec0001.{ending}"
        data, count = path.read_bytes(), 0
        for _ in range(20):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), rng.integers(1, 4)).tolist():
                broken[at] ^= 1 << rng.integers(0, 8)
            path.write_bytes(broken)
            if line_of(folder, **MICRO):
                count += 1
            elif ending != "jp2":  # which has no checksum; BMP has none, either: as others read it
                scan = read_volume(folder, **MICRO)
                assert np.array_equal(scan.array[1], imagecodecs.imread(path))
        assert count > 3 or ending != "png"
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_pictures_beside_other_slices_are_previews(tmp_path):
    folder = series(tmp_path / "top" / "dicom", chest())
    pictures(folder / "p", "png", grey(2))
    for file in (folder / "p").iterdir():
        file.rename(folder / file.name)
    (folder / "p").rmdir()
    assert np.array_equal(read_volume(folder).array, chest())
    assert "2 other files in the folder left out" in read_volume(folder).notes
    imagecodecs.imwrite(tmp_path / "top" / "view.png", grey(1)[0])
    assert np.array_equal(read_volume(tmp_path / "top").array, chest())
    both = pictures(tmp_path / "both", "png", grey(2))
    imagecodecs.imwrite(both / "a.bmp", grey(1, kind=np.uint8)[0])
    refused(FileError, both, "1 BMP, 2 PNG", **MICRO)
    deep = pictures(tmp_path / "deep" / "er", "png", grey(2)).parent
    refused(FileError, deep, "folders with 2 PNG files", **MICRO)
    mask = pictures(tmp_path / "mask", "png", (grey(6, kind=np.uint8) > 99).astype(np.uint8))
    scan = Volume(chest(), (2.5, 0.5, 0.6))
    assert np.array_equal(read_mask(mask, scan), grey(6, kind=np.uint8) > 99)


def test_a_picture_is_inspected_by_its_header(tmp_path):
    """A stack of thousands is not decoded before anybody asks for a slice."""
    folder = pictures(tmp_path / "s", "png", grey(3))
    found = find_scan(folder)
    assert found.format in FORMATS
    (head,) = inspect_file(found.format, found.files[0])
    assert (head.size, head.dtype, head.pages) == ((40, 48), np.uint16, 1)
    with (folder / "bone_rec0000.png").open("r+b") as f:
        f.truncate(100)
    assert inspect_file(found.format, found.files[0])[0].size == (40, 48)


def test_prepare_reads_pictures(tmp_path):
    images = grey(3, 40, 48)
    folder = pictures(tmp_path / "foam", "png", images)
    how = {"micro": str(folder), "micro_voxel_um": 78, "micro_window": [4000, 13000]}
    (case,) = micro_cases(PrepareSettings(out=str(tmp_path / "out"), **how))
    assert np.array_equal(case.volume.array, images)
    assert case.volume.spacing_mm == pytest.approx((0.078,) * 3)
