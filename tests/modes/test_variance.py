"""Learned variances, ADM's steps and ADM's classifier guidance, as a config asks for them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from mixing import assert_same_images, brighter
from tiny import QUICK, tiny_config

from cfd.devices import parallel, xla
from cfd.errors import UserError
from cfd.evaluation.features import FeatureNetwork
from cfd.fields import NETWORK
from cfd.guidance import Interval, classifier_guidance, clipped, shift_mean
from cfd.losses import variance_loss
from cfd.modes import cells, finetune, settings, train
from cfd.modes.sampler import Network, SampleSpec, compile_sampler, evaluations, to_uint8
from cfd.networks import model
from cfd.networks.times import logsnr_table, respaced
from cfd.process import tabulated
from cfd.runs import workdir
from cfd.sampling import ancestral, ddim, grid, guided_sample

TABLE = logsnr_table("linear")
ENDS = dict(process__logsnr_min=float(TABLE[-1]), process__logsnr_max=float(TABLE[0]), process__schedule="adm_linear")
LEARNED = dict(model__learn_variance=True, sample__variance="learned")
CLIPPED_FIRST = dict(sample__sampler="ddim", sample__guidance="classifier", sample__clip_first=True)
PARAMS = {"mix": np.random.default_rng(0).normal(0, 0.15, (64, 64)).astype(np.float32)}
WEIGHTS = np.array([0, 2] * 4, np.float32)
SPEC = SampleSpec(np.full(8, 7, np.uint32), np.arange(8, dtype=np.int32), np.arange(8) % 4, WEIGHTS)


def with_v(params: Any) -> Any:
    """A network that returns (ε, v), which mixes all pixels."""

    def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
        h = jnp.tanh(z.reshape(len(z), -1) @ params["mix"] + 0.1 * labels[:, None] + 0.01 * logsnr[:, None])
        return 1.5 * h.reshape(z.shape), 0.5 + h.reshape(z.shape)

    return eps_fn


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        (dict(sample__respacing="4", sample__guidance="classifier-mean", **LEARNED), respaced("4", "linear")),
        (dict(sample__guidance="classifier-mean", sample__interval=(-3.0, 2.0)), grid(4, tabulated(TABLE))),
        (dict(sample__respacing="ddim5", sample__num_steps=5, **CLIPPED_FIRST), respaced("ddim5", "linear")),
    ],
    ids=("ADM's Algorithm 1", "the shifted mean in an interval", "ADM's Algorithm 2"),
)
def test_images_are_those_of_guided_sample(
    changes: dict[str, Any], levels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the functions that each field means, at the λ of ADM's table or of the training schedule."""
    monkeypatch.setattr(xla, "compiler_options", lambda: QUICK)
    config = tiny_config(**changes, **ENDS)
    classifier = jax.tree_util.Partial(brighter, {"strength": jnp.float32(3.0)})
    params, given = parallel.replicate(mesh_of(1), (PARAMS, classifier))
    sampler = compile_sampler(Network(with_v, (8, 8, 1)), settings.sampling_of(config), mesh_of(1))
    (images,) = sampler(params, SPEC, classifier=given)

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(SPEC.index)
    lo, hi = config.sample.interval or (-np.inf, np.inf)
    eps_fn, labels, w = with_v(PARAMS), jnp.asarray(SPEC.label), Interval(jnp.asarray(SPEC.w), lo, hi)
    rule: Any = shift_mean(ancestral(None if config.model.learn_variance else 0.3), classifier, labels, w)
    clip = True
    if config.sample.clip_first:
        rule, eps_fn, clip = ddim(), classifier_guidance(clipped(eps_fn), classifier, w), False

    @functools.partial(jax.jit, compiler_options=QUICK)
    def draw(keys: Any) -> Any:
        return to_uint8(guided_sample(keys, eps_fn, labels, (8, 8, 1), num_steps=levels, sampler=rule, clip=clip))

    assert_same_images(images, np.asarray(draw(keys)))


def test_the_steps_of_a_table_are_counted_and_recorded() -> None:
    """Only the fields that differ from what versions without them did are in the manifest, and none is a column."""
    config = tiny_config(sample__respacing="ddim25", sample__num_steps=25, **LEARNED, **ENDS)
    sampling = settings.sampling_of(config)
    assert evaluations(sampling, 0.0, ()) == 25
    assert evaluations(sampling, 1.0, ()) == 50
    inside = int(np.sum((respaced("ddim25", "linear") >= -1.0) & (respaced("ddim25", "linear") <= 3.0)))
    assert evaluations(sampling, 1.0, (-1.0, 3.0)) == 25 + inside

    def recorded(config: Any) -> dict[str, Any]:
        (row, *_) = cells.rows_of_grid(config, 7)
        features = FeatureNetwork("classifier", "f", lambda _: pytest.fail("it is not used"))
        hashes: dict[str, str] = dict.fromkeys(("weights", "classifier", "data", "held_out", "reference"), "")
        return cells.manifest_of(config, row, hashes, features)

    assert recorded(config)["sampling"].items() >= {"variance": "learned", "respacing": "ddim25"}.items()
    assert recorded(config)["network"]["learn_variance"] is True
    plain = recorded(tiny_config())
    assert not {"variance", "respacing", "clip_first"} & plain["sampling"].keys()
    assert plain["network"].keys() == {*NETWORK, "out_channels"}
    (row, *_) = cells.rows_of_grid(config, 7)
    assert (row["num_steps"], row["v"]) == (25, 0.0)


class Pointwise(nn.Module):
    """A network of one product, in place of one that takes seconds to run without `jit`."""

    image_size: int
    fast: bool
    out_channels: int

    @nn.compact
    def __call__(self, z: Any, logsnr: Any, labels: Any, train: bool = False) -> Any:
        return nn.Dense(self.out_channels, use_bias=False, name="out")(z) + 0.1 * labels[:, None, None, None]


def test_a_variance_is_trained_on_levels_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is `variance_loss` at five levels of DDPM's table; ε and (o + 1) / 2 are the halves of the outputs."""
    monkeypatch.setitem(model.MODULES, "adm", Pointwise)
    config = tiny_config(model__learn_variance=True, train__p_uncond=0.0, train__variance_levels=5, **ENDS)
    assert config.model.out_channels == 2
    init, loss_fn = train.diffusion(config)
    params = init(jax.random.key(0))
    assert params["out"]["kernel"].shape == (1, 2)
    x, labels = jax.random.uniform(jax.random.key(1), (64, 4, 4, 1), minval=-1.0), jnp.arange(64) % 10

    def halves(z: Any, logsnr: Any, labels: Any) -> Any:
        outputs = z @ params["out"]["kernel"] + 0.1 * labels[:, None, None, None]
        return outputs[..., :1], 0.5 * (outputs[..., 1:] + 1.0)

    levels = np.interp(np.linspace(999, 0, 5), np.arange(1000), TABLE)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def losses(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = variance_loss(jax.random.split(key)[0], halves, x, labels, logsnr=levels, p_uncond=0.0)
        return loss_fn(key, params, x, labels), own

    np.testing.assert_allclose(*losses(jax.random.key(2)), rtol=1e-5)
    out = settings.network_of(config).eps_of_params(params)(x, jnp.zeros(64), labels)
    for part, whole in zip(out, halves(x, None, labels), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(sample__variance="learned"), r"'learned', and the network has no outputs .* cfd.convert adm --keep-variance"),
    (dict(model__learn_variance=True, model__out_channels=1), r"out_channels is 1, .*: set model.out_channels to 2,"),
    (dict(model__out_channels=2), r"out_channels is 2, .*: set model.out_channels to 1,"),
    (dict(model__learn_variance=True, train__weight="x"), r"train.weight is 'x', and model.learn_variance"),
    (dict(model__learn_variance=True, train__low_discrepancy=True), r"low_discrepancy is True, .* to False"),
    (dict(model__learn_variance=True, process__schedule="learned"), r"process.schedule is 'learned', .* to 'cosine'"),
    (dict(sample__sampler="ddim", **LEARNED), r"sample.variance is 'learned', and sample.sampler 'ddim'"),
    (dict(sample__sampler="dpm_solver", sample__guidance="classifier-mean"), r"guidance is 'classifier-mean', and sam"),
    (
        dict(sample__corrector=0.1, sample__guidance="classifier-mean"),
        r"guides the sampler alone, and not the corrector",
    ),
    (dict(eval__v=(0.1, 0.2), **LEARNED), r"eval.v is \(0.1, 0.2\), and sample.variance is 'learned'"),
    (dict(sample__respacing="4", sample__schedule="linear"), r"is a whole grid: set sample.schedule to ''"),
    (dict(sample__respacing="4", eval__num_steps=(4, 8)), r"is a whole grid: set eval.num_steps to \(\)"),
    (dict(sample__clip_first=True), r"clip_first is True, .* sample.guidance 'classifier-free'"),
    (dict(sample__clip_first=True, sample__guidance="classifier", sample__clip=False), r"with sample.clip False"),
    (dict(sample__guidance="classifier-mean", sample__rule="apg()"), r"'classifier-mean', which has no second score"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        tiny_config(**changes)
    assert "\n" not in str(error.value)


def test_a_run_that_learns_the_variance_begins_with_one_that_did() -> None:
    """The flags of the message are followed."""

    def content(config: Any) -> dict[str, Any]:
        return workdir.describe("diffusion", config.to_dict(), tuple("0123456789"))

    plain, learned = tiny_config(), tiny_config(model__learn_variance=True)
    finetune.check_network(learned, "run", content(learned))
    flags = '--config.model.learn_variance="False" --config.model.out_channels="1"'
    with pytest.raises(UserError, match=f"the network of run is another one .* give {flags}$"):
        finetune.check_network(learned, "run", content(plain))
    finetune.check_network(tiny_config(model__out_channels=1), "run", content(plain))


def test_steps_that_no_table_gives_are_refused() -> None:
    with pytest.raises(UserError, match=r"neither process.schedule nor model.time is 'adm_linear'"):
        settings.sampling_of(tiny_config(sample__respacing="4"))
    of_time = settings.sampling_of(tiny_config(sample__respacing="4", model__time="adm_cosine"))
    np.testing.assert_allclose(of_time.levels, respaced("4", "cosine"), rtol=1e-6)
    with pytest.raises(UserError, match=r"sample.respacing: steps is 'ddim900', which ADM's 1000 steps do not give"):
        settings.sampling_of(tiny_config(sample__respacing="ddim900", **ENDS))
    with pytest.raises(UserError, match=r"'25', which has 25 steps, and sample.num_steps is 4: set sample.num_steps"):
        settings.sampling_of(tiny_config(sample__respacing="25", **ENDS))


def test_a_v_that_a_learned_variance_does_not_use_is_said(capsys) -> None:
    settings.check_sampling(tiny_config(sample__v=0.43, **LEARNED), (4,), ((),))
    assert "sample.v = 0.43 is not used: sample.variance is 'learned'." in capsys.readouterr().out
