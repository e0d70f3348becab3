"""launch/colab.ipynb runs from its first to its last cell, and is stored with its outputs."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient are in the extra `test`")
nbclient = pytest.importorskip("nbclient", reason="nbformat and nbclient are in the extra `test`")

NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def images_of(notebook: Any) -> list[bytes]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def test_the_stored_outputs_are_complete_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 500_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # each cell was run once, in order
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert len(images_of(notebook)) == 3
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text and str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = os.environ | {
        "CFD_NOTEBOOK_STEPS": "20",
        "CFD_NOTEBOOK_WORKDIR": str(tmp_path / "run"),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    place = {"metadata": {"path": str(ROOT / "launch")}}
    client = nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=place)
    client.execute(env=environment)
    assert len(images_of(notebook)) == 3
