"""Broken, tilted, mixed and mislabelled scans are refused in one line; sound ones come back whole.

Scans of patients are read from the folder named by MMSR_REAL_DATA; without it those tests are
skipped. All others write what they need.
"""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from dicom_maker import change, chest, in_order, refused, series
from matplotlib.text import Text
from peak import PEAK_BYTES
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mmsr.core import RESEARCH_ONLY, FileError, GeometryError, RangeError, SettingsError, ShapeError
from mmsr.data.volume import Volume
from mmsr.scans.read import read_volume
from mmsr.scans.scan_summary import info_picture, info_text, scan_info
from mmsr.scans.slices import padding_values
from mmsr.scans.write import WRITABLE, write_volume

FILES = (".mha", ".nii", ".nii.gz", ".nrrd")
REAL = Path(os.environ.get("MMSR_REAL_DATA", "/nowhere"))
real = pytest.mark.skipif(
    not (REAL / "nlst_chest_dicom").is_dir(), reason="MMSR_REAL_DATA does not name the real scans"
)


# ---------------------------------------------------------------- real scans that are sound


@pytest.mark.slow
@real
def test_chest_dicom_is_read_as_simpleitk_reads_it_except_for_padding():
    scan = read_volume(REAL / "nlst_chest_dicom")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(REAL / "nlst_chest_dicom"))
    other = sitk.ReadImage(names)
    raw = sitk.GetArrayViewFromImage(other)
    assert scan.array.shape == (143, 512, 512)
    assert scan.array.dtype == np.int16
    assert scan.spacing_mm == pytest.approx((2.0, 0.54, 0.54), abs=1e-9)
    assert scan.origin_mm == pytest.approx(other.GetOrigin(), abs=1e-9)
    assert scan.direction == pytest.approx(other.GetDirection(), abs=1e-9)
    padding = raw == -2048
    assert padding.sum() > 8_000_000
    assert (scan.array[padding] == -1000).all()
    assert np.array_equal(scan.array[~padding], raw[~padding])  # noise down to -1454 HU included
    assert f"{padding.sum()} padding voxels (-2048 HU) set to -1000 HU" in scan.notes
    assert (scan.modality, scan.unit) == ("clinical", "HU")


@real
def test_some_slices_of_the_chest_are_those_of_the_whole():
    part = read_volume(REAL / "nlst_chest_dicom", slices=(60, 62))
    one = read_volume(REAL / "nlst_chest_dicom", slices=(61, 62))
    assert part.array.shape == (2, 512, 512)
    assert np.array_equal(part.array[1:], one.array)
    assert part.world_mm((1, 0, 0)) == pytest.approx(one.origin_mm, abs=1e-9)
    crop = read_volume(REAL / "nlst_chest_crop.nrrd")
    z = np.array([part.origin_mm[2], crop.origin_mm[2]])  # the crop is cut from the same scan
    assert (z[0] - z[1]) / 2.0 == pytest.approx(round((z[0] - z[1]) / 2.0))


@pytest.mark.slow
@real
def test_chest_crop_lies_where_it_was_cut():
    crop = read_volume(REAL / "nlst_chest_crop.nrrd")
    whole = read_volume(REAL / "nlst_chest_dicom")
    assert crop.array.shape == (48, 256, 256)
    x, y, z = (np.array(crop.origin_mm) - whole.origin_mm) / whole.spacing_mm[::-1]
    i, j, k = (round(float(v)) for v in (x, y, z))
    assert (x, y, z) == pytest.approx((i, j, k), abs=1e-3)
    same = whole.array[k : k + 48, j : j + 256, i : i + 256]
    assert np.array_equal(crop.array, same)
    assert crop.array.min() == -1219
    assert crop.notes == ()
    middle = read_volume(REAL / "nlst_chest_crop.nrrd", slices=(20, 22))
    assert np.array_equal(middle.array, crop.array[20:22])
    assert middle.origin_mm == pytest.approx(crop.take(20, 22).origin_mm)


@real
def test_micro_ct_tiff_folder():
    folder = REAL / "bone_microct_tiff"
    refused(GeometryError, folder, "voxel_um", modality="micro")
    bone = read_volume(folder, modality="micro", voxel_um=19.5)
    assert bone.array.shape == (200, 200, 200)
    assert bone.array.dtype == np.uint8
    assert bone.spacing_mm == pytest.approx((0.0195,) * 3)
    assert (bone.modality, bone.unit) == ("micro", "grey")
    last = tifffile.imread(folder / "3155_D_4_bc_0199.tif")
    assert np.array_equal(bone.array[199], last)
    part = read_volume(folder, modality="micro", voxel_um=19.5, slices=(10, 12))
    assert np.array_equal(part.array, bone.array[10:12])
    assert part.origin_mm == pytest.approx((0, 0, 0.195))
    refused(GeometryError, folder, "µm taken for mm", modality="micro", voxel_mm=19.5)
    refused(RangeError, folder, "8-bit", voxel_mm=0.5)


# ---------------------------------------------------------------- real scans that are not

BAD = [
    ("gantry_tilt", GeometryError, ("tilted gantry", "18.5°")),
    ("truncated/empty.nrrd", FileError, ("empty",)),
    ("truncated/not_an_image.nii.gz", FileError, ("packed data",)),
    ("truncated/truncated.nii.gz", FileError, ("cut short",)),
    ("truncated/truncated.nrrd", FileError, ("cut short",)),
    ("truncated/truncated_jpegls.dcm", FileError, ("cut short",)),
    ("truncated/truncated_uncompressed.dcm", FileError, ("cut short",)),
    ("dicom_misc/ExplVR_BigEndNoMeta.dcm", FileError, ("expected a DICOM file",)),
    ("dicom_misc/MR_truncated.dcm", FileError, ("expected modality CT, got MR",)),
    ("dicom_misc/badVR.dcm", FileError, ("RTDOSE",)),
    ("dicom_misc/eCT_Supplemental.dcm", FileError, ("multi-frame",)),
    ("dicom_misc/meta_missing_tsyntax.dcm", FileError, ("transfer syntax",)),
    ("dicom_misc/no_meta.dcm", FileError, ("expected a DICOM file",)),
    ("dicom_misc/rtplan_truncated.dcm", FileError, ("RTPLAN",)),
    ("example4d.nii.gz", ShapeError, ("4-D",)),
    ("wrong_modality", FileError, ("expected modality CT, got MR", "1-060.dcm")),
    ("wrong_modality/1-060.dcm", FileError, ("expected modality CT, got MR",)),
    ("oblique_not_hu.nii.gz", RangeError, ("8-bit", "HU")),
]


@real
@pytest.mark.parametrize(("name", "kind", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_file(name, kind, words, capfd):
    refused(kind, REAL / "bad" / name, *words)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # the line of the error is all there is to read


@real
def test_every_bad_file_has_a_test():
    tested = {name for name, *_ in BAD} | {"dicom_misc/CT_small.dcm"}
    for file in (REAL / "bad").rglob("*"):
        name = file.relative_to(REAL / "bad")
        assert file.is_dir() or {str(name), str(name.parent)} & tested, name


@real
def test_a_tilted_slice_alone_is_sound_and_force_cannot_straighten_the_stack():
    one = read_volume(REAL / "bad/gantry_tilt/I210.dcm")
    assert one.spacing_mm == pytest.approx((2.5, 0.482421875, 0.482421875))
    refused(GeometryError, REAL / "bad/gantry_tilt", "tilted", force=True)


@real
def test_the_sound_file_among_the_bad():
    path = REAL / "bad/dicom_misc/CT_small.dcm"
    scan = read_volume(path)
    d = pydicom.dcmread(path)
    expected = d.pixel_array * int(d.RescaleSlope) + int(d.RescaleIntercept)
    assert np.array_equal(scan.array[0], np.where(d.pixel_array == -2000, -1000, expected))
    assert scan.spacing_mm == pytest.approx((5.0, 0.661468, 0.661468))
    assert any("single slice" in note for note in scan.notes)


@real
def test_not_hu_can_be_overruled_and_is_noted():
    scan = read_volume(REAL / "bad/oblique_not_hu.nii.gz", force=True)
    other = sitk.ReadImage(str(REAL / "bad/oblique_not_hu.nii.gz"))
    assert np.array_equal(scan.array, sitk.GetArrayViewFromImage(other))
    assert scan.direction == pytest.approx(other.GetDirection())
    assert (
        abs(
            np.reshape(scan.direction, (3, 3))
            - np.diag(np.diag(np.reshape(scan.direction, (3, 3))))
        ).max()
        > 0.01
    )
    assert sum("taken on trust" in note for note in scan.notes) == 2  # 8-bit, and no air


# ---------------------------------------------------------------- DICOM series


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_slices_are_sorted_by_place_and_rescaled_one_by_one(tmp_path, syntax):
    hu = chest()
    folder = series(tmp_path / "s", hu, intercepts=(-1024, -1000, -1100), syntax=syntax)
    scan = read_volume(folder)
    assert np.array_equal(scan.array, hu)
    for k, path in enumerate(in_order(folder)):  # pydicom as the independent reader
        d = pydicom.dcmread(path)
        assert np.array_equal(scan.array[k], d.pixel_array * d.RescaleSlope + d.RescaleIntercept)
    assert scan.spacing_mm == (2.5, 0.5, 0.6)
    assert scan.origin_mm == (-10.0, 20.0, 30.0)
    assert "Secret" not in repr(scan)


def test_fractional_slope_is_rounded_and_noted(tmp_path):
    folder = series(tmp_path / "s", chest(), RescaleSlope=0.7)
    scan = read_volume(folder)
    d = pydicom.dcmread(in_order(folder)[2])
    assert np.array_equal(scan.array[2], np.rint(d.pixel_array * 0.7 - 1024))
    assert "values rounded to whole HU" in scan.notes


@pytest.mark.parametrize("turn", ["sagittal", "feet first", "oblique"])
def test_orientation_is_that_of_simpleitk(tmp_path, turn):
    c, s = np.cos(0.3), np.sin(0.3)
    cosines, step = {
        "sagittal": ([0, 1, 0, 0, 0, -1], (-2.5, 0, 0)),
        "feet first": ([-1, 0, 0, 0, 1, 0], (0, 0, -2.5)),
        "oblique": ([c, s, 0, -s, c, 0], (0, 0, 2.5)),
    }[turn]
    folder = series(
        tmp_path / "s", chest(), step=step, ImageOrientationPatient=[f"{v:.10g}" for v in cosines]
    )
    if turn == "sagittal":
        refused(GeometryError, folder, "expected axial slices, got sagittal", "--reorient")
    scan = read_volume(folder, force=turn == "sagittal")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    other = sitk.ReadImage(names)
    assert np.array_equal(scan.array, sitk.GetArrayViewFromImage(other))
    far = (5, 39, 47)
    assert scan.world_mm(far) == pytest.approx(
        other.TransformIndexToPhysicalPoint(far[::-1]), abs=1e-5
    )
    assert scan.world_mm((0, 0, 0)) == pytest.approx(other.GetOrigin())


def test_declared_padding_becomes_air_and_tissue_values_do_not(tmp_path):
    hu = chest()
    hu[:, :, :3] = -1050
    marked = read_volume(series(tmp_path / "a", hu, intercepts=(-1100,), PixelPaddingValue=50))
    assert (marked.array[:, :, :3] == -1000).all()
    assert np.array_equal(marked.array[:, :, 3:], hu[:, :, 3:])
    assert any("marked in the file" in note for note in marked.notes)
    water = read_volume(series(tmp_path / "b", hu, intercepts=(-1100,), PixelPaddingValue=1100))
    assert np.array_equal(water.array, hu)
    assert any("left alone" in note for note in water.notes)


@pytest.mark.parametrize("value", [-2048, -1500, -3024, -32768])
def test_unmarked_padding_becomes_air(tmp_path, value):
    hu = chest()
    hu[:, :, :3] = value
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.6, 0.5, 2.5))
    sitk.WriteImage(image, str(tmp_path / "p.nrrd"))
    scan = read_volume(tmp_path / "p.nrrd")
    assert (scan.array[:, :, :3] == -1000).all()
    assert np.array_equal(scan.array[:, :, 3:], hu[:, :, 3:])
    assert scan.notes[0].startswith(f"{6 * 40 * 3} padding voxels")


def test_noise_is_no_padding():
    rng = np.random.default_rng(0)
    for spread in (20, 80, 110):
        noise = np.rint(rng.normal(-1000, spread, 3_000_000)).clip(-32768).astype(np.int64)
        counts = np.bincount(noise + 32768, minlength=65536)
        assert padding_values(counts).size == 0
        clipped = np.bincount(noise.clip(-1024) + 32768, minlength=65536)
        assert padding_values(clipped).size == 0  # twelve-bit scanners cut at -1024
        large = np.bincount(noise[:50_000] + 32768, minlength=65536) * 64
        assert padding_values(large).size == 0  # each pixel of an enlarged scan comes 64 times
        even = np.bincount(noise // 4 * 4 + 32768, minlength=65536)
        assert padding_values(even).size == 0  # a slope of 4 leaves gaps, not padding


def test_slice_given_twice(tmp_path):
    folder = series(tmp_path / "s", chest())
    (folder / "copy.dcm").write_bytes((folder / "03.dcm").read_bytes())
    refused(GeometryError, folder, "same place", "03.dcm", "copy.dcm", force=True)


def test_missing_slice_names_its_neighbours(tmp_path):
    folder = series(tmp_path / "s", chest())
    gone = in_order(folder)
    gone[3].unlink()
    refused(GeometryError, folder, "1 missing", gone[2].name, gone[4].name)


def test_missing_slice_is_found_even_when_other_slices_are_asked_for(tmp_path):
    folder = series(tmp_path / "s", chest())
    in_order(folder)[4].unlink()
    refused(GeometryError, folder, "missing", slices=(0, 2))


def test_change_of_step(tmp_path):
    folder = series(tmp_path / "s", chest())
    for k, path in enumerate(in_order(folder)):
        change(path, ImagePositionPatient=[-10, 20, 30 + 2.5 * k + max(k - 3, 0)])
    refused(GeometryError, folder, "uneven", "2.5 to 3.5 mm")


def test_rounded_positions_are_even_enough(tmp_path):
    folder = series(tmp_path / "s", chest(), step=(0, 0, 1.25))
    for k, path in enumerate(in_order(folder)):
        change(path, ImagePositionPatient=[-10, 20, round(30 + 1.25 * k, 1)])
    assert read_volume(folder).spacing_mm[0] == pytest.approx(1.25, abs=0.02)


@pytest.mark.parametrize("degrees", [-20, 1, 18.5])
def test_tilt(tmp_path, degrees):
    shift = 2.5 * np.tan(np.radians(degrees))
    folder = series(tmp_path / "s", chest(12), step=(0, round(shift, 6), 2.5))
    refused(GeometryError, folder, "tilted gantry", f"{abs(degrees):.1f}°")


def test_two_series_are_listed(tmp_path):
    folder = series(tmp_path / "s", chest())
    series(tmp_path / "t", chest(2))
    for path in (tmp_path / "t").iterdir():
        path.rename(folder / f"other{path.name}")
    line = refused(FileError, folder, "expected one series, got 2", "6 slices", "2 slices")
    assert "Secret" not in line


def test_series_in_folders_are_listed_and_chosen(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    long, short = chest(), chest(4, seed=1)
    series(top / "a", long, SeriesNumber=3, SeriesDescription="Secret chest")
    series(top / "b", short, SeriesNumber=5)
    (top / "b" / "notes.txt").write_text("not a slice")
    line = refused(FileError, top, "1: CT", "2: CT", "6 slices", "4 slices", "--series")
    assert "Secret" not in line
    assert np.array_equal(read_volume(top, series=1).array, long)
    chosen = read_volume(top, series="2")
    assert np.array_equal(chosen.array, short)
    assert any("1 other file" in note for note in chosen.notes)
    uid = str(pydicom.dcmread(top / "b" / "00.dcm").SeriesInstanceUID)
    assert np.array_equal(np.asarray(read_volume(top, series=uid, lazy=True).array), short)
    refused(SettingsError, top, "from 1 to 2", series=9)


def test_info_shows_nothing_of_the_patient(tmp_path):
    secret = {
        "PatientBirthDate": "19010203",
        "InstitutionName": "Secret Clinic",
        "AccessionNumber": "Secret-ACC",
        "SeriesDescription": "Secret thorax",
        "StudyDate": "20200304",
        "ConvolutionKernel": "B70f",
    }
    folder = series(tmp_path / "s", chest(), **secret)
    in_order(folder)[3].unlink()  # refused, too: the line must not say it either
    info = scan_info(folder)
    figure = info_picture(info)
    shown = [info_text(info), *(t.get_text() for t in figure.findobj(Text)), repr(info)]
    assert "B70f" in shown[0]
    assert "missing slices: 1 (1 at 5 mm" in shown[0]
    for word in ("Secret", "19010203", "20200304"):
        assert not any(word in text for text in shown)


def test_slices_of_other_kinds(tmp_path):
    folder = series(tmp_path / "s", chest())
    odd = in_order(folder)[2]
    change(odd, PixelSpacing=[0.7, 0.7])
    refused(GeometryError, folder, "PixelSpacing", odd.name)
    change(odd, PixelSpacing=[0.5, 0.6], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    refused(GeometryError, folder, "ImageOrientationPatient")


@pytest.mark.parametrize(
    ("tags", "kind", "word"),
    [
        ({"Modality": "PT"}, FileError, "got PT"),
        ({"Modality": None, "SOPClassUID": "1.2.3"}, FileError, "got none"),
        ({"NumberOfFrames": 2}, FileError, "multi-frame"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, FileError, "grey"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, FileError, "localizer"),
        ({"ImagePositionPatient": None}, GeometryError, "ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, GeometryError, "ImageOrientationPatient"),
        ({"PixelSpacing": None}, GeometryError, "PixelSpacing"),
        ({"RescaleIntercept": None, "RescaleSlope": None}, RangeError, "RescaleSlope"),
        ({"RescaleType": "OD"}, RangeError, "OD"),
    ],
)
def test_header_that_does_not_fit(tmp_path, tags, kind, word):
    folder = series(tmp_path / "s", chest(), **tags)
    refused(kind, folder, word, ".dcm")


def test_spacing_in_micrometres(tmp_path):
    folder = series(tmp_path / "s", chest(), PixelSpacing=[0.000625, 0.000625])
    refused(GeometryError, folder, "mm taken for µm")
    assert read_volume(folder, force=True).spacing_mm[1] == 0.000625


def test_single_slice_without_thickness(tmp_path):
    folder = series(tmp_path / "s", chest(1), SliceThickness=None)
    refused(GeometryError, folder, "thickness")
    refused(GeometryError, folder / "00.dcm", "thickness")


@pytest.mark.parametrize("keep", [100, 140, 1000, 0.6, 0.999])
def test_dicom_cut_short(tmp_path, keep):
    folder = series(tmp_path / "s", chest())
    path = folder / "02.dcm"
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(len(data) * keep)])
    refused(FileError, folder, "02.dcm")


@real
def test_packed_dicom_cut_short_anywhere(tmp_path):
    data = (REAL / "nlst_chest_dicom/0071.dcm").read_bytes()
    for keep in (0.3, 0.9, 0.9999):
        (tmp_path / "cut.dcm").write_bytes(data[: int(len(data) * keep)])
        refused(FileError, tmp_path / "cut.dcm", "cut short")


def test_damaged_pixels_are_one_line(tmp_path):
    folder = series(tmp_path / "s", chest(), syntax=ExplicitVRLittleEndian)
    path = folder / "01.dcm"
    data = path.read_bytes()
    at = data.index(b"1.2.840.10008.1.2.1\0")
    path.write_bytes(data[:at] + b"1.2.840.10008.1.2.4\0" + data[at + 20 :])  # a packing unknown
    refused(FileError, folder, "01.dcm")


# ---------------------------------------------------------------- folders


def test_folders_that_are_no_scan(tmp_path):
    refused(FileError, tmp_path / "gone", "no such file")
    (tmp_path / "empty").mkdir()
    refused(FileError, tmp_path / "empty", "no files")
    both = series(tmp_path / "both", chest())
    tifffile.imwrite(both / "a.tif", chest()[0])
    refused(FileError, both, "6 DICOM", "1 TIFF")
    (tmp_path / "text.txt").write_text("hello")
    refused(FileError, tmp_path / "text.txt", "NIfTI")
    with pytest.raises(SettingsError, match="modality"):
        read_volume(both, modality="mr")


def test_files_without_an_ending_are_dicom_by_their_mark(tmp_path):
    folder = series(tmp_path / "s", chest())
    for path in folder.iterdir():
        path.rename(path.with_suffix(""))
    (folder / "readme.txt").write_text("not a slice")
    (folder / ".hidden").write_text("not a slice")
    assert np.array_equal(read_volume(folder).array, chest())


@pytest.mark.parametrize("wanted", [(3, 3), (4, 2), (-1, 2), (0, 7)])
def test_slices_that_are_not_there(tmp_path, wanted):
    refused(RangeError, series(tmp_path / "s", chest()), "6 slices", slices=wanted)


# ---------------------------------------------------------------- NIfTI, NRRD, MetaImage


@pytest.fixture
def scan():
    c, s = np.cos(np.radians(25)), np.sin(np.radians(25))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, s], [0, s, -c]]  # turned twice, and flipped
    )
    return Volume(
        chest(), (2.5, 0.5, 0.6), (-150.7812, -160.9375, 928.125), tuple(turn.ravel().tolist())
    )


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("turn", ["none", "twice and flipped", "upside down"])
def test_written_geometry_is_that_of_independent_readers(tmp_path, scan, ending, turn):
    if turn == "none":
        scan = scan._replace(direction=Volume._field_defaults["direction"])
    elif turn == "upside down":
        scan = scan._replace(direction=(0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    path = tmp_path / f"v{ending}"
    write_volume(path, scan)
    corners = np.array([(k, j, i) for k in (0, 5) for j in (0, 39) for i in (0, 47)])
    back = read_volume(path)
    assert np.array_equal(back.array, scan.array)
    close = 1e-4 if "nii" in ending else 1e-9
    assert back.world_mm(corners) == pytest.approx(scan.world_mm(corners), abs=close)
    other = sitk.ReadImage(str(path))
    places = [other.TransformIndexToPhysicalPoint(tuple(map(int, c[::-1]))) for c in corners]
    assert np.array(places) == pytest.approx(scan.world_mm(corners), abs=1e-4)
    assert np.array_equal(sitk.GetArrayViewFromImage(other), scan.array)
    if "nii" in ending:
        nifti = nibabel.load(path)
        ras = nibabel.affines.apply_affine(nifti.affine, corners[:, ::-1])
        assert ras * (-1, -1, 1) == pytest.approx(scan.world_mm(corners), abs=1e-4)
        assert np.array_equal(np.asarray(nifti.dataobj).T, scan.array)
    part = read_volume(path, slices=(2, 4))
    assert np.array_equal(part.array, scan.array[2:4])
    assert part.world_mm(corners) == pytest.approx(scan.take(2, 4).world_mm(corners), abs=close)
    write_volume(tmp_path / f"one{ending}", scan.take(3, 4))
    one = read_volume(tmp_path / f"one{ending}")
    assert one.array.shape == (1, 40, 48)
    assert one.spacing_mm == pytest.approx(scan.spacing_mm, abs=1e-6)


@pytest.mark.parametrize("ending", FILES)
def test_files_cut_short_at_every_tenth(tmp_path, scan, ending):
    path = tmp_path / f"v{ending}"
    write_volume(path, scan)
    data = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        refused(FileError, path)
    path.write_bytes(data[:-1])
    refused(FileError, path, "cut short")
    path.write_bytes(data)
    assert np.array_equal(read_volume(path).array, scan.array)


def test_packed_nrrd_and_metaimage_cut_short(tmp_path, scan):
    image = sitk.GetImageFromArray(scan.array)
    for name in ("v.nrrd", "v.mha"):
        sitk.WriteImage(image, str(tmp_path / name), useCompression=True)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-9])
        refused(FileError, tmp_path / name, "cut short")


def test_damaged_gzip_and_gzip_in_members(tmp_path, scan):
    write_volume(tmp_path / "v.nii", scan)
    plain = (tmp_path / "v.nii").read_bytes()
    half = len(plain) // 2
    members = gzip.compress(plain[:half]) + gzip.compress(plain[half:])  # as bgzip and pigz do
    (tmp_path / "m.nii.gz").write_bytes(members)
    assert np.array_equal(read_volume(tmp_path / "m.nii.gz").array, scan.array)
    packed = bytearray(gzip.compress(plain))
    packed[-7] ^= 1  # the checksum
    (tmp_path / "d.nii.gz").write_bytes(packed)
    refused(FileError, tmp_path / "d.nii.gz", "damaged")
    (tmp_path / "s.nii.gz").write_bytes(gzip.compress(plain[:-500]))  # whole stream, short data
    refused(FileError, tmp_path / "s.nii.gz", "cut short")


def test_detached_data_file_missing_or_short(tmp_path, scan):
    sitk.WriteImage(sitk.GetImageFromArray(scan.array), str(tmp_path / "v.mhd"))
    raw = tmp_path / "v.raw"
    data = raw.read_bytes()
    assert np.array_equal(read_volume(tmp_path / "v.mhd").array, scan.array)
    raw.write_bytes(data[:-2])
    refused(FileError, tmp_path / "v.mhd", "cut short", "v.raw")
    raw.unlink()
    refused(FileError, tmp_path / "v.mhd", "v.raw")


def edit(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_headers_without_geometry(tmp_path, scan):
    upright = scan._replace(direction=Volume._field_defaults["direction"])
    write_volume(tmp_path / "v.mha", upright)
    edit(tmp_path / "v.mha", b"ElementSpacing", b"ElementSpecing")
    refused(GeometryError, tmp_path / "v.mha", "voxel_mm")
    given = read_volume(tmp_path / "v.mha", voxel_mm=(2.5, 0.5, 0.6))
    assert given.spacing_mm == (2.5, 0.5, 0.6)
    write_volume(tmp_path / "t.mha", upright)
    edit(tmp_path / "t.mha", b"TransformMatrix", b"TronsformMatrix")
    refused(GeometryError, tmp_path / "t.mha", "oriented")
    assert read_volume(tmp_path / "t.mha", force=True).direction == upright.direction
    write_volume(tmp_path / "v.nrrd", upright)
    edit(tmp_path / "v.nrrd", b"space directions:", b"#pace directions:")
    refused((GeometryError), tmp_path / "v.nrrd", "voxel_mm")
    write_volume(tmp_path / "u.nrrd", upright)
    edit(tmp_path / "u.nrrd", b"encoding:", b'space units: "um" "um" "um"\nencoding:')
    refused(GeometryError, tmp_path / "u.nrrd", "voxel_mm")
    nifti = nibabel.Nifti1Image(scan.array.T, None)
    nifti.header.set_zooms((0.6, 0.5, 2.5))
    nifti.header["sform_code"] = nifti.header["qform_code"] = 0
    nibabel.save(nifti, tmp_path / "v.nii")
    refused(GeometryError, tmp_path / "v.nii", "oriented")
    nifti = nibabel.Nifti1Image(scan.array.T, np.diag([600.0, 500.0, 2500.0, 1.0]))
    nifti.header.set_xyzt_units("micron")
    nibabel.save(nifti, tmp_path / "um.nii")
    refused(GeometryError, tmp_path / "um.nii", "voxel")


def test_sheared_grids(tmp_path, scan):
    upright = scan._replace(direction=Volume._field_defaults["direction"])
    write_volume(tmp_path / "v.nrrd", upright)
    edit(tmp_path / "v.nrrd", b"(0.0,0.0,2.5)", b"(0.0,1.0,2.5)")
    refused(GeometryError, tmp_path / "v.nrrd", "sheared")
    affine = np.diag([0.6, 0.5, 2.5, 1.0])
    affine[1, 2] = 0.8
    nibabel.save(nibabel.Nifti1Image(scan.array.T, affine), tmp_path / "v.nii")
    refused(GeometryError, tmp_path / "v.nii", "sheared")


def test_sform_and_qform_that_disagree(tmp_path, scan):
    """Turned over, they are a contradiction; nearby, a note; the sform counts, as for nibabel."""
    path = tmp_path / "v.nii.gz"
    form, near, flipped = np.diag([0.6, 0.5, 2.5, 1]), np.eye(4), np.diag([-0.6, -0.5, 2.5, 1])
    near[:3] = form[:3]
    near[0, 3] = 2
    for codes in ((1, 1), (1, 2), (2, 1), (4, 1), (0, 1), (1, 0)):
        for qform in (form, near, flipped, form @ np.diag([-1, 1, 1, 1])):
            nifti = nibabel.Nifti1Image(scan.array.T, form)
            nifti.set_sform(form, codes[0])
            nifti.set_qform(qform, codes[1])
            nifti.header.set_xyzt_units("mm")
            nibabel.save(nifti, path)
            both = all(codes)
            if both and qform is not form and qform is not near:
                refused(FileError, path, "contradicts itself", "sform", "qform")
            read = read_volume(path, force=True)
            ras = nibabel.affines.apply_affine(nibabel.load(path).affine, (9, 7, 0))
            assert read.world_mm((0, 7, 9)) == pytest.approx(ras * (-1, -1, 1), abs=1e-4)
            assert len(read.notes) == int(both and qform is not form)


def test_four_dimensions_colour_and_complex(tmp_path, scan):
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), np.eye(4)), tmp_path / "a.nii"
    )
    refused(ShapeError, tmp_path / "a.nii", "4-D")
    nibabel.save(nibabel.Nifti1Image(scan.array.T[..., None], np.eye(4)), tmp_path / "b.nii")
    assert np.array_equal(read_volume(tmp_path / "b.nii").array, scan.array)
    sitk.WriteImage(sitk.Image(4, 5, sitk.sitkInt16), str(tmp_path / "c.nrrd"))
    refused(ShapeError, tmp_path / "c.nrrd", "2-D")
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3), str(tmp_path / "d.nrrd"))
    refused(FileError, tmp_path / "d.nrrd", "colour")


def test_values_that_are_not_hu(tmp_path, scan):
    def stored(name, values):
        write_volume(tmp_path / name, scan._replace(array=values))
        return tmp_path / name

    refused(RangeError, stored("a.nrrd", (scan.array + 1024).astype(np.uint16)), "look like HU")
    refused(RangeError, stored("b.nrrd", np.zeros((3, 4, 5), np.uint8)), "8-bit")
    refused(RangeError, stored("c.nrrd", (scan.array / 3000).astype(np.float32)), "look like HU")
    broken = scan.array.astype(np.float32)
    broken[0, 0, :7] = np.nan
    path = stored("d.mha", broken)
    refused(RangeError, path, "7 voxels are not finite")
    mended = read_volume(path, force=True)
    assert (mended.array[0, 0, :7] == -1000).all()
    assert np.array_equal(mended.array[1:], scan.array[1:])
    refused(RangeError, stored("e.mha", scan.array.astype(np.int32) * 100), "32767")
    refused(RangeError, path, "finite", modality="micro", voxel_mm=(2.5, 0.5, 0.6), force=True)


def test_a_voxel_size_that_contradicts_the_file(tmp_path, scan):
    write_volume(tmp_path / "v.mha", scan)
    refused(GeometryError, tmp_path / "v.mha", "leave voxel_mm", voxel_mm=1.0)
    assert read_volume(tmp_path / "v.mha", voxel_mm=(2.5, 0.5, 0.6)).spacing_mm == scan.spacing_mm
    forced = read_volume(tmp_path / "v.mha", voxel_um=800, force=True)
    assert forced.spacing_mm == (0.8, 0.8, 0.8)
    with pytest.raises(SettingsError, match="leave one out"):
        read_volume(tmp_path / "v.mha", voxel_mm=1, voxel_um=1000)
    for wrong in (0, -1, (1, 2), np.nan):
        with pytest.raises(SettingsError, match="positive"):
            read_volume(tmp_path / "v.mha", voxel_mm=wrong)


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize(
    "how", [{}, {"imagej": True}, {"compression": "zlib"}, {"metadata": None}, {"bigtiff": True}]
)
def test_tiff_file_whole_and_cut_short(tmp_path, how):
    grey = np.random.default_rng(0).integers(0, 65535, (10, 40, 50), dtype=np.uint16)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, grey, **how)
    options = {"modality": "micro", "voxel_um": (60, 50, 50)}
    micro = read_volume(path, **options)
    assert np.array_equal(micro.array, grey)
    assert micro.spacing_mm == pytest.approx((0.06, 0.05, 0.05))
    part = read_volume(path, slices=(3, 5), **options)
    assert np.array_equal(part.array, grey[3:5])
    assert part.origin_mm == pytest.approx((0, 0, 0.18))
    data = path.read_bytes()
    for keep in (0, 0.001, 0.1, 0.5, 0.6, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * keep)])
        refused(FileError, path, "cut short", **options)


def test_tiff_folder_in_the_order_of_numbers_with_nothing_missing(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65535, (12, 20, 30), dtype=np.uint16)
    folder = tmp_path / "stack"
    folder.mkdir()
    for k, plane in enumerate(grey):
        tifffile.imwrite(folder / f"scan7_{k}.tif", plane)  # 10 must come after 9
    options = {"modality": "micro", "voxel_um": 50}
    assert np.array_equal(read_volume(folder, **options).array, grey)
    data = (folder / "scan7_5.tif").read_bytes()
    (folder / "scan7_5.tif").unlink()
    refused(GeometryError, folder, "missing", "scan7_6.tif", **options)
    (folder / "scan7_5.tif").write_bytes(data[:-300])
    refused(FileError, folder, "cut short", "scan7_5.tif", **options)
    tifffile.imwrite(folder / "scan7_5.tif", grey[0, :, :20])
    refused(ShapeError, folder, "expected one page", "scan7_5.tif", **options)
    tifffile.imwrite(folder / "scan7_5.tif", np.zeros((20, 30, 3), np.uint8), photometric="rgb")
    refused(FileError, folder, "colour", "scan7_5.tif", **options)


def test_tiff_of_four_dimensions(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 3, 8, 9), np.uint8), photometric="minisblack")
    refused(ShapeError, tmp_path / "a.tif", "4-D", modality="micro", voxel_um=50)


# ---------------------------------------------------------------- writing


@pytest.mark.slow
@pytest.mark.parametrize("ending", FILES)
def test_missing_folder_and_failed_write_leave_nothing_new(tmp_path, scan, ending):
    with pytest.raises(FileError, match="folder does not exist"):
        write_volume(tmp_path / "gone" / f"v{ending}", scan)
    write_volume(tmp_path / f"v{ending}", scan)
    before = (tmp_path / f"v{ending}").read_bytes()
    code = f"""
import resource, signal, sys, numpy as np
from mmsr.core import ResourceError
from mmsr.data.volume import Volume
from mmsr.scans.write import WRITABLE, write_volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
noise = np.random.default_rng(0).integers(-1000, 1000, (20, 64, 64)).astype(np.int16)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # like a disk that fills up
try:
    write_volume({str(tmp_path / f"v{ending}")!r}, Volume(noise, (1.0, 1.0, 1.0)))
except ResourceError as e:
    sys.exit(0 if "\\n" not in str(e) and "free some space" in str(e) else 3)
sys.exit(4)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path / f"v{ending}").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [f"v{ending}"]


def test_volumes_that_cannot_be_written(tmp_path, scan):
    with pytest.raises(FileError, match="expected an ending"):
        write_volume(tmp_path / "v.jpg", scan)
    with pytest.raises(ShapeError, match="shape"):
        write_volume(tmp_path / "v.mha", scan._replace(array=scan.array[0]))
    with pytest.raises(GeometryError, match="positive"):
        write_volume(tmp_path / "v.mha", scan._replace(spacing_mm=(0.0, 1.0, 1.0)))
    with pytest.raises(RangeError, match="float16"):
        write_volume(tmp_path / "v.mha", scan._replace(array=scan.array.astype(np.float16)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", WRITABLE)
def test_the_notice_and_masks_travel(tmp_path, scan, ending):
    if ending == ".dicom":  # knows no mirrored axes, and no masks of bytes
        scan = scan._replace(direction=Volume._field_defaults["direction"])
    path = tmp_path / f"v{ending}"
    write_volume(path, scan._replace(notes=("super-resolved by 8",)))
    again = read_volume(path)
    assert RESEARCH_ONLY in again.notes
    write_volume(path, again)  # and travels on
    assert RESEARCH_ONLY in scan_info(path).notes
    assert RESEARCH_ONLY in read_volume(path, lazy=True).notes
    write_volume(path, scan)
    assert RESEARCH_ONLY not in read_volume(path).notes
    write_volume(path, scan._replace(array=scan.array > 0))
    mask = read_volume(path, modality="micro", force=True)
    assert np.array_equal(mask.array, scan.array > 0)


@pytest.mark.slow
def test_memory_of_reading_does_not_balloon(tmp_path):
    hu = chest(64, 256, 256)
    write_volume(tmp_path / "v.mha", Volume(hu, (2.0, 0.6, 0.6)))
    write_volume(tmp_path / "tiny.mha", Volume(hu[:2, :16, :16], (2.0, 0.6, 0.6)))
    code = f"""{PEAK_BYTES}
import SimpleITK, numpy
from mmsr.scans.read import read_volume
read_volume({str(tmp_path / "tiny.mha")!r})  # loads what a first reading needs
before = peak_bytes()
v = read_volume({str(tmp_path / "v.mha")!r})
grown = peak_bytes() - before
assert grown > 0, "nothing was measured"
sys.exit(0 if grown < 3.5 * v.array.nbytes else 5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
