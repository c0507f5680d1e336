"""A whole scan to the disk: bounded memory, killed and continued, in parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from peak import PEAK_BYTES

from mmsr.core import FileError, MMSRError, ResourceError, SettingsError, process_memory, seeded
from mmsr.data.volume import Volume, block_mean
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.inference.scan_job import ScanTargets, plan_scan, run_scan
from mmsr.inference.sr_slices import SROptions
from mmsr.inference.super_resolve import super_resolve
from mmsr.networks.generators import G1Settings, SRGenerator
from mmsr.networks.weights import ModelCard, build_g1, load_generator, save_generator
from mmsr.scans.output_plan import unfinished
from mmsr.scans.read import read_volume
from mmsr.scans.write import write_volume

REAL = os.environ.get("MMSR_REAL_DATA")
KILLS = int(os.environ.get("MMSR_KILLS", "3"))
large = pytest.mark.skipif(
    "MMSR_LARGE" not in os.environ, reason="MMSR_LARGE is not set: 4 GB and 5 minutes"
)
FORMATS = (".mha", ".nrrd", ".nii", ".nii.gz", ".ome.zarr", ".dicom")

# One call as a user's script would make it, in a process of its own.
JOB = (
    PEAK_BYTES
    + """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from mmsr.networks.weights import load_generator
from mmsr.scans.read import read_volume
from mmsr.inference.scan_job import ScanTargets, plan_scan, run_scan
from mmsr.inference.super_resolve import SROptions
scan, weights, out, part = sys.argv[1:5]
slices = tuple(map(int, sys.argv[5].split(":"))) if len(sys.argv) > 5 else None
g1, record = load_generator(weights)
volume = read_volume(scan, slices=slices, lazy=True)
i, n = map(int, part.split("/"))
job = plan_scan(volume, ScanTargets(Path(out)), g1, record)
done = run_scan(job, part=(i, n), progress=False)
print(json.dumps({"peak": peak_bytes(), "summary": done}))
"""
)


# The same, for many calls: one process loads the libraries, and another is split off for each call.
SERVER = f"""
import os, sys
lines = {JOB!r}.splitlines()
loading = next(i for i, line in enumerate(lines) if line.startswith("scan, "))
exec("\\n".join(lines[:loading]))
SROptions().resolved(load_generator(sys.argv[1])[0], (40, 32))  # loads and keeps a lot, too
print(0, flush=True)
for request in sys.stdin:
    if request.startswith("wait "):
        _, status = os.waitpid(int(request.split()[1]), 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        sys.argv, sys.stdout, ended = ["job", *json.loads(request)], sys.stderr, 1
        try:
            exec("\\n".join(lines[loading:]))
            ended = 0
        finally:
            os._exit(ended)
"""


class Jobs:
    """Calls in processes of their own."""

    def __init__(self, weights: Path) -> None:
        command, pipe = [sys.executable, "-c", SERVER, str(weights)], subprocess.PIPE
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "0\n"  # it is ready

    def ask(self, request: str) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(request + "\n")
        return int(self.server.stdout.readline())

    def start(self, *arguments: object) -> int:
        """Begin a call; return the number of its process."""
        return self.ask(json.dumps([str(a) for a in arguments]))

    def wait(self, process: int) -> int:
        """Wait for a call to end; return how it ended."""
        return self.ask(f"wait {process}")


@pytest.fixture(scope="module")
def jobs(weights: Path) -> Iterator[Jobs]:
    served = Jobs(weights)
    yield served
    served.server.communicate("", timeout=60)


def finish(*arguments: object) -> dict:
    """Make a call in a process that loads all by itself, as a user does."""
    command = [sys.executable, "-c", JOB, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def record_of(g1: SRGenerator) -> ModelCard:
    return ModelCard(
        g1=g1.settings,
        clinical_window=CLINICAL_WINDOW.to_dict(),
        micro_window={},
        method="untrained",
        data="none",
    )


def tiny(scale: int = 8, channels: int = 16) -> SRGenerator:
    return build_g1(
        G1Settings(channels=channels, blocks=1, norm="none", skip=True, scale=scale)
    ).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    g1 = tiny()
    save_generator(path, g1, record_of(g1))
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve oblique slices of air with something in it."""
    path = tmp_path_factory.mktemp("scan") / "scan.mha"
    rng = seeded(7, "scan job")
    hu = np.where(rng.random((12, 40, 32)) < 0.3, 60, -900) + rng.normal(0, 40, (12, 40, 32))
    c, s = np.cos(0.35), np.sin(0.35)
    turn = (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, -1.0)
    write_volume(path, Volume(np.rint(hu).astype(np.int16), (2.0, 0.7, 0.6), (-11, 7, 300), turn))
    return path


def content(path: Path) -> dict[str, bytes]:
    """Read a file, or all files of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def voxels(path: Path) -> np.ndarray:
    if path.name.endswith(".ome.zarr"):
        import zarr

        return np.asarray(zarr.open_array(path / "0", mode="r")[:])
    if path.is_dir():
        return np.stack([pydicom.dcmread(p).pixel_array for p in sorted(path.iterdir())])
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_holds_the_same_voxels(
    scan: Path, weights: Path, tmp_path: Path, ending: str
) -> None:
    g1, record = load_generator(weights)
    volume = read_volume(scan, slices=(4, 7), lazy=True)
    whole = super_resolve(volume, g1, record, progress=False).volume
    out = tmp_path / f"sr{ending}"
    run_scan(plan_scan(volume, ScanTargets(out), g1, record), progress=False)
    assert np.array_equal(voxels(out), whole.array)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [
        ".nii.gz",
        ".ome.zarr",
        pytest.param(".mha", marks=pytest.mark.nightly),
        pytest.param(".dicom", marks=pytest.mark.nightly),
    ],
)
def test_killed_at_any_moment_it_goes_on(
    scan: Path, weights: Path, tmp_path: Path, jobs: Jobs, ending: str
) -> None:
    (tmp_path / "whole").mkdir()
    reference = tmp_path / "whole" / f"sr{ending}"
    began = time.monotonic()
    assert jobs.wait(jobs.start(scan, weights, reference, "1/1")) == 0
    took = time.monotonic() - began
    rng, out, killed, ended = seeded(3, "kill", ending), tmp_path / f"sr{ending}", 0, 1
    while ended:
        process = jobs.start(scan, weights, out, "1/1")
        if killed < KILLS:
            time.sleep(rng.uniform(0, took))
            os.kill(process, signal.SIGKILL)
        ended = jobs.wait(process)
        assert ended in (0, -signal.SIGKILL)
        killed += ended != 0
        if not ended and killed < KILLS:  # the kill came too late: begin anew
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            ended = 1
        assert time.monotonic() - began < 60 + 20 * KILLS
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "whole"]
    assert np.array_equal(voxels(out), voxels(reference))
    if ending != ".dicom":  # its objects have new identifiers in each job
        assert content(out) == content(reference)


@pytest.mark.slow
def test_parts_at_once_make_one_volume(
    scan: Path, weights: Path, tmp_path: Path, jobs: Jobs
) -> None:
    out = tmp_path / "sr.ome.zarr"
    parts = [jobs.start(scan, weights, out, f"{i}/3") for i in (1, 2, 3)]
    assert [jobs.wait(part) for part in parts] == [0, 0, 0]
    assert not out.exists()
    g1, record = load_generator(weights)
    volume = read_volume(scan, lazy=True)
    summary = run_scan(plan_scan(volume, ScanTargets(out), g1, record), progress=False)
    assert summary is not None
    assert summary.slices == 12
    whole = super_resolve(volume, g1, record, progress=False).volume
    assert np.array_equal(voxels(out), whole.array)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for part in ("1/1", "2/3"):  # a cluster that repeats a call changes nothing
        assert jobs.wait(jobs.start(scan, weights, out, part)) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert not unfinished(out).exists()


# Jobs of more and more slices: what the longest one needs beyond the first is kept slices.
GROWING = (
    PEAK_BYTES
    + """
import json, sys
import numpy as np
import torch
torch.set_num_threads(1)
from mmsr.networks.weights import load_generator
from mmsr.scans.read import read_volume
from mmsr.inference.scan_job import ScanTargets, plan_scan, run_scan
from mmsr.data.volume import Volume
from mmsr.scans.slices import SliceReader
from mmsr.scans.write import write_volume
folder, ending, side = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
g1, record = load_generator(folder / "w.safetensors")
for count in map(int, sys.argv[4:]):
    scan, out = folder / f"{count}.mha", folder / f"{count}-sr{ending}"
    few = np.random.default_rng(5).integers(-1000, 100, (10, side, side)).astype(np.int16)
    read = lambda first, last: (few[z % 10] for z in range(first, last))
    tiled = SliceReader((count, side, side), few.dtype, read)
    write_volume(scan, Volume(tiled, (1.0, 0.6, 0.6)))
    volume = read_volume(scan, lazy=True)
    run_scan(plan_scan(volume, ScanTargets(out), g1, record), progress=False)
    assert out.exists()
    print(count, peak_bytes(), flush=True)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "scale", "side", "counts"),
    [
        (".mha", 2, 128, (10, 300)),  # kept, 1000 slices would be 131 MB
        pytest.param(".mha", 2, 128, (10, 100, 1000), marks=pytest.mark.nightly),
        pytest.param(".mha", 8, 512, (10, 100), marks=large),
        pytest.param(".ome.zarr", 8, 512, (10, 100), marks=large),
    ],
)
def test_memory_does_not_grow_with_the_slices(
    tmp_path: Path, ending: str, scale: int, side: int, counts: tuple[int, ...]
) -> None:
    g1 = tiny(scale, channels=max(scale, 4))
    save_generator(tmp_path / "w.safetensors", g1, record_of(g1))
    command = [sys.executable, "-c", GROWING, tmp_path, ending, side, *counts]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    peaks = {int(n): int(peak) for n, peak in (line.split() for line in run.stdout.splitlines())}
    assert len(peaks) == len(counts)
    assert max(peaks.values()) < 1.1 * peaks[counts[0]], peaks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [7, None])
def test_exact_means_are_the_scan(masked: bool, tile: int | None) -> None:
    """Whatever the network answers, also far outside its window and beside a mask."""
    rng = seeded(9, "exact")
    hu = rng.integers(-1024, 1500, (2, 23, 31)).astype(np.int16)
    mask = rng.random(hu.shape) < 0.5 if masked else None
    g1 = tiny()
    with torch.no_grad():  # an answer far from the scan
        g1.last.bias.fill_(0.4)
    options = SROptions(exact_means=True, tile=tile)
    volume = Volume(hu, (1.0, 0.6, 0.6))
    result = super_resolve(volume, g1, record_of(g1), options, mask=mask, progress=False)
    assert result.summary.saturated == 0
    assert np.abs(block_mean(result.volume.array) - hu).max() <= 0.5
    plain = super_resolve(volume, g1, record_of(g1), mask=mask, progress=False)
    assert np.abs(block_mean(plain.volume.array) - hu).max() > 20


def test_the_spread_is_that_of_the_eight_answers() -> None:
    """Made by hand: turn the slice, super-resolve, turn back; eight times."""
    hu = seeded(11, "spread").integers(-1000, 200, (1, 9, 14)).astype(np.int16)
    g1 = tiny()
    with torch.no_grad():
        g1.last.weight.mul_(4)  # so that the pose matters
    record, single = record_of(g1), []
    for turns in range(4):
        for flip in (False, True):
            posed = np.rot90(hu[:, :, ::-1] if flip else hu, turns, (1, 2))
            volume = Volume(np.ascontiguousarray(posed), (1.0, 0.6, 0.6))
            sr = super_resolve(volume, g1, record, progress=False).volume.array
            back = np.rot90(sr, -turns, (1, 2))
            single.append(back[:, :, ::-1] if flip else back)
    volume = Volume(hu, (1.0, 0.6, 0.6))
    result = super_resolve(volume, g1, record, SROptions(uncertainty=True), progress=False)
    assert result.uncertainty is not None
    assert np.array_equal(result.volume.array, single[0])
    wanted = np.std(np.stack(single).astype(float), axis=0)
    assert wanted.max() > 20
    assert np.abs(result.uncertainty.array - wanted).max() <= 1.5  # both are rounded


def test_no_spread_where_the_answer_does_not_depend_on_the_pose() -> None:
    g1 = tiny()
    with torch.no_grad():  # nothing but the skip, which is bicubic
        g1.last.weight.zero_()
        g1.last.bias.zero_()
    hu = seeded(12, "spread").integers(-1000, 200, (1, 9, 14)).astype(np.int16)
    volume = Volume(hu, (1.0, 0.6, 0.6))
    result = super_resolve(volume, g1, record_of(g1), SROptions(uncertainty=True), progress=False)
    assert result.uncertainty is not None
    assert result.uncertainty.array.max() == 0


def refused(kind: type[MMSRError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_end_is_not_begun(
    scan: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g1, record = load_generator(weights)
    volume, targets = read_volume(scan, lazy=True), ScanTargets(tmp_path / "sr.mha")
    monkeypatch.setattr("mmsr.inference.scan_job.free_space", lambda path: 1_000_000)
    assert "MB free" in refused(ResourceError, lambda: plan_scan(volume, targets, g1, record))
    monkeypatch.undo()
    monkeypatch.setattr("mmsr.inference.super_resolve.available_memory", lambda: 1_000_000)
    assert "memory" in refused(ResourceError, lambda: plan_scan(volume, targets, g1, record))
    monkeypatch.undo()
    wrong = SROptions(uncertainty=True)
    refused(SettingsError, lambda: plan_scan(volume, targets, g1, record, wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".mha", ".nii.gz", ".ome.zarr", ".dicom"])
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_work_that_somebody_has_tidied_up_is_done_again(
    scan: Path, weights: Path, tmp_path: Path, ending: str, how: str
) -> None:
    """The journal names slices whose files are gone: not one may come out blank."""
    g1, record = load_generator(weights)
    volume = read_volume(scan, slices=(4, 8), lazy=True)
    targets = ScanTargets(tmp_path / f"sr{ending}")
    whole = super_resolve(volume, g1, record, progress=False).volume
    run_scan(plan_scan(volume, targets, g1, record), part=(1, 2), progress=False)
    work = unfinished(targets.sr)
    pieces = [p for p in work.rglob("*") if p.is_file() and p.stat().st_size > 5000]
    assert pieces
    if how == "removed":
        pieces[0].unlink()
    else:
        pieces[0].write_bytes(b"")
    run_scan(plan_scan(volume, targets, g1, record), progress=False)
    assert np.array_equal(voxels(targets.sr), whole.array)


def test_slices_of_zeros_are_slices(weights: Path, tmp_path: Path) -> None:
    """Outside a mask the spread is 0; a packed format may not leave such slices out."""
    g1, record = load_generator(weights)
    hu = seeded(2, "zeros").integers(-1000, 100, (3, 12, 9)).astype(np.int16)
    volume, mask = Volume(hu, (1.0, 0.6, 0.6)), np.zeros(hu.shape, bool)
    mask[1] = True
    targets = ScanTargets(tmp_path / "sr.mha", uncertainty=tmp_path / "u.ome.zarr")
    options = SROptions(uncertainty=True)
    for part in ((1, 2), (1, 1)):
        job = plan_scan(volume, targets, g1, record, options, mask=mask)
        run_scan(job, part=part, progress=False)
    spread = voxels(tmp_path / "u.ome.zarr")
    assert spread[[0, 2]].max() == 0
    assert spread[1].max() > 0


def test_room_is_counted_once(
    scan: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier call has put on the disk is not asked for again."""
    g1, record = load_generator(weights)
    volume = read_volume(scan, lazy=True)
    targets = ScanTargets(tmp_path / "sr.mha", tmp_path / "apart.mha")
    run_scan(plan_scan(volume, targets, g1, record), part=(1, 2), progress=False)
    monkeypatch.setattr("mmsr.inference.scan_job.free_space", lambda path: 3_000_000)
    run_scan(plan_scan(volume, targets, g1, record), progress=False)
    assert targets.sr.exists()
    fresh = ScanTargets(tmp_path / "again.mha", tmp_path / "again-apart.mha")
    refused(ResourceError, lambda: plan_scan(volume, fresh, g1, record))


def test_a_plan_says_what_it_takes(
    scan: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process_memory() > 100_000_000  # with torch in it
    monkeypatch.setattr("mmsr.inference.scan_job.process_memory", lambda: 300_000_000)
    g1, record = load_generator(weights)
    volume = read_volume(scan, lazy=True)
    job = plan_scan(volume, ScanTargets(tmp_path / "sr.mha"), g1, record)
    assert (job.finished, list(tmp_path.iterdir())) == (False, [])
    *grids, needs, time_needed = job._replace(memory=168_000_000, disk=16_800_000_000).lines(950.0)
    assert grids[1] == "result: 256 x 320 x 12 voxels of 0.0750 x 0.0875 x 2 mm"
    assert needs == "needs:  468MB of memory, up to 16.8GB of disk"
    assert time_needed == "time:   about 950.0 s a slice, 3:10:00 (h:min:s) in all"


def test_another_job_is_not_mixed_in(scan: Path, weights: Path, tmp_path: Path) -> None:
    g1, record = load_generator(weights)
    volume, targets = read_volume(scan, lazy=True), ScanTargets(tmp_path / "sr.mha")
    run_scan(plan_scan(volume, targets, g1, record), part=(1, 2), progress=False)
    with torch.no_grad():
        g1.last.bias.add_(0.1)
    said = refused(FileError, lambda: run_scan(plan_scan(volume, targets, g1, record)))
    assert "weights" in said
    other = read_volume(scan, slices=(0, 11), lazy=True)
    g1, record = load_generator(weights)
    refused(FileError, lambda: run_scan(plan_scan(other, targets, g1, record)))
    run_scan(plan_scan(volume, targets, g1, record), progress=False)
    assert run_scan(plan_scan(volume, targets, g1, record), progress=False) is None  # is finished
    exact = SROptions(exact_means=True)
    said = refused(FileError, lambda: run_scan(plan_scan(volume, targets, g1, record, exact)))
    assert "exists" in said


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="MMSR_REAL_DATA is not set: no real scan to read")
def test_a_real_slice_stays_small_and_in_place(tmp_path: Path) -> None:
    source = Path(REAL or "", "nlst_chest_dicom")
    bundled = Path(__file__).parents[2] / "mmsr" / "weights" / "phantom.safetensors"
    out = tmp_path / "sr.mha"
    said = finish(source, bundled, out, "1/1", "60:61")
    assert said["peak"] < 0.8e9
    sr, volume = sitk.ReadImage(str(out)), read_volume(source, slices=(60, 61))
    assert sr.GetSize() == (4096, 4096, 1)
    for j, i in [(0, 0), (511, 511), (255, 37), (511, 0)]:
        centre = sr.TransformContinuousIndexToPhysicalPoint((8 * i + 3.5, 8 * j + 3.5, 0.0))
        assert np.abs(centre - volume.world_mm((0, j, i))).max() < 1e-6
    bone = volume.array[0] > 900  # far above the window's 350 HU
    assert bone.sum() > 50
    means = block_mean(sitk.GetArrayFromImage(sr))[0]
    assert np.corrcoef(means[bone], volume.array[0][bone])[0, 1] > 0.9
    assert abs(means[bone].mean() - volume.array[0][bone].mean()) < 40
