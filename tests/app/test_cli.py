"""The command line: what it writes, and what it refuses in one line without leaving anything."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from matplotlib.figure import Figure
from PIL import Image

import mmsr
from mmsr.app import cli, shell
from mmsr.core import RESEARCH_ONLY, seeded
from mmsr.data.masks import lung_mask
from mmsr.data.phantom_scans import clinical_case
from mmsr.data.volume import Volume, block_mean
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.evaluation import figures, protocols
from mmsr.inference import scan_job
from mmsr.inference.super_resolve import super_resolve
from mmsr.networks.generators import G1Settings
from mmsr.networks.weights import ModelCard, build_g1, load_generator, save_generator
from mmsr.scans.read import read_volume
from mmsr.scans.write import write_volume

REAL = os.environ.get("MMSR_REAL_DATA")
BUNDLED = Path(mmsr.__file__).parent / "weights" / "phantom.safetensors"
needs_real_data = pytest.mark.skipif(not REAL, reason="MMSR_REAL_DATA is not set")

# `python -m mmsr`, which says at its end how much memory it took. Not by getrusage: there a child
# starts with the peak of the process that made it.
MEASURED = """
import atexit, re, runpy
from pathlib import Path
def tell():
    status = Path("/proc/self/status").read_text()
    print("peak", 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]))
atexit.register(tell)
runpy.run_module("mmsr", run_name="__main__")
"""


class Place(NamedTuple):
    """A folder with all that a call needs."""

    folder: Path
    scan: Path
    clinical: Volume
    weights: Path
    other: Path


class Said(NamedTuple):
    """How a call ended."""

    code: int
    out: str
    err: str


def weights_file(path: Path, **settings: object) -> Path:
    """Write untrained weights."""
    g1 = build_g1(G1Settings(**{"channels": 8, "blocks": 1, "norm": "none", **settings}))
    window = CLINICAL_WINDOW.to_dict()
    record = ModelCard(
        g1=g1.settings, clinical_window=window, micro_window={}, method="none", data="phantom"
    )
    save_generator(path, g1, record)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("input")
    made = clinical_case(5, n_slices=2, size=384).clinical
    clinical = made._replace(array=made.array[:, 4:44, :], origin_mm=(-31.5, 12.25, -80.0))
    write_volume(folder / "scan.nii.gz", clinical)
    write_volume(folder / "copy.nii.gz", clinical)
    return Place(
        folder,
        folder / "scan.nii.gz",
        clinical,
        weights_file(folder / "small.safetensors", skip=True),
        weights_file(folder / "other.safetensors", norm="instance"),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of its own for what a call writes."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Run the command line in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return Said(code, said.out, said.err)


def lines_of(err: str) -> list[str]:
    """Split what was printed into lines, without progress bars."""
    lines = err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "slice/s" not in line]


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell what lies in a folder, hidden files included."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
    }


def refused(said: Said, *words: str, code: int = 2) -> None:
    """Check that a call ended with one line that has the words."""
    assert said.code == code, said
    assert said.out == ""
    (line,) = lines_of(said.err)
    assert line.startswith("mmsr: ")
    assert "Traceback" not in line
    assert not [word for word in words if word not in line], line


def child(*arguments: object, program: tuple[str, ...] = ("-m", "mmsr")) -> subprocess.Popen[str]:
    """Start the command line in a process that Ctrl-C reaches."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def overlays(image: sitk.Image, clinical: Volume) -> None:
    """Check that each block of 8 x 8 voxels lies in its clinical voxel."""
    assert image.GetSize()[:2] == tuple(8 * n for n in reversed(clinical.array.shape[1:]))
    z, y, x = np.array(clinical.array.shape) - 1
    for corner in [(0, 0, 0), (z, y, x), (0, y, 0), (z, 0, x)]:
        first = [8 * int(corner[2]), 8 * int(corner[1]), int(corner[0])]
        last = [first[0] + 7, first[1] + 7, first[2]]
        ends = [image.TransformIndexToPhysicalPoint(at) for at in (first, last)]
        centre = clinical.world_mm(np.array([corner]))[0]
        np.testing.assert_allclose(np.mean(ends, 0), centre, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".mha", ".nii.gz", ".nrrd"])
def test_super_resolve_writes_volume_picture_and_map(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    target, apart = out / f"sr.v1{ending}", out / "apart.mha"
    arguments = ("--weights", place.weights, "--consistency", apart, "--tile", 16)
    said = call(capsys, "super-resolve", place.scan, target, *arguments)
    assert said.code == 0, said
    assert sorted(content(out)) == sorted(["apart.mha", f"sr.v1{ending}", f"sr.v1{ending}.png"])
    image = sitk.ReadImage(str(target))
    assert image.GetPixelIDValue() == sitk.sitkInt16
    np.testing.assert_allclose(image.GetSpacing(), (0.078125, 0.078125, 0.6), rtol=1e-5)
    overlays(image, place.clinical)
    means = block_mean(sitk.GetArrayFromImage(image))
    map_hu = sitk.ReadImage(str(apart))
    assert map_hu.GetSize() == (48, 40, 2)
    np.testing.assert_allclose(map_hu.GetOrigin(), place.clinical.origin_mm, atol=1e-4)
    wanted = means - place.clinical.array
    np.testing.assert_allclose(sitk.GetArrayFromImage(map_hu), wanted, atol=0.01)
    with Image.open(out / f"sr.v1{ending}.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    assert RESEARCH_ONLY in said.out
    assert "384 x 320 x 2 voxels of 0.0781" in said.out


@pytest.mark.slow
def test_slices_are_those_named(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--weights", place.weights, "--slices", "1:2")
    assert call(capsys, "super-resolve", place.scan, out / "a.mha", *arguments).code == 0
    image = sitk.ReadImage(str(out / "a.mha"))
    assert image.GetSize()[2] == 1
    overlays(image, place.clinical.take(1, 2))


def test_overwrite_replaces(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "a.mha").write_text("earlier")
    arguments = ("super-resolve", place.scan, out / "a.mha", "--weights", place.weights)
    assert call(capsys, *arguments, "--overwrite").code == 0
    assert sitk.ReadImage(str(out / "a.mha")).GetSize() == (384, 320, 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lung", "mask"])
def test_outside_the_mask_bicubic_stands(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    extra: tuple[object, ...] = ("--lung-only",)
    if how == "mask":
        inside = np.zeros(place.clinical.array.shape, bool)
        inside[:, 16:24, 16:24] = True
        write_volume(out / "mask.nrrd", place.clinical._replace(array=inside))
        extra = ("--mask", out / "mask.nrrd")
    else:
        assert lung_mask(place.clinical).any()
    arguments = ("super-resolve", place.scan, out / "a.mha", "--weights", place.weights, *extra)
    assert call(capsys, *arguments).code == 0
    arguments = ("super-resolve", place.scan, out / "b.mha", "--weights", place.weights)
    assert call(capsys, *arguments).code == 0
    one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(out / n))) for n in ("a.mha", "b.mha"))
    assert (one != other).any()
    if how == "mask":
        np.testing.assert_array_equal(one[:, 136:184, 136:184], other[:, 136:184, 136:184])


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED.is_file(), reason="the package holds no weights here")
def test_bundled_weights(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, "super-resolve", place.scan, out / "a.mha", "--slices", "0:1")
    assert said.code == 0, said
    assert BUNDLED.stat().st_size <= 4_000_000
    assert sitk.ReadImage(str(out / "a.mha")).GetSize() == (384, 320, 1)
    sr = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.mha")))
    lung, clinical = lung_mask(place.clinical)[0], place.clinical.array[0]
    assert np.corrcoef(block_mean(sr)[0][lung], clinical[lung])[0, 1] > 0.9


def test_no_bundled_weights(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = out / "weights" / "phantom.safetensors"
    monkeypatch.setattr(protocols, "find_weights", lambda _: missing)
    refused(call(capsys, "super-resolve", place.scan, out / "a.mha"), "phantom.safetensors")
    assert content(out) == {}


# Arguments that differ from a good call, and words that the one line must have.
REFUSALS = {
    "missing scan": ({"scan": "IN/none.nii"}, ["none.nii", "no such file"]),
    "empty folder": ({"scan": "EMPTY"}, ["empty"]),
    "not a scan": ({"scan": "IN/small.safetensors"}, ["small.safetensors"]),
    "unknown suffix": ({"out": "OUT/a.tif"}, ["a.tif", ".mha"]),
    "no suffix": ({"out": "OUT/a"}, [".mha"]),
    "nothing but a suffix": ({"out": "OUT/.mha"}, [".mha", "ending"]),
    "missing folder": ({"out": "OUT/b/a.mha"}, ["folder does not exist"]),
    "folder is a file": ({"out": "IN/scan.nii.gz/a.mha"}, ["a.mha"]),
    "map in missing folder": ({"more": ["--consistency", "OUT/b/a.mha"]}, ["does not exist"]),
    "map on the volume": ({"more": ["--consistency", "OUT/a.mha"]}, ["a.mha"]),
    "slices, text": ({"more": ["--slices", "abc"]}, ["slices", "abc", "60:62"]),
    "slices, one": ({"more": ["--slices", "1"]}, ["slices", "60:62"]),
    "slices, empty": ({"more": ["--slices", "1:1"]}, ["slices", "1:1"]),
    "slices, reversed": ({"more": ["--slices", "2:1"]}, ["slices", "2:1"]),
    "slices, negative": ({"more": ["--slices", "-1:1"]}, ["slices", "-1:1"]),
    "slices, beyond": ({"more": ["--slices", "0:9"]}, ["scan.nii.gz", "2 slices", "0:9"]),
    "unknown option": ({"more": ["--bogus"]}, ["--bogus", "See mmsr super-resolve --help."]),
    "tile 0": ({"more": ["--tile", "0"]}, ["--tile"]),
    "tile, text": ({"more": ["--tile", "x"]}, ["--tile"]),
    "unknown device": ({"more": ["--device", "tpu"]}, ["device", "tpu", "cpu"]),
    "missing weights": ({"weights": "IN/no.safetensors"}, ["no.safetensors", "no such file"]),
    "weights, a folder": ({"weights": "IN"}, ["input"]),
    "weights, unset variable": ({"weights": "$MMSR_NOT_SET/w"}, ["MMSR_NOT_SET"]),
    "weights, a scan": ({"weights": "IN/scan.nii.gz"}, ["scan.nii.gz", "weights"]),
    "part that is none": ({"more": ["--part", "5/4"]}, ["part", "2/4"]),
    "precision that is none": ({"more": ["--precision", "8"]}, ["precision", "8"]),
    "map that DICOM cannot hold": (
        {"more": ["--consistency", "OUT/m.dicom"]},
        ["m.dicom", "float"],
    ),
    "missing mask": ({"more": ["--mask", "IN/none.nii"]}, ["none.nii"]),
    "mask, no mask": ({"more": ["--mask", "IN/copy.nii.gz"]}, ["copy.nii.gz", "mask"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(place: Place, out: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    changes, words = REFUSALS[name]
    given = {"scan": "IN/scan.nii.gz", "out": "OUT/a.mha", "weights": "IN/small.safetensors"}
    given |= {key: value for key, value in changes.items() if key != "more"}
    (out.parent / "empty").mkdir()
    names = {"IN": str(place.folder), "OUT": str(out), "EMPTY": str(out.parent / "empty")}
    arguments = [given["scan"], given["out"], "--weights", given["weights"]]
    arguments = [*arguments, *changes.get("more", [])]
    for short, long in names.items():
        arguments = [long + a[len(short) :] if a.startswith(short) else a for a in arguments]
    before = content(place.folder)
    refused(call(capsys, "super-resolve", *arguments), *words)
    assert content(out) == {}
    assert content(place.folder) == before


@pytest.mark.parametrize("existing", ["a.mha", "a.mha.png", "map.nrrd"])
def test_nothing_is_replaced_unasked(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], existing: str
) -> None:
    (out / existing).write_text("mine")
    arguments = ("--weights", place.weights, "--consistency", out / "map.nrrd")
    said = call(capsys, "super-resolve", place.scan, out / "a.mha", *arguments)
    refused(said, existing, "--overwrite")
    assert list(content(out)) == [existing]
    assert (out / existing).read_text() == "mine"


def test_the_scan_itself_is_never_replaced(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = out / "scan.nii.gz"
    scan.write_bytes(place.scan.read_bytes())
    before = content(out)
    arguments = ("--weights", place.weights, "--overwrite")
    refused(call(capsys, "super-resolve", scan, scan, *arguments), "scan.nii.gz")
    arguments = (*arguments, "--consistency", scan)
    refused(call(capsys, "super-resolve", scan, out / "a.mha", *arguments), "scan.nii.gz")
    assert content(out) == before


@pytest.mark.parametrize("kind", ["truncated", "empty", "pickle", "huge header", "huge network"])
def test_damaged_and_hostile_weights(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], kind: str, tmp_path: Path
) -> None:
    whole = place.weights.read_bytes()
    bad = tmp_path / "bad.safetensors"
    if kind == "pickle":
        trap = tmp_path / "sprung"
        command = f"touch {trap}".encode()
        bad.write_bytes(b"cposix\nsystem\n(S'" + command + b"'\ntR.")
    else:
        asked = whole.replace(b'\\"channels\\": 8', b'\\"channels\\": 9')
        assert asked != whole
        bad.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "empty": b"",
                "huge header": b"\xff" * 7 + b"\x7f" + whole[8:],
                "huge network": asked,
            }[kind]
        )
    refused(
        call(capsys, "super-resolve", place.scan, out / "a.mha", "--weights", bad),
        "bad.safetensors",
    )
    assert content(out) == {}
    assert not (tmp_path / "sprung").exists()


def test_mask_on_another_grid(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ones = np.ones(place.clinical.array.shape, bool)
    x, y, z = place.clinical.origin_mm
    moved = place.clinical._replace(array=ones, origin_mm=(x + 5, y, z))
    smaller = place.clinical._replace(array=ones[:, :-8])
    empty = place.clinical._replace(array=~ones)
    for mask, word in ((moved, "grid"), (smaller, "40, 48"), (empty, "mask")):
        write_volume(tmp_path / "mask.nrrd", mask)
        arguments = ("--weights", place.weights, "--mask", tmp_path / "mask.nrrd")
        said = call(capsys, "super-resolve", place.scan, out / "a.mha", *arguments)
        refused(said, "mask.nrrd", word)
        assert content(out) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--weights", place.weights, "--device", "cuda")
    refused(call(capsys, "super-resolve", place.scan, out / "a.mha", *arguments), "cuda", "cpu")
    assert content(out) == {}


def test_tiff_is_no_clinical_scan(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tifffile

    stack = seeded(0, "tiff").integers(0, 255, (4, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack)
    arguments = (tmp_path / "stack.tif", out / "a.mha", "--weights", place.weights)
    refused(call(capsys, "super-resolve", *arguments), "stack.tif")
    assert content(out) == {}


@needs_real_data
@pytest.mark.parametrize(
    "path",
    [
        "bone_microct_tiff",
        "bad/wrong_modality",
        "bad/gantry_tilt",
        "bad/example4d.nii.gz",
        "bad/oblique_not_hu.nii.gz",
        "bad/truncated/truncated.nii.gz",
    ],
)
def test_real_files_that_are_refused(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    scan = Path(str(REAL), path)
    refused(call(capsys, "super-resolve", scan, out / "a.mha", "--weights", place.weights))
    assert content(out) == {}


def test_the_plan_is_told_and_nothing_done(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (place.scan, out / "a.ome.zarr", "--weights", place.weights, "--plan")
    said = call(capsys, "super-resolve", *arguments)
    assert said.code == 0
    assert "48 x 40 x 2 voxels" in said.err
    assert "384 x 320 x 2 voxels" in said.err
    assert re.search(r"needs: .* of memory, up to .* of disk", said.err)
    assert re.search(r"time: +about .* a slice", said.err)
    assert content(out) == {}


@pytest.mark.slow
def test_overwrite_spares_what_is_not_ours(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the scan, nor the folder around it, nor somebody's folder with an output's name."""
    study = out / "study.dicom"
    (study / "series").mkdir(parents=True)
    inside = study / "series" / "scan.mha"
    inside.write_bytes((place.scan).read_bytes() if place.scan.is_file() else b"")
    write_volume(inside, place.clinical)
    for name in ("mine.mha", "mine.ome.zarr", "mine.dicom"):
        (out / name).mkdir()
        (out / name / "precious.txt").write_text("years of work")
    before = content(out)
    with_weights = ("--weights", place.weights, "--overwrite")
    said = call(capsys, "super-resolve", inside, study, *with_weights)
    refused(said, "another input or output lies in it")
    said = call(capsys, "super-resolve", study, study / "sr.nrrd", *with_weights)
    refused(said, "scan's folder")
    for name in ("mine.mha", "mine.ome.zarr", "mine.dicom"):
        said = call(capsys, "super-resolve", inside, out / name, *with_weights)
        refused(said._replace(err=said.err.splitlines()[-1]), "other things in it")
    assert content(out) == before
    (out / "real.ome.zarr").mkdir()
    (out / "link.ome.zarr").symlink_to(out / "real.ome.zarr")
    said = call(capsys, "super-resolve", inside, out / "link.ome.zarr", *with_weights)
    assert said.code == 0
    assert (out / "real.ome.zarr" / "zarr.json").is_file()
    assert (out / "link.ome.zarr").is_symlink()
    for _ in range(2):  # and what is ours may be replaced
        said = call(capsys, "super-resolve", inside, out / "ours.dicom", *with_weights)
        assert said.code == 0


@pytest.mark.slow
def test_parts_are_joined_by_a_last_call(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("super-resolve", place.scan, out / "a.nrrd", "--weights", place.weights)
    for part in ("2/2", "1/2"):
        said = call(capsys, *arguments, "--part", part)
        assert said.code == 0
        assert f"part {part[0]} of 2 is done" in said.out
        assert not (out / "a.nrrd").exists()
    assert call(capsys, *arguments).code == 0
    overlays(sitk.ReadImage(str(out / "a.nrrd")), place.clinical)
    before = content(out)
    assert sorted(before) == ["a.nrrd", "a.nrrd.png"]
    for more in ((), ("--part", "1/2"), ("--part", "2/2"), ("--plan",)):  # a cluster repeats itself
        said = call(capsys, *arguments, *more)
        assert (said.code, said.err) == (0, "")
        assert re.fullmatch(r".*a.nrrd: is finished, .* nothing is left to do\n", said.out)
    said = call(capsys, *arguments, "--exact-means")  # another job's output would not pass for its
    refused(said, "a.nrrd: exists already", "--overwrite")
    assert content(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".mha", ".nii", ".nii.gz", ".ome.zarr", ".dicom"])
def test_what_is_finished_says_whose_it_is(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    arguments = ("super-resolve", place.scan, out / f"a{ending}", "--slices", "0:1")
    arguments = (*arguments, "--weights", place.weights)
    assert call(capsys, *arguments).code == 0
    assert "nothing is left to do" in call(capsys, *arguments).out
    refused(call(capsys, *arguments[:-1], place.other), "exists already")
    again = (arguments[0], arguments[2], out / "b.mha", *arguments[3:])
    refused(call(capsys, *again), "is itself super-resolved", "--force")
    (out / f"a{ending}.unfinished").mkdir()  # a kill came before the very last step
    assert call(capsys, *arguments).code == 0
    assert sorted(p.name for p in out.iterdir()) == [f"a{ending}", f"a{ending}.png"]


@pytest.mark.slow
def test_pictures_have_names_of_their_own(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mha", "a.nrrd"):
        arguments = (place.scan, out / name, "--slices", "0:1", "--weights", place.weights)
        assert call(capsys, "super-resolve", *arguments).code == 0
    assert sorted(content(out)) == ["a.mha", "a.mha.png", "a.nrrd", "a.nrrd.png"]


def test_a_picture_is_no_reason_to_fail(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The volume is what was asked for: one line on stderr, and exit code 0."""

    class Unwritable(Figure):
        def savefig(self, *_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(figures, "overview", lambda *_: Unwritable())
    arguments = (place.scan, out / "a.mha", "--slices", "0:1", "--weights", place.weights)
    said = call(capsys, "super-resolve", *arguments)
    (line,) = [line for line in lines_of(said.err) if "picture" in line]
    assert line.startswith("note: no picture: ")
    assert "a.mha.png" in line
    assert said.code == 0
    assert "a picture of one slice" not in said.out
    assert list(content(out)) == ["a.mha"]


@pytest.mark.slow
@pytest.mark.parametrize("facts", ["[]", "{}", "null", "[1, 2]", "[{}]", '"x"'])
def test_a_record_changed_by_hand(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], facts: str
) -> None:
    arguments = ("super-resolve", place.scan, out / "a.mha", "--weights", place.weights)
    assert call(capsys, *arguments, "--part", "1/2").code == 0
    record = out / "a.mha.unfinished" / "job.json"
    record.write_text(record.read_text().rstrip().removesuffix("}") + f', "facts": {facts}}}')
    before = content(out)
    said = call(capsys, *arguments)
    refused(said._replace(err=said.err.splitlines()[-1]), "job.json", "by hand", "remove")
    assert content(out) == before


@pytest.mark.slow
def test_exact_means_and_maps(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = ("--consistency", out / "c.nrrd", "--uncertainty", out / "u.nrrd")
    arguments = (place.scan, out / "a.nrrd", "--weights", place.weights, "--exact-means", *maps)
    said = call(capsys, "super-resolve", *arguments)
    assert said.code == 0
    assert "+0.0 HU on average" in said.out
    sr, spread = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(out / n))) for n in ("a.nrrd", "u.nrrd")
    )
    assert np.abs(block_mean(sr) - place.clinical.array).max() <= 0.5
    assert spread.shape == sr.shape
    assert spread.min() >= 0
    assert spread.max() > 0


def test_info_tells_and_draws(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, "info", place.scan, "--picture", out / "info.png")
    assert said.code == 0
    assert "48 × 40 × 2" in said.out
    with Image.open(out / "info.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    refused(call(capsys, "info", out / "nothing.nii"), "nothing.nii")
    refused(call(capsys, "info", place.scan, "--picture", out / "a.jpg"), ".png")


def test_info_of_what_is_refused_exits_with_2_and_speaks_of_options(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (8, 40, 48), "u1")
    tifffile.imwrite(out / "bare.tif", grey, photometric="minisblack")
    said = call(capsys, "info", out / "bare.tif")
    assert said.code == 2
    assert "refused" in said.out
    assert "--voxel-um" in said.out
    assert not any(word in said.out for word in ("voxel_um", "voxel_mm", "=True", "Python"))
    assert call(capsys, "info", out / "bare.tif", "--voxel-um", 20).code == 0
    refused(call(capsys, "super-resolve", out / "bare.tif", out / "a.mha"), ".nrrd")
    refused(call(capsys, "super-resolve", out / "bare.tif", out / "a.mha", "--slices", "4-9"), ":")


def test_a_scan_unlike_those_of_the_training_is_noted_before_the_work_and_in_the_result(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = place.clinical._replace(spacing_mm=(5.0, 2.7, 2.7))
    write_volume(out / "coarse.mha", coarse)
    g1, card = load_generator(place.weights)
    training = {**card.training, "clinical_mm": [[1.0, 0.6, 0.6]]}
    weights = out / "w.safetensors"
    save_generator(weights, g1, card.model_copy(update={"training": training}))
    arguments = (out / "coarse.mha", out / "a.mha", "--weights", weights, "--plan")
    said = call(capsys, "super-resolve", *arguments)
    assert said.code == 0
    assert "note: unlike the training: pixels of 2.7 mm" in said.err
    assert said.err.index("unlike the training") < said.err.index("needs:")
    made = super_resolve(coarse.take(0, 1), g1, load_generator(weights)[1], progress=False)
    assert sum("unlike the training" in note for note in made.volume.notes) == 2


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
@pytest.mark.parametrize("lacking", ["volume", "map"])
def test_full_disk(
    place: Place, out: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    """No room for the volume (481 kB), or for the map: refused before anything is begun."""
    room_kb = {"volume": 200, "map": 0}[lacking]
    (small_disk / "a.mha.png").write_bytes(b"an earlier picture")
    (small_disk / "filler").write_bytes(bytes(1024 * (1024 - 4 - room_kb)))
    arguments = ["--weights", place.weights, "--overwrite"]
    target = small_disk / "a.mha"
    if lacking == "map":
        target = out / "a.mha"
        target.write_text("an earlier volume")
        arguments += ["--consistency", small_disk / "map.mha"]
    before = content(small_disk), content(out)
    refused(call(capsys, "super-resolve", place.scan, target, *arguments), "free some space")
    assert (content(small_disk), content(out)) == before


@pytest.mark.slow
def test_a_disk_that_fills_while_the_job_runs(
    place: Place,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is room when the job begins; after its first slice another program takes it."""
    rival, draw = small_disk / "rival", figures.overview

    def fill(*seen: object) -> Figure:
        with contextlib.suppress(OSError):  # to the last byte
            rival.write_bytes(bytes(1 << 20))
        return draw(*seen)

    monkeypatch.setattr(figures, "overview", fill)
    arguments = ("super-resolve", place.scan, small_disk / "a.mha", "--weights", place.weights)
    said = call(capsys, *arguments)
    *plan, no_picture, line = lines_of(said.err)
    assert len(plan) == 4
    assert "no picture" in no_picture
    refused(said._replace(err=line), "a.mha", "the disk is full", "free some space")
    assert not (small_disk / "a.mha").exists()
    work = small_disk / "a.mha.unfinished"
    assert (work / "job.json").is_file()
    monkeypatch.undo()
    rival.unlink()
    assert call(capsys, *arguments).code == 0
    overlays(sitk.ReadImage(str(small_disk / "a.mha")), place.clinical)
    assert not work.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(place: Place, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.chmod(0o500)
    try:
        arguments = (place.scan, out / "a.mha", "--weights", place.weights)
        refused(call(capsys, "super-resolve", *arguments), "a.mha")
        assert content(out) == {}
    finally:
        out.chmod(0o700)


@pytest.mark.slow
def test_ctrl_c(place: Place, out: Path, tmp_path: Path) -> None:
    """A real SIGINT, to a real process, in the middle of its slices."""
    large = np.full((60, 128, 128), -800, np.int16)
    write_volume(tmp_path / "large.mha", place.clinical._replace(array=large))
    slow = weights_file(tmp_path / "slow.safetensors", channels=32, blocks=4)
    job = child("super-resolve", tmp_path / "large.mha", out / "a.mha", "--weights", slow)
    try:
        assert job.stderr is not None
        said = ""
        while "super-resolving" not in said:
            letter = job.stderr.read(1)
            assert letter, said
            said += letter
        time.sleep(0.3)
        job.send_signal(signal.SIGINT)
        rest, err = job.communicate(timeout=60)
    finally:
        job.kill()
        job.wait()
    assert "Traceback" not in err
    refused(Said(job.returncode, rest, err), "stopped", code=130)
    assert not (out / "a.mha").exists()
    assert (out / "a.mha.unfinished" / "job.json").is_file()


SLOW_TO_LOAD = """
import sys, time
class Slow:
    @staticmethod
    def find_spec(name, *_):
        if name == "mmsr.app.cli":
            print("loading", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow)
from mmsr.__main__ import main
main()
"""


@pytest.mark.slow
def test_ctrl_c_while_it_loads() -> None:
    job = child(program=("-c", SLOW_TO_LOAD))
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "loading\n"
        job.send_signal(signal.SIGINT)
        assert (*job.communicate(timeout=30), job.returncode) == ("", "", 130)
    finally:
        job.kill()
        job.wait()


def test_ctrl_c_in_this_process(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan_job, "run_scan", interrupted)
    arguments = (place.scan, out / "a.mha", "--weights", place.weights)
    said = call(capsys, "super-resolve", *arguments)
    refused(said._replace(err=said.err.splitlines()[-1]), "stopped", code=130)


def test_ctrl_c_that_becomes_another_error(
    place: Place, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code may answer an interrupt with an error of its own."""

    def converted(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise ValueError("not a matrix")

    monkeypatch.setattr(scan_job, "run_scan", converted)
    said = call(capsys, "super-resolve", place.scan, out / "a.mha", "--weights", place.weights)
    refused(said._replace(err=said.err.splitlines()[-1]), "stopped", code=130)


def test_a_defect_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that is not the caller's keeps its traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "environment", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["version"])


def test_under_torchrun_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "PATIENCE_S", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for process, start in (("0", "mmsr: none.yaml"), ("3", "mmsr: process 3: none.yaml")):
        monkeypatch.setenv("RANK", process)
        said = call(capsys, "train", "none.yaml")
        refused(said, "none.yaml")
        assert said.err.startswith(start)


def test_version_names_no_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, "version")
    facts = json.loads(said.out)
    assert said.code == 0
    assert facts["packages"]["mmsr"] == mmsr.__version__
    assert {"python", "platform", "processors", "device"} <= set(facts)
    assert str(Path.home()) not in said.out
    assert socket.gethostname() not in said.out
    assert "/" not in said.out


@pytest.mark.slow
def test_light_commands_wait_for_no_torch(place: Place) -> None:
    """What a look at a scan loads: a second and more are at stake."""
    heavy = ["torch", "lightning_fabric", "matplotlib.pyplot", "papermill", "SimpleITK"]
    heavy += ["scipy.ndimage"]  # nibabel asks for scipy alone, which loads nothing
    code = (
        "import contextlib, sys\nfrom mmsr.app.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(sys.argv[1:])\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    for arguments, word in ((["--help"], "super-resolve"), (["info", place.scan], "48 × 40 × 2")):
        said, err = child(*arguments, program=("-c", code)).communicate(timeout=60)
        assert word in said, err
        assert said.splitlines()[-1] == "[]"


def test_version_in_one_line() -> None:
    said, err = child("--version").communicate(timeout=60)
    assert (said, err) == (f"mmsr {mmsr.__version__}\n", "")


def test_nothing_asked_is_help() -> None:
    said, err = child().communicate(timeout=60)
    assert said.startswith("Usage: mmsr [OPTIONS] COMMAND")
    assert err == ""


def test_help_lists_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, "--help")
    assert said.code == 0
    assert all(job in said.out for job in ("demo", "super-resolve", "plan", "run", "version"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], ["bogus", "See mmsr --help."]),
        (["demmo"], ["Did you mean 'demo'? See mmsr --help."]),
        (["super-resolve"], ["scan"]),
        (["super-resolve", "a.nii"], ["out"]),
        (["run", "prepare", "--out", "OUT/n.ipynb", "-p", "novalue"], ["novalue", "NAME=VALUE"]),
        (["run", "prepare", "--out", "OUT/n.ipynb", "-p", "size=[1"], ["size", "YAML"]),
        (["run", "prepare", "--out", "OUT/n.ipynb", "--json", "{"], ["--json"]),
        (["run", "prepare", "--out", "OUT/n.ipynb", "--json", "[1]"], ["--json", '{"steps": 100}']),
        (["plan", "OUT/no.yaml", "--out", "OUT/x"], ["no.yaml", "No such file"]),
        (["plan", "NOTES", "--out", "OUT/x"], ["notes.txt"]),
        (["plan", "LIST", "--out", "OUT/x"], ["list.yaml"]),
        (["plan", "TINY", "--out", "NOTES"], ["notes.txt"]),
        (["plan", "TINY", "--out", "OUT/x", "--cores", "0"], ["--cores"]),
        (["demo", "--out", "NOTES"], ["notes.txt"]),
    ],
)
def test_other_refusals(
    out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    notes, rows = out.parent / "notes.txt", out.parent / "list.yaml"
    notes.write_text("{: not a plan\n")
    rows.write_text("- prepare\n- train\n")
    tiny = Path(__file__).parent / "plans" / "tiny.yaml"
    names = {"OUT": out, "NOTES": notes, "LIST": rows, "TINY": tiny}
    for short, long in names.items():
        arguments = [str(long) + a[len(short) :] if a.startswith(short) else a for a in arguments]
    said = call(capsys, *arguments)
    own = [line for line in lines_of(said.err) if not line.startswith("a small phantom")]
    refused(said._replace(err="\n".join(own)), *words)
    assert content(out) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonesuch", "--out", "OUT/n.ipynb"], ["nonesuch", "prepare"]),
        (["prepare", "--out", "OUT/n.ipynb", "-p", "sizes=8"], ["sizes", "size"]),
        (["prepare", "--out", "OUT/file/n.ipynb", "-p", "out=x"], ["file"]),
        (["prepare", "--out", "OUT", "-p", "out=x"], ["NAME.ipynb"]),
        (["prepare"], ["--out NOTEBOOK", "--plain"]),
        (["prepare", "--plain", "--out", "OUT/n.ipynb"], ["--out NOTEBOOK", "--plain"]),
        (["prepare", "--plain", "-p", "out=x", "-p", "sizes=8"], ["sizes", "size"]),
        (["evaluate", "--plain"], ["evaluate", "as a notebook only"]),
        (["prepare", "--out", "OUT/n.txt", "-p", "out=x"], ["n.txt", "NAME.ipynb"]),
    ],
)
def test_run_refusals(
    out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    (out / "file").write_text("a file")
    before = content(out)
    arguments = [a.replace("OUT", str(out)) for a in arguments]
    said = call(capsys, "run", *arguments)
    own = [line for line in lines_of(said.err) if not line.endswith(": started")]
    refused(said._replace(err="\n".join(own)), *words)
    assert content(out) == before


@pytest.mark.slow
@pytest.mark.nightly
@needs_real_data
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_real_scan(place: Place, out: Path) -> None:
    """The job of a user, in a process of its own so that its memory can be measured."""
    scan = Path(str(REAL), "nlst_chest_dicom")
    weights = BUNDLED if BUNDLED.is_file() else place.weights
    arguments = (scan, out / "sr.mha", "--slices", "60:61", "--weights", weights)
    job = child("super-resolve", *arguments, program=("-c", MEASURED))
    said, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert "super-resolving" in err  # a progress bar
    peak = int(said.split("peak ")[1])
    assert peak < 2e9, f"{peak / 1e9:.2f} GB"
    image = sitk.ReadImage(str(out / "sr.mha"))
    assert image.GetSize() == (4096, 4096, 1)
    np.testing.assert_allclose(image.GetSpacing(), (0.0675, 0.0675, 2.0), atol=1e-3)
    overlays(image, read_volume(scan, slices=(60, 61)))
    with Image.open(out / "sr.mha.png") as picture:
        picture.load()
        assert min(picture.size) > 300
