"""Super-resolution in memory: HU in, HU out, whatever is in the scan."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmsr.core import MMSRError, ResourceError, seeded
from mmsr.data.volume import Volume, block_mean
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.inference.sr_slices import SROptions, _ahead, super_resolve_slices
from mmsr.inference.super_resolve import super_resolve
from mmsr.inference.two_grids import enlarge_bicubic
from mmsr.networks.generators import G1Settings, SRGenerator
from mmsr.networks.weights import ModelCard, build_g1


def tiny(norm: str = "none", skip: bool = True) -> SRGenerator:
    return build_g1(G1Settings(channels=16, blocks=1, norm=norm, skip=skip)).eval()  # type: ignore[arg-type]


def record_of(g1: SRGenerator) -> ModelCard:
    return ModelCard(
        g1=g1.settings,
        clinical_window=CLINICAL_WINDOW.to_dict(),
        micro_window={},
        method="untrained",
        data="none",
    )


def volume_of(array: np.ndarray) -> Volume:
    return Volume(np.asarray(array, np.int16), (2.0, 0.6, 0.6))


@pytest.mark.parametrize("norm", ["none", "channel", "instance"])
def test_tiles_give_the_same_hu(norm: str) -> None:
    """But for ties of rounding, of which there are few."""
    hu = seeded(0, "tiles").integers(-1000, 600, (1, 33, 26))
    g1 = tiny(norm)
    whole, tiled = (
        super_resolve(volume_of(hu), g1, record_of(g1), SROptions(tile=tile), progress=False)
        for tile in (None, 8)
    )
    assert (whole.tile, tiled.tile) == (None, 8)
    apart = np.abs(whole.volume.array.astype(int) - tiled.volume.array)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_what_is_made_ahead_comes_in_order_and_fails_in_place() -> None:
    """The pipeline of a GPU, with Python's own errands."""
    import threading

    made: list[int] = []

    def make(n: int) -> int:
        if n == 5:
            raise MMSRError("slice 5: broken")
        made.append(n)
        assert threading.current_thread() is not threading.main_thread()
        return n * n

    first = _ahead(make, range(4))
    assert next(first) == 0
    assert list(first) == [1, 4, 9]
    assert list(_ahead(make, _ahead(make, range(3)))) == [0, 1, 16]
    assert list(_ahead(make, range(4), threads=2)) == [0, 1, 4, 9]
    given = []
    with pytest.raises(MMSRError, match="slice 5"):
        given.extend(_ahead(make, range(9)))
    made.clear()
    stopped = _ahead(make, range(100))
    next(stopped)
    stopped.close()
    assert len(made) <= 3  # nobody works on for a caller who has left


@pytest.mark.slow
def test_a_gpu_keeps_all_digits_whatever_was_switched_before() -> None:
    """Torch has an old and a new switch for TF32, and fails where one looks at the other's."""
    cudnn = torch.backends.cudnn
    earlier = ["cudnn.allow_tf32 = True", "cudnn.allow_tf32 = False"]
    if hasattr(cudnn, "conv"):
        places = ("cudnn.conv", "cudnn", "torch.backends")
        earlier += [f"{p}.fp32_precision = '{how}'" for p in places for how in ("ieee", "tf32")]
    script = """
import os, sys, torch
from mmsr.training.distributed import _tf32_switch, deterministic_fp32
cudnn = torch.backends.cudnn
for line in sys.argv[1:]:
    if os.fork() == 0:  # the switches are the process's
        exec(line)
        owner, name, exact = _tf32_switch()
        before = getattr(owner, name), cudnn.deterministic, cudnn.benchmark
        with deterministic_fp32():
            assert (getattr(owner, name), cudnn.deterministic) == (exact, True), line
        assert (getattr(owner, name), cudnn.deterministic, cudnn.benchmark) == before, line
        os._exit(0)
    assert os.wait()[1] == 0, line
print("checked")
"""
    command = [sys.executable, "-W", "ignore", "-c", script, *earlier]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "checked\n", run.stderr


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            ResourceError,
        ),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_too_little_memory_on_the_device_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, raised: RuntimeError, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("mmsr.inference.sr_slices._finish", fail)
    g1, volume = tiny(), volume_of(np.zeros((1, 12, 9)))
    with pytest.raises(kind) as e:
        list(super_resolve_slices(volume, [0], g1, record_of(g1), SROptions()))
    assert (type(e.value) is ResourceError) == (kind is ResourceError)
    assert ("--batch 1" in str(e.value)) == (kind is ResourceError)


def test_the_caller_is_not_left_in_inference_mode() -> None:
    g1 = tiny()
    volume = volume_of(seeded(0, "mode").integers(-1000, 100, (2, 12, 9)))
    for _ in super_resolve_slices(volume, [0, 1], g1, record_of(g1), SROptions()):
        assert not torch.is_inference_mode_enabled()


def test_half_precision_is_close_and_finite() -> None:
    g1 = tiny()
    volume = volume_of(seeded(0, "half").integers(-1000, 100, (1, 12, 9)))
    half, full = (
        super_resolve(volume, g1, record_of(g1), SROptions(precision=p), progress=False)
        for p in ("bf16", "32")
    )
    apart = np.abs(half.volume.array.astype(int) - full.volume.array)
    assert 0 < apart.mean() < 10


def test_bone_and_metal_survive_the_window() -> None:
    hu = np.full((1, 24, 24), 40)
    hu[0, 8:16, 8:16] = 1200
    hu[0, 11:13, 11:13] = 3000
    g1 = tiny()
    result = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    means = block_mean(result.volume.array[0])
    assert np.abs(means[9:15, 9:15] - hu[0, 9:15, 9:15]).max() < 60
    assert result.summary[1:3] == (64, 0)


def test_int16_ends_are_counted() -> None:
    hu = np.full((1, 16, 16), -1000)
    hu[0, 6:10, 6:10] = 32767
    g1 = tiny()
    result = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    assert result.summary.saturated > 0
    assert result.volume.array.max() == 32767
    assert result.volume.array.min() > -32768  # nothing wrapped around


def test_an_empty_mask_is_bicubic() -> None:
    hu = seeded(1, "mask").integers(-1000, 300, (2, 12, 9))
    g1 = tiny()
    mask = np.zeros(hu.shape, bool)
    result = super_resolve(volume_of(hu), g1, record_of(g1), mask=mask, progress=False)
    for z in range(2):
        assert np.array_equal(result.volume.array[z], np.rint(enlarge_bicubic(hu[z])))


def test_a_full_mask_changes_nothing() -> None:
    hu = seeded(2, "mask").integers(-1000, 300, (1, 12, 9))
    g1 = tiny()
    everywhere = np.ones(hu.shape, bool)
    a = super_resolve(volume_of(hu), g1, record_of(g1), progress=False)
    b = super_resolve(volume_of(hu), g1, record_of(g1), mask=everywhere, progress=False)
    assert np.array_equal(a.volume.array, b.volume.array)


def test_the_bad_slice_is_named() -> None:
    g1 = tiny()
    with torch.no_grad():
        g1.last.weight.fill_(float("inf"))
    hu = seeded(3, "nan").integers(-1000, 300, (3, 8, 8))
    mask = np.zeros(hu.shape, bool)
    mask[2] = True  # the network sees the third slice only
    with pytest.raises(MMSRError, match=r"slice 2: .* not finite") as caught:
        super_resolve(volume_of(hu), g1, record_of(g1), mask=mask, progress=False)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmsr.inference.super_resolve.available_memory", lambda: 900_000_000)
    g1 = tiny()
    volume = volume_of(np.zeros((20, 512, 512)))
    with pytest.raises(ResourceError, match=r"at most \d+ slices at a time") as caught:
        super_resolve(volume, g1, record_of(g1), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (20, 3)])
def test_a_slice_too_small_is_one_line(size: tuple[int, int]) -> None:
    g1 = tiny()
    with pytest.raises(MMSRError, match="at least 4") as caught:
        super_resolve(volume_of(np.zeros((1, *size))), g1, record_of(g1), progress=False)
    assert "\n" not in str(caught.value)
