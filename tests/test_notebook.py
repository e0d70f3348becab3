"""launch/colab.ipynb needs no other file: it installs the package, trains, resumes, and draws while a slider moves."""

import ast
import base64
import builtins
import os
import re
import shutil
import symtable
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gcs import FakeGcs
from tiny import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient are in the extra `test`")
nbclient = pytest.importorskip("nbclient", reason="nbformat and nbclient are in the extra `test`")
pytest.importorskip("ipykernel", reason="ipykernel is in the extra `test`")

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
INSTALL, PLACE, TRAIN, GRID, SLIDER, GAUSSIANS, SWEEP = (
    "Install",
    "Where the run is saved",
    "Train",
    "A grid over w",
    "A slider over w",
    "Three Gaussians in the plane",
    "FID and Inception score against w",
)
HIDING = """
import os, sys
sys.path[:] = [path for path in sys.path if not os.path.isfile(os.path.join(path, "cfd", "sampling.py"))]
"""
"""The sitecustomize.py of a kernel in which the package is not installed, although it is in this environment."""

COLAB = """
import sys, types
colab = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=lambda path: print("Drive is mounted at", path))
colab.auth = types.SimpleNamespace(authenticate_user=lambda: print("The user is asked for access."))
sys.modules["google.colab"] = colab
"""

WRONG = {
    TRAIN: ("STEPS", ("800", 2.5, None, True, 0, -1, 2**31), "an integer >= 1 and < 2^31"),
    GRID: (
        "WEIGHTS",
        ("0.0", 2.0, None, (), ("1",), (-1.5,), [1e39], (True,)),
        "a tuple of guidance weights, each finite in float32 and >= -1 (w = -1 is the unconditional model)",
    ),
    SLIDER: ("MAX_W", ("8", None, 0, -1.0, 1e39, True), "a number > 0, finite in float32"),
    SWEEP: ("NUM_SAMPLES", ("500", 2.5, None, 3, 2**31), "an integer >= 4 and < 2^31"),
}
"""The fields of the forms, with values of which each has another kind or is out of range, and the expected ones."""

INTERRUPTING = """
import signal
requested, steps = preemption.requested, []
def interrupted():
    steps.append(len(steps))
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return requested()
preemption.requested = interrupted
"""
"""The button that interrupts a cell sends SIGINT to the kernel. Here, this is in the third check of the training."""

UNTRAINED = """
add_noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
run = run._replace(eps_fn=jax.tree.map(add_noise, run.eps_fn))
"""
"""After a few steps, classes differ by less than a byte of a picture. With random weights they differ."""


def cells(notebook: Path = NOTEBOOK) -> dict[str, Any]:
    """The code cells by their titles, in order."""
    found = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return {cell.source.splitlines()[0].removeprefix("# @title "): cell for cell in found}


def source(title: str, **fields: object) -> str:
    """The source of a cell in which fields of its form have other values."""
    text = cells()[title].source
    for name, value in fields.items():
        text, count = re.subn(rf"^{name} = .*?(?=  # @param )", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, f"{name} is no field of the cell {title!r}"
    return text


@contextmanager
def kernel(folder: Path, **environment: str) -> Iterator[Callable[[str], Any]]:
    """A new kernel, as a function that runs a cell in it and returns the outputs. The notebook is alone in `folder`."""
    folder.mkdir(exist_ok=True)
    shutil.copy(NOTEBOOK, folder)
    notebook = nbformat.v4.new_notebook()
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=place, allow_errors=True)
    backend = {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

    def run(text: str) -> Any:
        notebook.cells.append(nbformat.v4.new_code_cell(text))
        return client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1).outputs

    with client.setup_kernel(env=os.environ | backend | environment):
        yield run


def printed(outputs: Any) -> str:
    """The text that a cell printed. An error in it fails the test."""
    errors = ["\n".join(output.traceback) for output in outputs if output.output_type == "error"]
    assert not errors, errors[0]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def stopped(outputs: Any) -> str:
    """The whole error of a cell, which is a message of the notebook without a traceback."""
    *_, error = outputs
    assert error.output_type == "error" and error.ename == "Stop", outputs
    assert error.traceback == [f"Stopped: {error.evalue}"]
    return error.evalue


def pictures(outputs: Any) -> list[bytes]:
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def wheel(folder: Path, name: str, version: str) -> str:
    """The path of a wheel that contains no module."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return str(path)


def from_the_checkout() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def test_the_stored_outputs_are_complete_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 500_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert list(cells()) == [INSTALL, PLACE, TRAIN, GRID, SLIDER, GAUSSIANS, SWEEP]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # each cell was run once, in order
    assert [len(pictures(cell.outputs)) for cell in code] == [0, 0, 1, 1, 1, 1, 1]
    for cell in code:
        printed(cell.outputs)
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text and str(Path.home()) not in text and str(ROOT) not in text
    # A widget without a kernel is an error message on the page.
    assert "widgets" not in notebook.metadata and "widget-view" not in text


def bound(tree: ast.AST) -> list[str]:
    """The global names that the code of a cell binds, in order."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            names += bound(node)
    return names


def globals_read(table: symtable.SymbolTable) -> set[str]:
    """The global names that code reads, in its functions too."""
    own = {
        s.get_name()
        for s in table.get_symbols()
        if s.is_referenced() and (s.is_global() or table.get_type() == "module")
    }
    return own.union(*(globals_read(child) for child in table.get_children()))


@pytest.mark.parametrize("name", ["colab", "editing", "guidance"])
def test_a_cell_out_of_order_asks_for_those_above(name: str) -> None:
    """Each later cell asserts a name. The cells up to the one that binds it bind all that the cell reads."""
    first, *rest = (cell.source for cell in cells(ROOT / "launch" / f"{name}.ipynb").values())
    above = [bound(ast.parse(first))]
    for text in rest:
        with pytest.raises(
            AssertionError, match=r"^Run the cells above first \(Runtime → Run before, in Jupyter Run → "
        ):
            exec(text, {})
        (needed,) = re.findall(r'^assert "(\w+)" in globals\(\), ', text, re.MULTILINE)
        count = next(i for i, names in enumerate(above) if needed in names) + 1
        there = {name for names in above[:count] for name in names}.union(bound(ast.parse(text)), dir(builtins))
        assert not globals_read(symtable.symtable(text, name, "exec")) - there
        above.append(bound(ast.parse(text)))


def test_without_the_package_the_first_cell_installs_it_from_its_address_or_says_how(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is in the extra `test`")
    hiding, target, wheels = (tmp_path / name for name in ("hiding", "target", "wheels"))
    for folder in (hiding, wheels):
        folder.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDING)
    pip = {"PIP_TARGET": str(target), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    path = os.pathsep.join((str(hiding), str(target)))
    with kernel(tmp_path / "alone", PYTHONPATH=path, **pip) as run:
        for empty in ("", " ", None, 3):
            message = stopped(run(source(INSTALL, ADDRESS=empty)))
            assert f"ADDRESS is {empty!r}. Set ADDRESS" in message and "git+https://HOST/OWNER/REPOSITORY" in message

        message = stopped(run(source(INSTALL, ADDRESS="cfd")))  # never the name of a package on the index
        assert f"no file or folder {tmp_path / 'alone' / 'cfd'}. Set ADDRESS" in message
        assert "only Colab has a Drive" in stopped(run(source(INSTALL, ADDRESS="/content/drive/MyDrive/cfd.whl")))
        message = stopped(run(source(INSTALL, ADDRESS=str(tmp_path / "alone"))))
        assert "pip could not install" in message and "Set ADDRESS" in message and "pyproject.toml" in message
        assert "is not the package cfd. Set ADDRESS" in stopped(
            run(source(INSTALL, ADDRESS=wheel(wheels, "another", "1.0")))
        )
        message = stopped(run(source(INSTALL, ADDRESS=wheel(wheels, "jax", "99.0"))))
        assert re.search(r"pip replaced jax [\d.]+ by 99.0. Restart the runtime", message)

        (tmp_path / "alone" / "cfd").mkdir()  # a folder of that name, such as a checkout, is not the package
        assert "cfd 0.1.0, jax " in printed(run(source(INSTALL, ADDRESS=str(ROOT))))
        assert printed(run("print(cfd.__file__)")).strip() == str(target / "cfd" / "__init__.py")
        assert "ADDRESS is not used" in printed(run(source(INSTALL, ADDRESS=str(ROOT))))

        assert "only Colab has a Drive" in stopped(run(source(PLACE, WORKDIR="/content/drive/MyDrive/digits")))
        assert "WORKDIR is empty" in stopped(run(source(PLACE, WORKDIR=" ")))
        assert "WORKDIR is None; expected a string. Change it" in stopped(run(source(PLACE, WORKDIR=None)))
        message = stopped(run(source(PLACE, WORKDIR="a*b")))
        assert f"{tmp_path / 'alone' / 'a*b'} has * in its name" in message and "give a WORKDIR whose path" in message
        message = stopped(run(source(PLACE, WORKDIR=str(wheels / "jax-99.0-py3-none-any.whl" / "digits"))))
        assert "jax-99.0-py3-none-any.whl is a file): set WORKDIR to another folder, and run all cells again" in message
        assert "WORKDIR is 's3://bucket/digits'" in stopped(run(source(PLACE, WORKDIR="s3://bucket/digits")))
        assert printed(run(source(PLACE))) == f"The run is saved in {tmp_path / 'alone' / 'runs' / 'notebook'}.\n"
        run(COLAB)
        assert "Colab deletes this folder with the machine" in printed(run(source(PLACE)))
        text = printed(run(source(PLACE, WORKDIR="/content/drive/MyDrive/digits")))
        assert "Drive is mounted at /content/drive\n" in text and "Colab deletes" not in text

        printed(run("find = importlib.util.find_spec"))
        printed(run("importlib.util.find_spec = lambda name: None if name == 'gcsfs' else find(name)"))
        outputs = run(source(PLACE, WORKDIR="gs://bucket/digits"))
        assert printed(outputs[:-1]) == "The user is asked for access.\npip install gcsfs\n"
        assert "pip could not install gcsfs. Check the connection" in stopped(outputs)


def test_it_resumes_and_the_slider_draws_without_compiling(tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets", reason="ipywidgets is in the extra `test`")
    folder = tmp_path / "alone"
    fast = {
        "PYTHONPATH": from_the_checkout(),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with kernel(folder, **fast) as run:
        printed(run(source(INSTALL)))
        printed(run(source(PLACE)))
        assert "Saving step 2 of 2." in printed(run(source(TRAIN, STEPS=2)))
        assert len(pictures(run(source(GRID, WEIGHTS=(0.0, 2.0))))) == 1
        for title, (name, values, expected) in WRONG.items():
            for value in values:
                shown = tuple(value) if isinstance(value, list) else value
                message = f"{name} is {shown!r}; expected {expected}. Change it, and run this cell again."
                assert stopped(run(source(title, **{name: value}))) == message
        for value in ("7", 1.5, None, -1, 2**32):
            assert f"SEED is {value!r}; expected an integer in [0, 2^32)" in stopped(run(source(GRID, SEED=value)))
        assert (folder / "runs" / "notebook" / "config.json").is_file()
        printed(run(UNTRAINED))
        drawn = run(source(SLIDER))
        (at_zero,) = pictures(drawn)
        assert "with 1 compiled program." in printed(drawn)

        printed(run("import jax.monitoring; events = []"))
        printed(run("jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))"))
        printed(run("at_one = picture.value; slider.value = 0.0; at_zero = picture.value; slider.value = 7.9"))
        (shown,) = pictures(run("display(Image(at_zero))"))
        assert shown == at_zero
        assert printed(run("print(len({at_zero, at_one, picture.value}), picture.value == png(7.9))")) == "3 True\n"
        assert printed(run("print([name for name in events if 'compile' in name or 'trace' in name])")) == "[]\n"
        assert (
            printed(run("jax.jit(lambda x: x + 1)(1.0); print(any('compile' in name for name in events))")) == "True\n"
        )

    with kernel(folder, **fast) as run:
        printed(run(source(INSTALL)))
        printed(run(source(PLACE)))
        text = printed(run(source(TRAIN, STEPS=3)))
        assert "at step 2 of 3." in text and "\n1 steps in " in text
        text = printed(run(source(TRAIN, STEPS=3)))
        assert "at step 3 of 3." in text and " steps in " not in text
        assert printed(run("print([line['step'] for line in lines])")) == "[2, 3]\n"

        printed(run(INTERRUPTING))
        message = stopped(run(source(TRAIN, STEPS=9)))
        found = re.fullmatch(r"at step (\d) of 9, saved in (.*)\. To go on, run this cell again\.", message)
        assert found and 3 < int(found[1]) < 9 and found[2] == str(folder / "runs" / "notebook"), message
        text = printed(run(source(TRAIN, STEPS=9)))
        assert f"at step {found[1]} of 9." in text and f"\n{9 - int(found[1])} steps in " in text
        assert len(pictures(run(source(GRID, WEIGHTS=[0.0])))) == 1

        printed(run(source(PLACE, WORKDIR="elsewhere")))
        elsewhere = str(folder / "elsewhere")
        assert f"{elsewhere} is not the folder of a run: train one there first" in stopped(run(source(GRID)))
        assert f"{elsewhere} is a folder without config.json, which is no run" in stopped(run(source(SWEEP)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_cells_run_and_go_on_in_a_bucket(tmp_path: Path, bucket: FakeGcs) -> None:
    pytest.importorskip("ipywidgets", reason="ipywidgets is in the extra `test`")
    fields = {PLACE: {"WORKDIR": f"{bucket.url}/digits"}, TRAIN: {"STEPS": 20}, SWEEP: {"NUM_SAMPLES": 100}}
    texts = []
    for _ in range(2):
        with kernel(tmp_path / "alone", PYTHONPATH=from_the_checkout()) as run:
            outputs = {title: run(source(title, **fields.get(title, {}))) for title in cells()}
        texts.append({title: printed(output) for title, output in outputs.items()})
        assert [len(pictures(output)) for output in outputs.values()] == [0, 0, 1, 1, 1, 1, 1]
    first, second = texts
    assert first[PLACE] == f"The run is saved in {bucket.url}/digits.\n"
    assert "Saving step 20 of 20." in first[TRAIN] and "6 cells to measure" in first[SWEEP]
    assert "at step 20 of 20." in second[TRAIN] and "cells to measure" not in second[SWEEP]
    table = "| w | FID-100 | IS |"
    assert table in first[SWEEP]
    assert first[SWEEP].partition(table)[2] == second[SWEEP].partition(table)[2]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [NOTEBOOK.name]
