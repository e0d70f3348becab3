"""InceptionV3 against torch-fidelity's network in PyTorch, and its resize and weights against their definitions.

`data/torch_fidelity.npz` contains the outputs of torch-fidelity 0.4.0 (`FeatureExtractorInceptionV3`, torch 2.13 on a
CPU) for the weights and images of `formula.py`: the features "2048", the first 7 channels of Mixed_6d.branch1x1 with
the channel last, and the softmax of "logits_unbiased".
"""

from pathlib import Path

import formula
import jax
import numpy as np
import pytest
from inception_formula import inception_state

from cfd.convert.inception import inception_params_from_torch
from cfd.evaluation import inception
from cfd.runs import npz

PEER = Path(__file__).parents[1] / "data" / "torch_fidelity.npz"


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return inception_state()


@pytest.fixture(scope="module")
def params(state):
    return inception_params_from_torch(state)


@pytest.fixture(scope="module")
def outputs(params):
    """The outputs for two images in one batch, and for the same images one by one, as floats."""
    images = formula.images(2, 64)
    apply, variables = jax.jit(inception.InceptionV3().apply), {"params": params}
    singles = [apply(variables, image[None].astype(np.float32)) for image in images]
    return apply(variables, images), jax.tree.map(lambda *rows: np.concatenate(rows), *singles)


@pytest.mark.parametrize("name", inception.Features._fields)
def test_parity_with_torch_fidelity(outputs, name):
    ours, theirs = getattr(outputs[0], name), npz.read_npz(PEER)[name]
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    # Float32 rounding errors scale with the largest activation, not with small ones just above the ReLU's zero.
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    if name == "probs":
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_batch_size_and_dtype_do_not_matter(outputs):
    for whole, single in zip(*outputs, strict=True):
        np.testing.assert_allclose(whole, single, rtol=1e-5, atol=1e-5 * whole.max())


@pytest.mark.parametrize("height, width", [(32, 32), (64, 47), (299, 299), (1, 5), (400, 310)])
def test_resize_is_tensorflow_1s(height, width):
    images = formula.images(1, 400)[:, :height, :width].astype(np.float32)
    ours = np.asarray(inception.resize_tf1(jax.numpy.asarray(images), 299))
    assert ours.shape == (1, 299, 299, 3)
    # TensorFlow 1's kernel, value by value: no half-pixel offset, the lower neighbour by truncation, and the upper one
    # clamped at the edge.
    scale_y, scale_x = np.float32(height) / np.float32(299), np.float32(width) / np.float32(299)
    for y in range(0, 299, 7):
        for x in range(0, 299, 11):
            at_y, at_x = np.float32(y) * scale_y, np.float32(x) * scale_x
            y0, x0 = int(at_y), int(at_x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            dy, dx = float(at_y) - y0, float(at_x) - x0
            corners = images[0, [y0, y0, y1, y1], [x0, x1, x0, x1]].astype(np.float64)
            expected = np.array([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx]) @ corners
            np.testing.assert_allclose(ours[0, y, x], expected, atol=1e-4)


def test_resize_keeps_299_and_is_not_antialiased():
    image = np.zeros((1, 598, 598, 1), np.float32)
    image[0, 1::2, 1::2] = 1.0
    assert not np.asarray(inception.resize_tf1(jax.numpy.asarray(image), 299)).any()
    image = formula.images(1, 299).astype(np.float32)
    np.testing.assert_array_equal(inception.resize_tf1(jax.numpy.asarray(image), 299), image)


def test_grey_images_are_refused(params):
    with pytest.raises(ValueError, match="RGB"):
        jax.eval_shape(inception.InceptionV3().apply, {"params": params}, np.zeros((1, 8, 8, 1), np.float32))


def test_full_precision_on_every_device(params):
    """No device may compute a convolution or matrix product in TF32 or bfloat16."""
    apply = jax.make_jaxpr(inception.InceptionV3().apply)
    jaxpr = apply({"params": params}, np.zeros((1, 8, 8, 3), np.uint8))
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(found) == 95
    highest = jax.lax.Precision.HIGHEST
    assert all(eqn.params["precision"] in (highest, (highest, highest)) for eqn in found)


def test_batch_norm_is_folded_exactly(state, params):
    name = ("Mixed_7a", "branch3x3_2")
    key = ".".join(name)
    x = formula.uniform("patch", 192, 3, 3)
    bn = {k: state[f"{key}.bn.{k}"].astype(np.float64) for k in ("weight", "bias", "running_mean", "running_var")}
    conv = np.einsum("fchw,chw->f", state[f"{key}.conv.weight"].astype(np.float64), x)
    expected = (conv - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-3) * bn["weight"] + bn["bias"]
    folded = params[name[0]][name[1]]["conv"]
    ours = np.einsum("hwcf,chw->f", folded["kernel"].astype(np.float64), x) + folded["bias"]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_converter_accepts_batch_counters(state, params):
    counters = {
        f"{key.removesuffix('.weight')}.num_batches_tracked": np.array(0) for key in state if ".bn.weight" in key
    }
    again = inception_params_from_torch(state | counters)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Mixed_5b.branch1x1.bn.weight": None}, "no tensor 'Mixed_5b.branch1x1.bn.weight'"),
        ({"fc.bias": None}, "no tensor 'fc.bias'"),
        (
            {"fc.weight": np.zeros((1000, 2048), np.float32)},
            r"'fc.weight' has shape \(1000, 2048\), expected \(1008, 2048\)",
        ),
        ({"AuxLogits.fc.weight": np.zeros(3)}, "1 tensors are not InceptionV3's: .*AuxLogits"),
        ({"fc.bias": np.full(1008, np.nan)}, "'fc.bias' holds NaN"),
    ],
)
def test_converter_names_what_does_not_fit(state, change, message):
    changed = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        inception_params_from_torch(changed)


def test_params_on_disk(params, tmp_path):
    path = tmp_path / "inception.npz"
    inception.save_params(path, params)
    jax.tree.map(np.testing.assert_array_equal, inception.load_params(path), params)
    again = tmp_path / "again.npz"
    inception.save_params(again, params)
    assert inception.weights_hash(path) == inception.weights_hash(again)
    assert len(inception.weights_hash(path)) == 64

    flat = npz.read_npz(path)
    npz.write_npz(path, flat | {"fc/kernel": flat["fc/kernel"][:, :1000]})
    with pytest.raises(ValueError, match=r"fc/kernel: \(2048, 1000\), expected \(2048, 1008\)"):
        inception.load_params(path)
    assert inception.weights_hash(path) != inception.weights_hash(again)
