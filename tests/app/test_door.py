"""`import mmsr` gives what people need, and loads it only when it is used."""

import inspect
import subprocess
import sys

import pytest

import mmsr


def fresh(code: str) -> str:
    """Run code in a new process; give what it printed."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_import_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import mmsr; print(*set(sys.modules) - before)"
    loaded = fresh(code).split()
    assert [name for name in loaded if name.startswith("mmsr")] == ["mmsr"]
    heavy = {"torch", "numpy", "pydantic", "scipy", "matplotlib", "pandas", "SimpleITK"}
    assert not heavy & set(loaded)


@pytest.mark.slow
def test_reading_a_scan_waits_for_no_torch() -> None:
    assert fresh("import sys, mmsr; mmsr.read_volume; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("name", mmsr.__all__)
def test_each_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(mmsr, name)
    assert value.__module__.startswith("mmsr.")
    assert value.__name__ == name
    text = inspect.getdoc(value)
    assert text
    if inspect.isfunction(value):
        assert "Parameters\n" in text
        assert "Returns\n" in text or value.__annotations__["return"] in (None, "None")


def test_the_door_stays_narrow() -> None:
    assert "read_volume" in mmsr.__all__ == dir(mmsr)
    assert len(mmsr.__all__) <= 28


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="mmsr attribute super_resolv"):
        _ = mmsr.super_resolv


@pytest.mark.slow
def test_help_is_quick() -> None:
    """A third of a second of processor time on an idle machine; the bound leaves room."""
    code = (
        "import resource, subprocess, sys\n"
        "call = [sys.executable, '-m', 'mmsr', '--help']\n"
        "subprocess.run(call, capture_output=True, check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    assert min(float(fresh(code)) for _ in range(3)) < 1.0
