"""Tests run in several processes at once, each on one core; chance draws the same in each run."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from slurm_node import SlurmNode, why_not

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for all that tests start

slow = [HealthCheck.too_slow]  # says how busy the machine is
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=slow)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Take back the threads that a test or a page asked for: sums are made in one order."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmNode]:
    """Run a Slurm of one node on the loopback interface."""
    if reason := why_not():
        pytest.skip(reason)
    with SlurmNode(tmp_path_factory.mktemp("slurm"), cpus=16) as node:
        yield node


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is for the night to the night."""
    if "MMSR_SLOW" not in os.environ:
        tonight = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=tonight)
        items[:] = [item for item in items if item not in tonight]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, for they share what they prepare; deal out notebooks."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            alone = nodeid.startswith("tests/test_notebooks.py")
            return nodeid if alone else super()._split_scope(nodeid)

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell what each part took: its pages and its tests."""
    seconds, failed = Counter[str](), Counter[str]()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if not isinstance(report, pytest.TestReport):
            continue
        place = re.search(r"\[(\d_\w+)/.*\.ipynb|tests/(\w+)/", report.nodeid)
        part = next(filter(None, place.groups())) if place else "the whole"
        seconds[part] += report.duration
        failed[part] += report.failed
    terminalreporter.section("by part")
    for part, took in sorted(seconds.items()):
        terminalreporter.line(f"{part:<14}{took:7.1f} s{failed[part] or '':>6}")
