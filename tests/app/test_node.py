"""A machine for a time: what fails is recorded, what is measured stands, time ends all."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsr.app import cli, node
from mmsr.app.node import NodeSettings, use_node
from mmsr.core import ResourceError, SettingsError, read_json
from mmsr.networks.weights import load_generator

TINY = Path(__file__).parent / "plans" / "tiny.yaml"


def parts(folder: Path) -> dict[str, dict[str, Any]]:
    return read_json(folder / "node.json")["parts"]


@pytest.mark.slow
def test_a_try_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Everything in small; then the same call goes on with the training and measures nothing."""
    out = tmp_path / "node"
    for minutes in ("0.8", "2"):
        began = time.time()
        with pytest.raises(SystemExit) as ended:
            cli.main(["node", str(out), "--minutes", minutes, "--device", "cpu", "--small"])
        assert ended.value.code == 0
        assert time.time() - began < 60 * float(minutes) + 60
        said = capfd.readouterr()
        assert f"report: {out / 'node.html'}" in said.out
        assert ("train SR-UNIT" in said.err) == (minutes == "0.8")
    rows = parts(out)
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    trained = [row for name, row in rows.items() if name.startswith("train ")]
    assert {row["system"] for row in trained} == set(node.SYSTEMS)
    assert all(row["samples/s"] > 0 and 0 < row["share of the product"] < 1 for row in trained)
    assert rows["super-resolve in 32"]["slices/s"] > 0
    assert rows["training"]["finished"]
    _, card = load_generator(out / "train" / "weights.safetensors")
    assert card.training["steps"] == rows["training"]["step"]
    page = (out / "node.html").read_text(encoding="utf8")
    assert all(f">{caption}<" in page for caption in dict.fromkeys(node._CAPTIONS.values()))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what costs time."""
    rate = {"precision": "32", "batch": 6, "samples/s": 9.0}
    monkeypatch.setattr(node, "prepare", lambda values: "patches")
    monkeypatch.setattr(node, "product_rate", lambda *args: 1e12)
    monkeypatch.setattr(node, "training_rate", lambda chosen, s: {"system": chosen.system, **rate})
    monkeypatch.setattr(node, "inference_rate", lambda *args: {"slices/s": 1.0})


def test_what_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(chosen: Any, seconds: float) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(node, "training_rate", without_memory)
    use_node(NodeSettings(out=str(tmp_path), minutes=10, device="cpu"))
    rows = parts(tmp_path)
    assert rows["train UNIT, 32, batch 8"]["failed"] == "CUDA out of memory. Tried"
    assert rows["super-resolve in 32"]["slices/s"] == 1
    assert "no prepared cases" in rows["training"]["failed"]  # there are no patches
    assert "CUDA out of memory" in (tmp_path / "node.html").read_text(encoding="utf8")


def test_a_measured_batch_is_taken_and_another_machine_measures_anew(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = NodeSettings(out=str(tmp_path), minutes=10, device="cpu")
    use_node(settings)
    values = parts(tmp_path)["training"]["values"]
    assert (values["system"], values["settings"]["batch_size"]) == ("SR-CycleGAN", 6)
    calls: list[Any] = []
    monkeypatch.setattr(node, "product_rate", lambda *args: calls.append(args) or 2e12)
    use_node(settings)
    assert not calls
    faster = {"system": "SR-CycleGAN", "precision": "32", "batch": 12, "samples/s": 99.0}
    monkeypatch.setattr(node, "training_rate", lambda *args: faster)
    monkeypatch.setattr(node, "environment", lambda: {**node_environment, "device": "another"})
    use_node(settings)
    assert len(calls) == 1
    assert parts(tmp_path)["training"]["values"] == values  # the training goes on as it was begun


node_environment = node.environment()


def test_a_plan_ends_with_the_time(tmp_path: Path, quick: None) -> None:
    """The command of the plan is told to end, and is waited for."""
    began = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node._Parts, "left", lambda self: 16.0)
        patch.setattr(sys, "executable", sleeper(tmp_path))
        use_node(NodeSettings(out=str(tmp_path / "n"), minutes=1, device="cpu", plan=str(TINY)))
    assert time.time() - began < 10
    assert parts(tmp_path / "n")["plan"]["finished"] is False
    assert (tmp_path / "ended").read_text() == "in order\n"


def sleeper(folder: Path) -> str:
    """Write a program that does nothing until it is told to end."""
    file = folder / "sleeper"
    file.write_text(
        f"#!/bin/sh\ntrap 'echo in order > {folder}/ended; exit 1' TERM\nsleep 60 & wait\n"
    )
    file.chmod(0o755)
    return str(file)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cuda:7 asked for"):
        use_node(NodeSettings(out=str(tmp_path), device="cuda:7"))
    with pytest.raises(SettingsError, match="minutes"):
        NodeSettings.read({"out": "x", "minutes": -1})
    assert not list(tmp_path.iterdir())
