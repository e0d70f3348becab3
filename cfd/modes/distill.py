"""`--mode=distill`: students of a run, which have the guidance weight as an input, and then take fewer steps.

Meng et al., On Distillation of Guided Diffusion Models (arXiv:2210.03142). In stage one, a student in the run's folder
learns the guided score of its teacher for all weights of distill.weights. In stage two, distill.halvings, each further
student learns to take half the steps of the one before, in a folder of its own. Every student is a run like any other.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfd.config import Config, with_classes
from cfd.data.sources import check_classes
from cfd.devices import parallel
from cfd.distillation import distillation_loss, halving_loss
from cfd.errors import UserError
from cfd.fields import BEFORE
from cfd.losses import v_weight, x_weight
from cfd.modes import finetune, settings, students
from cfd.modes.fit import fit
from cfd.modes.train_step import make_optimizer
from cfd.networks.model import build
from cfd.networks.weight import is_of_weight
from cfd.runs import files, workdir
from cfd.runs.digest import leaves
from cfd.runs.steps import steps_of

WEIGHTS: dict[str, Callable[[Array], Array] | None] = {"eps": None, "x": x_weight, "v": v_weight}
"""The weight of the loss of ε that distill.weight names."""


def stages(config: Config, folder: str, init_from: str | None = None) -> list[tuple[Config, str, str | None]]:
    """The students that a config asks for: the config, the folder and the teacher of each, in order.

    The teacher of the first is the run that `init_from` names, or distill.teacher if the student has not begun yet;
    None: the one that config.json records. Raises ValueError if the numbers of steps do not halve.
    """
    config = students.of_config(config, config.distill.sampling_steps)
    made = [(config, folder, init_from or (not workdir.has_begun(folder) and config.distill.teacher) or None)]
    halvings = tuple(config.distill.halvings)
    before = (config.distill.sampling_steps or 2 * halvings[0], *halvings) if halvings else ()
    for longer, steps in zip(before, halvings, strict=False):
        if longer != 2 * steps:
            raise UserError(
                f"config.distill.halvings is {halvings}, and a student of {longer} steps teaches one of half as many, "
                f"not of {steps}: give numbers that halve, such as {(8, 4, 2, 1)}"
            )
        check_prediction(config, steps)
        made.append((students.of_config(config, steps), os.path.join(folder, f"steps_{steps}"), made[-1][1]))
    return made


def check(config: Config, folder: str, teacher: str | None) -> None:
    """Raises ValueError, before anything large is read, if a student cannot learn in `folder` from this teacher."""
    if settings.is_imported({"config": config.to_dict()}):
        settings.open_split(config, config.data.split)  # which says that the images are not here
    if config.model.network != "adm":
        raise UserError(
            f"config.model.network is {config.model.network!r}, and only 'adm' has an input for w: distill a run whose "
            "model.network is 'adm'"
        )
    check_prediction(config, config.distill.sampling_steps)
    recorded = finetune.source_of(folder)
    if recorded is None and workdir.has_begun(folder):
        raise UserError(
            f"{folder} is the run of no student, because it began with random weights: give another --workdir"
        )
    if teacher is None and recorded is None:
        raise UserError(f"{folder} has no teacher yet: name the run that the student learns from, by --init_from=RUN")
    named = "config.distill.teacher" if teacher == config.distill.teacher else "--init_from"
    place = recorded.run if recorded is not None else finetune.parse(teacher or "", named)[0]
    if recorded is None and not workdir.has_config(place):
        raise UserError(f"the teacher {place} is no run yet: train it first, or name another run by --init_from=RUN")
    if workdir.has_config(place) and workdir.read_config(place)["kind"] == "diffusion":
        check_teacher(config, place)
    finetune.check(as_predicted(config, place), folder, teacher)


def check_prediction(config: Config, steps: int) -> None:
    """Raises ValueError if a student of so many steps, 0 for any number, predicts what says nothing about x."""
    if steps and config.model.predict not in ("x", "v"):
        raise UserError(
            f"config.model.predict is {config.model.predict!r}: in few steps, a student must predict x or v, because "
            "noise alone says nothing about x. Distill the teacher into a student that does first: give stage one "
            "--config.model.predict=v and --config.distill.weight=v, in another --workdir"
        )


def check_teacher(config: Config, run: str) -> None:
    """Raises ValueError unless the run has the scores that a student of this config learns."""
    content = workdir.read_config(run)
    theirs = settings.config_of_run(run)
    steps, range_ = config.distill.sampling_steps, tuple(theirs.model.weight_range)
    p_uncond = theirs.train.p_uncond
    if steps and (not range_ or not range_[0] <= config.distill.weights[0] <= config.distill.weights[1] <= range_[1]):
        learned = f"learned w in {range_}" if range_ else "is no student"
        raise UserError(
            f"the teacher {run} {learned}, and a student of {steps} steps learns w in {tuple(config.distill.weights)} "
            "from a student: distill one for these weights first, with distill.sampling_steps 0"
        )
    if not steps and range_:
        raise UserError(
            f"the teacher {run} is a student, which has no unconditional score: name the run that it learned from, or "
            "go on to fewer steps with --config.distill.sampling_steps"
        )
    if not steps and (not content["class_names"] or p_uncond in (0, 1)):
        lacks = "conditional" if p_uncond == 1 or not content["class_names"] else "unconditional"
        raise UserError(
            f"the teacher {run} has no {lacks} score (train.p_uncond = {p_uncond:g}, {len(content['class_names'])} "
            "classes), so it has no guided one: name a run with classes and 0 < train.p_uncond < 1"
        )
    remedy = "set process.logsnr_min and process.logsnr_max to those of the teacher"
    settings.check_range(f"the teacher {run}", theirs.process.to_dict(), config.process.to_dict(), remedy)


def as_predicted(config: Config, run: str) -> Config:
    """A copy of a config with the model.predict of a run: a student may predict something else than its teacher."""
    if not workdir.has_config(run):
        return config
    copy: Config = ConfigDict(config.to_dict())
    copy.model.predict = workdir.read_config(run)["config"]["model"].get("predict", BEFORE["model.predict"])
    return copy.lock()


def distill(config: Config, folder: str, *, init_from: str | None = None, allow_fresh_start: bool = False) -> None:
    """Train the student of `config` in `folder`, or resume it there. Its teacher is the run that `init_from` names.

    config.json records the teacher under "init_from", with the hash of its weights. The student begins with these
    weights. If it predicts what the teacher predicts, it is at first the teacher's conditional score, and in stage one
    it remains that at w = 0 (see `student_of`). A student that is finished no longer needs its teacher.
    Raises ValueError as `check` does, and everything that `train` raises.
    """
    config = settings.of_run(config, folder)
    check(config, folder, init_from)
    mesh = parallel.make_mesh(**config.mesh)
    dataset = settings.open_split(config, config.data.split)
    config = with_classes(config, len(dataset.class_names))
    content = workdir.describe("diffusion", config.to_dict(), dataset.class_names)
    recorded = finetune.source_of(folder)
    if workdir.has_begun(folder):
        workdir.check_config(folder, content, BEFORE)
        if init_from and recorded is not None and workdir.has_config(finetune.parse(init_from)[0]):
            finetune.check_same(folder, recorded, init_from)
        if max(steps_of(files.place(folder, workdir.CHECKPOINTS)), default=0) >= config.distill.num_steps:
            return finetune.say(f"The student in {folder} has all its {config.distill.num_steps} steps.")
    place = recorded.run if recorded is not None else finetune.parse(init_from or "")[0]
    start = finetune.find(as_predicted(config, place), folder, init_from)
    assert start is not None, "check saw a teacher"
    teacher = start.read()
    if not settings.is_imported(teacher.config_json):
        names = f"the teacher {start.source.run}", dataset.class_names, f"data.split {config.data.split!r}"
        check_classes(teacher.config_json["class_names"], *names)
    content["init_from"] = start.source._asdict()
    init, loss_fn = student_of(config, teacher.config_json["config"])
    train = training(config)
    fit(
        settings.training_of(config, train),
        folder,
        mesh,
        dataset,
        content,
        init,
        loss_fn,
        make_optimizer(
            **{name: train[name] for name in ("learning_rate", "warmup_steps", "adam_b1", "adam_b2", "grad_clip")},
            weight_decay=0.0,
            num_steps=train.num_steps,
        ),
        None,
        allow_fresh_start=allow_fresh_start,
        start_from=finetune.from_weights(start._replace(read=lambda: teacher), config, dataset.class_names),
        frozen=(divided(mesh, teacher.params),),
    )


def training(config: Config) -> Config:
    """The `train` group of a student: that of the config, except for what `distill` says.

    There is no EMA, because the learning rate falls to 0.
    """
    names = ("num_steps", "batch_size", "learning_rate", "warmup_steps")
    own = {name: config.distill[name] for name in names}
    none: dict[str, Any] = {"ema_decay": 0.0, "ema_warmup": False, "posthoc_ema": (), "sample_every_steps": 0}
    return ConfigDict({**config.train.to_dict(), **own, **none})


def student_of(config: Config, theirs: dict[str, Any]) -> tuple[Callable[[Array], Any], Callable[..., Array]]:
    """(key -> initial parameters, loss) of a student. The loss takes the parameters of the teacher first.

    `theirs` is the recorded config of the teacher. A student of stage one that predicts what its teacher predicts
    learns only its input w: all other parameters stay those of the teacher, to the bit.
    """
    student, distill = settings.model_of(config), config.distill
    teacher = build(theirs["model"], config.data.image_size, config.data.channels)
    shared: dict[str, Any] = dict(
        weights=tuple(map(float, distill.weights)),
        schedule=settings.training_schedule(config),
        weight=WEIGHTS[distill.weight],
    )
    same = theirs["model"].get("predict", BEFORE["model.predict"]) == config.model.predict

    def loss_fn(teacher_params: Any, key: Array, params: Any, x: Array, labels: Array) -> Array:
        params = only_weight(params) if same and not distill.sampling_steps else params

        def student_fn(z: Array, logsnr: Array, labels: Array, w: Array) -> Array:
            return student.apply(params, z, logsnr, labels, w=w)

        def teacher_fn(z: Array, logsnr: Array, labels: Array, w: Array | None = None) -> Array:
            return teacher.apply(teacher_params, z, logsnr, labels, **({} if w is None else {"w": w}))

        if not distill.sampling_steps:
            return distillation_loss(key, student_fn, teacher_fn, x, labels, **shared)
        steps = distill.sampling_steps
        return halving_loss(key, student_fn, teacher_fn, x, labels, num_steps=steps, clip=config.sample.clip, **shared)

    return student.init, loss_fn


def only_weight(params: Any) -> Any:
    """Parameters of a student whose gradients are 0, except for those of the input w.

    Adam without weight decay does not change a parameter whose gradient is always 0.
    """

    kept = [x if is_of_weight(key) else jax.lax.stop_gradient(x) for key, x in leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


def divided(mesh: Mesh, params: Any) -> Any:
    """Parameters as global arrays, divided over the devices as those of the student are."""
    shapes = parallel.with_shardings(mesh, jax.eval_shape(lambda: params))

    def place(x: Array, like: Any) -> Array:
        value = np.asarray(x)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    return jax.tree.map(place, params, shapes)
