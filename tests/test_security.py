"""No code of the project executes what it reads, unpacks archives to the paths that they name, or downloads files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT

PACKAGE = sorted([*(ROOT / "cfd").rglob("*.py"), *(ROOT / "launch").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
FORBIDDEN_MODULES = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DOWNLOADS = {"urllib", "http", "ftplib", "requests", "urllib3", "httpx", "aiohttp", "huggingface_hub", "gdown"}
HARMLESS_OF_PICKLE = {"UnpicklingError", "PickleError"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"unsafe_load", "full_load", "UnsafeLoader", "FullLoader", "read_pickle", "system", "popen"}


def unsafe(source: str) -> Iterator[str]:
    """ "line: reason" for every construct that executes, or may execute, the content of a file."""
    for node in ast.walk(ast.parse(source)):
        for reason in _reasons(node):
            yield f"{getattr(node, 'lineno', 0)}: {reason}"


def _reasons(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        yield from (f"import {m}" for m in modules if m.partition(".")[0] in FORBIDDEN_MODULES | DOWNLOADS)
    if isinstance(node, ast.ImportFrom) and node.module == "pickle":
        yield from (f"pickle.{alias.name}" for alias in node.names if alias.name not in HARMLESS_OF_PICKLE)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
        yield from [f"pickle.{node.attr}"] if node.attr not in HARMLESS_OF_PICKLE else []
    if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
        yield node.attr
    if not isinstance(node, ast.Call):
        return
    owner, name = _name(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    literal = {key: value.value for key, value in keywords.items() if isinstance(value, ast.Constant)}
    if not owner and name in FORBIDDEN_CALLS:
        yield f"{name}()"
    if "allow_pickle" in keywords and literal.get("allow_pickle") is not False:
        yield "allow_pickle"
    if owner == "torch" and name == "load" and literal.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if owner == "yaml" and name == "load":
        yield "yaml.load"
    if name == "extractall" and literal.get("filter") != "data":
        yield "extractall without filter='data'"
    if "download" in keywords and literal.get("download") is not False:
        yield "download"
    if name == "unpack_archive":
        yield "unpack_archive"
    if "shell" in keywords and literal.get("shell") is not False:
        yield "shell"


def _name(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return (function.value.id if isinstance(function.value, ast.Name) else "?"), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_unsafe_load(path: Path) -> None:
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "import joblib",
        "import urllib.request",
        "from requests import get",
        "tfds.data_source(name, download=True)",
        "from pickle import loads",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, Loader=yaml.UnsafeLoader)",
        "yaml.unsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "tarfile.open(f).extractall(place)",
        "archive.extractall(place, filter='tar')",
        "shutil.unpack_archive(f)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_scan_sees_it(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
        "tfds.data_source(name, download=False)",
        "torch.load(f, weights_only=True)",
        "archive.extractall(place, filter='data')",
        "re.compile(text)",
        "model.eval()",
    ],
)
def test_the_scan_lets_it_pass(source: str) -> None:
    assert not list(unsafe(source))
