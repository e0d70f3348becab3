"""Programs compiled for TPUs: what is refused, the least bytes, the table, and a compilation if libtpu is there."""

import importlib.util
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from cfd.benchmark import __main__ as benchmark
from cfd.benchmark import ahead
from cfd.benchmark.side import COMMON, IMAGE_SIZE, NETWORKS
from cfd.networks.mp_unet import MPUNet
from cfd.networks.unet import UNet
from cfd.platforms import by_platform

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
TINY: dict[str, Any] = COMMON | dict(
    num_classes=10,
    out_channels=3,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=32,
)
SETTING = ahead.Setting("v5e:2x2", 1, 1, "small", 8, "bfloat16", False, ("train", "guided"))


@pytest.mark.parametrize("chips", ["v5e", "v5e:", "v5e:3x3", "v9:2x2", "2x2", "v5e:2x2x2", "v5e=2x2", "V5E:2x2"])
def test_chips_that_are_not_sold_are_refused_in_a_line(chips: str) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main([f"--compile_for={chips}"])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert end.value.code.startswith(f"error: --compile_for is '{chips}': give v5e or v6e, a colon and ")


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_command_says_what_to_install() -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--compile_for=v5e:2x2"])
    remedy = f"pip install 'jax[tpu]=={jax.__version__}'"
    assert end.value.code == f"error: --compile_for needs the compiler of TPUs: {remedy}"


@pytest.mark.parametrize(
    "flags",
    [["--rows=input"], ["--rows=train,sampler"], ["--profile=train"], ["--slices=0"], ["--fsdp=0"]],
)
def test_flags_that_run_something_are_refused(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--compile_for=v5e:2x2", *flags])
    assert f"error: {flags[0].partition('=')[0]} " in capsys.readouterr().err


def test_the_least_bytes_of_a_network_can_be_counted_by_hand() -> None:
    """A network of one level of 8x8 with 32 channels in bfloat16, and one image. Each array has 64 positions.

    Convolutions, as (inputs, outputs): conv_in, two in each of five blocks, two 1x1 of the blocks up, conv_out, and
    qkv and out of the attention. Norms: two in each block, the attention's and the last.
    """
    fields: dict[str, Any] = TINY | dict(dtype="bfloat16")
    net = UNet(image_size=8, **fields)
    convolutions = [(3, 32), *[(32, 32)] * 6, *[(64, 32), (32, 32), (64, 32)] * 2, (32, 3), (32, 96), (32, 32)]
    norms = [32] * 6 + [64, 32] * 2 + [32, 32]
    forward = sum(x + y for x, y in convolutions) + sum(2 * x for x in norms) + 4 * 32  # attention: q, k, v, its output
    backward = sum(2 * (x + y) for x, y in convolutions) + sum(3 * x for x in norms) + 8 * 32
    added = 6 * 32  # a block's sum reads the other branch: five residual blocks and one of attention
    parameters = sum(
        x.size
        for x in jax.tree.leaves(
            jax.eval_shape(net.init, jax.random.key(0), *(jax.ShapeDtypeStruct(*s) for s in INPUTS))
        )
    )
    size = 4 * parameters
    assert ahead.least_bytes(net, "forward", 1) == 2 * 64 * (forward + added) + size
    assert ahead.least_bytes(net, "guided", 3) == 2 * (3 * 2 * 64 * (forward + added) + size)
    assert ahead.least_bytes(net, "train", 1) == 2 * 64 * (forward + backward + 2 * added) + 12 * size


@pytest.mark.parametrize(
    "shape, size",
    [
        ((32, 64, 64, 192), 32 * 64 * 64 * 256),  # channels last: 192 -> 256; images last would be 32 -> 128
        ((32, 64, 64, 3), 32 * 64 * 128 * 3),  # a side last: 64 -> 128
        ((1, 8, 8, 384), 8 * 8 * 384),
        ((3, 3, 6, 130), 3 * 3 * 8 * 256),
        ((384, 5), 8 * 384),  # 5 rows -> 8
        ((200,), 256),
        ((), 128),
    ],
)
def test_padding_is_that_of_the_best_order_of_axes(shape: tuple[int, ...], size: int) -> None:
    assert ahead.padded_size(shape) == size


def test_the_least_bytes_with_padding_are_those_of_padded_arrays() -> None:
    """Arrays of 128 images and 64 or 128 channels have no padding; those of 32 images and 64 channels have."""
    fields: dict[str, Any] = TINY | dict(base_channels=64, dtype="bfloat16")
    net = UNet(image_size=8, **fields)
    whole, padded = (ahead.least_bytes(net, "train", 128, size_of=f) for f in (math.prod, ahead.padded_size))
    assert whole < padded < 1.2 * whole  # the image, biases and embeddings alone
    whole, padded = (ahead.least_bytes(net, "train", 32, size_of=f) for f in (math.prod, ahead.padded_size))
    assert 1.5 * whole < padded < 2.5 * whole


INPUTS = (((1, 8, 8, 3), "float32"), ((1,), "float32"), ((1,), "int32"))


def test_the_least_bytes_of_a_magnitude_preserving_network_can_be_counted_by_hand() -> None:
    """The same levels as above. There are no norms, and the constant 1 is a channel of the input.

    Convolutions of vectors of one position: the time's, and those of the embedding of 128 channels in five blocks.
    """
    fields: dict[str, Any] = TINY | dict(dtype="bfloat16")
    net = MPUNet(image_size=8, **{k: v for k, v in fields.items() if k not in ("resblock_updown", "scale_shift_norm")})
    convolutions = [(4, 32), *[(32, 32)] * 6, *[(64, 32), (32, 32), (64, 32)] * 2, (32, 3), (32, 96), (32, 32)]
    vectors = (32 + 128) + 5 * (128 + 32)
    passed = 64 * sum(x + y for x, y in convolutions) + vectors
    added = 64 * 6 * 32
    inputs = [jax.ShapeDtypeStruct(*s) for s in INPUTS]
    size = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), *inputs)))
    assert ahead.least_bytes(net, "forward", 1) == 2 * (passed + added + 64 * 4 * 32) + size
    assert ahead.least_bytes(net, "train", 1) == 2 * (3 * passed + 2 * added + 64 * 12 * 32) + 12 * size


def test_the_table_has_the_roofline_of_the_slowest_part() -> None:
    """4 chips of 8 images in max(2, 4, 1) ms."""
    one = dict(program="train", flops=2e12, bytes_accessed=4e9, main_memory_bytes=3e9)
    one |= dict(
        least_bytes=1e9,
        least_bytes_padded=2e9,
        temporary_bytes=1e9,
        collectives="none",
        seconds={"FLOPs": 0.002, "memory": 0.004, "links": 0.001},
    )
    lines = ahead.table(SETTING, [one]).splitlines()
    assert lines[0].startswith("small, 8 images per chip, bfloat16, 4 chips of v5e, fsdp = 1; ")
    assert lines[2].split() == ["train", "2", "4", "3", "1.50", "1", "2", "4", "1", "8000", "none"]


def test_a_call_aside_gives_its_result_or_its_error(capsys: pytest.CaptureFixture) -> None:
    assert ahead.aside("Adding", lambda: 1 + 1) == 2
    assert capsys.readouterr().out == "Adding: this takes minutes.\n"
    for error in (KeyError("a"), TimeoutError()):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            ahead.aside("Failing", fail)


def test_a_signal_ends_the_wait_for_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself goes on until the test lets it end."""
    goes_on = threading.Event()
    compiling = lambda setting: iter([ahead.aside("Compiling", lambda: (stop(), goes_on.wait()))])  # noqa: E731
    monkeypatch.setattr(ahead, "compile_ahead", compiling)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(SystemExit) as end:
            benchmark.main(["--compile_for=v5e:2x2"])
        assert end.value.code == "error: stopped by SIGINT; 0 of 2 programs are compiled"
    finally:
        goes_on.set()


@pytest.mark.parametrize("kind, is_expected", [("RESOURCE_EXHAUSTED: Ran out of memory", True), ("INTERNAL: x", False)])
def test_a_program_that_fits_no_chip_is_an_error_of_the_user(
    kind: str, is_expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of the programs before it was printed."""

    def aside(words: str, call: Any) -> Any:
        if "guided" in words:
            return None
        raise jax.errors.JaxRuntimeError(kind)

    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    monkeypatch.setattr(ahead, "mesh_of", lambda setting: mesh)
    monkeypatch.setattr(ahead, "aside", aside)
    monkeypatch.setattr(ahead, "facts", lambda *_: {})
    monkeypatch.setattr(ahead, "table", lambda setting, found: f"{len(found)} of 2")
    monkeypatch.setitem(NETWORKS, "small", TINY)
    command = ["--compile_for=v5e:2x2", "--rows=guided,train"]
    with pytest.raises(SystemExit if is_expected else jax.errors.JaxRuntimeError, match=kind) as end:
        benchmark.main(command)
    assert "1 of 2" in capsys.readouterr().out
    if is_expected:
        assert str(end.value).startswith("error: train does not fit into the memory of a chip (JaxRuntimeError: ")
        assert str(end.value).endswith("give a smaller --batch_size, which is per chip, --remat, or a larger --fsdp")


def test_programs_are_traced_for_tpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training on a TPU does: the gradient of a choice among all forms would keep arrays of each."""
    traced: list[str] = []

    def form(name: str) -> Callable[[Any], Any]:
        return lambda x: traced.append(name) or x

    def fun(x: Any) -> Any:
        return by_platform(x, cpu=form("cpu"), tpu=form("tpu"), default=form("default"))

    monkeypatch.setattr(ahead, "mesh_of", lambda setting: Mesh(np.array(jax.devices()[:1]), ("data",)))
    monkeypatch.setattr(ahead, "program", lambda *_: (fun, (1.0,), {}))
    monkeypatch.setattr(ahead, "aside", lambda words, call: None)
    monkeypatch.setattr(ahead, "facts", lambda *_: {})
    monkeypatch.setitem(NETWORKS, "small", TINY)
    assert len(list(ahead.compile_ahead(ahead.Setting("v5e:1x1", 1, 1, "small", 1, "float32", False, ("train",))))) == 1
    assert traced == ["tpu"]


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
@pytest.mark.slow
@pytest.mark.parametrize("chips", ["v5e:1x1", "v6e:2x2"])
def test_the_command_compiles_and_writes_its_json(chips: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A training step exchanges the gradient, and a sampling step nothing. Arrays are larger than the vector memory."""
    monkeypatch.setitem(NETWORKS, "small", TINY)
    monkeypatch.setitem(IMAGE_SIZE, "small", 64)
    path = tmp_path / "result.json"
    benchmark.main([f"--compile_for={chips}", "--batch_size=128", "--dtype=bfloat16", f"--json={path}"])
    train, guided = json.loads(path.read_text())["programs"]
    assert guided["collectives"] == "none" and ("all-reduce" in train["collectives"]) == (chips == "v6e:2x2")
    assert train["main_memory_bytes"] > 0 and train["temporary_bytes"] > 0 and train["seconds"]["FLOPs"] > 0
