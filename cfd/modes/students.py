"""The limits of a student, which has the guidance weight as an input and one score, guided already."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from cfd.config import Config
from cfd.errors import UserError
from cfd.modes.rules import Guidance


def is_student(config: Config) -> bool:
    """Whether the config is that of a student, which --mode=distill trains."""
    return bool(config.model.weight_range)


def of_config(config: Config, steps: int) -> Config:
    """A copy of a config for a student in any number of steps of sampling, or in `steps` of DDIM if that is not 0."""
    student: Config = ConfigDict(config.to_dict())
    student.model.weight_range = tuple(config.distill.weights)
    student.model.update(learn_variance=False, out_channels=config.data.channels)
    student.sample.variance = "fixed"
    student.distill.sampling_steps = steps
    if steps:
        student.distill.halvings = ()
        student.sample.update(num_steps=steps, sampler="ddim", clean_end=False, schedule="", respacing="")
        student.eval.num_steps = ()
    return student.lock()


def check(config: Config, weights: Iterable[float], guidance: Guidance, guide: str) -> None:
    """Raises ValueError if a student did not learn one of these weights, or if a second score is asked of it."""
    lo, hi = config.model.weight_range
    second = {
        "sample.guidance": config.sample.guidance if config.sample.guidance != "classifier-free" else "",
        "sample.rule or eval.rules": guidance.text if guidance.rule or guidance.reuse or guidance.other_labels else "",
        "sample.guide or eval.guides": guide,
        "sample.doubled": config.sample.doubled or "",
    }
    for name, value in second.items():
        if value != "":
            raise UserError(
                f"config.{name} is {value!r}, and the run is a student, whose one score is guided by its input w: "
                "leave it out, or use the run that the student learned from"
            )
    if outside := [w for w in weights if not lo <= w <= hi]:
        raise UserError(
            f"w = {outside[0]:g} of sample.w, eval.weights or eval.rules is outside of [{lo:g}, {hi:g}], the weights "
            "that this student learned (model.weight_range): leave it out, or distill another student with a wider "
            "distill.weights"
        )
    steps, sample = config.distill.sampling_steps, config.sample
    learned = dict(num_steps=steps, sampler="ddim", clean_end=False, schedule="", respacing="")
    if steps and (config.eval.num_steps or any(sample[name] != value for name, value in learned.items())):
        flags = ", ".join(f"--config.sample.{name}={value or repr(value)}" for name, value in learned.items())
        raise UserError(
            f"this student learned to sample in {steps} steps of DDIM alone: give {flags} and "
            "--config.eval.num_steps='()'"
        )
