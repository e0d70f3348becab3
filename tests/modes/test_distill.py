"""`--mode=distill`: students begin as their teacher, resume to the bit, and are runs like any other."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import opened, same_bits
from meshes import mesh_of
from ml_collections import ConfigDict
from tiny import tiny_config

from cfd.config import complete
from cfd.devices import parallel, preemption
from cfd.distillation import distillation_loss, halving_loss
from cfd.errors import UserError
from cfd.loading import load, load_ema
from cfd.losses import v_weight
from cfd.modes import distill, finetune, sample, settings, students, train
from cfd.modes.finetune import Source
from cfd.networks.model import Model, build
from cfd.networks.weight import is_of_weight
from cfd.process import cosine
from cfd.runs import checkpoint, workdir
from cfd.runs.digest import leaves
from cfd.sampling import ddim, guided_sample

DIGITS = tuple("0123456789")
OF_STUDENT: dict[str, Any] = dict(
    distill__num_steps=4, distill__batch_size=16, distill__learning_rate=1e-3, sample__w=(0.0, 2.0), eval__weights=()
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))


def make_run(folder: Path, config: Any, model: Any = None, **content: Any) -> str:
    """A run at step 3 with random weights, of which none is 0."""
    model = model or build(dict(config.model), 8, 1)
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)
    workdir.write_config(folder, workdir.describe("diffusion", config.to_dict(), DIGITS) | content)
    with opened(folder, keep=1) as manager:
        checkpoint.save(manager, 3, {"ema": params}, data_state={}, config_json=workdir.read_config(folder))
    return str(folder)


def student_config(steps: int = 0, **changes: Any) -> Any:
    return students.of_config(tiny_config(**OF_STUDENT | changes), steps)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("teacher") / "run", tiny_config())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> str:
    """A run of a student as `distill` leaves it, though with random weights, that w changes."""
    source = Source(teacher, 3, load_ema(teacher, "diffusion").weights_hash)._asdict()
    return make_run(tmp_path_factory.mktemp("student") / "run", student_config(), init_from=source)


def linear_init(key: Any) -> Any:
    return {"gain": jax.random.normal(key, (8, 8, 1)), "class": jnp.zeros((11, 1, 1, 1))}


def linear_apply(params: Any, z: Any, logsnr: Any, labels: Any, w: Any = None) -> Any:
    of_weight = 0.0 if w is None else w[:, None, None, None] * params["weight"]["gain"][None]
    return z * params["gain"][None] + params["class"][labels] + of_weight


LINEAR = Model(linear_init, linear_apply)
LINEAR_STUDENT = Model(lambda key: linear_init(key) | {"weight": {"gain": jnp.zeros((8, 8, 1))}}, linear_apply)


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear maps in place of both networks."""
    monkeypatch.setattr(distill, "build", lambda *_: LINEAR)
    monkeypatch.setattr(settings, "model_of", lambda config: LINEAR_STUDENT)


def inputs(n: int = 4) -> tuple[Any, Any, Any]:
    return jax.random.normal(jax.random.key(1), (n, 8, 8, 1)), jnp.linspace(-9.0, 9.0, n), jnp.arange(n)


def begun(teacher: str) -> tuple[Any, Any]:
    """The model of a student, and its parameters at step 0."""
    config = student_config()
    start = finetune.find(config, "new", teacher)
    assert start is not None
    model = settings.model_of(config)
    return model, finetune.from_weights(start, config, DIGITS)(jax.jit(model.init)(jax.random.key(5)))


def test_a_student_begins_with_its_teachers_weights_and_an_input_w_that_adds_zero(teacher: str) -> None:
    _, params = begun(teacher)
    flat, theirs = (dict(leaves(tree)) for tree in (params, load_ema(teacher, "diffusion").params))
    assert same_bits(*({key: np.asarray(tree[key]) for key in theirs} for tree in (flat, theirs)))
    maps = {key: np.asarray(x) for key, x in flat.items() if "/map/" in key}
    assert len(maps) == 2 * 5 + 2 and not any(x.any() for x in maps.values())  # five blocks, and the last layer


@pytest.mark.slow
def test_a_student_begins_as_the_conditional_score_of_its_teacher_to_the_bit(teacher: str) -> None:
    (model, params), run = begun(teacher), load(teacher)
    z, logsnr, labels = inputs()
    for w in (1.7, 4.0):
        # Not jitted: XLA would fuse the addition of zeros, and round another sum.
        ours = model.apply(params, z, logsnr, labels, w=jnp.full(4, w))
        np.testing.assert_array_equal(ours, run.eps_fn(z, logsnr, labels))
    # At w = 0, it remains that, whatever the layers of w have learned.
    changed = [x + 0.1 if is_of_weight(key) else x for key, x in leaves(params)]
    other = jax.tree.unflatten(jax.tree.structure(params), changed)
    ours = model.apply(other, z, logsnr, labels, w=jnp.zeros(4))
    np.testing.assert_array_equal(ours, run.eps_fn(z, logsnr, labels))


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("steps", [0, 2])
def test_the_loss_of_the_mode_is_that_of_the_teacher_whose_parameters_come_first(steps: int) -> None:
    config = student_config(steps, model__predict="v", distill__weight="v", distill__weights=(-0.5, 3.0))
    init, loss_fn = distill.student_of(config, {"model": {}})
    shared: dict[str, Any] = dict(weights=(-0.5, 3.0), schedule=cosine(-20.0, 20.0), weight=v_weight)
    keys = jax.random.split(jax.random.key(2), 4)
    params, teacher = init(keys[0]), LINEAR_STUDENT.init(keys[1])
    teacher["weight"]["gain"] += 0.3
    x, _, labels = inputs()
    networks = (lambda z, level, c, w: linear_apply(params, z, level, c, w)), functools.partial(linear_apply, teacher)
    if steps:
        own = halving_loss(keys[2], *networks, jnp.tanh(x), labels, num_steps=2, clip=config.sample.clip, **shared)
    else:
        own = distillation_loss(keys[2], *networks, jnp.tanh(x), labels, **shared)
    np.testing.assert_allclose(loss_fn(teacher, keys[2], params, jnp.tanh(x), labels), own, rtol=1e-5)


@pytest.mark.usefixtures("linear")
def test_a_stopped_student_resumes_to_the_bit_and_needs_its_teacher_only_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_run(tmp_path / "teacher", tiny_config(), LINEAR)
    folder, straight = str(tmp_path / "run"), str(tmp_path / "straight")
    distill.distill(student_config(), straight, init_from=teacher)
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: next(calls) == 2)
        with pytest.raises(preemption.Stopped):
            distill.distill(student_config(), folder, init_from=teacher)
    moved = (tmp_path / "teacher").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="teacher"):
        distill.distill(student_config(), folder)
    moved.rename(tmp_path / "teacher")
    distill.distill(student_config(), folder)  # config.json names the teacher
    assert load_ema(folder, "diffusion").weights_hash == load_ema(straight, "diffusion").weights_hash
    (tmp_path / "teacher").rename(moved)
    distill.distill(student_config(), folder)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]

    content, ema = workdir.read_config(folder), load_ema(moved, "diffusion")
    assert content["kind"] == "diffusion" and content["config"]["model"]["weight_range"] == [0.0, 4.0]
    assert content["init_from"] == {"run": teacher, "step": 3, "weights_hash": ema.weights_hash}
    with pytest.raises(UserError, match=r"distill\.num_steps: 4 there, 9 here"):
        distill.distill(student_config(distill__num_steps=9), folder, init_from=str(moved))


@pytest.mark.usefixtures("linear")
def test_a_linear_student_learns_the_guided_score_of_its_teacher(tmp_path: Path) -> None:
    """The teacher's difference of scores is a constant d of the class; the student's input w learns the factor d."""
    params = LINEAR.init(jax.random.key(0))
    params["class"] = params["class"].at[:10].set(0.5)  # ∅, the last row, stays at 0
    teacher = str(tmp_path / "teacher")
    workdir.write_config(teacher, workdir.describe("diffusion", tiny_config().to_dict(), DIGITS))
    with opened(Path(teacher), keep=1) as manager:
        checkpoint.save(manager, 3, {"ema": params}, data_state={}, config_json=workdir.read_config(teacher))
    many: dict[str, Any] = dict(distill__num_steps=150, distill__learning_rate=0.05, train__checkpoint_every_steps=150)
    distill.distill(student_config(**many), str(tmp_path / "run"), init_from=teacher)
    learned = load_ema(str(tmp_path / "run"), "diffusion").params
    np.testing.assert_allclose(learned["weight"]["gain"], 0.5, atol=0.06)
    np.testing.assert_array_equal(learned["gain"], params["gain"])


def test_a_student_of_the_older_form_is_refused(tmp_path: Path) -> None:
    older = Model(lambda key: {"weight": {"weight_1": {"kernel": jnp.zeros((2, 2))}}}, linear_apply)
    folder = make_run(tmp_path / "older", student_config(), older)
    with pytest.raises(UserError, match=r"is a student of an older form, .* distill it again with --mode=distill"):
        load(folder)


@pytest.mark.slow
def test_a_chain_of_halvings_keeps_w_and_ends_with_one_evaluation(tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "teacher", tiny_config(model__predict="v"))
    changes = dict(model__predict="v", distill__weight="v", distill__num_steps=2, distill__halvings=(2, 1))
    stages = distill.stages(tiny_config(**OF_STUDENT | changes), str(tmp_path / "run"), teacher)
    assert [Path(place).name for _, place, _ in stages] == ["run", "steps_2", "steps_1"]
    assert [before for _, _, before in stages[1:]] == [place for _, place, _ in stages[:-1]]
    for config, place, before in stages:
        distill.distill(config, place, init_from=before)
    run = load(stages[-1][1])
    assert run.sampling["num_steps"].shape == (1,) and run.sampling["num_steps"][0] == -20.0
    z, _, labels = inputs()
    draw = {
        w: guided_sample(jax.random.key(0), run.eps_fn, labels, (8, 8, 1), w=w, start=z, **run.sampling)
        for w in (0.0, 4.0)
    }
    # One evaluation at λ = −20: the image is x̂ of the start.
    logsnr = jnp.full(4, -20.0)
    model = build(run.config["model"], 8, 1)
    eps = model.apply(run.params, z, logsnr, labels, w=jnp.full(4, 4.0))
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(-20.0)), jnp.sqrt(jax.nn.sigmoid(20.0))
    np.testing.assert_allclose(draw[4.0], jnp.clip((z - sigma * eps) / alpha, -1.0, 1.0), atol=2e-3)
    assert np.abs(draw[0.0] - draw[4.0]).max() > 0


@pytest.mark.parametrize("halvings", [(8, 3), (2, 4), (8, 2)])
def test_numbers_of_steps_must_halve(halvings: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"distill.halvings is {halvings}")):
        of_v = dict(model__predict="v", distill__halvings=halvings)
        distill.stages(tiny_config(**OF_STUDENT | of_v), "new", "teacher")


def test_other_modes_take_the_config_that_distill_takes(tmp_path: Path, student: str) -> None:
    """In the folder of a student, of any number of steps, it is the config of that student."""
    run = settings.open_run(tiny_config(**OF_STUDENT), student)
    assert run.config == settings.open_run(student_config(), student).config and students.is_student(run.config)
    with pytest.raises(UserError, match=r"is another run's: distill\.num_steps: 4 there, 5 here\."):
        settings.open_run(tiny_config(**OF_STUDENT | {"distill__num_steps": 5}), student)
    of_v: dict[str, Any] = dict(model__predict="v", distill__halvings=(4, 2))
    folder = make_run(tmp_path / "run", student_config(steps=2, **of_v))
    run = settings.open_run(tiny_config(**OF_STUDENT | of_v), folder)
    assert (run.config.sample.num_steps, run.config.sample.sampler, run.config.distill.halvings) == (2, "ddim", ())


def test_a_student_goes_on_with_the_teacher_that_it_began_with(
    tmp_path: Path, teacher: str, student: str, capsys: pytest.CaptureFixture
) -> None:
    """A finished one too does not take another --init_from. distill.teacher is for the beginning."""
    asked: dict[str, Any] = dict(distill__num_steps=3, distill__teacher=student)
    source = Source(teacher, 3, load_ema(teacher, "diffusion").weights_hash)._asdict()
    folder = make_run(tmp_path / "run", student_config(**asked), init_from=source)
    (of_stage,) = distill.stages(tiny_config(**OF_STUDENT | asked), folder)
    assert of_stage[1:] == (folder, None)
    assert distill.stages(tiny_config(**OF_STUDENT | asked), str(tmp_path / "new"))[0][2] == student
    for init_from in (None, teacher, f"{teacher}:3", str(tmp_path / "gone")):
        distill.distill(of_stage[0], folder, init_from=init_from)
        assert "has all its 3 steps." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step 3, whose weights are not those of --init_from=.*: give another"):
        distill.distill(of_stage[0], folder, init_from=student)


@pytest.mark.slow
def test_the_mode_sample_draws_a_students_grid(student: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = settings.config_of_run(student)
    sample.sample(complete(config), student, str(tmp_path))
    assert re.search("4 images, 4 network evaluations or ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(train__p_uncond=0.0), "has no unconditional score"),
        (dict(train__p_uncond=1.0), "has no conditional score"),
        (dict(process__logsnr_min=-5.0), "does not cover the run's"),
        (dict(model__channel_mult=(2,)), "give --config.model.channel_mult"),
        (dict(model__weight_range=(0.0, 4.0)), "is a student, which has no unconditional score"),
    ],
)
def test_a_teacher_must_have_both_scores_of_the_network_and_all_levels(
    tmp_path: Path, changes: Any, reason: str
) -> None:
    teacher = make_run(tmp_path / "teacher", tiny_config(**changes))
    with pytest.raises(UserError, match=reason):
        distill.check(student_config(), str(tmp_path / "run"), teacher)


def test_halving_needs_a_student_and_a_prediction_of_x_or_v(tmp_path: Path, teacher: str, student: str) -> None:
    of_eps = "model.predict is 'eps': in few steps, a student must predict x or v"
    with pytest.raises(UserError, match=of_eps):
        distill.check(student_config(steps=4), str(tmp_path / "run"), student)
    with pytest.raises(UserError, match="is no student, and a student of 4 steps"):
        distill.check(student_config(steps=4, model__predict="v"), str(tmp_path / "run"), teacher)
    wider = dict(model__predict="v", distill__weights=(-1.0, 4.0))
    with pytest.raises(UserError, match=re.escape("learned w in (0.0, 4.0), and a student of 4 steps")):
        distill.check(student_config(steps=4, **wider), str(tmp_path / "run"), student)


def test_a_new_student_needs_a_teacher_and_a_folder_of_its_own(tmp_path: Path, teacher: str, student: str) -> None:
    with pytest.raises(UserError, match=r"has no teacher yet.*--init_from=RUN"):
        distill.check(student_config(), str(tmp_path / "run"), None)
    with pytest.raises(UserError, match=r"the teacher .*none is no run yet: train it first, or name another run"):
        distill.check(student_config(), str(tmp_path / "run"), str(tmp_path / "none"))
    for named, config in (
        ("--init_from", student_config()),
        (r"config\.distill\.teacher", student_config(distill__teacher="gs://")),
    ):
        with pytest.raises(UserError, match=rf"^{named} is 'gs://'"):
            distill.check(config, str(tmp_path / "run"), "gs://")
    with pytest.raises(UserError, match="give another --workdir"):
        distill.check(student_config(), teacher, teacher)
    with pytest.raises(UserError, match="give --mode=distill"):
        train.train(student_config(), student)
    with pytest.raises(UserError, match=re.escape(f"begin with those of the run that it learned from, {teacher}")):
        finetune.check(tiny_config(), str(tmp_path / "new"), student)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(sample__w=(0.0, 4.5)), "w = 4.5 .* outside of"),
        (dict(sample__w=(-0.5,)), r"w = -0.5 .* outside of \[0, 4\]"),
        (dict(sample__guidance="classifier"), "sample.guidance is 'classifier', and the run is a student"),
        (dict(sample__rule="apg(0, 1, -0.5)"), "sample.rule or eval.rules is .*, and the run is a student"),
        (dict(sample__guide="@3"), "sample.guide or eval.guides is '@3', and the run is a student"),
        (dict(sample__doubled=True), "sample.doubled is True, and the run is a student"),
    ],
)
def test_a_student_is_asked_only_for_what_it_learned(changes: Any, reason: str) -> None:
    config = student_config(**changes)
    with pytest.raises(UserError, match=reason):
        settings.check_weights(config, config.sample.w, settings.sampling_of(config).guidance, config.sample.guide)


@pytest.mark.parametrize(
    "changes", [dict(num_steps=3), dict(sampler="ancestral"), dict(clean_end=True), dict(schedule="linear")]
)
def test_a_student_of_few_steps_is_sampled_as_it_learned(changes: Any) -> None:
    config = student_config(steps=4, model__predict="v")
    other: Any = ConfigDict(config.to_dict())
    other.sample.update(changes)
    settings.check_weights(config, (0.0,))
    with pytest.raises(UserError, match="learned to sample in 4 steps of DDIM"):
        students.check(other, (0.0,), settings.sampling_of(other).guidance, "")


def test_a_loaded_student_takes_w_and_refuses_other_weights_and_the_null_label(student: str) -> None:
    run = load(student)
    assert run.eps_fn.func.weight_range == (0.0, 4.0)
    z, logsnr, labels = inputs()
    given: Any = run.eps_fn
    for w in (-0.1, 4.1, np.nan):
        with pytest.raises(ValueError, match=r"w is .*the student learned w in \[0, 4\]"):
            given(z, logsnr, labels, jnp.full(4, w))
    with pytest.raises(ValueError, match="unconditional score, which a student does not have"):
        given(z, logsnr, jnp.array([0, 1, -1, 2]), jnp.ones(4))
    with pytest.raises(ValueError, match="eps_fn is a student that learned w"):
        guided_sample(jax.random.key(0), run.eps_fn, labels, (8, 8, 1), w=5.0, num_steps=2, sampler=ddim())
    eps_fn: Any = jax.jit(given)
    both = eps_fn(z, logsnr, labels, jnp.array([0.0, 4.0, 0.0, 4.0]))
    ends = [eps_fn(z, logsnr, labels, jnp.full(4, w)) for w in (0.0, 4.0)]
    assert np.abs(ends[0] - ends[1]).max() > 0  # and each row has its own w:
    np.testing.assert_allclose(both, jnp.stack([ends[0][0], ends[1][1], ends[0][2], ends[1][3]]), atol=1e-6)
    # Under jit, rows that cannot be refused are NaN, and only those.
    out = eps_fn(z, logsnr, jnp.array([0, -1, 2, 3]), jnp.array([1.0, 1.0, 4.5, 4.0]))
    np.testing.assert_array_equal(np.isnan(out).all((1, 2, 3)), [False, True, True, False])
