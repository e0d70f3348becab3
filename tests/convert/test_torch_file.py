"""The tensors of a PyTorch file: under a wrapper's prefix, or in one of several dicts."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adm_formula import hidden, printed
from inception_formula import inception_state

from cfd.convert.adm_network import adm_network
from cfd.convert.adm_weights import adm_params
from cfd.convert.inception import inception_params_from_torch
from cfd.convert.torch_file import read_torch
from cfd.errors import UserError

torch = pytest.importorskip("torch", reason="PyTorch, which only cfd.convert needs, is not installed")


def tensors(prefix: str = "", number: float = 1.0) -> dict[str, Any]:
    """Names of a U-Net of ADM, with tensors of one number."""
    names = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight")
    return {prefix + name: torch.full((1,), number) for name in names}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.net."])
def test_the_prefix_of_a_wrapper_is_removed_and_named(prefix: str, tmp_path: Path, capsys) -> None:
    state = read_torch(saved(tmp_path, tensors(prefix)))
    assert state.keys() == tensors().keys()
    assert f"The names of all tensors begin with '{prefix}', which is removed." in capsys.readouterr().out


def test_other_names_stay_as_they_are(tmp_path: Path, capsys) -> None:
    """A prefix that only some tensors have is no wrapper's; one that tells what a network is helps its message."""
    latent = {f"model.diffusion_model.{name}": x for name, x in tensors().items()}
    for state in (tensors(), tensors("module.") | tensors(), {"a.b": torch.zeros(1), "a.c": torch.zeros(1)}, latent):
        assert read_torch(saved(tmp_path, state)).keys() == state.keys()
    assert capsys.readouterr().out == ""


def test_one_of_several_dicts_is_chosen_by_its_key(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    models = {"model": tensors(number=1.0), "ema": {"shadow": tensors("module.", number=2.0)}}
    path = saved(tmp_path, models | {"optimizer": optimizer, "step": 3})
    choice = r"--key=model \(3 tensors\), --key=ema/shadow \(3 tensors\)"
    with pytest.raises(
        UserError, match=rf"is not one flat dict of tensors. It holds .*: give one of its dicts, {choice}"
    ):
        read_torch(path)
    for key, number in (("model", 1.0), ("ema/shadow", 2.0)):
        state = read_torch(path, key)
        assert state.keys() == tensors().keys() and all(x == number for x in state.values())
    for key in ("ema", "state_dict", "step", "model/time_embed.0.weight"):
        with pytest.raises(UserError, match=rf"has no dict of tensors at --key={key}: give {choice}"):
            read_torch(path, key)
    same = tensors()
    path = saved(tmp_path, {"model": same, "ema": same})
    assert read_torch(path, "ema").keys() == read_torch(path, "model").keys() == same.keys()
    with pytest.raises(UserError, match=r"has no dict of tensors at --key=ema: omit it$"):
        read_torch(saved(tmp_path, tensors()), "ema")


def refused(folder: Path, content: Any, key: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        read_torch(saved(folder, content), key)
    return str(error.value)


def test_entries_that_are_no_tensors_are_named_with_a_remedy_that_works(tmp_path: Path) -> None:
    state: dict[str, Any] = tensors() | {"step": 3, "note": None}
    message = refused(tmp_path, state)
    assert "has a dict with entries that are no tensors, step, note: save it again as torch.save({name" in message
    plain = eval(message[message.index("{name") : message.index(", FILE")], {"state": state, "torch": torch})
    assert read_torch(saved(tmp_path, plain)).keys() == tensors().keys()
    models = {"model": state, "ema": tensors()}
    message = refused(tmp_path, models, "model")
    assert "a dict at --key=model with entries" in message and message.endswith("or give --key=ema (3 tensors)")


@pytest.mark.parametrize(("content", "words"), [({}, "one dict"), (3, "one int"), ([0], "one list")])
def test_files_without_tensors_are_named(content: Any, words: str, tmp_path: Path) -> None:
    assert f"It holds {words} without tensors by their names: give a file" in refused(tmp_path, content)


def test_tensors_that_are_no_real_numbers_are_refused(tmp_path: Path) -> None:
    name, *_ = tensors()
    with warnings.catch_warnings(action="ignore"):  # quantized tensors are deprecated
        quantized = torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.qint8)
    for x in (quantized, torch.ones(1, dtype=torch.complex64)):
        assert f"tensor {name!r} is {x.dtype}, and weights are real" in refused(tmp_path, tensors() | {name: x})
    assert "without values (on the device meta)" in refused(tmp_path, tensors() | {name: torch.ones(1, device="meta")})


def test_bytes_that_changed_are_found_by_their_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, tensors(number=3.0) | {"more": torch.full((999,), 7.0)})
    content, value = path.read_bytes(), np.full(999, 7.0, np.float32).tobytes()
    at = content.index(value)
    path.write_bytes(content[: at + 5] + bytes([content[at + 5] ^ 1]) + content[at + 6 :])
    with pytest.raises(UserError, match=r"is damaged, because the checksum of .*data/3 differs: download it again"):
        read_torch(path)
    path.write_bytes(content)
    assert len(read_torch(path)) == 4


@pytest.mark.parametrize("kind", ["int8", "bool"])
def test_tensors_of_another_type_are_refused(kind: str) -> None:
    ours = printed("small")
    with pytest.raises(UserError, match=rf"tensor 'out\.2\.bias' is {kind}, and weights are floating-point numbers"):
        adm_params(ours.network, ours.state | {"out.2.bias": ours.state["out.2.bias"].astype(kind)})
    state = inception_state()
    with pytest.raises(UserError, match=rf"tensor 'fc\.weight' is {kind}, and weights are floating-point numbers"):
        inception_params_from_torch(state | {"fc.weight": state["fc.weight"].astype(kind)})


@pytest.mark.parametrize("outputs", [4, 9, 1])
def test_another_number_of_outputs_is_no_network_of_adm(outputs: int) -> None:
    ours = printed("small")
    shapes = {name: x.shape for name, x in ours.state.items()} | {"out.2.weight": (outputs, 32, 3, 3)}
    with pytest.raises(UserError, match=rf"has {outputs} outputs for images of 3 channels"):
        adm_network(shapes, hidden(ours.stored))


@pytest.mark.parametrize("places", [0, 1])
def test_a_classifier_that_pools_no_place_is_refused(places: int) -> None:
    ours = printed("classifier_small")
    shapes = {name: x.shape for name, x in ours.state.items()} | {"out.2.positional_embedding": (64, places)}
    with pytest.raises(UserError, match=rf"its attention pooling has {places} places"):
        adm_network(shapes, hidden(ours.stored))


def test_a_block_far_above_the_others() -> None:
    """The message names the first few of the blocks that are missing, and a number of any size takes no time."""
    ours = printed("small")
    shapes = {name: x.shape for name, x in ours.state.items()} | {"input_blocks.99.0.weight": (3,)}
    with pytest.raises(UserError, match=r"blocks \[4, 5, 6, 7, 8, 9, 10, 11\] have no tensors"):
        adm_network(shapes, hidden(ours.stored))
    far = ours.state | {"input_blocks.999999999999.0.weight": np.zeros(3, np.float32)}
    assert adm_network({name: x.shape for name, x in far.items()}, hidden(ours.stored)) == ours.network
    with pytest.raises(
        UserError, match=r"1 tensors have no place in the network, the first are \['input_blocks\.99999"
    ):
        adm_params(ours.network, far)


def test_levels_that_change_by_pooling_are_named() -> None:
    """With conv_resample=False and resblock_updown=False, blocks that change the resolution have no tensors."""
    ours = printed("plain")
    kept = {name: x.shape for name, x in ours.state.items() if ".op." not in name and ".conv." not in name}
    assert len(kept) == len(ours.state) - 4
    with pytest.raises(UserError, match=r"its input blocks \[3\] have no tensors.*conv_resample=False"):
        adm_network(kept, hidden(ours.stored))


def test_flags_that_do_not_fit_are_named() -> None:
    ours = printed("small")
    shapes = {name: x.shape for name, x in ours.state.items()}
    for changes, words in (({"image_size": 17}, "need"), ({"head_channels": 48}, "heads")):
        network = adm_network(shapes, hidden(ours.stored)._replace(**changes))
        with pytest.raises(UserError, match=rf"the flags do not fit its tensors: .*{words}"):
            adm_params(network, ours.state)


@pytest.mark.parametrize(("kind", "parameters"), [("diffusion", 558_997_638), ("classifier", 54_448_360)])
def test_the_published_networks_for_512_pixels_have_a_level_of_half_the_base(kind: str, parameters: int) -> None:
    """The parameter counts are those of the original networks, which ADM's `create_model` builds."""
    small = printed("half" if kind == "diffusion" else "classifier_small")
    network = adm_network({name: x.shape for name, x in small.state.items()}, hidden(small.stored))
    fields = network.fields | dict(base_channels=256 if kind == "diffusion" else 128, num_classes=1000)
    fields |= dict(channel_mult=(0.5, 1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(32, 16, 8))
    fields["head_channels"] = 64
    whole = network._replace(fields=fields, image_size=512)
    inputs = (np.zeros((1, 512, 512, 3), np.float32), np.zeros(1, np.float32))
    inputs += (np.zeros(1, np.int32),) if kind == "diffusion" else ()
    shapes = jax.eval_shape(whole.module().init, jax.random.key(0), *map(jax.numpy.asarray, inputs))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
