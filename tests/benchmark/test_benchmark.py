"""The benchmark: its networks, rows, table and command line, and the output of a run that ends early.

No test asserts a speed.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfd.benchmark import __main__ as benchmark
from cfd.benchmark.ours import operations, our_side
from cfd.benchmark.side import COMMON, IMAGE_SIZE, NETWORKS, Setting, seconds
from cfd.devices import xla
from cfd.networks.model import module
from cfd.networks.unet import UNet

TINY: dict[str, Any] = COMMON | dict(
    num_classes=10,
    out_channels=6,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=32,
)


@pytest.mark.parametrize(
    "network, parameters",
    [("small", 7_995_011), ("adm64", 295_904_454), ("mp_small", 7_383_510), ("mp64", 280_214_437)],
)
def test_the_networks_have_their_documented_size(network: str, parameters: int) -> None:
    size = IMAGE_SIZE[network]
    net = module(NETWORKS[network], size)
    z, one = jnp.zeros((1, size, size, 3)), jnp.zeros(1)
    shapes = jax.eval_shape(net.init, jax.random.key(0), z, one, jnp.zeros(1, jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_rows_are_built_and_can_be_called_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this process: exactly the requested rows, their compile times, and the output on the common input."""
    monkeypatch.setitem(NETWORKS, "small", TINY)
    monkeypatch.setitem(IMAGE_SIZE, "small", 8)
    rows = ("forward", "input")
    built = our_side(Setting("small", 2, "float32", False, 2, rows, 1, "", "", str(tmp_path)))
    assert set(built.rows) == set(rows) and built.output is not None and built.output.shape == (2, 8, 8, 6)
    assert set(built.facts["compile_seconds"]) == set(rows) - {"input"}
    for call in (*built.rows.values(), *built.rows.values()):
        call()


@pytest.mark.slow
def test_the_other_network_has_the_same_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The row "forward" reads the parameters that a training step leaves."""
    monkeypatch.setitem(NETWORKS, "mp_small", TINY | dict(network="mp"))
    monkeypatch.setitem(IMAGE_SIZE, "mp_small", 8)
    built = our_side(Setting("mp_small", 2, "float32", False, 2, ("forward", "train"), 1, "", "", str(tmp_path)))
    before = np.asarray(built.rows["forward"]())
    for _ in range(2):
        metrics = built.rows["train"]()
    assert np.isfinite(metrics["loss"]) and (np.asarray(built.rows["forward"]()) != before).any()


def test_flops_are_those_of_the_products() -> None:
    """The products of a network of one level can be counted by hand. Norms and embeddings add less than 1 %."""
    fields: dict[str, Any] = TINY | dict(num_classes=0, dtype="float32", remat=False)
    net = UNet(image_size=32, **fields)
    z, one, labels = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), z, one, labels)["params"]
    # The 3x3 convolutions: conv_in, one block down, two in the middle, two up, conv_out. The blocks up have a 1x1 too.
    per_position = 9 * (3 * 32 + 2 * 32 * 32 + 4 * 32 * 32 + 2 * (64 * 32 + 32 * 32) + 32 * 6) + 2 * 64 * 32
    per_position += 4 * 32 * 32 + 2 * 32 * 32 * 32  # attention in the middle: four layers and two products
    found = xla.flops(lambda params, *inputs: net.apply({"params": params}, *inputs), params, z, one, labels)
    assert found == pytest.approx(2 * 32 * 32 * per_position, rel=0.01)


def test_the_table_has_medians_ratios_and_shares() -> None:
    setting = Setting("small", 4, "float32", False, 8, (), 1, "forward", "", "")
    result = {
        "setting": setting._asdict() | {"rounds": 3},
        "whole_rounds": 3,
        "facts": {
            "ours": {
                "device": "cpu",
                "parameters": 10,
                "forward_flops": 4e9,
                "matrix_flops_per_second": 1e11,
                "compile_seconds": {"forward": 1.5, "guided": 2.5},
                "peak_memory_bytes": 2 * 10**9,
                "profile": {"convolution": 0.075, "dot": 0.025},
            },
            "peer": {"peak_memory_bytes": 10**9},
        },
        "seconds": {
            "forward": {"ours": [0.1, 0.1, 0.4], "peer": [0.2, 0.2, 0.2]},
            "guided": {"ours": [0.2, 0.2, 0.2]},
        },
    }
    json.dumps(result)
    lines = benchmark.table(result).splitlines()
    forward, guided = lines[2:4]
    assert forward.split() == [
        "forward",
        "100",
        "[100,",
        "250]",
        "40",
        "0.04",
        "40.0%",
        "1.5",
        "0.50",
        "[0.50,",
        "1.25]",
    ]
    assert guided.split()[-4:] == ["20", "0.04", "40.0%", "2.5"]
    assert [line.split() for line in lines[4:6]] == [
        ["convolution", "75", "ms", "75.0%", "of", "forward"],
        ["dot", "25", "ms", "25.0%", "of", "forward"],
    ]


def test_the_table_of_an_interrupted_round_has_all_that_was_measured() -> None:
    """The second round has a time of the peer alone in one row, and nothing in the last row."""
    setting = Setting("small", 4, "float32", False, 8, (), 1, "", "", "")
    facts = dict(device="cpu", parameters=10, forward_flops=4e9, compile_seconds={"forward": 1.5}, peak_memory_bytes=1)
    result = {
        "setting": setting._asdict() | {"rounds": 3},
        "whole_rounds": 0,
        "facts": {"ours": facts, "peer": {"peak_memory_bytes": 10**9}},
        "seconds": {"forward": {"ours": [0.1], "peer": [0.2, 0.4]}, "train": {"peer": [0.1]}, "input": {}},
    }
    lines = benchmark.table(result).splitlines()
    assert len(lines) == 5 and "matrix products" not in lines[0]
    assert lines[2].split() == ["forward", "100", "[100,", "100]", "40", "0.04", "-", "1.5", "0.50", "[0.50,", "0.50]"]


def test_a_profile_adds_up_the_operations_of_a_kind() -> None:
    x, y = jnp.ones((512, 512)), jnp.ones((512, 64))
    product = jax.jit(lambda x, y: jnp.sort(x @ y, axis=0) @ y.T).lower(x, y).compile()
    found = operations(lambda: jax.block_until_ready(product(x, y)))
    assert any("sort" in name for name in found) and all(spent >= 0 for spent in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert not any(name[-1].isdigit() for name in found)


def test_of_several_calls_only_the_last_is_waited_for() -> None:
    called, waited = iter(range(9)), []
    assert seconds(lambda: next(called), waited.append, 3) >= 0
    assert waited == [2] and next(called) == 3


@pytest.mark.parametrize(
    "flag",
    [
        "--rows=forwards",
        "--rounds=0",
        "--in_flight=0",
        "--sampler_steps=0",
        "--batch_size=-1",
        "--peer=no",
        "--profile=w1",
        "--json=/proc/none/x.json",
    ],
)
def test_bad_flags_are_refused_before_anything_is_built(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse([flag])
    name, _, value = flag.partition("=")
    error = capsys.readouterr().err
    assert f"error: {name} " in error and value in error


def test_errors_that_a_user_can_correct_are_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guided_diffusion").mkdir()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cfd.benchmark.peer", raising=False)
    with pytest.raises(SystemExit) as end:
        benchmark.main([f"--peer={tmp_path}"])
    assert end.value.code == "error: --peer needs PyTorch: pip install torch"
    monkeypatch.setattr(benchmark, "build", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        benchmark.main([])


TINY_COMMAND = f"""
import sys
from cfd.benchmark import __main__ as benchmark, side
side.NETWORKS["small"], side.IMAGE_SIZE["small"] = {TINY}, 8
if __name__ == "__main__":
    benchmark.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("SIGINT", "stopped by SIGINT"),
        pytest.param("SIGTERM", "stopped by SIGTERM", marks=pytest.mark.slow),
        pytest.param("SIGHUP", "stopped by SIGHUP", marks=pytest.mark.slow),
        pytest.param("a side dies", "the process of side 'ours' ended with exit code -9", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_early_leaves_its_table_and_its_json(tmp_path: Path, ending: str, words: str) -> None:
    script, result_path = tmp_path / "tiny.py", tmp_path / "result.json"
    script.write_text(TINY_COMMAND)
    command = [sys.executable, str(script), "--rows=input", "--batch_size=1", "--rounds=1000000"]
    with subprocess.Popen(
        [*command, f"--json={result_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        while not (line := process.stdout.readline()).startswith("Round 1 of 1000000; medians so far: input "):
            assert line, process.communicate()
        if ending == "a side dies":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (side,) = (int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(side, signal.SIGKILL)
        else:  # to all processes, as a terminal does at Ctrl-C
            os.killpg(process.pid, signal.Signals[ending])
        out, err = process.communicate(timeout=60)
    result = json.loads(result_path.read_text())
    rounds = result["whole_rounds"]
    assert process.returncode == 1
    assert err.splitlines()[-1] == f"error: {words}; {rounds} of 1000000 rounds are whole"
    assert 1 <= rounds <= len(result["seconds"]["input"]["ours"]) <= rounds + 1
    assert f"median of {rounds} [quartiles]" in out and "input pipeline, a batch of JPEGs" in out
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_command_writes_its_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With this package's side in a process of its own."""
    path = tmp_path / "result.json"
    benchmark.main(["--rows=forward,train", "--batch_size=1", "--rounds=3", "--in_flight=2", f"--json={path}"])
    result = json.loads(path.read_text())
    assert len(result["seconds"]["forward"]["ours"]) == len(result["seconds"]["train"]["ours"]) == 3
    assert result["facts"]["ours"]["parameters"] == 7_995_011
