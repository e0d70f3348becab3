"""DINOv2 against its forward pass in NumPy and in PyTorch's functions; its resizes and weights likewise."""

from pathlib import Path
from typing import Any

import dinov2_formula
import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dinov2_formula import SMALL, dinov2_state

from cfd.convert.dinov2 import dinov2_params_from_torch
from cfd.devices import parallel
from cfd.evaluation import dinov2, features, inception
from cfd.runs import npz

VIT_L = dinov2.VIT_L
SHAPES = [(32, 32), (64, 47), (224, 224), (1, 5), (400, 310)]


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return dinov2_state()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "VIT_L", SMALL)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch, which only cfd.convert needs, is not installed")


def ours(state: dict[str, np.ndarray], *batches: np.ndarray) -> np.ndarray:
    params, apply = dinov2_params_from_torch(state), jax.jit(dinov2.VIT_L.apply)
    return np.concatenate([apply({"params": params}, images) for images in batches])


def torchs(torch: Any, state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The features by PyTorch's own functions, from images of any size and positions of any grid."""
    f, w = torch.nn.functional, {key: torch.from_numpy(x) for key, x in state.items()}
    width, grid = len(w["norm.bias"]), int((w["pos_embed"].shape[1] - 1) ** 0.5)

    def norm(x: Any, name: str) -> Any:
        return f.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: Any, name: str) -> Any:
        return f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = f.interpolate(x, (224, 224), mode="bicubic", antialias=True) / 255.0
    x = (x - torch.tensor(dinov2.MEAN)[:, None, None]) / torch.tensor(dinov2.STD)[:, None, None]
    x = f.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).mT
    square = w["pos_embed"][:, 1:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    square = f.interpolate(square, scale_factor=(16.1 / grid, 16.1 / grid), mode="bicubic")
    positions = torch.cat([w["pos_embed"][:, :1], square.permute(0, 2, 3, 1).reshape(1, 256, width)], 1)
    x = torch.cat([w["cls_token"].expand(len(x), 1, width), x], 1) + positions
    for block in range(sum(key.endswith("ls1.gamma") for key in w)):
        b = f"blocks.{block}"
        attended, _ = f.multi_head_attention_forward(
            *[norm(x, f"{b}.norm1").transpose(0, 1)] * 3,
            embed_dim_to_check=width,
            num_heads=width // 64,
            in_proj_weight=w[f"{b}.attn.qkv.weight"],
            in_proj_bias=w[f"{b}.attn.qkv.bias"],
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=w[f"{b}.attn.proj.weight"],
            out_proj_bias=w[f"{b}.attn.proj.bias"],
            training=False,
        )
        x = x + w[f"{b}.ls1.gamma"] * attended.transpose(0, 1)
        hidden = f.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + w[f"{b}.ls2.gamma"] * linear(hidden, f"{b}.mlp.fc2")
    return norm(x, "norm")[:, 0].numpy()


def test_the_forward_pass_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 224x224 and with positions of 16 by 16 patches, nothing is interpolated."""
    monkeypatch.setattr(dinov2, "VIT_L", SMALL.clone(grid=16))
    state, images = dinov2_state(grid=16), formula.images(2, 224)
    expected = dinov2_formula.features(state, images)
    assert expected.std() > 0.1 and np.abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(ours(state, images), expected, atol=1e-5)


def test_parity_with_pytorchs_functions(torch: Any, state) -> None:
    """From bytes to features, with both interpolations."""
    images = formula.images(2, 64)[:, :, :47]
    np.testing.assert_allclose(ours(state, images), torchs(torch, state, images), atol=2e-5)


@pytest.mark.slow
def test_parity_of_vit_l(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 24 blocks of 1024 channels, and positions of 37 by 37 patches, as published."""
    monkeypatch.setattr(dinov2, "VIT_L", VIT_L)
    rng = np.random.default_rng(0)
    shapes = {key: x.shape for key, x in dinov2_state(64, 24, 37).items()}
    state = {}
    for key, shape in shapes.items():
        shape = tuple(16 * d if d % 64 == 0 else d for d in shape)
        state[key] = rng.normal(size=shape, scale=np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3)
        state[key] = (state[key] + key.endswith(("gamma", "norm1.weight", "norm2.weight"))).astype(np.float32)
    assert sum(map(np.size, state.values())) == 304_368_640
    images = formula.images(2, 64)
    np.testing.assert_allclose(ours(state, images), torchs(torch, state, images), atol=2e-5)


def test_batch_size_and_dtype_do_not_matter(state) -> None:
    images = formula.images(3, 40)
    single = ours(state, *(image[None].astype(np.float32) for image in images))
    np.testing.assert_allclose(ours(state, images), single, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_resize_is_antialiased_bicubic(shape: tuple[int, int]) -> None:
    """That of JAX, which has Keys' kernel too; an image of the right size is kept."""
    images = formula.images(1, 400)[:, : shape[0], : shape[1]].astype(np.float32)
    expected = jax.image.resize(images, (1, 224, 224, 3), "cubic", antialias=True)
    found = np.asarray(dinov2.resize(jnp.asarray(images), 224))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    if shape == (224, 224):
        np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_resize_is_pytorchs(torch: Any, shape: tuple[int, int]) -> None:
    """In float64. Nothing is clipped: beside an edge, the kernel's negative lobes leave [0, 255]."""
    images = formula.images(1, 400)[:, : shape[0], : shape[1]].astype(np.float64)
    images[0, : shape[0] // 2] = 255.0
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2), (224, 224), mode="bicubic", antialias=True
    ).permute(0, 2, 3, 1)
    rows, columns = (dinov2.antialiased(old, 224) for old in shape)
    np.testing.assert_allclose(np.einsum("hxc,yh->yxc", columns @ images[0], rows), expected[0], atol=1e-9)
    assert 1 in shape or shape == (224, 224) or expected.max() > 255.5


def test_positions_are_interpolated_as_dinov2_does_it(torch: Any) -> None:
    """By a scale factor with an offset of 0.1, as its hub builds ViT-L/14. Without the offset, the values differ."""
    positions = formula.uniform("positions", 1 + 37**2, 4).astype(np.float32)
    square = torch.from_numpy(positions[1:].reshape(1, 37, 37, 4)).permute(0, 3, 1, 2)
    scaled, sized = (
        torch.nn.functional.interpolate(square, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(256, 4).numpy()
        for how in (dict(scale_factor=(16.1 / 37, 16.1 / 37)), dict(size=(16, 16)))
    )
    found = np.asarray(dinov2.interpolate_positions(jnp.asarray(positions), 16))
    np.testing.assert_array_equal(found[0], positions[0])
    np.testing.assert_allclose(found[1:], scaled, atol=2e-5)
    assert np.abs(scaled - sized).max() > 0.1
    kept = positions[: 1 + 16**2]
    np.testing.assert_array_equal(dinov2.interpolate_positions(jnp.asarray(kept), 16), kept)


def test_grey_images_are_refused() -> None:
    with pytest.raises(ValueError, match="RGB"):
        jax.eval_shape(SMALL.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))


def test_full_precision_on_every_device(state) -> None:
    """No device may compute a convolution or matrix product in TF32 or bfloat16."""
    params = dinov2_params_from_torch(state)
    text = str(jax.make_jaxpr(SMALL.apply)({"params": params}, np.zeros((1, 8, 8, 3), np.uint8)))
    products = text.count("= dot_general[") + text.count("= conv_general_dilated[")
    assert products == 2 + 2 + 1 + 6  # two resizes, the patches, and those of a block
    assert text.count("precision=Precision.HIGHEST") + text.count("precision=(Precision.HIGHEST") == products


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.ls2.gamma": None}, "no tensor 'blocks.1.ls2.gamma': give dinov2_vitl14_pretrain.pth"),
        (
            {"pos_embed": np.zeros((1, 25, 128))},
            r"\(1, 25, 128\), expected \(1, 26, 128\): give dinov2_vitl14_pretrain",
        ),
        ({"patch_embed.proj.weight": np.zeros((128, 3, 16, 16))}, r"\(128, 3, 16, 16\), expected \(128, 3, 14, 14\)"),
        ({"blocks.2.norm1.bias": np.zeros(128)}, r"1 tensors are not ViT-L/14's: \['blocks.2.norm1.bias'\]; give "),
        ({"norm.bias": np.full(128, np.nan)}, "'norm.bias' holds NaN"),
    ],
)
def test_converter_names_what_does_not_fit(state, change: dict[str, Any], message: str) -> None:
    changed = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        dinov2_params_from_torch(changed)


def test_the_mask_token_is_not_needed(state) -> None:
    without = {key: value for key, value in state.items() if key != "mask_token"}
    jax.tree.map(np.testing.assert_array_equal, dinov2_params_from_torch(without), dinov2_params_from_torch(state))


def test_params_on_disk(state, tmp_path: Path) -> None:
    params, path = dinov2_params_from_torch(state), tmp_path / "dinov2.npz"
    dinov2.save_params(path, params)
    jax.tree.map(np.testing.assert_array_equal, dinov2.load_params(path), params)
    with pytest.raises(ValueError, match="does not hold InceptionV3"):
        inception.load_params(path)
    flat = npz.read_npz(path)
    for change, message in (
        (
            {"blocks/fc1/kernel": flat["blocks/fc1/kernel"][:1]},
            r"fc1/kernel: \(1, 128, 512\), expected \(2, 128, 512\)",
        ),
        ({"registers": np.zeros((4, 128))}, r"registers: \(4, 128\), expected nothing"),
    ):
        npz.write_npz(path, flat | change)
        with pytest.raises(ValueError, match=f"{message}.*`python -m cfd.convert dinov2 FILE OUT`"):
            dinov2.load_params(path)


def test_the_feature_network(state, tmp_path: Path) -> None:
    """It has features alone, for any number of images, and runs on all devices."""
    path = tmp_path / "dinov2.npz"
    dinov2.save_params(path, dinov2_params_from_torch(state))
    images = formula.images(3, 32)
    network = features.open_dinov2(str(path), parallel.make_mesh(data=-1, fsdp=1))
    outputs = network.extract(images)
    assert (network.name, network.weights_hash) == ("dinov2", inception.weights_hash(path))
    assert outputs.spatial is None and outputs.probs is None
    np.testing.assert_allclose(outputs.pool, ours(state, images), atol=1e-5)
