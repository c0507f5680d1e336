"""Package mmsr: every value comes from settings.ini."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]


class BuildWithExperiments(build_py):
    """Put the experiments and the workflow into the wheel: `mmsr demo` needs no checkout."""

    def run(self) -> None:
        """Build as always, then copy the two folders."""
        super().run()
        if self.editable_mode:
            return
        for source in ("nbs/experiments", "workflow"):
            target = Path(self.build_lib, lib, "_workflow", source)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(HERE / source, target, ignore=shutil.ignore_patterns(".*"))


setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["__init__.pyi", "weights/*.safetensors", "py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        name: cfg[f"{name}_requirements"].split()
        for name in ("train", "dev", "bench", "docs", "slurm")
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithExperiments},
)
