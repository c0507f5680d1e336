"""What the tour's tables say is so: the readings R1 to R20 are settings, and no page is missing."""

import re
from pathlib import Path

from mmsr.app.training_cases import PrepareSettings
from mmsr.training.sr_cyclegan import cyclegan_settings
from mmsr.training.sr_unit import unit_settings

NBS = Path(__file__).parents[1] / "nbs"
TOUR = (NBS / "index.ipynb").read_text(encoding="utf8")


def test_each_reading_has_its_row() -> None:
    assert re.findall(r"\| (R\d+) \|", TOUR) == [f"R{i}" for i in range(1, 21)]


def test_the_map_is_whole() -> None:
    """Every link of the tour leads to a notebook, and no notebook of the library is missing."""
    links = set(re.findall(r"\]\(([\w/]+\.ipynb)\)", TOUR))
    pages = {p.relative_to(NBS).as_posix() for p in (*NBS.glob("0*.ipynb"), *NBS.glob("[0-9]_*/*"))}
    pages = {page for page in pages if page.endswith(".ipynb")}
    assert not [link for link in links if not (NBS / link).is_file()]
    assert len(pages) > 40
    assert not pages - links


def test_defaults_are_those_of_the_table() -> None:
    default, paper, released = map(cyclegan_settings, ("default", "paper", "code_2022"))
    for method in (default, paper):
        mmsr = method.mmsr
        assert (mmsr.ssim_window, mmsr.c1, mmsr.c2, mmsr.distance) == (None, 0.02, 0.06, "mse")
        assert (method.cycle, method.degraded_fraction, mmsr.psf_sigma) == (
            10,
            0,
            0,
        )  # R6, R15, R18
        assert (method.identity_x, method.identity_y) == (0, 0)  # R5
        assert (method.learning_rate, method.betas) == (2e-4, (0.5, 0.999))  # R12
        assert (method.constant, method.pool_size) == (0.5, 50)
        assert method.steps * method.batch_size == 2_000_000
    # R12, R19: a deconvolution G1 has no skip
    assert (paper.batch_size, paper.g1.octaves, paper.g2.octaves) == (1, 3, -3)
    assert (default.batch_size, default.g1.skip, default.g1.noise) == (16, True, True)
    assert not released.g1.skip
    assert (released.cycle, released.degraded_fraction) == (1, 0.25)  # R6, R15
    assert (released.mmsr.ssim_window, released.mmsr.distance) == ((11, 1.5), "l1")  # R2, R4
    halvings = unit_settings("paper").unit
    assert (halvings.halvings_x, halvings.halvings_y) == (0, 3)  # R13


def test_alternatives_are_accepted() -> None:
    others = {"c1": 4e-4, "c2": 3.6e-3, "ssim_window": (11, 1.5), "distance": "l1"}  # R2, R3, R4
    changes = {"identity_x": 0.5, "identity_y": 0.5, "cycle": 1, "degraded_fraction": 0.25}
    changes |= {"g1": {"skip": False}, "mmsr": {**others, "psf_sigma": 0.5}}  # R18, R19
    cyclegan_settings(changes=changes)
    for baseline in ("sr_networks", "same_size"):  # R14
        for made in (cyclegan_settings(baseline=baseline), unit_settings(baseline=baseline)):
            weights = ("structure_x", "structure_y", "down", "up")
            assert not any(getattr(made.mmsr, name) for name in weights)
            assert made.enlarged_input == (baseline == "same_size")
    reading = {"clinical_mask": "a.mha", "micro_mask": "b.mha"}  # R10
    reading |= {"clinical_window": (-1000, 50), "micro_window": (9000, 40000)}  # R11, R17
    reading |= {"micro_resample_um": 78.125, "held_out": 0}  # R7, R16
    PrepareSettings.read({"out": ".", "clinical": "c.mha", "micro": "m.mha", **reading})
