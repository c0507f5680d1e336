"""Patch banks: what a damaged folder, a full disk or a wrong argument may do, and may not."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsr.core import (
    FileError,
    MMSRError,
    RangeError,
    ResourceError,
    SettingsError,
    ShapeError,
    seeded,
)
from mmsr.data.batches import PatchLoader, UnpairedBatches
from mmsr.data.masks import lung_mask
from mmsr.data.patches import PatchCase, open_bank, write_bank
from mmsr.data.sampling import sample_positions, split_cases
from mmsr.data.volume import Volume, resample_in_plane
from mmsr.data.windows import CLINICAL_WINDOW, Window
from mmsr.training.distributed import make_fabric

REAL = Path(os.environ.get("MMSR_REAL_DATA") or "/nowhere")
needs_real = pytest.mark.skipif(
    not (REAL / "nlst_chest_dicom").is_dir(), reason="MMSR_REAL_DATA does not point at the scans"
)
SETTINGS = {
    "modality": "clinical",
    "size": 16,
    "per_case": 20,
    "window": CLINICAL_WINDOW,
    "seed": 5,
}


def case(name: str, seed: int = 0, dtype: type = np.int16, shape=(2, 50, 60)) -> PatchCase:
    noise = seeded(seed, "case").normal(-850, 60, shape)
    array = np.rint(noise).astype(dtype) if np.dtype(dtype).kind != "f" else noise.astype(dtype)
    volume = SimpleNamespace(array=array, spacing_mm=(2.0, 0.6, 0.6))
    return PatchCase(name, volume, np.ones(shape, bool))


@pytest.fixture
def bank(tmp_path):
    return write_bank(tmp_path / "bank", [case("a"), case("b", 1)], **SETTINGS)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@given(
    mask=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 4), st.integers(5, 40), st.integers(5, 40)),
    size=st.integers(1, 6),
    share=st.sampled_from([0.002, 0.02, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_centres_lie_in_the_mask_and_patches_in_the_image(mask, shape, size, share):
    inside = seeded(mask).random(shape) < share
    if size > min(shape[1:]):
        with pytest.raises(ShapeError):
            sample_positions(inside, size, 10, seeded(0))
        return
    half = size // 2
    room = inside[:, half : shape[1] - size + half + 1, half : shape[2] - size + half + 1]
    if not room.any():
        with pytest.raises(RangeError):
            sample_positions(inside, size, 10, seeded(0))
        return
    z, y, x = sample_positions(inside, size, 50, seeded(mask)).T
    assert inside[z, y + half, x + half].all()
    assert min(y.min(), x.min()) >= 0
    assert (y + size <= shape[1]).all()
    assert (x + size <= shape[2]).all()


@pytest.mark.parametrize("size", [7, 8])
def test_both_ways_of_drawing_are_uniform(size):
    from scipy import stats

    for share in (0.3, 0.004):  # by rejection; by rank
        mask = seeded(1, "uniform").random((5, 90, 110)) < share
        corners = sample_positions(mask, size, 40_000, seeded(2))
        hits = np.zeros(mask.shape, int)
        half = size // 2
        np.add.at(hits, tuple((corners + [0, half, half]).T), 1)  # noqa: RUF005
        room = mask.copy()
        room[:, :half] = room[:, :, :half] = False
        room[:, 90 - size + half + 1 :] = room[:, :, 110 - size + half + 1 :] = False
        assert hits[~room].sum() == 0
        assert 0.001 < stats.chisquare(hits[room]).pvalue < 0.999


def test_sampling_takes_little_memory():
    mask = np.broadcast_to(np.ones((1, 512, 512), bool), (500, 512, 512))
    tracemalloc.start()
    sample_positions(mask, 32, 2000, seeded(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_sampling_nothing_and_no_cases():
    assert sample_positions(np.ones((1, 9, 9), bool), 3, 0, seeded(0)).shape == (0, 3)
    with pytest.raises(SettingsError, match="held_out"):
        split_cases([], held_out=0)
    assert split_cases(["a"], held_out=0) == (["a"], [])
    with pytest.raises(SettingsError, match="held_out"):
        split_cases(["a", "b"], held_out=-1)


@pytest.mark.slow
def test_another_process_writes_the_same_bank(tmp_path, bank):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_patches import *\n"
        "write_bank(sys.argv[1], [case('b', 1), case('a')], **SETTINGS)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other"), str(Path(__file__).parent)]
    subprocess.run(command, check=True)
    for name in ("bank.json", "patches.npy", "positions.npy"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "bank" / name).read_bytes()


def crop(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


DAMAGE = {
    "no bank.json": lambda b: (b / "bank.json").unlink(),
    "half a bank.json": lambda b: crop(b / "bank.json", 0.5),
    "empty bank.json": lambda b: (b / "bank.json").write_text(""),
    "a list in bank.json": lambda b: (b / "bank.json").write_text("[1, 2]"),
    "no patches": lambda b: (b / "patches.npy").unlink(),
    "half the patches": lambda b: crop(b / "patches.npy", 0.5),
    "no header": lambda b: crop(b / "patches.npy", 0.0001),
    "a text for patches": lambda b: (b / "patches.npy").write_text("patches"),
    "other patches": lambda b: np.save(b / "patches.npy", np.zeros((40, 8, 8), np.int16)),
    "another type": lambda b: np.save(b / "patches.npy", np.zeros((40, 16, 16), np.float32)),
    "objects": lambda b: np.save(b / "patches.npy", np.array([{}], object), allow_pickle=True),
    "cases in another order": lambda b: np.save(
        b / "positions.npy", np.load(b / "positions.npy")[::-1]
    ),
    "a case that is not there": lambda b: np.save(
        b / "positions.npy", np.load(b / "positions.npy") + np.array([1, 0, 0, 0], np.int32)
    ),
    "too few positions": lambda b: np.save(b / "positions.npy", np.zeros((39, 4), np.int32)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_banks_are_refused(tmp_path, bank, damage):
    DAMAGE[damage](tmp_path / "bank")
    with pytest.raises(FileError) as e:
        open_bank(tmp_path / "bank")
    assert "bank" in one_line(e)
    assert "write it" in one_line(e)
    with pytest.raises(FileError):  # nor is it taken for one that is done
        write_bank(tmp_path / "bank", [case("a"), case("b", 1)], **SETTINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sise", 16),
        ("modality", "mr"),
        ("window", {"air": 5}),
        ("cases", "none"),
        ("cases", []),
        *(("dtype", dtype) for dtype in ("<c16", "<f16", "|O", "|b1", "<i4,<i4", "number", "")),
    ],
)
def test_wrong_records_are_refused(tmp_path, bank, name, value):
    path = tmp_path / "bank" / "bank.json"
    record = json.loads(path.read_text())
    record[name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(FileError, match=r"bank\.json"):
        open_bank(tmp_path / "bank")


def test_a_record_of_an_empty_bank(tmp_path, bank):
    path = tmp_path / "bank" / "bank.json"
    record = json.loads(path.read_text())
    for one in record["cases"]:
        one["taken"] = 0
    path.write_text(json.dumps(record))
    np.save(tmp_path / "bank" / "patches.npy", np.zeros((0, 16, 16), np.int16))
    np.save(tmp_path / "bank" / "positions.npy", np.zeros((0, 4), np.int32))
    with pytest.raises(FileError, match=r"bank\.json.*taken"):
        open_bank(tmp_path / "bank")


@pytest.mark.parametrize("place", [200, -1])
def test_changed_patches_are_found_when_asked(tmp_path, bank, place):
    path = tmp_path / "bank" / "patches.npy"
    assert np.array_equal(open_bank(path.parent, verify=True).patches, bank.patches)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    open_bank(path.parent)  # only reading it all can tell
    with pytest.raises(FileError, match="fingerprint differs") as e:
        open_bank(path.parent, verify=True)
    assert "write it again" in one_line(e)


def test_a_record_whose_case_window_cannot_be_inverted(tmp_path, bank):
    path = tmp_path / "bank" / "bank.json"
    record = json.loads(path.read_text())
    record["cases"][1]["window"]["tissue"] = -2000
    path.write_text(json.dumps(record))
    with pytest.raises(FileError, match=r"bank\.json.*tissue above air"):
        open_bank(tmp_path / "bank")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, ResourceError), (errno.EACCES, FileError)]
)
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "numpy.save"])
def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch, number, kind, call):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, fail)
    with pytest.raises(kind, match="not written") as e:
        write_bank(tmp_path / "bank", [case("a")], **SETTINGS)
    one_line(e)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_while_the_patches_are_written(tmp_path):
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_patches import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: write_bank(sys.argv[1], [case('a')], **{**SETTINGS, 'per_case': 200})\n"
        "except ResourceError as e: print(e)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bank"), str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "not written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_keeps_the_earlier_bank(tmp_path, bank):
    before = (tmp_path / "bank" / "patches.npy").read_bytes()
    flat = case("c")
    flat.volume.array[:] = -1000
    with pytest.raises(RangeError, match=r"case c: .*flat"):
        write_bank(tmp_path / "bank", [case("a"), flat], **SETTINGS, overwrite=True)
    assert (tmp_path / "bank" / "patches.npy").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]
    write_bank(tmp_path / "bank", [case("c", 3)], **SETTINGS, overwrite=True)
    assert [c.name for c in open_bank(tmp_path / "bank").info.cases] == ["c"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("sea")
    (tmp_path / "file").write_text("text")
    for name in ("holiday", "file"):
        with pytest.raises(FileError, match="no patch bank"):
            write_bank(tmp_path / name, [case("a")], **SETTINGS, overwrite=True)
    assert (tmp_path / "holiday" / "photo.jpg").read_text() == "sea"
    with pytest.raises(FileError, match="not written"):
        write_bank(tmp_path / "absent" / "bank", [case("a")], **SETTINGS)


WRONG = {
    "no cases": ([], {}),
    "twice the same": ([case("a"), case("a", 1)], {}),
    "modality": ([case("a")], {"modality": "mr"}),
    "per_case": ([case("a")], {"per_case": 0}),
    "size": ([case("a")], {"size": 64}),
    "size 0": ([case("a")], {"size": 0}),
    "types": ([case("a"), case("b", dtype=np.float32)], {}),
    "window": ([case("a")], {"window": Window(5.0, 5.0, "HU")}),
    "seed": ([case("a")], {"seed": -1}),
    "two dimensions": ([case("a", shape=(50, 60))], {}),
    "empty mask": ([case("a")._replace(mask=np.zeros((2, 50, 60), bool))], {}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_write_nothing(tmp_path, wrong):
    cases, change = WRONG[wrong]
    with pytest.raises(MMSRError) as e:
        write_bank(tmp_path / "bank", cases, **{**SETTINGS, **change})
    one_line(e)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    bad = case("dora", dtype=np.float32)
    bad.volume.array[1, 3, 59] = value
    with pytest.raises(RangeError, match=r"case dora: (nan|inf) at z 1, y 3, x 59"):
        write_bank(tmp_path / "bank", [bad], **SETTINGS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, ">u2"])
def test_the_number_type_is_kept(tmp_path, dtype):
    array = seeded(0, "grey").integers(0, 255, (1, 40, 40)).astype(dtype)
    volume = SimpleNamespace(array=array, spacing_mm=(0.1, 0.1, 0.1))
    change = {"modality": "micro", "window": Window(20.0, 200.0, "grey")}
    bank = write_bank(
        tmp_path / "b", [PatchCase("a", volume, array >= 0)], **{**SETTINGS, **change}
    )
    assert bank.patches.dtype == np.dtype(dtype)
    _, z, y, x = bank.positions[3]
    assert (bank.patches[3] == array[z, y : y + 16, x : x + 16]).all()


def test_every_case_is_mapped_by_its_own_window(tmp_path):
    first = case("a")
    doubled = SimpleNamespace(array=first.volume.array * 2, spacing_mm=(2.0, 0.6, 0.6))
    second = PatchCase("a", doubled, first.mask, Window(-2000.0, 100.0, "grey"))
    banks = [write_bank(tmp_path / n, [c], **SETTINGS) for n, c in (("1", first), ("2", second))]
    x, y = (bank.unit(range(20)) for bank in banks)
    assert np.abs(x - y).max() < 1e-6
    assert banks[1].info.cases[0].window["tissue"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 40, 95])
def test_epochs_are_permutations_whatever_the_batch(bank, tmp_path, batch_size):
    y = write_bank(tmp_path / "y", [case("y", 9, shape=(1, 200, 200))],
                   **{**SETTINGS, "modality": "micro", "size": 128, "per_case": 3})  # fmt: skip
    batches = UnpairedBatches(bank, y, batch_size, 0, augment=False)
    steps = -(-120 // batch_size)
    loader = PatchLoader(batches, make_fabric("cpu"))
    seen = np.concatenate([loader.batch(t)[0].numpy() for t in range(steps)])[:120]
    known = {patch.tobytes(): i for i, patch in enumerate(bank.unit(range(40)))}
    order = np.array([known[patch.tobytes()] for patch in seen[:, 0]]).reshape(3, 40)
    assert (np.sort(order) == np.arange(40)).all()
    assert (order[0] != order[1]).any()


def test_wrong_batches(bank):
    with pytest.raises(ShapeError, match="y_bank: expected patches of 128"):
        UnpairedBatches(bank, bank, 2, 0).draw(0)
    same = UnpairedBatches(bank, bank, 2, 0, scale=1)
    for wrong in (same._replace(batch_size=0), same):
        with pytest.raises(SettingsError, match="step"):
            wrong.draw(-1 if wrong is same else 0)


@pytest.mark.slow
@given(
    batch_size=st.integers(1, 13),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.7, 1.0]),
    first=st.sampled_from([0, 3, 10_000_000]),
)
@settings(max_examples=40, deadline=None)
def test_degraded_samples_are_evenly_spaced_and_change_nothing_else(batch_size, fraction, first):
    banks = [SimpleNamespace(info=SimpleNamespace(size=s), patches=range(n))
             for s, n in ((16, 11), (128, 7))]  # fmt: skip
    plain = UnpairedBatches(*banks, batch_size, 4)
    mixed = plain._replace(degraded_fraction=fraction)
    steps = range(first, first + 40)
    one, other = ([b.draw(t) for t in steps] for b in (plain, mixed))
    degraded = np.concatenate([draw.degraded for draw in other])
    chosen = np.flatnonzero(degraded >= 0)
    assert abs(len(chosen) - fraction * 40 * batch_size) <= 1
    assert np.ptp(np.diff(chosen)) <= 1 if len(chosen) > 2 else True
    assert degraded.max() < 7
    for a, b in zip(one, other, strict=True):
        for name in ("y", "x_pose", "y_pose"):
            assert (getattr(a, name) == getattr(b, name)).all()
    if fraction == 0:
        assert all((a.x == b.x).all() for a, b in zip(one, other, strict=True))
    clinical = np.concatenate([draw.x for draw in other])[degraded < 0]
    counts = np.bincount(clinical, minlength=11)
    assert np.ptp(counts) <= 2  # passes: at most one begun and one not finished


def test_degraded_patches_are_block_means_of_another_draw(tmp_path, bank):
    y_bank = write_bank(tmp_path / "y", [case("y", 9, shape=(1, 200, 200))],
                        **{**SETTINGS, "modality": "micro", "size": 32, "per_case": 9})  # fmt: skip
    batches = UnpairedBatches(bank, y_bank, 8, 3, scale=2, degraded_fraction=0.5, augment=False)
    same, loader = 0, PatchLoader(batches, make_fabric("cpu"))
    for step in range(20):
        draw, (x, y) = batches.draw(step), (z.numpy() for z in loader.batch(step))
        means = y_bank.unit(draw.degraded[1::2])
        means = means.reshape(4, 16, 2, 16, 2).mean((2, 4))
        np.testing.assert_allclose(x[1::2, 0], means, atol=1e-6)
        np.testing.assert_array_equal(x[::2, 0], bank.unit(draw.x[::2]))
        np.testing.assert_array_equal(y[:, 0], y_bank.unit(draw.y))
        same += (draw.degraded == draw.y).sum()
    assert same < 40  # of 80: by chance a ninth
    for wrong in (-0.1, 1.01, float("nan")):
        with pytest.raises(SettingsError, match="degraded_fraction"):
            batches._replace(degraded_fraction=wrong).draw(0)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(3, 40), st.integers(3, 40)),
    ratios=st.tuples(st.floats(1, 3), st.floats(1, 3)),
    flip=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_averaging_keeps_means_ramps_and_the_centre(shape, ratios, flip):
    pixel, (z, y, x) = 0.06, np.mgrid[tuple(slice(n) for n in shape)]
    spacing = (0.5, pixel / ratios[0], pixel / ratios[1])
    turn = (0.0, flip, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    fine = Volume(np.zeros(shape), spacing, (4.0, -3.0, 2.0), turn, "micro", "grey")
    ramp = (fine.world_mm(np.stack([z, y, x], -1).reshape(-1, 3)) @ [3.0, -5.0, 7.0]).reshape(shape)
    coarse = resample_in_plane(fine._replace(array=ramp), pixel)
    assert coarse.array.dtype == np.float32
    for size, old, ratio in zip(coarse.array.shape[1:], shape[1:], ratios, strict=True):
        assert size == int(old / ratio + 1e-6)  # as many whole pixels as fit
    middle = [[(n - 1) / 2 for n in v.array.shape] for v in (fine, coarse)]
    np.testing.assert_allclose(coarse.world_mm(middle[1]), fine.world_mm(middle[0]), atol=1e-9)
    assert coarse.array.mean() == pytest.approx(ramp.mean(), abs=1e-4)
    flat = resample_in_plane(fine._replace(array=np.full(shape, 77, np.uint8)), pixel).array
    np.testing.assert_allclose(flat, 77, rtol=1e-6)
    if min(ratios) > 1.01:  # one pixel sees its own part of the ramp, to a pixel's width
        where = np.stack(np.meshgrid(*map(np.arange, coarse.array.shape), indexing="ij"), -1)
        expected = coarse.world_mm(where.reshape(-1, 3)) @ [3.0, -5.0, 7.0]
        assert np.abs(coarse.array.ravel() - expected).max() < 8 * max(spacing[1:])


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_averaging_by_a_whole_ratio_is_the_block_mean(ratio, dtype):
    array = seeded(ratio, "blocks").integers(0, 250, (2, 6 * ratio, 4 * ratio)).astype(dtype)
    fine = Volume(array, (1.0, 0.1, 0.1), modality="micro", unit="grey")
    blocks = array.reshape(2, 6, ratio, 4, ratio).astype(float).mean((2, 4))
    coarse = resample_in_plane(fine, 0.1 * ratio)
    np.testing.assert_allclose(coarse.array, blocks, rtol=1e-6, atol=1e-5)
    assert coarse.spacing_mm == (1.0, 0.1 * ratio, 0.1 * ratio)
    odd = resample_in_plane(
        fine._replace(array=np.pad(array, ((0, 0), (0, ratio - 1), (0, 0)))), 0.1 * ratio
    )
    assert odd.array.shape == coarse.array.shape


def test_averaging_cannot_enlarge():
    volume = Volume(np.zeros((1, 8, 8), np.uint8), (1.0, 0.1, 0.05), modality="micro", unit="grey")
    assert resample_in_plane(volume, 0.098).array.shape == (1, 8, 4)  # two per cent are no detail
    for wrong in (0.09, 0.0, -1.0, 0.41, float("nan")):
        with pytest.raises(RangeError, match="pixel_mm: expected") as e:
            resample_in_plane(volume, wrong)
        one_line(e)


@pytest.mark.slow
@needs_real
def test_a_bank_from_the_real_scan(tmp_path):
    from mmsr.scans.read import read_volume

    scan = read_volume(REAL / "nlst_chest_dicom", slices=(50, 80))
    mask = lung_mask(scan)
    bank = write_bank(
        tmp_path / "x", [PatchCase("nlst", scan, mask)], **{**SETTINGS, "size": 32, "per_case": 500}
    )
    record = bank.info.cases[0]
    assert record.taken == 500
    assert record.rejected_flat + record.rejected_air < 25  # a lung is neither
    assert record.spacing_mm == pytest.approx((2.0, 0.54, 0.54))
    unit = bank.unit(range(500))
    assert -0.8 < np.median(unit) < -0.5  # parenchyma, between −1000 and −775 HU
    height = np.histogram(bank.positions[:, 1], 5, (0, 30))[0] / 500
    expected = np.histogram(np.nonzero(mask)[0], 5, (0, 30))[0] / mask.sum()
    assert np.abs(height - expected).max() < 0.08
