"""A format of one's own: a small module that describes it, and one line in the table."""

from pathlib import Path

import numpy as np
import pytest
from export_job import SLICES, outputs, plane, run

from mmsr.core import FileError, RangeError, ShapeError, seeded
from mmsr.data.volume import Volume
from mmsr.scans import write
from mmsr.scans.output_plan import is_finished, is_stamped, plan_outputs, unfinished
from mmsr.scans.slice_writers import Format, Target, Writer, write_piece
from mmsr.scans.write import check_writable, disk_needed, format_of, write_volume

# ---- the module: a folder with a NumPy file for each slice, and a page that says what it is


def slice_of(to: Target, z: int) -> Path:
    return to.path / f"{z}.npy"


def open_npys(to: Target) -> Writer:
    to.path.mkdir(exist_ok=True)
    page = f"{to.volume.spacing_mm} {to.volume.origin_mm} {to.notice}"
    (to.path / "about.txt").write_text(page)

    def put(z: int, plane: np.ndarray) -> None:
        write_piece(slice_of(to, z), lambda f: np.save(f, plane), to.sync)

    return Writer(put)


NPYS = Format(
    ".npys",
    open_npys,
    lambda to, z: {slice_of(to, z): to.plane_bytes},
    start=lambda path: (path / "about.txt").read_bytes(),
    entries=r"\d+\.npy|about\.txt",
    limit=1000,
    types=("int16", "float32"),
)


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setattr(write, "FORMATS", (*write.FORMATS, NPYS))


# ---- and all that comes with it


def read(path: Path) -> np.ndarray:
    files = [path / f"{z}.npy" for z in range(len(list(path.glob("*.npy"))))]
    return np.stack([np.load(file) for file in files])


def test_a_volume_is_written(tmp_path: Path) -> None:
    hu = seeded(1, "own").integers(-1000, 300, (3, 5, 7)).astype(np.int16)
    volume = Volume(hu, (2.0, 0.6, 0.6), notes=("super-resolved 8x",))
    for array in (hu * 0, hu):  # the second one replaces the first
        write_volume(tmp_path / "sr.npys", volume._replace(array=array))
    assert np.array_equal(read(tmp_path / "sr.npys"), hu)
    assert "Research only" in (tmp_path / "sr.npys" / "about.txt").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["sr.npys"]


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    volume = Volume(np.zeros((1, 4, 4)), (1.0, 1.0, 1.0))
    with pytest.raises(RangeError, match=r"float64 has no place in \.npys, which holds int16, fl"):
        check_writable(tmp_path / "a.npys", volume)
    with pytest.raises(ShapeError, match=r"\.npys holds up to 1000 voxels"):
        check_writable(tmp_path / "a.npys", volume._replace(array=np.zeros((1, 4, 1001), "int16")))
    with pytest.raises(FileError, match=r"\.dicom, \.npys"):  # it is among those that are named
        format_of(tmp_path / "a.png")
    assert disk_needed(tmp_path / "a.npys", (3, 100, 100), "int16") > 3 * 100 * 100 * 2


def test_a_job_makes_it_in_parts_and_knows_it_again(tmp_path: Path) -> None:
    made = outputs(tmp_path, ".npys")
    assert run(tmp_path, ".npys", (1, 2)) is None
    stored = sorted(unfinished(made["sr"].path).rglob("*.npy"))
    assert len(stored) == SLICES // 2
    stored[0].unlink()  # somebody has tidied up
    assert run(tmp_path, ".npys") == [{"z": z} for z in range(SLICES)]
    assert np.array_equal(read(made["sr"].path), np.stack([plane(z) for z in range(SLICES)]))
    assert is_stamped(made["sr"].path)
    assert is_finished(plan_outputs(made, {"scan": "abc"}))
    assert not is_finished(plan_outputs(made, {"scan": "other"}))
    (made["sr"].path / "4.npy").write_bytes(b"cut short")
    assert not is_finished(plan_outputs(made, {"scan": "abc"}))
