"""The MMSR terms: SSIM against scikit-image, the small grid against the printed form, slopes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from mmsr.losses.mmsr import (
    MMSRSettings,
    MMSRTerms,
    enlarge,
    mmsr_loss,
    mmsr_terms,
    mmsr_terms_on_small_grid,
    shrink,
    ssim,
)

SQUARED = {"c1": 0.02**2, "c2": 0.06**2}
FORMS = [
    MMSRSettings(**constants, ssim_window=window, distance=distance, psf_sigma=sigma)
    for constants in ({}, SQUARED)
    for window in (None, (5, 1.5))
    for distance in ("mse", "l1")
    for sigma in (0.0, 0.54)
]
WAYS = (mmsr_terms, mmsr_terms_on_small_grid)
Way = Callable[[Tensor, Tensor, Tensor, Tensor, MMSRSettings], MMSRTerms]


def values_and_slopes(
    way: Way, images: list[Tensor], form: MMSRSettings, *, mixed: bool = False
) -> list[Tensor]:
    x, x_sr, y, y_lr = images
    answers = [x_sr.clone().requires_grad_(), y_lr.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        terms = way(x, answers[0], y, answers[1], form)
    return [torch.stack(list(terms)), *torch.autograd.grad(mmsr_loss(terms, form), answers)]


@pytest.mark.parametrize("size", [(32, 32), (11, 40), (37, 51)])
@pytest.mark.parametrize(("level", "spread"), [(0.0, 0.4), (-0.8, 0.03), (0.0, 1.0)])
def test_windowed_ssim_is_that_of_scikit_image(
    size: tuple[int, int], level: float, spread: float
) -> None:
    draw = np.random.default_rng(0)
    a = level + spread * draw.standard_normal(size)
    if spread == 1:  # black and white halves
        a = np.sign(np.linspace(-1, 1, size[0]))[:, None] + 1e-3 * a
    b = 0.7 * a + 0.3 * (level + spread * draw.standard_normal(size))
    at, bt = (torch.from_numpy(z).float()[None, None] for z in (a, b))
    # The second pair are the K for which (K L)² are the printed numbers.
    for k1, k2, constants in ((0.01, 0.03, SQUARED), (0.02**0.5 / 2, 0.06**0.5 / 2, {})):
        theirs = structural_similarity(
            a, b, data_range=2, K1=k1, K2=k2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert ssim(at, bt, window=(11, 1.5), **constants).item() == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("scale", "size"), [(2, (9, 7)), (8, (5, 12)), (16, (6, 6))])
def test_the_small_grid_gives_what_is_printed(
    dtype: torch.dtype, limit: float, scale: int, size: tuple[int, int]
) -> None:
    draw = torch.Generator().manual_seed(5)
    small, large = (2, 1, *size), (2, 1, scale * size[0], scale * size[1])
    for form in FORMS:
        for level, spread in ((0.0, 0.4), (-0.8, 0.03)):
            images = [
                (level + spread * torch.randn(s, generator=draw, dtype=torch.float64)).to(dtype)
                for s in (small, large, large, small)
            ]
            printed, short = (values_and_slopes(way, images, form) for way in WAYS)
            torch.testing.assert_close(printed[0], short[0], rtol=0, atol=limit)
            for p, q in zip(printed[1:], short[1:], strict=True):
                assert (p - q).abs().max() < limit * p.abs().max()


def test_the_small_grid_keeps_little_for_the_way_back() -> None:
    y = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    kept = []
    for way in WAYS:
        held: dict[int, Tensor] = {}

        def pack(z: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            held[z.untyped_storage().data_ptr()] = z
            return z

        y_lr = shrink(y).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
            assert way(shrink(y), y, y, y_lr, MMSRSettings()).up.requires_grad
        kept.append(sum(z.untyped_storage().nbytes() for z in held.values()))
    assert kept[1] < kept[0] / 20


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_slopes_are_finite_on_flat_patches_and_those_of_finite_differences(
    way: Way, form: MMSRSettings
) -> None:
    flat = torch.full((2, 1, 16, 16), -0.8)
    for value in values_and_slopes(way, [flat, enlarge(flat), enlarge(flat), flat], form):
        assert value.isfinite().all()
    draw = torch.Generator().manual_seed(3)
    small, fine = (torch.rand(1, 1, n, n, dtype=torch.float64, generator=draw) for n in (12, 24))
    start = [fine.flip(2).requires_grad_(), small.flip(2).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda a, b: torch.stack(list(way(small, a, fine, b, form))), start, fast_mode=True
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_terms_are_in_32_bits_whatever_autocast_does(way: Way, form: MMSRSettings) -> None:
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(1, 1, n, n, generator=draw) for n in (12, 96, 96, 12)]
    both = (values_and_slopes(way, images, form, mixed=mixed) for mixed in (True, False))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)
    half = way(*(z.half() for z in images), form)
    assert all(term.dtype == torch.float32 for term in half)


def test_the_sum_is_by_name() -> None:
    terms = MMSRTerms(*torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert mmsr_loss(terms, MMSRSettings()) == 2 * 1 + 10 + 100 + 1000
    none = dict.fromkeys(MMSRTerms._fields, 0.0)
    assert mmsr_loss(terms, MMSRSettings(**none)) == 0
    assert not MMSRSettings(**none).active
    assert MMSRSettings(**{**none, "up": 0.5}).active
    assert not MMSRSettings(**{**none, "up": 0.5}).ties_anatomy
    assert MMSRSettings(**{**none, "down": 0.5}).ties_anatomy
