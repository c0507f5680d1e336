"""Figures 1, 2 and 3: what is drawn is what the code is; what cannot be is told in one line."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from mmsr.app.prepare import prepare
from mmsr.app.run_notebook import experiments_folder, find_experiment, run_experiment
from mmsr.core import FileError, MMSRError, SettingsError, ShapeError, read_json, seeded, write_json
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.evaluation import paper_figures
from mmsr.networks.generators import G1Settings
from mmsr.networks.weights import ModelCard, build_g1, save_generator
from mmsr.scans.cases import prepared_cases
from mmsr.scans.read import read_volume
from mmsr.scans.write import write_volume
from mmsr.training import sr_cyclegan, sr_unit
from mmsr.training.sr_cyclegan import cyclegan_settings
from mmsr.training.sr_unit import unit_settings

pytestmark = pytest.mark.slow

EVIDENCE = experiments_folder().parent / "results" / "evidence"


def run_page(name: str, **values: Any) -> dict[str, Any]:
    """Run an experiment's cells in this process with other parameters; give all its names."""
    mpl.use("agg")
    names: dict[str, Any] = {"display": lambda figure: None}
    for cell in nbformat.read(find_experiment(name), 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= values
    return names


@pytest.fixture(scope="module")
def diagram(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The page of Figure 1, run once as it is."""
    return run_page("figure_1", out=str(tmp_path_factory.mktemp("figure_1")))


def texts(figure: Any) -> list[str]:
    """List the lines of all that is written in a figure."""
    return [line for ax in figure.axes for t in ax.texts for line in t.get_text().splitlines()]


def test_the_networks_that_are_drawn_are_those_that_are_trained(diagram: dict[str, Any]) -> None:
    cyclegan, unit = diagram["drawn"]
    nets = sr_cyclegan.networks_of(cyclegan_settings())
    wanted = {
        n.upper(): sum(p.numel() for p in net.parameters()) for n, net in nets._asdict().items()
    }
    assert cyclegan.parameters == wanted
    coders = sr_unit.networks_of(unit_settings())
    assert unit.parameters["G1"] == sum(
        p.numel() for net in (coders.encode_x, coders.decode_y) for p in net.parameters()
    )
    x, y = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 128, 128)
    scores = {"D_X": nets.d_x(x), "D_Y": nets.d_y(y), "G1": nets.g1(x), "G2": nets.g2(y)}
    for way, made in scores.items():
        last = cyclegan.ways[way][-1]
        assert (last.channels, *last.size) == made.shape[1:], way
    for way, boxes in cyclegan.ways.items():  # one channel goes in, and what comes out goes on
        assert boxes[0].inputs == 1, way
    convolutions = [m for m in nets.d_y.modules() if isinstance(m, nn.Conv2d)]
    kernels = [p for box in cyclegan.ways["D_Y"] for p in box.parts if "×" in p]
    assert len(kernels) == len(convolutions)
    assert kernels[0] == "4×4 /2"


CHANGES = {
    "channels": {"g1": {"channels": 32}},
    "blocks": {"g1": {"blocks": 4}},
    "norm": {"g1": {"norm": "instance"}},
    "kernel": {"g1": {"head_kernel": 5}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_network_is_another_drawing(diagram: dict[str, Any], what: str) -> None:
    before = diagram["drawn"][0]
    after = diagram["read_system"](cyclegan_settings("default", CHANGES[what]), 16)
    assert after.ways["G1"] != before.ways["G1"]
    for way in ("G2", "D_X", "D_Y"):
        assert after.ways[way] == before.ways[way]
    assert after.terms == before.terms
    both = (texts(diagram["networks_figure"](system)) for system in (before, after))
    assert next(both) != next(both)


def test_blocks_that_are_alike_are_one_box_with_a_number(diagram: dict[str, Any]) -> None:
    for count in (1, 5):
        system = diagram["read_system"](cyclegan_settings("default", {"g1": {"blocks": count}}), 16)
        (box,) = (box for box in system.ways["G1"] if box.kind == "ResidualBlock")
        assert (box.times, box.parts) == (
            count,
            ("3×3", "ChannelNorm", "ReLU", "3×3", "ChannelNorm"),
        )


class Own(nn.Module):
    """A generator of one's own, of layers that the package has not."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.turn = nn.Conv2d(1, 4, 5, padding=2), nn.Hardswish()
        self.last, self.shuffle = nn.Conv2d(4, 64, 3, padding=1), nn.PixelShuffle(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.shuffle(self.last(self.turn(self.head(x)))))


def test_a_generator_of_ones_own_is_drawn(diagram: dict[str, Any]) -> None:
    head, last = (box for _, box in diagram["walk"]({"own": Own()}, torch.zeros(1, 1, 16, 16)))
    assert (head.parts, head.inputs, head.channels) == (("5×5", "Hardswish"), 1, 4)
    assert (last.parts, last.channels, last.size) == (("3×3", "PixelShuffle"), 1, (128, 128))


@pytest.mark.parametrize("name", ["structure_x", "structure_y", "down", "up"])
def test_another_weight_is_another_drawing(diagram: dict[str, Any], name: str) -> None:
    before, settings = diagram["drawn"][0], cyclegan_settings("default", {"mmsr": {name: 0.375}})
    after = diagram["read_system"](settings, 16)
    assert after.ways == before.ways
    changed = [(a.name, b.weight) for a, b in zip(before.terms, after.terms, strict=True) if a != b]
    assert changed == [(name, 0.375)]
    (said,) = (t for t in texts(diagram["losses_figure"](after)) if "0.375" in t)
    assert said.startswith(f"{name}: λ")


def test_cyclegan_differs_by_weights_alone(diagram: dict[str, Any]) -> None:
    with_loss = diagram["drawn"][0]
    system = diagram["read_system"](cyclegan_settings(baseline="sr_networks"), 16)
    assert system.ways == with_loss.ways
    before, after = ({t.name for t in one.terms if not t.weight} for one in (with_loss, system))
    assert after - before == {"structure_x", "structure_y", "down", "up"}
    drawn = [t for ax in diagram["losses_figure"](system).axes for t in ax.texts]
    colours = {t.get_color() for t in drawn if "structure" in t.get_text()}
    assert colours == {"0.72"}  # faint


def test_all_terms_of_both_loops_have_a_place(diagram: dict[str, Any]) -> None:
    for settings, loop in ((cyclegan_settings(), sr_cyclegan), (unit_settings(), sr_unit)):
        terms = diagram["loss_terms"](settings)
        names = {*loop.GeneratorLosses._fields, *settings.mmsr.weights} - {"total", "mmsr"}
        assert {term.name for term in terms} == names
        assert all(all(term.ties) and term.weight is not None for term in terms)
        said = " ".join(texts(diagram["losses_figure"](diagram["read_system"](settings, 16))))
        assert all(f"{name}: λ" in said for name in names)


@pytest.fixture
def tied_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNIT's encoders with their residual blocks in common, as its paper has them."""
    separate = sr_unit.networks_of

    def tied(settings: sr_unit.SRUNITSettings) -> sr_unit.SRUNITNetworks:
        nets = separate(settings)
        nets.encode_y.blocks = nets.encode_x.blocks
        return nets

    monkeypatch.setattr(sr_unit, "networks_of", tied)


def test_what_several_ways_share_is_found(diagram: dict[str, Any]) -> None:
    cyclegan, unit = diagram["drawn"]
    assert {box.shared for boxes in cyclegan.ways.values() for box in boxes} == {()}
    ways = {"encode_x": "x_rec", "decode_y": "y_rec", "encode_y": "y_rec", "decode_x": "x_rec"}
    boxes = unit.ways["G1"] + unit.ways["G2"]
    assert {box.net: box.shared for box in boxes} == {net: (way,) for net, way in ways.items()}


@pytest.mark.usefixtures("tied_encoders")
def test_layers_in_common_are_found(diagram: dict[str, Any]) -> None:
    system = diagram["read_system"](unit_settings(), 16)
    shared = {box.kind: box.shared for box in system.ways["G2"] if box.net == "encode_y"}
    assert shared["ResidualBlock"] == ("G1", "x_rec", "y_rec")
    assert shared["DownBlock"] == ("y_rec",)


def test_the_file_says_what_is_drawn(diagram: dict[str, Any]) -> None:
    folder = Path(diagram["chosen"].out)
    written = read_json(folder / "figure_1.json")
    assert list(written) == ["SR-CycleGAN", "SR-UNIT"]
    for one, system in zip(written.values(), diagram["drawn"], strict=True):
        assert one["parameters"] == system.parameters
        assert [t["name"] for t in one["terms"]] == [t.name for t in system.terms]
    assert len(list(folder.glob("*.png"))) == 4


def test_runs_and_weights_of_before_are_drawn(tmp_path: Path) -> None:
    run = EVIDENCE / "SR-CycleGAN-0"
    names = [str(run), str(run / "weights.safetensors"), "bundled"]
    from_run, from_weights, bundled = run_page("figure_1", systems=names, out=str(tmp_path))[
        "drawn"
    ]
    assert from_run == from_weights
    assert from_run.ways["G1"][0].channels == 32
    assert bundled.ways["G1"][0].channels == 48


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"method": "SR-CycleGAN"})
    wrong: list[tuple[dict[str, Any], type[MMSRError], str]] = [
        (
            {"systems": ["SR-Cyclegan"]},
            SettingsError,
            "systems: expected SR-CycleGAN, .*'SR-Cyclegan'",
        ),
        ({"systems": [str(tmp_path)]}, FileError, "holds no settings of a training"),
        ({"systems": [str(tmp_path / "none")]}, SettingsError, "systems: expected"),
        ({"preset": "paper"}, ShapeError, "patch_size: 16 does not suit D_X"),
        ({"settings": {"stepss": 3}}, SettingsError, "stepss"),
        ({"patch_size": 0}, SettingsError, "patch_size"),
    ]
    for values, kind, said in wrong:
        with pytest.raises(kind, match=said) as e:
            run_page("figure_1", out=str(tmp_path), **values)
        assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `prepare` with one held-out phantom, and weights of scale 8 and 4."""
    folder = tmp_path_factory.mktemp("prepared")
    sizes = {"cases": 2, "slices": 1, "size": 256, "patch_size": 8, "patches_per_case": 4}
    prepare({**sizes, "out": str(folder)})
    for scale in (8, 4):
        settings = G1Settings(channels=8, blocks=1, scale=scale)
        window: dict[str, Any] = {"clinical_window": CLINICAL_WINDOW.to_dict(), "micro_window": {}}
        card = ModelCard(g1=settings, method="untrained", data="nothing", **window)
        save_generator(folder / f"scale{scale}.safetensors", build_g1(settings), card)
    return folder


def test_panels_of_prepared_cases_with_papermill(prepared: Path, tmp_path: Path) -> None:
    weights = str(prepared / "scale8.safetensors")
    values = {"prepared": str(prepared), "out": str(tmp_path), "device": "cpu", "crop_mm": 8.0}
    values |= {"models": {"mine": weights, "UNIT": weights, "SR-CycleGAN": weights}}
    run_experiment("figures_2_3", tmp_path / "page.ipynb", values)
    (case,) = prepared_cases(prepared)
    written = read_json(tmp_path / "figures_2_3.json")
    assert list(written) == [case.name]
    shown = written[case.name]
    order = ["clinical CT", "bicubic", "SR-CycleGAN", "UNIT", "mine", "truth"]
    assert shown["columns"] == order
    assert list(shown["rows"]) == sorted(
        case.places
    )  # JSON sorts; the picture has the paper's order
    assert shown["title"] == f"{case.name}: phantom, held out"
    assert "synthesised" in shown["warning"]
    assert (tmp_path / f"{case.name}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A scan of five slices made of one."""
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    (case,) = prepared_cases(prepared)
    noise = seeded(0, "slices").integers(-20, 20, (5, *case.volume.shape[1:]))
    volume = case.volume._replace(array=(case.volume.array + noise).astype(np.int16), notes=())
    write_volume(path, volume)
    return path


def test_of_a_scan_only_slices_with_a_place_are_made(
    prepared: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = paper_figures.run_slices

    def spy(job: Any, slices: Any) -> Any:
        seen.append(np.array(job.volume.array))
        return whole(job, slices)

    monkeypatch.setattr(paper_figures, "run_slices", spy)
    values: dict[str, Any] = {"scan": str(scan), "out": str(tmp_path), "device": "cpu"}
    values |= {"models": {"SR-UNIT": str(prepared / "scale8.safetensors")}}
    places = {"vessel": [4, 10, 11], "bronchus": [1, 12, 13]}
    names = run_page("figures_2_3", places=places, **values)
    (made,) = seen
    assert np.array_equal(made, read_volume(scan).array[[1, 4]])
    shown = names["shown"]["scan"]
    assert list(shown["rows"]) == ["vessel", "bronchus"]  # as they were given
    assert shown["columns"] == ["clinical CT", "bicubic", "SR-UNIT"]  # there is no truth
    assert shown["title"] == "scan: patient data"
    assert "there is no truth" in shown["warning"]
    assert [ax.get_ylabel() for ax in names["picture"].axes[::3]] == ["vessel", "bronchus"]
    assert read_json(tmp_path / "figures_2_3.json")["scan"]["rows"]["vessel"] == [4, 10, 11]


def test_panels_that_cannot_be_drawn(prepared: Path, scan: Path, tmp_path: Path) -> None:
    held: dict[str, Any] = {"prepared": str(prepared)}
    own: dict[str, Any] = {"scan": str(scan), "places": {"vessel": [0, 9, 9]}}
    models = {str(n): {"SR-UNIT": str(prepared / f"scale{n}.safetensors")} for n in (8, 4)}
    many = {f"UNIT-{n}": "bundled" for n in range(5)}
    wrong: list[tuple[dict[str, Any], type[MMSRError], str]] = [
        ({"prepared": str(tmp_path / "none")}, FileError, "none: holds no prepared cases"),
        ({"scan": str(tmp_path / "none"), "places": {"a": [0, 0, 0]}}, FileError, "none"),
        ({**held, "models": {"UNIT": str(tmp_path / "none")}}, FileError, "none: no such file"),
        ({**held, "models": {"UNIT": str(tmp_path)}}, FileError, r"done\.json: cannot be read"),
        (
            {**held, "rows": ["bronchs"]},
            SettingsError,
            "rows: expected places of .*bronchus.*'bronchs'",
        ),
        ({**own, "places": {"vessel": [5, 9, 9]}}, ShapeError, r"places\.vessel: expected z, y, x"),
        (
            {**own, "places": {"vessel": [0, -1, 9]}},
            ShapeError,
            r"places\.vessel: expected z, y, x",
        ),
        ({**own, "places": {"vessel": [0, 9]}}, SettingsError, "places"),
        ({**held, "models": models["4"]}, SettingsError, r"models\.SR-UNIT: .* enlarges 4 times"),
        (
            {**own, "models": models["8"], "scale": 4},
            SettingsError,
            "enlarges 8 times, scan asks for 4",
        ),
        ({**held, "models": many}, SettingsError, "models"),
        ({**held, **own}, SettingsError, "got both"),
        ({"scan": str(scan)}, SettingsError, "`places` .* with a `scan`"),
    ]
    for values, kind, said in wrong:
        with pytest.raises(kind, match=said) as e:
            run_page(
                "figures_2_3",
                **{"models": models["8"], "out": str(tmp_path), "device": "cpu"} | values,
            )
        assert "\n" not in str(e.value), said
    assert not list(tmp_path.glob("*.png"))
