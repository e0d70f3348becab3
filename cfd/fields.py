"""Every field that a config may set: its default, what it accepts, its meaning and its unit, in one table."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Check(NamedTuple):
    """The type of a value, the condition that it must satisfy, and that condition in words."""

    type: type
    holds: Callable[[Any], bool]
    words: str


class Field(NamedTuple):
    """One row of the table.

    `before` is the value that means what the code did before the field existed; None if the default does.
    """

    default: Any
    check: Check
    meaning: str
    before: Any = None


def accepts(check: Check, value: Any) -> bool:
    """Whether a value has the type and satisfies the condition. An int passes for a float, a bool only for a bool."""
    types = (int, float) if check.type is float else (check.type,)
    return isinstance(value, types) and (check.type is bool or not isinstance(value, bool)) and check.holds(value)


def at_least(low: int) -> Check:
    return Check(int, lambda x: x >= low, f"an integer >= {low}")


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    words = f"a number {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    return Check(float, lambda x: (x > low if above else x >= low) and x <= high and math.isfinite(x), words)


def one_of(*values: str) -> Check:
    return Check(str, lambda x: x in values, f"one of {', '.join(values)}")


def each(check: Check, words: str, *, empty: bool = True) -> Check:
    return Check(tuple, lambda x: (empty or len(x) > 0) and all(accepts(check, item) for item in x), words)


def distinct(check: Check, words: str) -> Check:
    every = each(check, words)
    return Check(tuple, lambda x: every.holds(x) and len(set(x)) == len(x), f"{words}, none twice")


def is_interval(value: Any) -> bool:
    """Whether a value is () or (logsnr_lo, logsnr_hi) with lo <= hi."""
    finite = isinstance(value, tuple) and all(accepts(FINITE, end) for end in value)
    return finite and (value == () or (len(value) == 2 and value[0] <= value[1]))


SEED = Check(int, lambda x: 0 <= x < 2**32, "an integer in [0, 2^32), the seeds of JAX")
TEXT = Check(str, lambda _: True, "a string")
PATH = Check(
    str,
    lambda x: x.startswith("gs://") or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://", x, re.DOTALL),
    "a path, or a URL gs://BUCKET/NAME (copy what another URL names to a disk or into a bucket)",
)
BOOL = Check(bool, lambda _: True, "True or False")
FINITE = Check(float, math.isfinite, "a finite number")
DECAY = Check(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
MAX_PIXELS = Check(int, lambda x: 1 <= x <= 178_956_970, "an integer in [1, 178956970], the limit of Pillow")
CHANNELS = Check(int, lambda x: x in (1, 3), "1 or 3")
BASE_CHANNELS = Check(int, lambda x: x > 0 and x % 32 == 0, "a multiple of 32, the number of norm groups")
MULTIPLIERS = each(number(0.0, above=True), "a tuple of numbers > 0", empty=False)
# Beyond ±88, α or σ is 0 in float32.
LOGSNR = Check(float, lambda x: -80 <= x <= 80, "a number in [-80, 80]")
WEIGHTS = "a tuple of guidance weights, each finite and >= -1 (w = -1 is the unconditional model)"
INTERVAL = "() or (logsnr_lo, logsnr_hi) with lo <= hi"
SEEDS = each(SEED, "a tuple of integers in [0, 2^32), the seeds of JAX", empty=False)
INTERVALS = distinct(
    Check(tuple, is_interval, INTERVAL), f"() for sample.interval, or a tuple of intervals, each {INTERVAL}"
)
GUIDE_WORDS = "'', or '@STEP' of this run, 'RUN' or 'RUN@STEP' of another run's folder"


def is_guide(value: str) -> bool:
    """Whether a value is "", or "@STEP", "RUN" or "RUN@STEP", where RUN is a path or a URL of a bucket."""
    run, _, step = value.rpartition("@")
    path = run if step.isdecimal() else value
    return value.isprintable() and value == value.strip() and not path.startswith("@") and PATH.holds(path)


GUIDE = Check(str, is_guide, GUIDE_WORDS)
WITH_WEIGHTS = each(number(-1.0), WEIGHTS, empty=False)
RULE_WORDS = "a rule, or (a rule, a tuple of its own weights in place of eval.weights, each finite and >= -1)"


def is_rule_of_grid(value: Any) -> bool:
    """Whether a value is a text, or (a text, weights), with at least one weight and none twice."""
    if isinstance(value, str):
        return True
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
        return False
    return accepts(WITH_WEIGHTS, value[1]) and len(set(value[1])) == len(value[1])


RULES = each(
    Check(object, is_rule_of_grid, RULE_WORDS), f"() for sample.rule, or a tuple whose entries are each {RULE_WORDS}"
)
CLASSES = Check(
    tuple,
    lambda x: all(accepts(TEXT, item) or accepts(at_least(0), item) for item in x),
    "a tuple of class numbers and names, such as (3, 'cat'); () for the first ten",
)
MESH_DATA = Check(int, lambda x: x == -1 or x >= 1, "-1 (the devices that fsdp leaves) or an integer >= 1")

SCHEDULES = ("cosine", "linear", "adm_linear", "adm_cosine")

NETWORK = {
    "num_classes": Field(0, at_least(0), "classes of the label; 0: as many as the data has"),
    "base_channels": Field(128, BASE_CHANNELS, "channels that channel_mult multiplies"),
    "channel_mult": Field((1, 2, 2, 2), MULTIPLIERS, "channel multiplier of each level"),
    "num_res_blocks": Field(2, at_least(1), "residual blocks per level, downwards"),
    "attention_resolutions": Field(
        (16, 8), each(at_least(1), "() or a tuple of integers >= 1"), "heights, in pixels, of the levels with attention"
    ),
    "head_channels": Field(64, at_least(0), "channels per attention head; 0: num_heads decides"),
    "num_heads": Field(0, at_least(0), "attention heads; 0: head_channels decides"),
    "resblock_updown": Field(True, BOOL, "residual blocks change the resolution; False: plain convolutions do"),
    "scale_shift_norm": Field(True, BOOL, "the embedding scales and shifts the second norm; False: it is added"),
    "dropout": Field(0.0, Check(float, lambda x: 0 <= x < 1, "a probability in [0, 1)"), "dropout probability"),
    "time": Field("cosine", one_of("cosine", "adm_cosine", "adm_linear"), "the time by which λ enters the network"),
    "dtype": Field("float32", one_of("float32", "bfloat16"), "dtype of activations; parameters are float32"),
    "remat": Field(False, BOOL, "recompute activations in the backward pass: less memory, more time"),
}

FIELDS: dict[str, Field] = {
    "seed": Field(0, SEED, "seed of initialisation, data order and training noise"),
    "data.source": Field(
        "folder", one_of("digits", "folder", "tfds", "adm"), "where images are; adm: imported, no data"
    ),
    "data.name": Field("", TEXT, "name of the TensorFlow Datasets data set"),
    "data.split": Field("train", TEXT, "split that is trained on"),
    "data.path": Field(
        "", PATH, "folder or .zip file of images, or folder of prepared tfds data sets ('': ~/tensorflow_datasets)"
    ),
    "data.labels": Field(
        "", PATH, "CSV file with the columns file,label, in the split's folder, or its absolute path; '': class folders"
    ),
    "data.empty_classes": Field(False, BOOL, "accept class folders without images, which keep their numbers"),
    "data.image_size": Field(32, at_least(1), "height and width in pixels; larger images are cropped and shrunk"),
    "data.channels": Field(3, CHANNELS, "1: grey, 3: RGB"),
    "data.num_classes": Field(0, at_least(0), "classes that the data must have; 0: as many as it has"),
    "data.flip": Field(False, BOOL, "flip each training image left to right with probability 1/2"),
    "data.on_bad_image": Field("raise", one_of("raise", "skip"), "for a bad image; skip: another of its class"),
    "data.exif_orientation": Field(
        True, BOOL, "turn and mirror images as their EXIF orientation says, which ADM does not do", before=False
    ),
    "data.transparency": Field(
        "refuse", one_of("refuse", "white", "grey", "black"), "background of transparent images; refuse: they are bad"
    ),
    "data.max_pixels": Field(2**25, MAX_PIXELS, "largest image; decoding takes 4 to 20 bytes per pixel and thread"),
    "data.in_memory": Field(False, BOOL, "decode each image once and keep it"),
    "data.num_workers": Field(2, at_least(0), "decoding threads per process; 0: the calling thread"),
    **{f"model.{name}": field for name, field in NETWORK.items()},
    "model.out_channels": Field(0, at_least(0), "output channels; 0: data.channels"),
    "process.logsnr_min": Field(-20.0, LOGSNR, "smallest log-SNR λ, all noise"),
    "process.logsnr_max": Field(20.0, LOGSNR, "largest log-SNR λ, hardly any noise"),
    "process.schedule": Field("cosine", one_of(*SCHEDULES), "density of λ in training; adm_linear is DDPM's too"),
    "train.num_steps": Field(100_000, at_least(1), "optimizer steps in all"),
    "train.batch_size": Field(256, at_least(1), "images per step, over all devices"),
    "train.p_uncond": Field(0.1, number(0.0, 1.0), "probability of dropping the label"),
    "train.learning_rate": Field(2e-4, number(0.0, above=True), "learning rate of AdamW after the warm-up"),
    "train.warmup_steps": Field(0, at_least(0), "steps of linear warm-up of the learning rate"),
    "train.adam_b1": Field(0.9, DECAY, "β1 of Adam"),
    "train.adam_b2": Field(0.999, DECAY, "β2 of Adam"),
    "train.weight_decay": Field(0.0, number(0.0), "weight decay of AdamW"),
    "train.grad_clip": Field(1.0, number(0.0, above=True), "largest global norm of the gradient"),
    "train.ema_decay": Field(0.9999, DECAY, "decay of the moving average of the parameters, per step"),
    "train.ema_warmup": Field(False, BOOL, "limit the decay to (1 + t) / (10 + t) at step t"),
    "train.num_microbatches": Field(1, at_least(1), "parts of the batch whose gradients are accumulated"),
    "train.nonfinite_limit": Field(3, at_least(1), "consecutive non-finite steps at which training gives up"),
    "train.checkpoint_every_steps": Field(5000, at_least(1), "steps between checkpoints"),
    "train.keep_checkpoints": Field(2, at_least(1), "checkpoints that are kept, the newest"),
    "train.keep_every_steps": Field(0, at_least(0), "steps between checkpoints that are kept for good; 0: none"),
    "train.snapshot_every_steps": Field(
        0, at_least(0), "steps between snapshots, which hold the EMA alone and are kept for good; 0: none"
    ),
    "train.log_every_steps": Field(100, at_least(1), "steps between lines of metrics.jsonl"),
    "train.sample_every_steps": Field(10_000, at_least(0), "steps between sample grids; 0: none"),
    "train.watchdog_seconds": Field(600, at_least(0), "seconds without progress that end the process; 0: never"),
    **{f"classifier.{name}": field for name, field in NETWORK.items()},
    "classifier_train.num_steps": Field(300_000, at_least(1), "optimizer steps of the noisy classifier"),
    "classifier_train.batch_size": Field(256, at_least(1), "images per step of the noisy classifier"),
    "classifier_train.learning_rate": Field(
        3e-4, number(0.0, above=True), "learning rate of its AdamW after the warm-up"
    ),
    "classifier_train.weight_decay": Field(0.05, number(0.0), "weight decay of its AdamW"),
    "mesh.data": Field(-1, MESH_DATA, "devices along which the batch alone is divided; -1: those that fsdp leaves"),
    "mesh.fsdp": Field(1, at_least(1), "devices along which parameters are divided too"),
    "mesh.fsdp_across_slices": Field(
        False, BOOL, "divide parameters over devices of several slices, across the slower network", before=True
    ),
    "sample.step": Field(-1, at_least(-1), "step of training whose weights are sampled; -1: the newest"),
    "sample.num_steps": Field(256, at_least(1), "T, network evaluations per image and score"),
    "sample.schedule": Field("", one_of("", *SCHEDULES), "grid of λ between the same ends; '': that of training"),
    "sample.sampler": Field("ancestral", one_of("ancestral", "ddim", "dpm_solver", "sde_dpm_solver"), "step rule"),
    "sample.v": Field(0.3, number(0.0, 1.0), "interpolation of the ancestral sampler's log-variance"),
    "sample.w": Field((0.0, 1.0, 2.0, 4.0), each(number(-1.0), WEIGHTS, empty=False), "weights, columns of the grid"),
    "sample.guidance": Field("classifier-free", one_of("classifier-free", "classifier"), "kind of guidance"),
    "sample.rule": Field("", TEXT, "rule that mixes the scores, of cfd.rules; '': the paper's; see cfd.modes.rules"),
    "sample.guide": Field("", GUIDE, "network that guidance leads away from; '': the unconditional score"),
    "sample.interval": Field((), Check(tuple, is_interval, INTERVAL), "λ interval that is guided; (): all"),
    "sample.doubled": Field(False, BOOL, "both scores in one batch of twice the size"),
    "sample.clip": Field(True, BOOL, "clip the predicted image to [-1, 1] at every step"),
    "sample.classes": Field((), CLASSES, "classes, by number or name, rows of the grid; (): the first ten"),
    "sample.seeds": Field((0,), SEEDS, "seeds, one row per class and seed"),
    "sample.batch_size": Field(256, at_least(1), "images per batch, over all devices"),
    "eval.weights": Field(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0),
        distinct(number(-1.0), f"() for no sweep, as --config.eval.weights='()', or {WEIGHTS}"),
        "weights of the sweep; (): no sweep",
    ),
    "eval.steps": Field((), distinct(at_least(0), "() for sample.step, or integers >= 0"), "values of sample.step"),
    "eval.num_steps": Field(
        (), distinct(at_least(1), "() for sample.num_steps, or a tuple of integers >= 1"), "values of T"
    ),
    "eval.v": Field(
        (), distinct(number(0.0, 1.0), "() for sample.v, or a tuple of numbers in [0, 1]"), "values of sample.v"
    ),
    "eval.intervals": Field((), INTERVALS, "values of sample.interval"),
    "eval.rules": Field((), RULES, "values of sample.rule, or of (sample.rule, its own weights)"),
    "eval.guides": Field(
        (),
        distinct(GUIDE, f"() for sample.guide, or a tuple whose entries are {GUIDE_WORDS}"),
        "values of sample.guide",
    ),
    "eval.seeds": Field(
        (), distinct(SEED, "() for eval.seed, or a tuple of integers in [0, 2^32)"), "values of eval.seed"
    ),
    "eval.racing": Field(
        False, BOOL, "find the best cell by a race, from a part of the images, and measure that cell alone"
    ),
    "eval.num_samples": Field(50_000, at_least(4), "images per cell of the sweep"),
    "eval.labels": Field("balanced", one_of("balanced", "random", "data"), "classes: in turn, drawn or as in the data"),
    "eval.seed": Field(1000, SEED, "seed of the images"),
    "eval.features": Field("classifier", one_of("classifier", "inception", "dinov2"), "feature network of the metrics"),
    "eval.inception_path": Field("", PATH, "file that `python -m cfd.convert inception` wrote"),
    "eval.dinov2_path": Field("", PATH, "file that `python -m cfd.convert dinov2` wrote"),
    "eval.reference": Field("", PATH, ".npz of OpenAI's evaluator; '': the training split"),
    "eval.test_split": Field("test", TEXT, "held-out split on which the feature classifier is tested"),
    "eval.classifier_steps": Field(4000, at_least(1), "training steps of the feature classifier"),
    "likelihood.num_steps": Field(256, at_least(2), "levels of the bound, uniform in λ up to likelihood.logsnr_max"),
    "likelihood.logsnr_max": Field(13.3, LOGSNR, "largest λ at which the chain may end, at most process.logsnr_max"),
    "likelihood.v": Field(0.0, number(0.0, 1.0), "v of the chain's variances, as sample.v"),
    "likelihood.weights": Field((0.0,), distinct(number(-1.0), WEIGHTS), "guidance weights of the chain"),
    "likelihood.num_images": Field(1000, at_least(0), "images of each split, evenly spaced; 0: all"),
    "xla.compilation_cache": Field("", PATH, "folder of compiled programs that later starts use again; '': none"),
}

DEFAULTS: dict[str, Any] = {name: field.default for name, field in FIELDS.items()}
BEFORE: dict[str, Any] = {
    name: field.default if field.before is None else field.before for name, field in FIELDS.items()
}
"""The value of each field in a run that is older than the field."""
