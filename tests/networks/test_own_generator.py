"""A generator of one's own, a small module and one line: it trains, is saved, and runs in tiles."""

import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from own_generator import Own, OwnSettings

from mmsr.core import SettingsError, ShapeError, seeded
from mmsr.data.patches import PatchBank, PatchCase, write_bank
from mmsr.data.windows import Window
from mmsr.inference import tiling
from mmsr.inference.memory import choose_tile, memory_needed
from mmsr.inference.tiling import sr_slice
from mmsr.networks.layers import Convolution
from mmsr.networks.weights import GENERATORS, ModelCard, build_g1, load_generator, save_generator
from mmsr.training.sr_cyclegan import cyclegan_settings, train_sr_cyclegan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def own(kind: str) -> Own:
    """Build one in evaluation mode."""
    g1 = build_g1(OwnSettings(kind=kind)).eval()  # type: ignore[arg-type]
    assert isinstance(g1, Own)
    return g1


def slices(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def bank(folder: Path, name: str, size: int, side: int) -> PatchBank:
    """Cut patches from smooth noise."""
    noise = seeded(0, name).normal(0, 1, (2, side // 4, side // 4))
    array = (np.kron(noise, np.ones((1, 4, 4))) * 200 - 600).astype(np.int16)
    volume = types.SimpleNamespace(array=array, spacing_mm=(1.0, 0.625, 0.625))
    case = PatchCase(f"case {name}", volume, np.ones(array.shape, bool))  # type: ignore[arg-type]
    window = Window(-1000.0, 50.0, "HU" if name == "clinical" else "grey")
    options = {"modality": name, "size": size, "per_case": 6, "window": window, "seed": 0}
    return write_bank(folder / name, [case], **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_trains_is_saved_and_runs_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discriminator = {"channels": 8, "layers": 1}
    changes = {
        "g1": {"kind": "own", "channels": 4},
        "g2": {"channels": 8, "blocks": 1},
        "d_x": discriminator,
        "d_y": discriminator,
        "steps": 3,
        "batch_size": 2,
        "ema": 0.0,
    }
    settings = cyclegan_settings(changes=changes)
    assert settings.g1 == OwnSettings(channels=4)
    banks = bank(tmp_path, "clinical", 8, 48), bank(tmp_path, "micro", 64, 160)
    trained = train_sr_cyclegan(settings, *banks, tmp_path / "run")
    before = build_g1(settings.g1)
    moved = zip(trained.g1.parameters(), before.parameters(), strict=True)
    assert all((after - first).abs().max() > 0 for after, first in moved)
    g1, card = load_generator(tmp_path / "run" / "weights.safetensors")
    assert (type(g1), card.g1) == (Own, settings.g1)
    x = slices(2, 1, 29, 22)
    with torch.no_grad():
        whole = g1(x)
    assert whole.shape == (2, 1, 232, 176)
    assert torch.equal(sr_slice(g1, x), whole)
    monkeypatch.setattr(tiling, "MIN_TILE", 1)
    for tile in (5, 13):
        assert (sr_slice(g1, x, tile=tile) - whole).abs().max() < 1e-5
    exact = sr_slice(g1.double(), x.double(), tile=6)
    with torch.no_grad():
        assert (exact - g1(x.double())).abs().max() < 1e-12
    with pytest.raises(ShapeError, match="at least 3 pixels"):
        sr_slice(g1, x[..., :2])


def test_memory_of_it_is_estimated() -> None:
    g1 = own("own")
    tile = choose_tile(g1, (512, 512))
    assert tile is not None
    whole, tiled = (memory_needed(g1, (512, 512), tile=t) for t in (None, tile))
    assert tiled < whole


@pytest.mark.parametrize(
    ("kind", "reason"), [("silent", "Silent lists no stages"), ("zeros", "Conv2d is no layer")]
)
def test_what_cannot_run_in_tiles_runs_on_whole_slices(kind: str, reason: str) -> None:
    g1, x = own(kind), slices(2, 1, 70, 40)
    with pytest.warns(UserWarning, match=f"runs on whole slices: {reason}"):
        assert choose_tile(g1, (512, 512)) is None
    assert memory_needed(g1, (70, 40), tile=None) > 4 * 70 * 40 * 64
    with torch.no_grad():
        whole = g1(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = g1(x)
    assert torch.equal(sr_slice(g1, x, tile=None), whole)
    assert torch.equal(sr_slice(g1, x, tile=None, precision="bf16"), half.float())
    with pytest.raises(SettingsError, match=f"tile: {reason}") as caught:
        sr_slice(g1, x, tile=64)
    assert "\n" not in str(caught.value)


def test_a_class_derived_from_a_known_layer_is_not_known() -> None:
    class Doubled(Convolution):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    g1 = own("own")
    g1.head = Doubled(1, 8, 5)
    with pytest.raises(SettingsError, match="Doubled is no layer"):
        sr_slice(g1, slices(1, 1, 70, 70), tile=64)


def test_its_first_weights_come_from_a_generator_alone() -> None:
    state = torch.get_rng_state()
    settings = OwnSettings()
    one, same, other = (build_g1(settings, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    weights = [g1.get_parameter("head.weight") for g1 in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_file_of_an_unknown_kind_names_those_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, g1 = tmp_path / "g1.safetensors", own("own")
    windows = {"clinical_window": {}, "micro_window": {}}
    save_generator(path, g1, ModelCard(g1=g1.settings, method="untrained", data="none", **windows))
    assert type(load_generator(path)[0]) is Own
    monkeypatch.delitem(GENERATORS, "own")
    with pytest.raises(ValueError, match=r"g1: kind: expected 'pixel_shuffle' or .*, got 'own'"):
        load_generator(path)


def test_stages_that_forget_the_enlargement_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    g1 = own("own")
    stages = list(g1.stages() or ())
    monkeypatch.setattr(Own, "stages", lambda _: [*stages[:4], stages[5]])
    with pytest.raises(ShapeError, match=r"its stages make .70, 70. pixels, its scale asks for"):
        sr_slice(g1, slices(1, 1, 70, 70), tile=64)
