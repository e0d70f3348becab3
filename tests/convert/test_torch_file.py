"""The tensors of a PyTorch file: under a wrapper's prefix, or in one of several dicts."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adm_formula import hidden, printed

from cfd.convert.adm_network import adm_network
from cfd.convert.adm_weights import adm_params
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
