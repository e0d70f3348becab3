"""`python -m cfd.convert dinov2`: the file that a config names, and other transformers, which are refused by name."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dinov2_formula import SMALL, dinov2_state
from inception_formula import inception_state

from cfd.convert.__main__ import main
from cfd.convert.dinov2 import dinov2_params_from_torch
from cfd.convert.torch_file import identify
from cfd.evaluation import dinov2


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "VIT_L", SMALL)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch, which only cfd.convert needs, is not installed")


def write(torch: Any, path: Path, state: dict[str, np.ndarray], prefix: str = "") -> str:
    torch.save({prefix + key: torch.from_numpy(x) for key, x in state.items()}, path)
    return str(path)


def refused(*argv: str) -> str:
    """The message, one line, with which the command fails."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_the_weights_become_the_file_that_a_config_names(torch: Any, tmp_path: Path, capsys, prefix: str) -> None:
    state, out = dinov2_state(), tmp_path / "dinov2.npz"
    main(["dinov2", write(torch, tmp_path / "vit.pth", state, prefix), str(out)])
    jax.tree.map(np.testing.assert_array_equal, dinov2.load_params(out), dinov2_params_from_torch(state))
    said = capsys.readouterr().out
    assert all(f"{stage} " in said for stage in ("Reading", "Converting", "Saving", "Wrote"))
    assert (f"begin with {prefix!r}" in said) == bool(prefix)
    assert f"{out} exists" in refused("dinov2", "FILE", str(out))


def test_each_command_refuses_the_networks_of_the_others(torch: Any, tmp_path: Path) -> None:
    """The message names the command that converts the file, which then does."""
    vit, out = write(torch, tmp_path / "vit.pth", dinov2_state()), str(tmp_path / "out.npz")
    inception = write(torch, tmp_path / "inception.pth", inception_state())
    message = refused("dinov2", inception, out)
    assert "does not hold a DINOv2 that can be converted, but InceptionV3: convert it with" in message
    for command in ("adm", "inception"):
        assert "DINOv2: convert it with `python -m cfd.convert dinov2`" in refused(command, vit, out)
    assert not Path(out).exists()
    main(["dinov2", vit, out])


def test_another_size_is_refused(torch: Any, tmp_path: Path) -> None:
    """FD-DINOv2 is of ViT-L/14: distances of other features must not bear its name."""
    vit = write(torch, tmp_path / "vits.pth", dinov2_state(width=64))
    message = refused("dinov2", vit, str(tmp_path / "out.npz"))
    assert "'blocks.0.norm1.weight' has shape (64,), expected (128,): give dinov2_vitl14_pretrain.pth" in message


def test_a_truncated_file_is_named(torch: Any, tmp_path: Path) -> None:
    file = Path(write(torch, tmp_path / "vit.pth", dinov2_state()))
    file.write_bytes(file.read_bytes()[:-100_000])
    assert "vit.pth is a truncated PyTorch zip" in refused("dinov2", str(file), str(tmp_path / "out.npz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"register_tokens": np.zeros((1, 4, 128), np.float32)}, "a DINOv2 with registers"),
        ({"blocks.0.mlp.w12.weight": np.zeros((8, 128), np.float32)}, "ViT-g with its SwiGLU"),
        ({"head.weight": np.zeros((10, 128), np.float32)}, "1 tensors are not ViT-L/14's: ['head.weight']"),
        ({"norm.weight": None}, "no tensor 'norm.weight': give dinov2_vitl14_pretrain.pth"),
    ],
)
def test_other_files_are_refused(torch: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {key: x for key, x in (dinov2_state() | change).items() if x is not None}
    assert message in refused("dinov2", write(torch, tmp_path / "vit.pth", state), str(tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["rope_embed.periods", "blocks.0.ls1.gamma"], "DINOv3"),
        (["register_tokens", "blocks.0.ls1.gamma"], "with registers"),
        (["blocks.0.mlp.w12.weight", "blocks.0.ls1.gamma"], "SwiGLU"),
        (["backbone.blocks.0.0.ls1.gamma", "dino_head.mlp.0.weight"], "checkpoint of DINOv2's training"),
        (["embeddings.patch_embeddings.projection.weight"], "Hugging Face's transformers"),
        (["cls_token", "blocks.0.attn.qkv.weight"], "without layer scales"),
    ],
)
def test_other_transformers_are_known_and_the_file_to_give_is_named(names: list[str], words: str) -> None:
    assert words in identify(names) and "give dinov2_vitl14_pretrain.pth" in identify(names)
