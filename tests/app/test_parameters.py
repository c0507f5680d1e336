"""Parameters mean what was written, whichever door they come by; a notebook runs twice."""

import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell

from mmsr.app import cli
from mmsr.app.plan import check_plan
from mmsr.app.prepare import prepare
from mmsr.app.run_notebook import (
    declared_types,
    find_experiment,
    notebook_parameters,
    read_parameters,
    read_yaml,
    values_by_type,
)
from mmsr.app.train import TrainSettings, train
from mmsr.app.training_cases import PrepareSettings
from mmsr.core import MMSRError, Settings, SettingsError, ShapeError, seeded
from mmsr.data.volume import Volume
from mmsr.evaluation.paper_figures import DiagramSettings, PanelSettings
from mmsr.evaluation.protocols import EvaluateSettings, SuperResolveSettings
from mmsr.scans.write import write_volume
from mmsr.training.run_folder import locked

pytestmark = pytest.mark.slow

KINDS: dict[str, type[Settings]] = {
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "super_resolve": SuperResolveSettings,
    "evaluate": EvaluateSettings,
    "figure_1": DiagramSettings,
    "figures_2_3": PanelSettings,
}
TINY = Path(__file__).parent / "plans" / "tiny.yaml"


def short(annotation: Any) -> str:
    """Write a type as the comments of the parameter cells do."""
    inner, kind = get_args(annotation), get_origin(annotation)
    if kind is Literal:
        return type(inner[0]).__name__
    if kind in (Union, UnionType):
        return "|".join(map(short, inner))
    if hasattr(annotation, "__metadata__"):
        return short(inner[0])
    name = "None" if annotation is type(None) else annotation.__name__
    return f"{name}[{','.join(map(short, inner))}]" if inner else name


@pytest.mark.parametrize("name", KINDS)
def test_what_papermill_tells_is_what_the_settings_say(name: str) -> None:
    told = papermill.inspect_notebook(find_experiment(name))
    fields = KINDS[name].model_fields
    assert told.keys() == fields.keys()
    defaults: dict[str, Any] = {}
    for parameter, one in told.items():
        assert one["inferred_type_name"] == short(fields[parameter].annotation), parameter
        assert len(one["help"]) > 10, parameter
        exec(f"{parameter} = {one['default']}", {}, defaults)
    if name != "super_resolve":  # which needs one of two sources
        KINDS[name].read(defaults)


ODD = ["001", "no", "12:30", "2024-05-06", "a #b", "1e3", "true", "0x10", "1_000", "a: b", "[x] y"]
DOORS = ("plain", "notebook", "yaml", "json", "papermill -r")


def through(door: str, folder: Path, name: str, text: str) -> TrainSettings:
    """Read a text parameter, as one door after the other gives it."""
    other = {"prepared": "p", "run": "r"}
    other.pop(name, None)
    if door == "plain":
        return read_parameters(TrainSettings, other, {name: text})
    if door == "notebook":
        types = declared_types(find_experiment("train"))
        return notebook_parameters(TrainSettings, values_by_type(types, other, {name: text}))
    if door == "yaml":
        plain = text if not re.search(r" #|: |^\[", text) else json.dumps(text)  # by YAML's rules
        lines = [f"{key}: {value}" for key, value in {**other, name: plain}.items()]
        (folder / "train.yaml").write_text("\n".join(lines))
        return read_parameters(TrainSettings, read_yaml(folder / "train.yaml"))
    return read_parameters(TrainSettings, {**other, name: text})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", ODD)
def test_a_text_stays_what_was_written(tmp_path: Path, door: str, text: str) -> None:
    assert through(door, tmp_path, "run", text).run == text


@pytest.mark.parametrize("door", DOORS)
def test_numbers_truth_and_choices_are_what_their_parameters_are(tmp_path: Path, door: str) -> None:
    assert through(door, tmp_path, "precision", "32").precision == "32"
    assert through(door, tmp_path, "devices", "010").devices == 10
    assert through(door, tmp_path, "stop_after_minutes", "1e3").stop_after_minutes == 1000
    with pytest.raises(SettingsError, match="devices"):
        through(door, tmp_path, "devices", "12:30")
    for text in ("true", "no"):
        with pytest.raises(SettingsError, match="devices"):
            through(door, tmp_path, "devices", text)


@pytest.mark.parametrize("value", [1, 1.0, True, 750, None])
def test_what_papermill_or_json_turned_into_a_number_is_refused(value: Any) -> None:
    """``papermill -p run 001`` gives 1: nobody knows what was written."""
    with pytest.raises(SettingsError, match="run: ") as e:
        notebook_parameters(TrainSettings, {"prepared": "p", "run": value})
    assert "quote" in str(e.value) or "in quotes" in str(e.value)
    given = {"prepared": "p", "run": "r", "precision": 32}
    assert notebook_parameters(TrainSettings, given).precision == "32"


def test_lists_and_mappings_come_as_texts_or_are_refused() -> None:
    given = {"prepared": "p", "run": "r", "settings": "{steps: 9, g1: {head_kernel: 5, skip: no}}"}
    chosen = notebook_parameters(TrainSettings, given)
    assert chosen.settings == {"steps": 9, "g1": {"head_kernel": 5, "skip": "no"}}
    assert notebook_parameters(PrepareSettings, {"out": "o", "micro_slices": "[1, 3]"}).micro_slices
    with pytest.raises(SettingsError, match="clinical: expected a list"):
        notebook_parameters(PrepareSettings, {"out": "o", "clinical": "[a, b]"})
    listed = read_parameters(PrepareSettings, {"out": "o"}, {"clinical": "[001, no, 'x #1']"})
    assert listed.clinical == ["001", "no", "x #1"]


TWICE = ("a: 1\na: 2", "train:\n  b: {seed: 1, seed: 2}", '{"a": 1, "a": 2}', "x: &x {p: 1, p: 2}")


@pytest.mark.parametrize("text", TWICE)
def test_names_that_stand_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"a\.yaml: \w+: stands twice"):
        read_yaml(tmp_path / "a.yaml")


def test_names_that_stand_twice_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--json", '{"seed": 1, "seed": 2}'], ["-p", "settings={steps: 1, steps: 2}"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["run", "train", "--plain", *given])
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert "stands twice" in line


def test_anchors_and_merges_still_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a, z: ~}")
    read = read_yaml(tmp_path / "a.yaml")
    assert read["b"] == {"x": "3", "y": "2"}
    assert read["c"] == {"x": "1", "y": "2", "z": None}
    root = Path(cli.__file__).parents[2]
    monkeypatch.setenv("MMSR_EVIDENCE", str(root / "nbs" / "results" / "evidence"))
    for plan in [TINY, *(root / "workflow" / "plans").glob("*.yaml")]:
        check_plan(read_yaml(plan))


def test_a_plan_has_one_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "out" / ".snakemake"), pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(TINY), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "another process carries out a plan here" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".snakemake"]


def run_all(shell: InteractiveShell, name: str, values: dict[str, Any]) -> None:
    """Run an experiment's cells as Jupyter does, with other parameters in the first."""
    for cell in nbformat.read(find_experiment(name), 4).cells:
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
        if cell.cell_type == "code":
            shell.run_cell(source, store_history=True).raise_error()


@pytest.mark.slow
def test_experiments_run_again_in_the_same_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell()
    sizes = {"cases": 2, "slices": 1, "size": 256, "patch_size": 8, "patches_per_case": 4}
    small = {"g1": {"channels": 8, "blocks": 1}, "g2": {"channels": 8, "blocks": 1}, "steps": 2}
    small |= {"d_x": {"channels": 4, "layers": 1, "scales": 1}, "batch_size": 2}
    small |= {"d_y": {"channels": 4, "layers": 1}}
    jobs = {
        "prepare": sizes,
        "train": {"settings": small, "device": "cpu"},
        "super_resolve": {"prepared": "runs/prepare", "weights": "runs/train/weights.safetensors"},
        "evaluate": {"models": {"a": "runs/super_resolve"}},
        "figure_1": {"systems": ["runs/train"]},
        "figures_2_3": {"prepared": "runs/prepare", "models": {"a": "runs/super_resolve"}},
    }
    for name, values in jobs.items():
        shell.reset(new_session=False)
        for _ in range(2):
            run_all(shell, name, values)
    with pytest.raises(SettingsError, match="titel"):  # a misspelt name is still refused
        run_all(shell, "evaluate", {"models": {"a": "runs/super_resolve"}, "titel": "x"})


def test_a_small_stack_is_told_what_would_fit(tmp_path: Path) -> None:
    grey = seeded(0, "stack").integers(0, 5000, (2, 72, 96)).astype("int16")
    write_volume(tmp_path / "micro.mha", Volume(grey, (0.05,) * 3, unit="grey"))
    values = {"out": str(tmp_path / "out"), "micro": str(tmp_path / "micro.mha")}
    values |= {"cases": 1, "slices": 1, "size": 256, "micro_window": [0, 5000]}
    with pytest.raises(SettingsError, match=r"held_out: expected less than .* 0 evaluates"):
        prepare({**values, "held_out": 1})
    with pytest.raises(ShapeError, match=r"patch_size: micro-0 has slices of 72 x 96.*take 9 or"):
        prepare({**values, "held_out": 0})
    assert not (tmp_path / "out" / "prepared.json").exists()
    with pytest.raises(MMSRError):
        train({"prepared": str(tmp_path / "out"), "run": str(tmp_path / "run")})
