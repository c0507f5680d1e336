"""Weights files that are cut, altered, hostile or cannot be written: one line, nothing left."""

import contextlib
import errno
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mmsr.core import FileError, MMSRError, RangeError, ResourceError, SettingsError
from mmsr.networks.generators import G1, G1Settings, ResnetSettings
from mmsr.networks.unit import UNITSettings
from mmsr.networks.weights import (
    RECORD_KEY,
    AnyG1,
    ModelCard,
    build_g1,
    load_generator,
    save_generator,
)
from mmsr.training.sr_cyclegan import cyclegan_settings

SMALL = G1Settings(channels=8, blocks=1, norm="none", head_kernel=3, last_kernel=3)


def record_of(settings: AnyG1, **more: object) -> ModelCard:
    """Make a record with no story."""
    known = {"clinical_window": {}, "micro_window": {}, "method": "untrained", "data": "none"}
    return ModelCard.read({"g1": settings, **known, **more})


def tensors_of(g1: G1) -> dict[str, torch.Tensor]:
    """Return the weights as safetensors wants them."""
    return {name: value.detach().contiguous() for name, value in g1.state_dict().items()}


def with_record(tensors: dict[str, torch.Tensor], record: object) -> bytes:
    """Pack tensors with any record."""
    text = record if isinstance(record, str) else json.dumps(record)
    return save(tensors, {RECORD_KEY: text})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Write a sound file."""
    path = tmp_path / "good.safetensors"
    save_generator(path, build_g1(SMALL), record_of(SMALL))
    return path


def test_maps_lie_as_b_h_w_c_from_the_first_layer_on(good: Path) -> None:
    """Its weights have one channel, and a memory format that torch is easily wrong about."""
    for g1 in (build_g1(SMALL), load_generator(good)[0]):
        seen: list[torch.Tensor] = []

        def keep(_layer: object, _inputs: object, out: torch.Tensor, into: list = seen) -> None:
            into.append(out)

        for layer in g1.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(keep)
        g1.eval()(torch.zeros(1, 1, 12, 10))
        assert len(seen) > 3
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


def refused(path: Path, content: bytes) -> str:
    """Load `content` and return its one-line refusal."""
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        load_generator(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        G1Settings(channels=16, blocks=2, norm="channel", skip=True),
        G1Settings(channels=16, blocks=0, scale=2, norm="instance"),
        G1Settings(channels=32, blocks=1, scale=16, norm="none", up_kernel=5),
        ResnetSettings(channels=8, blocks=1),
        ResnetSettings(channels=8, blocks=1, octaves=0, enlarged=8, norm="none"),
        UNITSettings(latent=16, blocks=1),
        UNITSettings(latent=16, blocks=1, halvings_x=2, halvings_y=2, enlarged=8, norm="channel"),
    ],
)
def test_round_trip(settings: AnyG1, tmp_path: Path) -> None:
    g1 = build_g1(settings, torch.Generator().manual_seed(3)).eval()
    path = tmp_path / "g1.safetensors"
    save_generator(path, g1, record_of(settings, measures={"PSNR": 15.25}))
    again, record = load_generator(path)
    x = torch.rand(1, 1, 7, 5, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again(x), g1(x))
    assert record.g1 == settings
    assert record.measures == {"PSNR": 15.25}
    assert "Research only" in record.notice
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())


def test_every_truncation_is_refused(good: Path) -> None:
    content = good.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    cuts = {0, 1, 7, 8, 9, 8 + header // 2, 8 + header, len(content) - 1}
    cuts |= set(random.Random(0).sample(range(len(content)), 60))
    for cut in sorted(cuts):
        refused(good, content[:cut])


def test_altered_bytes_never_escape_the_error_family(good: Path) -> None:
    content = good.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    draw = random.Random(1)
    refusals = 0
    for _ in range(400):
        altered = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            altered[draw.randrange(header)] = draw.randrange(256)
        good.write_bytes(bytes(altered))
        with contextlib.suppress(FileError):
            load_generator(good)
            refusals -= 1
        refusals += 1
    assert refusals > 200  # the rest changed a value that is free to change, or nothing


def test_appended_bytes_are_refused(good: Path) -> None:
    refused(good, good.read_bytes() + b"more")


def test_a_header_that_claims_gigabytes_is_refused(good: Path) -> None:
    refused(good, struct.pack("<Q", 2**40) + b"{}")


def test_other_kinds_of_file(good: Path, tmp_path: Path) -> None:
    refused(good, b"")
    refused(good, b"PK\x03\x04" + bytes(200))  # what torch.save writes
    assert "not those of a generator" in refused(good, save({"a": torch.zeros(1)}))
    with pytest.raises(FileError, match="no such file"):
        load_generator(tmp_path / "missing.safetensors")
    with pytest.raises(FileError, match="no such file"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "not JSON",
        "[]",
        "null",
        "[" * 100_000,
        '{"g1": {}}',
        '{"g1": {"channels": 1e999}}',
    ],
    ids=["empty", "no JSON", "list", "null", "deep", "incomplete", "infinite"],
)
def test_hostile_records(good: Path, record: str) -> None:
    refused(good, with_record(tensors_of(build_g1(SMALL)), record))


@pytest.mark.parametrize(
    "g1",
    [
        {"channels": 10**9},
        {"channels": 2**70},
        {"channels": -8},
        {"blocks": 10**6},
        {"scale": 7},
        {"norm": "__import__('os')"},
        {"code": "print()"},
        {"kind": "diffusion"},
        {"kind": ["unit"]},
        {"kind": None},
        {"kind": "unit", "latent": 10**9},
        {"kind": "resnet", "channels": 10**9},
        {"kind": "resnet", "octaves": -(2**70)},
        {"kind": "resnet", "scale": 8},
        [],
        "pixel shuffle",
        None,
    ],
)
def test_hostile_architectures(good: Path, g1: object) -> None:
    record = {**record_of(SMALL).model_dump(mode="json"), "g1": g1}
    assert "does not fit" in refused(good, with_record(tensors_of(build_g1(SMALL)), record))


@pytest.mark.parametrize(
    "g1",
    [
        {"channels": 1024, "blocks": 256},  # 19 GB of weights, if they were made
        {"kind": "resnet", "channels": 512, "blocks": 64},
        {"kind": "unit", "latent": 1024, "blocks": 64},
    ],
)
def test_the_largest_architecture_costs_no_memory_before_it_is_refused(
    good: Path, g1: dict[str, object]
) -> None:
    record = {**record_of(SMALL).model_dump(mode="json"), "g1": g1}
    assert "but its record asks for" in refused(good, with_record({"a": torch.zeros(1)}, record))


def test_weights_that_disagree_with_the_record(good: Path) -> None:
    record = record_of(SMALL).model_dump(mode="json")
    tensors = tensors_of(build_g1(SMALL))
    missing = {name: value for name, value in tensors.items() if name != "last.weight"}
    assert "last.weight has shape missing" in refused(good, with_record(missing, record))
    extra = {**tensors, "zzz": torch.zeros(3)}
    assert "zzz has shape (3,)" in refused(good, with_record(extra, record))
    turned = {**tensors, "last.bias": torch.zeros(2)}
    assert "last.bias has shape (2,)" in refused(good, with_record(turned, record))
    whole = {**tensors, "last.bias": torch.zeros(1, dtype=torch.int64)}
    assert "type I64" in refused(good, with_record(whole, record))
    broken = {**tensors, "last.bias": torch.tensor([float("inf")])}
    assert "not finite" in refused(good, with_record(broken, record))


def test_half_precision_halves_the_file_and_refuses_overflow(tmp_path: Path) -> None:
    g1 = build_g1(G1Settings(channels=16, blocks=2, norm="none"))
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    record = record_of(g1.settings)
    save_generator(full, g1, record)
    save_generator(half, g1, record, half=True)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    g1.last.bias.data.fill_(1e6)
    save_generator(full, g1, record)
    earlier = half.read_bytes()
    with pytest.raises(RangeError, match="too large for"):
        save_generator(half, g1, record, half=True)
    assert half.read_bytes() == earlier


def test_a_failed_write_keeps_the_earlier_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = good.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_generator(good, build_g1(SMALL), record_of(SMALL))
    monkeypatch.undo()
    assert good.read_bytes() == earlier
    assert [p.name for p in good.parent.iterdir()] == [good.name]


def test_bad_arguments_leave_nothing(tmp_path: Path) -> None:
    g1 = build_g1(SMALL)
    with pytest.raises(FileError, match="folder does not exist"):
        save_generator(tmp_path / "no" / "g1.safetensors", g1, record_of(SMALL))
    with pytest.raises(FileError, match=r"ends in \.safetensors"):
        save_generator(tmp_path / "g1.pt", g1, record_of(SMALL))
    with pytest.raises(SettingsError, match="another architecture"):
        save_generator(tmp_path / "g1.safetensors", g1, record_of(G1Settings()))
    with pytest.raises(MMSRError, match="did you mean method"):
        record_of(SMALL, methd="?")
    assert not list(tmp_path.iterdir())


def test_a_record_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "g1.safetensors"
    with pytest.raises(SettingsError, match="plain values"):
        save_generator(path, build_g1(SMALL), record_of(SMALL, training={"x": object()}))
    assert not list(tmp_path.iterdir())
    save_generator(path, build_g1(SMALL), record_of(SMALL, measures={"PSNR": float("nan")}))
    assert load_generator(path)[1].measures == {"PSNR": None}


def test_files_from_before_there_were_kinds_and_when_they_had_other_names(good: Path) -> None:
    record = record_of(SMALL).model_dump(mode="json")
    for kind in ({}, {"kind": "pixel shuffle"}, {"kind": "pixel_shuffle"}):
        older = {name: value for name, value in record["g1"].items() if name != "kind"} | kind
        good.write_bytes(with_record(tensors_of(build_g1(SMALL)), {**record, "g1": older}))
        assert load_generator(good)[1].g1 == SMALL


def test_settings_refuse_the_old_names_and_give_the_new_ones() -> None:
    for name, old, new in (("g1", "pixel shuffle", "pixel_shuffle"), ("g2", "light", "strided")):
        with pytest.raises(SettingsError, match=f"{name}: kind: '{old}' is called '{new}' now"):
            cyclegan_settings(changes={name: {"kind": old}})
