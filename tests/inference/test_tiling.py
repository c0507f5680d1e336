"""Tiles of every generator are the whole slice, at any size and in the estimated memory."""

import copy
import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from peak import PEAK_BYTES

from mmsr.core import MMSRError, RangeError
from mmsr.inference import lazy_layers, tiling
from mmsr.inference.memory import choose_batch, choose_tile, memory_needed
from mmsr.inference.tiling import sr_slice, sr_tiles
from mmsr.networks.generators import G1Settings, ResnetSettings
from mmsr.networks.unit import UNITSettings
from mmsr.networks.weights import build_g1, load_generator

NORMS = ("none", "channel", "instance")
ARCHITECTURES: dict[str, tuple[type, dict]] = {
    "x8": (G1Settings, {"channels": 16, "blocks": 2}),
    "x2, skip": (G1Settings, {"channels": 16, "blocks": 1, "scale": 2, "skip": True}),
    "x16, wide": (
        G1Settings,
        {"channels": 16, "blocks": 0, "scale": 16, "up_kernel": 5, "last_kernel": 9},
    ),
    "noise": (G1Settings, {"channels": 16, "blocks": 1, "skip": True, "noise": True}),
    "deconvolution x2": (ResnetSettings, {"channels": 16, "blocks": 1, "octaves": 1}),
    "deconvolution x8": (ResnetSettings, {"channels": 16, "blocks": 2, "octaves": 3}),
    "same size": (ResnetSettings, {"channels": 8, "blocks": 1, "octaves": 0}),
    "enlarged": (ResnetSettings, {"channels": 8, "blocks": 1, "octaves": 0, "enlarged": 8}),
    "enlarged x2": (ResnetSettings, {"channels": 8, "blocks": 1, "octaves": 2, "enlarged": 2}),
    "UNIT": (UNITSettings, {"latent": 32, "blocks": 1}),
    "UNIT, wide": (UNITSettings, {"latent": 32, "blocks": 1, "up_kernel": 5, "last_kernel": 9}),
    "UNIT, halved": (
        UNITSettings,
        {"latent": 32, "blocks": 1, "halvings_x": 1, "halvings_y": 4, "last_kernel": 5},
    ),
    "UNIT, enlarged": (
        UNITSettings,
        {"latent": 32, "blocks": 1, "halvings_x": 2, "halvings_y": 2, "enlarged": 8},
    ),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiles be as small as asked for."""
    monkeypatch.setattr(tiling, "MIN_TILE", 1)


def slices(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiles_are_the_whole_slice(name: str, norm: str, small_tiles: None) -> None:
    kind, changes = ARCHITECTURES[name]
    g1 = build_g1(kind(norm=norm, **changes)).eval()
    x = slices(2, 1, 19, 14)
    with torch.no_grad():
        single, double = g1(x), copy.deepcopy(g1).double()(x.double())
    assert torch.equal(sr_slice(g1, x, tile=None), single)
    for tile in (5, 13):
        assert (sr_slice(g1, x, tile=tile) - single).abs().max() < 1e-5
    if name != "noise":  # whose noise is drawn in single precision
        exact = sr_slice(copy.deepcopy(g1).double(), x.double(), tile=6)
        assert (exact - double).abs().max() < 1e-12  # rounding cannot hide a small seam


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("size", "tile"),
    [((4, 4), 1), ((5, 31), 3), ((5, 31), 30), ((29, 16), 7), ((33, 45), 16), ((33, 45), 64)],
)
def test_awkward_sizes(norm: str, size: tuple[int, int], tile: int, small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=1, norm=norm, skip=True)).double().eval()
    x = slices(1, 1, *size).double()
    with torch.no_grad():
        whole = g1(x)
    assert whole.shape[2:] == (8 * size[0], 8 * size[1])
    assert (sr_slice(g1, x, tile=tile) - whole).abs().max() < 1e-12


def test_each_slice_has_its_own_statistics_and_noise(small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=1, noise=True)).eval()
    x = slices(3, 1, 20, 17)
    together = sr_slice(g1, x, tile=8)
    for i in range(3):
        assert (sr_slice(g1, x[i : i + 1], tile=8) - together[i]).abs().max() < 1e-5


def test_what_is_not_held_is_made_again(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=2)).double().eval()
    x = slices(1, 1, 21, 18).double()
    with torch.no_grad():
        whole = g1(x)
    for keep in (0, 1 << 40):
        monkeypatch.setitem(lazy_layers._normalised.__kwdefaults__, "keep", keep)
        assert (sr_slice(g1, x, tile=6) - whole).abs().max() < 1e-12


def test_flat_slices_and_large_grey_levels(small_tiles: None) -> None:
    """What InstanceNorm divides by nearly nothing."""
    g1 = build_g1(G1Settings(channels=16, blocks=2)).eval()
    for level in (-1.0, 0.0, 0.3):
        x = torch.full((1, 1, 20, 20), level)
        with torch.no_grad():
            whole = g1(x)
        assert (sr_slice(g1, x, tile=7) - whole).abs().max() < 1e-5


@pytest.mark.slow
def test_the_bundled_generator_has_no_seams() -> None:
    g1, _ = load_generator(str(files("mmsr") / "weights" / "phantom.safetensors"))
    x = torch.nn.functional.interpolate(slices(1, 1, 17, 20), size=(137, 160), mode="bicubic")
    x = (x + 0.05 * slices(1, 1, 137, 160)).clamp(-1, 1)
    with torch.no_grad():
        whole = g1(x)
    tiles = sr_slice(g1, x, tile=64)
    assert (tiles - whole).abs().max() < 1e-5
    steps = (tiles[..., 1:] - tiles[..., :-1]).abs().mean((0, 1, 2))
    before = (whole[..., 1:] - whole[..., :-1]).abs().mean((0, 1, 2))
    meeting = [8 * (160 * i // 3) - 1 for i in (1, 2)]
    assert abs(float(steps[meeting].mean() / before[meeting].mean()) - 1) < 1e-3


def test_tiles_cover_the_slice_once(small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=0, scale=2, norm="none")).eval()
    covered = torch.zeros(2 * 23, 2 * 31)
    for ((top, bottom), (left, right)), piece in sr_tiles(g1, slices(1, 1, 23, 31), tile=6):
        covered[top:bottom, left:right] += 1
        assert piece.shape == (1, 1, bottom - top, right - left)
        assert max(piece.shape[2:]) <= 12
    assert (covered == 1).all()


def test_a_given_buffer_is_filled(small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=0, norm="none")).eval()
    x, out = slices(1, 1, 9, 7), torch.full((1, 1, 72, 56), torch.nan)
    for tile in (4, None):
        assert sr_slice(g1, x, tile=tile, out=out.fill_(torch.nan)) is out
        assert (out - sr_slice(g1, x, tile=None)).abs().max() < 1e-5


def test_the_bad_place_is_named(small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=0, norm="none")).eval()
    with torch.no_grad():
        g1.last.weight[0, 0, 3, 3] = torch.inf  # 0 · ∞ where features are 0
    with pytest.raises(RangeError, match=r"tile at rows 0 to 8, columns 0 to 8: .* not finite"):
        sr_slice(g1, slices(1, 1, 16, 16), tile=8)
    whole = build_g1(G1Settings(channels=16, blocks=0, norm="none")).eval()
    with torch.no_grad():
        whole.last.bias.fill_(torch.inf)  # tanh would make it a harmless 1
        assert whole(slices(1, 1, 8, 8)).isfinite().all()
    with pytest.raises(RangeError, match="not finite"):
        sr_slice(whole, slices(1, 1, 8, 8), tile=None)


def test_half_precision_is_close_and_made_again(small_tiles: None) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=2, norm="none", skip=True)).eval()
    x = slices(1, 1, 24, 24)
    whole = sr_slice(g1, x, tile=None)
    half = sr_slice(g1, x, tile=8, precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.01
    with torch.no_grad():  # a value that float32 can hold and bfloat16 cannot
        g1.blocks[0].branch[0].weight[0].fill_(0)
        g1.blocks[0].branch[0].bias[0] = 3.4e38
        g1.blocks[0].branch[3].weight.fill_(0)  # and nothing comes of it
        expected = g1(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not g1(x).isfinite().any()
    assert expected.isfinite().all()
    again = sr_slice(g1, x, tile=8, precision="bf16")
    assert again.isfinite().all()
    assert (again - expected).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tile": 0}, "tile: expected"),
        ({"tile": "big"}, "tile: expected"),
        ({"precision": "fp16"}, "precision: expected"),
        ({"out": torch.zeros(1, 1, 8, 8)}, "out: expected"),
        ({"x": torch.zeros(1, 1, 3, 20)}, "at least 4"),
        ({"x": torch.zeros(1, 2, 20, 20)}, "x: expected shape"),
    ],
)
def test_one_line_for_what_cannot_be(change: dict, text: str) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=0)).eval()
    arguments = {"x": torch.zeros(1, 1, 20, 20), **change}
    x = arguments.pop("x")
    with pytest.raises(MMSRError, match=text) as caught:
        sr_slice(g1, x, **arguments)
    assert "\n" not in str(caught.value)


# Slices, each in a process of its own so that its peak can be measured; they are split off from one
# that has loaded the libraries and computed nothing.
SLICES = (
    PEAK_BYTES
    + """
import json, os
import torch
from mmsr.networks.weights import build_g1, load_generator
from mmsr.networks.generators import G1Settings, ResnetSettings
from mmsr.inference.memory import choose_tile, memory_needed
from mmsr.inference.tiling import sr_slice
from mmsr.networks.unit import UNITSettings
torch.set_num_threads(1)
for job in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            g1, side, tile = eval(job)
            g1 = load_generator(g1)[0] if isinstance(g1, str) else build_g1(g1).eval()
            tile = choose_tile(g1, (side, side)) if tile == "auto" else tile
            need = memory_needed(g1, (side, side), tile=tile)
            x = torch.rand(1, 1, side, side) * 2 - 1
            sr_slice(g1, x[..., :8, :8], tile=None)  # the pages of the libraries' code
            status = Path("/proc/self/status").read_text().splitlines()
            (line,) = [s for s in status if s.startswith("VmRSS")]
            before = int(line.split()[1]) * 1024
            sr_slice(g1, x, tile=tile)
            said = {"need": need, "took": peak_bytes() - before, "peak": peak_bytes()}
            print(json.dumps(said), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""
)
JOBS = (  # all but the first two are for the night
    "G1Settings(blocks=2, norm='channel', skip=True, noise=True), 256, 128",
    "ResnetSettings(channels=16, blocks=1, octaves=0, enlarged=8), 128, 64",
    "G1Settings(blocks=2), 256, 64",
    "UNITSettings(latent=128, blocks=1), 256, 64",
    "ResnetSettings(channels=32, blocks=2), 320, 128",
)


def measured(*jobs: str) -> list[dict[str, int]]:
    command = [sys.executable, "-c", SLICES, *jobs]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[pytest.mark.nightly] * (i > 1)) for i, job in enumerate(JOBS)]
)
def test_memory_is_as_estimated(job: str) -> None:
    (said,) = measured(job)
    assert 0.7 < said["need"] / said["took"] < 1.3, said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_whole_slice_in_little_memory() -> None:
    path = str(files("mmsr") / "weights" / "phantom.safetensors")
    (said,) = measured(f"{path!r}, 512, 'auto'")
    assert said["peak"] < 0.8e9
    assert 0.7 < said["need"] / said["took"] < 1.3, said


@pytest.mark.slow
def test_small_slices_run_whole_and_large_ones_in_tiles() -> None:
    g1 = build_g1(G1Settings(norm="channel", skip=True, noise=True))
    assert choose_tile(g1, (24, 24)) is None
    tile = choose_tile(g1, (512, 512))
    assert tile is not None
    whole, tiled = (memory_needed(g1, (512, 512), tile=t) for t in (None, tile))
    assert tiled < whole / 4
    assert choose_batch(g1, (512, 512)) == 1
