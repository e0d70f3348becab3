"""Import: the architecture that tensors show, the files that are refused, and the run folder that is written."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import hidden, printed, relative
from inception_formula import inception_state

from cfd.convert.__main__ import main
from cfd.convert.adm_network import PUBLISHED, Hidden, adm_network
from cfd.convert.adm_weights import adm_params
from cfd.convert.inception import inception_params_from_torch
from cfd.convert.torch_file import identify
from cfd.evaluation import inception
from cfd.guidance import NULL_LABEL, classifier_guidance
from cfd.loading import load, load_classifier
from cfd.modes.report import report
from cfd.networks.times import logsnr_table
from cfd.sampling import ancestral, guided_sample

Shapes = dict[str, tuple[int, ...]]


def shapes_of(name: str) -> tuple[Shapes, Hidden]:
    ours = printed(name)
    return {key: x.shape for key, x in ours.state.items()}, hidden(ours.stored)


def test_the_architecture_is_read_off_the_tensors() -> None:
    """The fields are the arguments with which the original network was built."""
    network = adm_network(*shapes_of("plain"))
    expected = dict(
        num_classes=10,
        out_channels=3,
        base_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        head_channels=0,
        num_heads=4,
        resblock_updown=False,
        scale_shift_norm=False,
        dropout=0.0,
        time="adm_linear",
        dtype="float32",
        remat=False,
    )
    assert network.fields == expected
    classifier = adm_network(*shapes_of("classifier_small"))
    assert (classifier.kind, classifier.image_size, classifier.fields["num_res_blocks"]) == ("classifier", 16, 1)
    assert adm_network(*shapes_of("uncond")).fields["num_classes"] == 0


def published_shapes(kind: str, size: int = 64) -> Shapes:
    """The shapes of ADM's model or classifier: those of a small network of the same pattern, with the widths scaled."""
    base = 128 if kind == "classifier" else 192 if size == 64 else 256
    shapes, _ = shapes_of(f"{'classifier_' * (kind == 'classifier')}pattern{size}")
    scaled = {}
    for key, shape in shapes.items():
        grown = tuple(d * base // 32 if d % 32 == 0 else d for d in shape)
        scaled[key] = tuple(1000 if d == 10 else d for d in grown)
    if kind == "classifier":  # one position per pixel of 8x8, and one for their mean
        scaled["out.2.positional_embedding"] = (scaled["out.2.positional_embedding"][0], 65)
    return scaled


@pytest.mark.parametrize(
    ("kind", "size", "parameters", "schedule", "order", "heads"),
    [
        ("diffusion", 64, 295_904_454, "cosine", "new", (64, 0)),
        ("classifier", 64, 65_438_568, "cosine", "legacy", (64, 0)),
        ("diffusion", 128, 421_529_606, "linear", "legacy", (0, 4)),
        ("classifier", 128, 42_568_040, "linear", "legacy", (64, 0)),
    ],
)
def test_a_published_model_needs_no_flags(
    kind: str, size: int, parameters: int, schedule: str, order: str, heads: tuple[int, int]
) -> None:
    """The model is recognised, and has as many parameters as the original."""
    shapes = published_shapes(kind, size)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    network = adm_network(shapes)
    assert (network.kind, network.image_size, network.schedule, network.attention_order) == (
        kind,
        size,
        schedule,
        order,
    )
    assert (network.fields["head_channels"], network.fields["num_heads"]) == heads
    assert network.fields["attention_resolutions"] == (32, 16, 8)


def test_a_flag_is_stronger_than_a_published_model() -> None:
    network = adm_network(published_shapes("diffusion"), Hidden(num_heads=4, attention_order="legacy"))
    assert (network.fields["head_channels"], network.fields["num_heads"], network.attention_order) == (0, 4, "legacy")


def test_what_tensors_do_not_show_is_asked_for() -> None:
    shapes, flags = shapes_of("small")
    with pytest.raises(
        ValueError, match=r"--image-size, --attention-order, --schedule, --head-channels or --num-heads"
    ):
        adm_network(shapes)
    with pytest.raises(ValueError, match=r"give --schedule$"):
        adm_network(shapes, flags._replace(schedule=None))
    assert all(p.head_channels or p.num_heads for p in PUBLISHED.values())


def test_residual_blocks_of_a_classifier_that_can_be_read_in_two_ways() -> None:
    """Without attention and with equal widths, blocks that halve the resolution look like the others."""
    shapes = {k: v for k, v in shapes_of("classifier_small")[0].items() if not k.startswith("input_blocks.")}
    for k in range(1, 6):
        shapes[f"input_blocks.{k}.0.in_layers.2.weight"] = (32, 32, 3, 3)
    shapes["input_blocks.0.0.weight"] = (32, 3, 3, 3)
    with pytest.raises(
        ValueError, match=r"5 input blocks fit \[1, 2, 5\] residual blocks per level: give --num-res-blocks"
    ):
        adm_network(shapes, shapes_of("classifier_small")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_block.0.emb_layers.1.weight": None}, "tensor missing"),
        ({"time_embed.0.weight": (128,)}, "another rank"),
        ({"input_blocks.0.0.weight": (32, 6, 3, 3)}, "upsampler"),
        ({"input_blocks.1.0.in_layers.2.weight": (16, 32, 3, 3)}, r"\[16, 64\] channels"),
        ({"input_blocks.4.0.in_layers.2.weight": (32, 32, 3, 3)}, "unequal numbers"),
        ({"model.diffusion_model.out.2.weight": (4,)}, "latent-diffusion"),
    ],
)
def test_other_architectures_are_named(change: dict[str, Any], message: str) -> None:
    shapes, flags = shapes_of("small")
    changed = {k: v for k, v in (shapes | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        adm_network(changed, flags)


def test_a_classifier_without_attention_pooling() -> None:
    shapes, flags = shapes_of("classifier_small")
    pooled = {k: v for k, v in shapes.items() if not k.startswith("out.2.")} | {"out.3.weight": (10, 64, 1, 1)}
    with pytest.raises(ValueError, match='only pool="attention"'):
        adm_network(pooled, flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out.0.weight": None}, r"no tensor 'out.0.weight'"),
        ({"extra.weight": np.zeros(3)}, r"1 tensors have no place in the network, the first are \['extra.weight'\]"),
        ({"out.0.weight": np.zeros(7)}, r"'out.0.weight' has shape \(7,\)"),
        ({"middle_block.1.qkv.weight": np.zeros((64, 192, 1))}, "'middle_block.1.qkv.weight' has shape"),
        ({"out.0.weight": np.full(32, np.nan)}, "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    ours = printed("small")
    state = {k: v for k, v in (ours.state | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        adm_params(ours.network, state)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.diffusion_model.time_embed.0.weight", "first_stage_model.x"], "latent-diffusion"),
        (["Mixed_5b.branch3x3dbl_1.conv.weight"], "InceptionV3"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers"),
        (["blocks.0.adaLN_modulation.1.weight"], "DiT"),
        (["state", "param_groups"], "optimizer"),
        (["layer1.0.conv1.weight"], "ResNet"),
        (["a", "b", "c"], "3 names unknown here"),
        (["time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.x"], "a U-Net of ADM"),
        (["time_embed.0.weight", "input_blocks.0.0.weight"], "a noisy classifier of ADM"),
    ],
)
def test_networks_are_known_by_their_names(names: list[str], words: str) -> None:
    assert words in identify(names)


@pytest.fixture
def torch() -> Any:
    """PyTorch, which all tests of files need."""
    return pytest.importorskip("torch", reason="PyTorch, which only cfd.convert needs, is not installed")


FLAGS = {"small": ["--head-channels=32", "--attention-order=new", "--schedule=cosine", "--image-size=16"]}
FLAGS["classifier_small"] = ["--head-channels=32", "--attention-order=legacy", "--schedule=cosine"]


def write(torch: Any, path: Path, name: str) -> Path:
    torch.save({key: torch.from_numpy(x) for key, x in printed(name).state.items()}, path)
    return path


def test_a_u_net_becomes_a_run_that_samples(torch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours, out = printed("small"), tmp_path / "run"
    main(["adm", str(write(torch, tmp_path / "model.pt", "small")), str(out), *FLAGS["small"]])
    said = capsys.readouterr().out
    assert all(f"{stage} " in said for stage in ("Reading", "Converting", "Saving"))
    assert "829,638 parameters" in said and "Dropped the learned variance: outputs 3 to 5" in said and "w = 0" in said

    run = load(out)
    table = logsnr_table("cosine")
    assert (run.image_shape, run.num_classes, run.config["train"]["p_uncond"]) == ((16, 16, 3), 10, 0.0)
    assert run.config["process"] == dict(logsnr_min=table[-1], logsnr_max=table[0])
    stored, labels = ours.stored, jnp.int32(ours.stored["labels"])
    eps = jax.jit(run.eps_fn)(ours.z, jnp.float32(stored["logsnr"]), labels)
    assert relative(eps[:, ::2, ::2], stored["out"][..., :3]) < 1e-4

    options: dict[str, Any] = dict(num_steps=2, sampler=ancestral(0.3), **run.config["process"])
    x = guided_sample(jax.random.key(0), run.eps_fn, labels, run.image_shape, **options)
    assert x.shape == (3, 16, 16, 3) and jnp.isfinite(x).all()
    assert "adm, 16x16, 10 classes" in Path(report(str(out), str(out))).read_text()
    # There is no null label. With concrete labels that is an error; with traced labels, the result is NaN.
    with pytest.raises(ValueError, match="no unconditional score"):
        guided_sample(jax.random.key(0), run.eps_fn, labels, run.image_shape, w=1.0, **options)
    traced = jax.jit(run.eps_fn)(ours.z, jnp.float32(stored["logsnr"]), jnp.array([0, NULL_LABEL, 1]))
    assert jnp.isnan(traced[1]).all() and jnp.isfinite(traced[jnp.array([0, 2])]).all()


def test_a_learned_variance_can_be_kept(torch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours, out = printed("small"), tmp_path / "run"
    file = write(torch, tmp_path / "model.pt", "small")
    main(["adm", str(file), str(out), *FLAGS["small"], "--keep-variance", "--kind=diffusion"])
    assert "Kept the learned variance" in capsys.readouterr().out
    run = load(out)
    assert run.params["conv_out"]["kernel"].shape[-1] == 6 and run.config["model"]["out_channels"] == 6
    arguments = (ours.z, jnp.float32(ours.stored["logsnr"]), jnp.int32(ours.stored["labels"]))
    eps = jax.jit(run.eps_fn)(*arguments)
    assert eps.shape == (3, 16, 16, 3)
    assert relative(eps[:, ::2, ::2], ours.stored["out"][..., :3]) < 1e-4
    both = jax.jit(load(out, variance=True).eps_fn)(*arguments)
    outputs = jnp.concatenate([both[0], 2.0 * both[1] - 1.0], axis=-1)  # v = (o + 1) / 2
    assert relative(outputs[:, ::2, ::2], ours.stored["out"]) < 1e-4


def test_a_classifier_becomes_a_run_that_guides(torch, tmp_path: Path) -> None:
    ours, out = printed("classifier_small"), tmp_path / "run"
    file = write(torch, tmp_path / "model.pt", "classifier_small")
    main(["adm", str(file), str(out), *FLAGS["classifier_small"]])
    classifier_fn = load_classifier(out)
    logsnr, labels = jnp.float32(ours.stored["logsnr"]), jnp.int32(ours.stored["labels"])
    assert relative(jax.jit(classifier_fn)(ours.z, logsnr), ours.stored["out"]) < 1e-4
    guided = classifier_guidance(lambda z, logsnr, labels: z, classifier_fn, 1.0)
    assert jax.jit(guided)(ours.z, logsnr, labels).shape == ours.z.shape
    with pytest.raises(ValueError, match="holds a classifier run; a diffusion run was expected"):
        load(out)


def fails(capsys: pytest.CaptureFixture, *argv: Any) -> str:
    """The message, one line, with which the command fails."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_classifier_where_a_u_net_is_expected(torch, tmp_path: Path, capsys) -> None:
    file, out = write(torch, tmp_path / "model.pt", "classifier_small"), tmp_path / "run"
    message = fails(capsys, "adm", file, out, *FLAGS["classifier_small"], "--kind=diffusion")
    assert "this is a classifier network of ADM; --kind asks for a diffusion network" in message
    file = write(torch, tmp_path / "model.pt", "small")
    assert "--kind asks for a classifier" in fails(capsys, "adm", file, out, *FLAGS["small"], "--kind=classifier")
    assert "does not hold InceptionV3 but a U-Net of ADM" in fails(capsys, "inception", file, out)
    assert not out.exists()


class Canary:
    """Its pickle creates a file when a careless program loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_a_pickle_that_carries_code_is_refused_unrun(torch, tmp_path: Path, capsys) -> None:
    canary = tmp_path / "canary"
    bad = {"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(2)}, "callbacks": Canary(canary)}
    torch.save(bad, tmp_path / "ldm.ckpt")
    message = fails(capsys, "adm", tmp_path / "ldm.ckpt", tmp_path / "run")
    assert "ldm.ckpt is refused: its pickle asks to run code on loading" in message
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Canary(canary)))
    assert "plain.pt" in fails(capsys, "adm", tmp_path / "plain.pt", tmp_path / "run")
    torch.save(Canary(canary), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert "refused" in fails(capsys, "adm", tmp_path / "legacy.pt", tmp_path / "run")
    assert not canary.exists() and not (tmp_path / "run").exists()


def test_files_that_are_something_else_are_named(torch, tmp_path: Path, capsys) -> None:
    good = write(torch, tmp_path / "good.pt", "small").read_bytes()
    nested = {"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(2)}, "step": 3}
    torch.save(nested, tmp_path / "nested")
    torch.save([torch.zeros(2)], tmp_path / "list")
    torch.save({"a": torch.zeros(2)}, tmp_path / "unknown")
    torch.save({"a": torch.nn.Parameter(torch.zeros(2))}, tmp_path / "parameter")
    torch.save({"a": torch.zeros(1, dtype=torch.float16).expand(10**13)}, tmp_path / "expanded")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse")
    with zipfile.ZipFile(tmp_path / "other zip", "w") as archive:
        archive.writestr("word/document.xml", "text")
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1183923455\n"
    contents = {
        "lfs": (pointer, "git-LFS pointer of"),
        "half": (good[: len(good) // 2], "truncated"),
        "page": (b"<!DOCTYPE html><html>", "web page"),
        "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"a":{}}', "safetensors"),
        "empty": (b"", "no PyTorch file"),
        "text": (b"hello", "no PyTorch file"),
        "half pickle": (pickle.dumps(dict.fromkeys(range(99)))[:40], "damaged"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: words for name, (_, words) in contents.items()} | {
        "nested": "not one flat dict of tensors. It holds a latent-diffusion checkpoint",
        "list": "not one flat dict",
        "unknown": "no network of ADM but 1 names unknown",
        "parameter": "no network of ADM but 1 names unknown",
        "expanded": "repeat their bytes to more than the file holds",
        "sparse": "its tensors are sparse",
        "other zip": "zip archive without PyTorch's data.pkl",
        "bomb": "compressed",
        "absent": "is not a file",
    }
    for name, words in expected.items():
        message = fails(capsys, "adm", tmp_path / name, tmp_path / "run")
        assert words in message, name
    assert not (tmp_path / "run").exists()


def test_inceptions_weights_become_the_file_that_a_config_names(torch, tmp_path: Path) -> None:
    state = inception_state()
    torch.save({key: torch.from_numpy(x) for key, x in state.items()}, tmp_path / "fid.pth")
    main(["inception", str(tmp_path / "fid.pth"), str(tmp_path / "inception.npz")])
    expected = inception_params_from_torch(state)
    jax.tree.map(np.testing.assert_array_equal, inception.load_params(tmp_path / "inception.npz"), expected)


def test_nothing_is_overwritten(torch, tmp_path: Path, capsys) -> None:
    file = write(torch, tmp_path / "model.pt", "small")
    before = file.read_bytes()
    assert "exists" in fails(capsys, "adm", file, tmp_path, *FLAGS["small"])
    assert "exists" in fails(capsys, "inception", file, file)
    assert file.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(torch, tmp_path: Path, capsys) -> None:
    file = write(torch, tmp_path / "model.pt", "small")
    assert f"{file / 'run'}" in fails(capsys, "adm", file, file / "run", *FLAGS["small"])


def test_a_pytorch_that_runs_code_is_refused(torch, tmp_path: Path, capsys, monkeypatch) -> None:
    file = write(torch, tmp_path / "model.pt", "small")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "PyTorch 2.9.1+cpu runs code" in fails(capsys, "adm", file, tmp_path / "run", *FLAGS["small"])


def test_heads_given_twice_are_refused(torch, tmp_path: Path, capsys) -> None:
    """ADM follows num_head_channels if both are given, and its flag num_heads has a default."""
    file = write(torch, tmp_path / "model.pt", "small")
    message = fails(capsys, "adm", file, tmp_path / "run", *FLAGS["small"], "--head-channels=32", "--num-heads=4")
    assert "--head-channels and --num-heads are both given" in message


def test_nested_dicts_are_named_in_a_moment(torch, tmp_path: Path, capsys) -> None:
    nested: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    nested["itself"] = nested
    torch.save(nested, tmp_path / "model.pt")
    assert "not one flat dict of tensors" in fails(capsys, "adm", tmp_path / "model.pt", tmp_path / "run")


def test_without_pytorch_the_extra_is_named(tmp_path: Path) -> None:
    """In a process where PyTorch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None; from cfd.convert.__main__ import main; "
        f"main(['adm', {str(tmp_path / 'x.pt')!r}, {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "torch>=2.10"' in done.stderr and "Traceback" not in done.stderr
