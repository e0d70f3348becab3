"""Remedies in the messages: what they tell a user to install or to name exists outside a checkout, too."""

import ast
import re
import tomllib
from pathlib import Path

from tiny import ROOT


def texts(folder: Path) -> dict[str, list[str]]:
    """Every string of each module; f-strings are joined, with {} for their values."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        found[str(path)] = strings = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                strings.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return found


def test_what_is_to_be_installed_are_requirements_of_this_package_and_not_its_own_name() -> None:
    """On an index, the name of this package may be anybody's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {text for extra in (project["dependencies"], *project["optional-dependencies"].values()) for text in extra}
    names = {re.split(r"[\[<>=]", text)[0] for text in listed} | {"torch", "tensorflow-datasets", "tensorflow"}
    installed = []
    for path, strings in texts(ROOT / "cfd").items():
        for text in strings:
            assert "cfd[" not in text, path
            for command in re.findall(r"pip install ((?:[\"']?[\w.\[\]-]+(?:[<>=]+[\d.]+)?[\"']?[ ,]?)+)", text):
                installed += [re.split(r"[\[<>=]", word.strip("\"'`,.;"))[0] for word in command.split()]
    assert "torch" in installed
    words = [name for name in installed if name not in names]
    assert not words, words


def test_no_message_names_a_file_of_the_checkout() -> None:
    """A wheel has the configs by their names, and no launch/."""
    for path, strings in texts(ROOT / "cfd").items():
        for text in strings:
            assert not re.search(r"configs/\w+\.py|launch/(?!supervise)", text), (path, text)


def test_scripts_install_what_is_here() -> None:
    for script in sorted((ROOT / "launch").glob("*.sh")):
        for wanted in re.findall(r"pip install (?:-\w+ )*(\S+)", script.read_text()):
            assert wanted.strip("'`\"").startswith("."), (script, wanted)
