"""A format of your own: a small module and one line make it known to reading and to `info`."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mmsr.app import cli
from mmsr.core import FileError
from mmsr.scans import read
from mmsr.scans.read import read_mask, read_volume
from mmsr.scans.scan_summary import scan_info

# What somebody would put into `toy.py`: a header line of text, and int16 HU behind it.
TOY_MODULE = """
from pathlib import Path

import numpy as np

from mmsr.scans.slices import Format
from mmsr.scans.volume_files import open_scan_file
from mmsr.scans.volume_headers import Header, read_header


def read_toy(path: Path) -> Header:
    line = path.open("rb").readline()
    word, *numbers = line.split()
    if word != b"TOY":
        raise ValueError("no TOY")
    x, y, z, *sizes = map(float, numbers)
    place = {"spacing": tuple(sizes), "axes": np.eye(3), "origin": (0.0, 0.0, 0.0)}
    return Header((int(x), int(y), int(z)), np.dtype("<i2"), path, len(line), **place)


TOY = Format("Toy", (".toy",), lambda path: read_header(read_toy, path), open_scan_file)
"""


def chest() -> np.ndarray:
    """Air with a ball of tissue in it, int16 HU."""
    z, y, x = np.mgrid[-1:1:6j, -1:1:24j, -1:1:20j]
    return np.where(np.sqrt(x**2 + y**2 + z**2) < 0.7, 40, -1000).astype(np.int16)


def save(path: Path, hu: np.ndarray) -> Path:
    """Write a toy file."""
    z, y, x = hu.shape
    path.write_bytes(f"TOY {x} {y} {z} 0.7 0.8 2.5\n".encode() + hu.astype("<i2").tobytes())
    return path


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the toy format known: one line."""
    module = ModuleType("toy")
    exec(TOY_MODULE, module.__dict__)
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.setattr(read, "FORMATS", [*read.FORMATS, module.TOY])


@pytest.mark.usefixtures("toy")
def test_it_is_read_whole_lazily_in_part_and_as_a_mask(tmp_path: Path) -> None:
    hu = chest()
    path = save(tmp_path / "scan.TOY", hu)
    scan = read_volume(path)
    assert np.array_equal(scan.array, hu)
    assert (scan.spacing_mm, scan.unit, scan.notes) == ((2.5, 0.8, 0.7), "HU", ())
    assert np.array_equal(read_volume(path, lazy=True).array[3], hu[3])
    assert np.array_equal(read_volume(path, slices=(2, 4)).array, hu[2:4])
    mask = save(tmp_path / "mask.toy", (hu > 0).astype(np.int16))
    assert np.array_equal(read_mask(mask, scan), hu > 0)


@pytest.mark.usefixtures("toy")
def test_it_is_told_by_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "scan.toy", chest())
    with pytest.raises(SystemExit) as end:
        cli.main(["info", str(path)])
    assert not end.value.code
    out = capsys.readouterr().out
    for line in ("Toy", "20 × 24 × 6 voxels", "0.7 × 0.8 × 2.5 mm", "-1000 to 40 HU", "as it is"):
        assert line in out
    assert [plane.title for plane in scan_info(path).planes] == ["axial", "coronal", "sagittal"]


@pytest.mark.usefixtures("toy")
def test_what_is_wrong_with_it_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.toy", chest())
    path.write_bytes(path.read_bytes()[:-9])
    for data, words in ((path.read_bytes(), "cut short"), (b"TIN 1\n", "no TOY"), (b"", "empty")):
        path.write_bytes(data)
        with pytest.raises(FileError, match=words) as error:
            read_volume(path)
        assert "\n" not in str(error.value)
    (tmp_path / "other.xyz").write_bytes(b"?")
    with pytest.raises(FileError, match="Toy"):  # it is among what could be read
        read_volume(tmp_path / "other.xyz")
    with pytest.raises(FileError, match="1 Toy"):
        read_volume(tmp_path)


def test_without_the_line_it_is_another_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="another file"):
        read_volume(save(tmp_path / "scan.toy", chest()))
