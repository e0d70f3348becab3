"""README's Python snippet runs as it stands, in the folder of a tiny run. The weights are arguments of its program."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checkpoints import State, opened
from tiny import QUICK, ROOT, tiny_config

from cfd.networks.model import module
from cfd.runs import checkpoint, workdir


def tiny_run(folder: Path) -> None:
    """Makes a run's folder with an untrained model of the digits."""
    config = tiny_config()
    net = module(dict(config.model), 8)
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    ema = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(0), *inputs)["params"]
    config_json = workdir.describe("diffusion", config.to_dict(), list("0123456789"))
    workdir.write_config(folder, config_json)
    with opened(folder) as manager:
        checkpoint.save(manager, 1, State(jnp.asarray(1), ema, ema, ()), data_state={}, config_json=config_json)


def test_the_guide_for_contributors_names_what_the_code_has() -> None:
    names = set(re.findall(r"`(_[a-z_]+|[A-Z][A-Z_]+)`", (ROOT / ".github" / "CONTRIBUTING.md").read_text()))
    code = "".join(path.read_text() for folder in ("cfd", "tests") for path in (ROOT / folder).rglob("*.py"))
    assert "STEP_RULES" in names
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


def test_the_snippet_runs_and_its_program_has_the_weights_as_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    tiny_run(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["images"].shape == (4, 8, 8, 1) and jnp.isfinite(names["images"]).all()

    run = names["run"]
    lowered = names["sample"].lower(jax.random.key(0), run.eps_fn, names["labels"], 1.0)
    weights = jax.tree.leaves(run.params)
    assert len(jax.tree.leaves(lowered.args_info)) == len(weights) + 3  # the key, the labels and w
    # As text, an array has two characters for each of its bytes.
    assert len(lowered.as_text()) < sum(x.nbytes for x in weights)
    longest = max(re.findall(r"dense<[^>]*>", lowered.as_text()), key=len)
    assert len(longest) < 2000, longest[:100]
