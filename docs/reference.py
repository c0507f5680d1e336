"""Reference pages, made from the code: the door, modules, settings, the command line."""

import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import typer
from numpydoc.docscrape import NumpyDocString
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import mmsr
from mmsr.app.cli import app
from mmsr.core import Settings
from mmsr.networks.weights import ModelCard


def reference_pages(root: Path) -> Iterator[tuple[str, str]]:
    """Give the name and the text of each page."""
    told = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if found := re.search(r"#\| ?default_exp ([\w.]+)", path.read_text("utf8")):
            told[f"mmsr.{found[1]}"] = path.relative_to(root / "nbs").with_suffix("").as_posix()
    for module, page in told.items():
        yield f"reference/api/{module}.rst", module_page(module, page)
    names = "\n   ".join(f"api/{module}" for module in told)
    yield "reference/modules.rst", f"{heading('All modules')}.. toctree::\n\n   {names}\n"
    yield "reference/mmsr.rst", door_page()
    yield "reference/settings.md", settings_page(root, list(told))
    yield "reference/command_line.md", command_line_page()
    yield "bundled_card.txt", bundled_card()


def heading(text: str) -> str:
    """Underline a title, as reStructuredText wants it."""
    return f"{text}\n{'=' * len(text)}\n\n"


def module_page(module: str, page: str) -> str:
    """Document a module, and say which page of the book tells of it."""
    told = f"Explained and tested in the book: :doc:`/book/{page}`.\n\n"
    return f"{heading(module)}{told}.. automodule:: {module}\n   :members:\n   :show-inheritance:\n"


def door_page() -> str:
    """Document the names that `import mmsr` gives."""
    text = f"{heading('import mmsr')}.. automodule:: mmsr\n   :no-members:\n\n"
    names = {name: getattr(mmsr, name) for name in sorted(mmsr.__all__)}
    for name, one in names.items():
        text += f"* :py:obj:`mmsr.{name}`: {inspect.getdoc(one).splitlines()[0]}\n"
    for name, one in names.items():
        kind = "class" if isinstance(one, type) else "function"
        text += f"\n.. auto{kind}:: mmsr.{name}\n"
    return text


def plain_type(kind: Any) -> str:
    """Name a type as a person would."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(repr(value) for value in typing.get_args(kind))
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|(?:\w+\.)+(\w+)", r"\1\2", str(kind))
    return re.sub(r"Annotated\[(\w+), .*\]$", r"\1", text).replace("NoneType", "None")


def default_of(field: FieldInfo) -> str:
    """Write the default of a field."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Settings):
        return f"`{type(value).__name__}()`"
    return f"`{value!r}`"


def meanings(cls: type[Settings]) -> dict[str, str]:
    """Read what a docstring, and those of the classes below it, say of each parameter."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if issubclass(one, Settings) and one.__doc__ and "__doc__" in vars(one):
            for names, _, text in NumpyDocString(one.__doc__.replace("\n    ", "\n"))["Parameters"]:
                found |= dict.fromkeys(re.findall(r"\w+", names), " ".join(text))
    return found


def experiment_tables(root: Path) -> Iterator[str]:
    """Make a table of each experiment's parameters from the cell that holds them."""
    for path in sorted((root / "nbs/experiments").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf8"))["cells"]
        told = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        source = "\n".join("".join(cell["source"]) for cell in told)
        rows = re.findall(r"^(\w+) = (.+?)  # type: (\S+) ?(.*)$", source, re.M)
        table = list(HEAD)
        for name, default, kind, meaning in rows:
            table += [row(name, f"`{default}`", kind, meaning)]
        link = f"{{doc}}`{path.stem} </book/experiments/{path.stem}>`"
        yield "\n".join([f"\n### {path.stem}\n", f"The experiment {link}.\n", *table])


HEAD = ["| name | default | meaning |", "|---|---|---|"]


def row(name: str, default: str, kind: str, meaning: str) -> str:
    """Write a line of a table; a bar would end its cell."""
    cells = (f"`{name}`", default, f"{meaning.rstrip('.').replace('``', '`')} (`{kind}`)")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def settings_page(root: Path, modules: list[str]) -> str:
    """Make a table of each settings class: name, default, meaning, type."""
    text = ["# Settings\n\nMade from the code: what a run, a plan or a call can be told."]
    text += ["Names that are not here are refused.\n\n## Parameters of the experiments\n"]
    text += ["`mmsr run NAME -p NAME=VALUE`, and the sections of a plan.", *experiment_tables(root)]
    text += ["\n## Settings in the code\n\nWhat `settings` of `train` may change, and arguments."]
    for name in modules:
        for cls in vars(importlib.import_module(name)).values():
            mine = isinstance(cls, type) and issubclass(cls, Settings) and cls.__module__ == name
            means = meanings(cls) if mine and not cls.__subclasses__() else {}
            if not means or cls is ModelCard:  # a record, not something to be told
                continue
            text += [f"\n### {cls.__name__}\n", cls.__doc__.split("\n\n")[0].strip(), ""]
            text += [f"{{py:class}}`{name}.{cls.__name__}`", ""]
            text += HEAD
            for key, field in cls.model_fields.items():
                text += [row(key, default_of(field), plain_type(field.annotation), means[key])]
    return "\n".join(text) + "\n"


def command_line_page() -> str:
    """Write what `--help` of each command says."""
    group: Any = typer.main.get_command(app)
    made = "\nMade from the code: what `mmsr COMMAND --help` says.\n"
    text = ["# Command line\n", group.help, made]
    for name, command in group.commands.items():
        usage = command.get_usage(command.context_class(command, info_name=f"mmsr {name}"))
        text += [f"## mmsr {name}\n", f"```text\n{usage.removeprefix('Usage: ')}\n```\n"]
        text += [(command.help or "").replace("\f", ""), ""]
        rows = [one for one in command.params if one.name != "help"]
        if rows:
            text += ["| | meaning | default |", "|---|---|---|"]
        for one in rows:
            default = "" if one.default in (None, False, "", (), []) else f"`{one.default}`"
            default = "required" if one.required else default
            text += [f"| `{', '.join(one.opts)}` | {one.help} | {default} |"]
        text += [""]
    return "\n".join(text)


def bundled_card() -> str:
    """Write down the model card of the weights that come with the package."""
    _, card = mmsr.load_generator()
    training, measures = card.training, card.measures
    rows = {
        "method": card.method,
        "trained on": card.data,
        "training": f"{training['steps']} of {training['steps_planned']} steps of "
        f"{training['batch_size']} pairs, on a {training['device']}",
        "G1": ", ".join(f"{name} {value}" for name, value in card.g1),
        "windows": f"{card.clinical_window}; {card.micro_window}",
        "measured on": measures["on"],
        "version": card.version,
        "notice": f"**{card.notice}**",
    }
    text = [
        "| model card | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    text += ["", "| | these weights | bicubic | the truth itself |", "|---|---|---|---|"]
    for name, title in {
        "corr_clinical": "f(SR) ~ scan in the lung, r",
        "corr_parenchyma": "the same, parenchyma, r",
        "hu_error": "distance of f(SR) from the scan, HU",
        "spectrum_error_db": "spectrum error, dB",
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
    }.items():
        values = (measures[which][name] for which in ("this", "bicubic", "truth"))
        cells = ("–" if value is None else f"{value:.3g}" for value in values)
        text += [f"| {title} | {' | '.join(cells)} |"]
    return "\n".join(text) + "\n"
