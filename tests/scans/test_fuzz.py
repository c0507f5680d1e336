"""Malformed and odd scans, through every door: one line, or the voxels that other readers find.

Each case is a format, a fault and a door, drawn by its number, so it is the same in every run.
MMSR_FUZZ says how many there are: 200 in `make test`, 1,000 in `make nightly`.
"""

import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
import zarr
from dicom_maker import chest, series
from pydicom.encaps import generate_frames
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from test_dicom import enhanced
from test_reading import saved, zarr_of_others

from mmsr.app import cli
from mmsr.app.prepare import prepare
from mmsr.app.training_cases import PrepareSettings, micro_cases
from mmsr.core import MMSRError, seeded
from mmsr.data.volume import Volume
from mmsr.scans.read import read_volume
from mmsr.scans.scan_summary import info_picture, info_text, scan_info
from mmsr.scans.write import write_volume

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("MMSR_FUZZ", "200"))
HU = chest(5, 24, 28)
GREY = (HU.astype(np.int32) + 1024).astype(np.uint16)


# ---------------------------------------------------------------- formats


def tiff_folder(folder: Path, **how: Any) -> Path:
    folder.mkdir()
    for k, plane in enumerate(GREY):
        tifffile.imwrite(folder / f"scan_{k + 8}.tif", plane, **how)  # 10 comes after 9
    return folder


def tiff_file(path: Path, **how: Any) -> Path:
    tifffile.imwrite(path, GREY, **how)
    return path


def ours(path: Path) -> Path:
    write_volume(path, Volume(HU, (2.5, 0.5, 0.6), (-10.0, 20.0, 30.0)))
    return path


def nifti_pair(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Pair(HU.T, np.diag([-0.6, -0.5, 2.5, 1])), path)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "nii": lambda d: ours(d / "v.nii"),
    "nii.gz": lambda d: ours(d / "v.nii.gz"),
    "nii.gz of others": lambda d: saved(d / "v.nii.gz", HU),
    "hdr": lambda d: nifti_pair(d / "v.hdr"),
    "mha": lambda d: ours(d / "v.mha"),
    "mha, packed": lambda d: saved(d / "v.mha", HU, useCompression=True),
    "mhd": lambda d: saved(d / "v.mhd", HU),
    "nrrd": lambda d: ours(d / "v.nrrd"),
    "nrrd, packed": lambda d: saved(d / "v.nrrd", HU, useCompression=True),
    "nhdr": lambda d: saved(d / "v.nhdr", HU),
    "ome.zarr": lambda d: ours(d / "v.ome.zarr"),
    "zarr of others": lambda d: zarr_of_others(d / "v.zarr", GREY),
    "tiff": lambda d: tiff_file(d / "v.tif"),
    "tiff, ImageJ": lambda d: tiff_file(d / "v.tif", imagej=True),
    "tiff, packed": lambda d: tiff_file(d / "v.tif", compression="zlib"),
    "tiffs": lambda d: tiff_folder(d / "stack"),
    "dicom": lambda d: series(d / "s", HU, syntax=ExplicitVRLittleEndian),
    "dicom, implicit": lambda d: series(d / "s", HU, syntax=ImplicitVRLittleEndian),
    "dicom, JPEG-LS": lambda d: series(d / "s", HU, syntax=JPEGLSLossless),
    "dicom, JPEG 2000": lambda d: series(d / "s", HU, syntax=JPEG2000Lossless),
    "dicom, RLE": lambda d: series(d / "s", HU, syntax=RLELossless),
    "dicom, frames": lambda d: enhanced(d / "x", HU, order=[2, 0, 4, 1, 3]),
}


STORED = {name: GREY for name in FORMATS if "tiff" in name or "zarr of" in name}  # the µCT scans


def dicom_slice(file: Path, d: Any) -> np.ndarray:
    """Read a slice with GDCM, or with pydicom and imagecodecs, which mind damaged headers less."""
    try:
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[0])
    except RuntimeError:
        decode = {
            JPEGLSLossless: imagecodecs.jpegls_decode,
            JPEG2000Lossless: imagecodecs.jpeg2k_decode,
        }
        syntax = d.file_meta.TransferSyntaxUID
        packed = next(generate_frames(d.PixelData)) if syntax in decode else b""
        stored = decode[syntax](packed) if packed else d.pixel_array
        return stored * float(d.RescaleSlope) + float(d.RescaleIntercept)


def others(path: Path, name: str) -> np.ndarray | None:
    """Read with the format's own library; None if that refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _others(path, name)
        except Exception:  # what may they not raise
            return None


def _others(path: Path, name: str) -> np.ndarray:
    if "nii" in name or name == "hdr":
        image = nibabel.load(path)
        return np.asarray(image.dataobj).T.reshape(image.shape[2::-1])
    if "zarr" in name:
        return np.asarray(zarr.open_array(str(path / "0"), mode="r"))
    if name == "tiffs":
        files = sorted(path.glob("*.tif"), key=lambda p: int(re.findall(r"\d+", p.name)[-1]))
        return np.stack([tifffile.imread(file) for file in files])
    if "tiff" in name:
        pages = tifffile.imread(path)
        return pages.reshape(-1, *pages.shape[-2:])
    if name == "dicom, frames":
        d = pydicom.dcmread(path)
        frames = d.PerFrameFunctionalGroupsSequence
        order = np.argsort(
            [float(f.PlanePositionSequence[0].ImagePositionPatient[2]) for f in frames]
        )
        values = [f.PixelValueTransformationSequence[0] for f in frames]
        planes = [
            plane * float(v.RescaleSlope) + float(v.RescaleIntercept)
            for plane, v in zip(d.pixel_array, values, strict=True)
        ]
        return np.stack(planes)[order]
    if "dicom" in name:
        slices = {}
        for file in path.rglob("*.dcm"):
            d = pydicom.dcmread(file)
            slices[float(d.ImagePositionPatient[2])] = dicom_slice(file, d)
        return np.stack([slices[z] for z in sorted(slices)])
    try:
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    except RuntimeError:  # minds damage that has nothing to do with the voxels
        data = path.with_suffix(".raw") if name in ("mhd", "nhdr") else path
        return np.frombuffer(data.read_bytes()[-HU.nbytes :], "<i2").reshape(HU.shape)


# ---------------------------------------------------------------- faults


def one_of(path: Path, rng: np.random.Generator) -> Path:
    """Choose one file of a scan: half of the time its metadata, where they are a file."""
    beside = [path, *path.parent.glob("v.*")] if path.is_file() else path.rglob("*")
    files = sorted({p for p in beside if p.is_file()})
    pages = [p for p in files if p.name in ("zarr.json", ".zattrs", ".zarray")]
    return (
        files[rng.integers(len(files))]
        if not pages or rng.random() < 0.5
        else pages[rng.integers(len(pages))]
    )


def edited(change: Callable[[bytearray, np.random.Generator], bytes]) -> Callable[..., Path]:
    """Make a fault that changes the bytes of one file."""

    def fault(path: Path, rng: np.random.Generator) -> Path:
        file = one_of(path, rng)
        file.write_bytes(change(bytearray(file.read_bytes()), rng))
        return path

    return fault


def flipped(data: bytearray, rng: np.random.Generator, among: int = 1 << 30) -> bytes:
    for at in rng.integers(0, min(len(data), among), rng.integers(1, 6)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def word(data: bytearray, rng: np.random.Generator) -> bytes:
    at = rng.integers(0, max(1, min(len(data), 1200) - 4))
    data[at : at + 4] = rng.choice(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\x80\x7f", rng.bytes(4)]
    )
    return bytes(data)


def number(data: bytearray, rng: np.random.Generator) -> bytes:
    found = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:4000]))]
    start, end = found[rng.integers(len(found))] if found else (0, 0)
    new = rng.choice(["-1", "0", "1e400", "NaN", "987654321", "3", "x", "0.6", "", "1 2"])
    return bytes(data[:start]) + str(new).encode() + bytes(data[end:])


def lines(data: bytearray, rng: np.random.Generator) -> bytes:
    """Repeat, drop or exchange lines of what may be text."""
    parts = bytes(data).split(b"\n")
    i, j = rng.integers(0, min(len(parts), 14), 2)
    way = rng.integers(3)
    if way == 0:
        parts.insert(j, parts[i])
    elif way == 1:
        del parts[i]
    else:
        parts[i], parts[j] = parts[j], parts[i]
    return b"\n".join(parts)


def blanked(data: bytearray, rng: np.random.Generator) -> bytes:
    at = rng.integers(0, len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    return bytes(data)


def gone(path: Path, rng: np.random.Generator) -> Path:
    one_of(path, rng).unlink()
    return path


def twice(path: Path, rng: np.random.Generator) -> Path:
    file = one_of(path, rng)
    shutil.copy(file, file.with_name(f"copy of {file.name}"))
    return path


def exchanged(path: Path, rng: np.random.Generator) -> Path:
    """Give two files each other's content; DICOM slices know where they belong all the same."""
    a, b = one_of(path, rng), one_of(path, rng)
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data)
    b.write_bytes(a_data)
    return path


def strays(path: Path, rng: np.random.Generator) -> Path:
    """Lay beside it what desktops, synchronisers and people leave."""
    folder = path if path.is_dir() else path.parent
    for name in rng.choice(
        [".DS_Store", "Thumbs.db", "._v", "notes.txt", "view.png", "desktop.ini", "empty.dcm"], 3
    ):
        (folder / str(name)).write_bytes(b"" if rng.random() < 0.5 else rng.bytes(600))
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "link").symlink_to(folder / "nowhere")
    return path


def renamed(path: Path, rng: np.random.Generator) -> Path:
    """Names of people's folders; the ending stays, but may be written large."""
    ending = "".join(path.suffixes)
    names = [
        "a b",
        "CT.mha #2",
        "Lunge, größer",
        "50%",
        "-v",
        "v.1.5",
        "'q'",
        "肺",
        "x" * 120,
        "$HOME",
    ]
    ending = ending.upper() if rng.random() < 0.3 else ending
    return path.rename(path.with_name(f"{rng.choice(names)}{ending}"))


FAULTS: dict[str, Callable[[Path, np.random.Generator], Path]] = {
    "cut short": edited(lambda data, rng: bytes(data[: rng.integers(len(data) + 1)])),
    "bits of the header": edited(lambda data, rng: flipped(data, rng, 400)),
    "bits anywhere": edited(flipped),
    "a word": edited(word),
    "a number": edited(number),
    "lines": edited(lines),
    "a blank": edited(blanked),
    "more at the end": edited(
        lambda data, rng: bytes(data) + rng.bytes(int(rng.integers(1, 3000)))
    ),
    "empty": edited(lambda data, rng: b""),
    "gone": gone,
    "twice": twice,
    "exchanged": exchanged,
    "strays": strays,
    "renamed": renamed,
}


# ---------------------------------------------------------------- doors


class Scan(NamedTuple):
    """A scan that may be broken, and how it is asked for."""

    path: Path
    micro: bool
    options: dict[str, Any]


def eager(scan: Scan, rng: np.random.Generator) -> Volume:
    return read_volume(scan.path, **scan.options)


def lazy(scan: Scan, rng: np.random.Generator) -> Volume:
    volume = read_volume(scan.path, lazy=True, **scan.options)
    return volume._replace(array=np.asarray(volume.array))


def in_info(scan: Scan, rng: np.random.Generator) -> None:
    how = {name: value for name, value in scan.options.items() if name != "force"}
    found = scan_info(scan.path, **how)
    assert all("\n" not in line and str(scan.path.parent) not in line for line in found.refusals)
    assert info_text(found)
    if rng.random() < 0.1:
        info_picture(found)


def in_cli(scan: Scan, rng: np.random.Generator) -> None:
    options = ["--micro"] * scan.micro
    options += ["--voxel-um", "50"] * ("voxel_um" in scan.options)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", *options, "--", str(scan.path)])
    assert ended.value.code in (0, 2)


def in_prepare(scan: Scan, rng: np.random.Generator) -> Volume | None:
    settings = {"out": str(scan.path.parent / "out"), "held_out": 0}
    if not scan.micro:
        prepare(settings | {"clinical": [str(scan.path)]})
        return None
    settings |= {"micro": [str(scan.path)], "micro_voxel_um": scan.options.get("voxel_um")}
    (case,) = micro_cases(PrepareSettings.read(settings))
    return case.volume


DOORS = (eager, lazy, in_info, in_cli, in_prepare)


def agrees(volume: Volume, other: np.ndarray | None) -> bool:
    """Tell whether voxels are those; padding of a clinical scan has become air."""
    array = volume.array
    if other is None or array.shape != other.shape:
        return False
    if any("white as 0" in note for note in volume.notes):
        other = np.iinfo(other.dtype).max - other
    if volume.modality == "micro":
        return np.array_equal(array, other)
    return bool(((array == np.rint(other)) | ((array == -1000) & ~(other > -1000))).all())


# ---------------------------------------------------------------- the cases


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a sound scan of every format; return its path in a folder of its own."""
    made = {}
    for name, make in FORMATS.items():
        made[name] = make(tmp_path_factory.mktemp("sound"))
    return made


def faults_of(name: str, original: Path, work: Path, capfd: Any) -> Iterator[str]:
    """Try the cases of a format, and say what is wrong with each."""
    for case in range(list(FORMATS).index(name), COUNT, len(FORMATS)):
        rng = seeded(case, "fuzz")
        fault, door = list(FAULTS)[rng.integers(len(FAULTS))], DOORS[rng.integers(len(DOORS))]
        folder = work / str(case)
        shutil.copytree(original.parent, folder)
        path = FAULTS[fault](folder / original.name, rng)
        micro = name in STORED or ("dicom" not in name and rng.random() < 0.5)
        options: dict[str, Any] = {"modality": "micro"} if micro else {}
        options |= {"voxel_um": 50} if "tiff" in name else {}
        if micro and name not in STORED and door in (eager, lazy):
            options["force"] = True  # voxels of half a millimetre
        start, wrong, volume = time.perf_counter(), "", None
        try:
            volume = door(Scan(path, micro, options), rng)
        except MMSRError as e:
            if "\n" in str(e) or f"{folder}/" in str(e).replace(str(path), ""):
                wrong = f"not a good line: {e}"
        except Exception as e:
            wrong = f"{type(e).__name__}: {e}"
        if volume is not None:
            same = agrees(volume, STORED.get(name, HU)) or agrees(volume, others(path, name))
            wrong = "" if same else "other voxels than another reader"
        out, err = capfd.readouterr()
        if "Traceback" in out + err or err.count("\n") > 1 or (door is not in_cli and out + err):
            wrong = f"said {(out + err)[-300:]}"
        if time.perf_counter() - start > 10:
            wrong = "took more than 10 s"
        if wrong:
            yield f"case {case}: {name}, {fault}, {door.__name__}, {options}: {wrong}"
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_malformed_and_odd_scans(
    tmp_path: Path, sound: dict[str, Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    assert list(faults_of(name, sound[name], tmp_path, capfd)) == []


@pytest.mark.parametrize("packing", ["LZW", "lossless JPEG"])
def test_decoders_stay_within_their_memory(tmp_path: Path, packing: str) -> None:
    """Some streams with changed bytes end the process in imagecodecs: it must not see them."""
    rng, options = seeded(0, packing), {}
    grey = rng.integers(0, 40, (64, 64)).astype(np.uint16)
    if packing == "LZW":
        scan, options = tmp_path / "v.tif", {"voxel_um": 50, "slices": (0, 1)}
        tifffile.imwrite(scan, np.stack([grey] * 2), compression="lzw")
        file = scan
        with tifffile.TiffFile(scan) as tif:
            start = tif.pages[0].dataoffsets[0]
    else:
        scan = series(tmp_path / "s", grey.astype(np.int16)[None], syntax=JPEGLosslessSV1)
        file = next(scan.iterdir())
        start = file.read_bytes().index(b"\xff\xd8\xff")
    sound = file.read_bytes()
    for case in range(2 * COUNT):
        damaged = bytearray(sound)
        for place in rng.integers(
            start, len(sound) if rng.random() < 0.5 else start + 60, 1 + case % 3
        ):
            damaged[place] = rng.integers(256)
        if case == 0 and b"\xff\xc4" in sound:  # no table of codes, and another predictor
            damaged = bytearray(sound.replace(b"\xff\xc4", b"\xff\xe4"))
            damaged[sound.index(b"\xff\xda") + 7] = 5
        file.write_bytes(damaged)
        with suppress(MMSRError):
            read_volume(scan, **options)


def test_the_sound_ones_are_read(sound: dict[str, Path]) -> None:
    """Else no fault would show."""
    for name, path in sound.items():
        options = {"modality": "micro"} if name in STORED else {}
        volume = read_volume(path, **options, **({"voxel_um": 50} if "tiff" in name else {}))
        assert np.array_equal(volume.array, STORED.get(name, HU)), name
        assert agrees(volume, others(path, name)), name


def test_a_wrong_voxel_and_a_traceback_are_seen(
    tmp_path: Path,
    sound: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*args: Any, **how: Any) -> Volume:
        volume = read_volume(*args, **how)
        return volume._replace(array=np.asarray(volume.array)[::-1])

    monkeypatch.setattr("test_fuzz.DOORS", (lambda scan, rng: wrong(scan.path, **scan.options),))
    monkeypatch.setattr("test_fuzz.FAULTS", {"none": lambda path, rng: path})
    monkeypatch.setattr("test_fuzz.COUNT", len(FORMATS))
    assert "other voxels" in "".join(faults_of("nii.gz", sound["nii.gz"], tmp_path, capfd))
    monkeypatch.setattr("test_fuzz.DOORS", (lambda scan, rng: print(1 / 0),))
    assert "ZeroDivisionError" in "".join(faults_of("nii.gz", sound["nii.gz"], tmp_path, capfd))
