"""Every field that a config may set: its default, what it accepts, its meaning and its unit, in one table."""

from typing import Any, NamedTuple

from cfd.checks import (
    BASE_CHANNELS,
    BOOL,
    CHANNELS,
    CLASSES,
    DECAY,
    EMA,
    GUIDE,
    GUIDE_WORDS,
    INTERVAL,
    INTERVALS,
    LENGTH,
    LOGSNR,
    MAX_PIXELS,
    MESH_DATA,
    MULTIPLIERS,
    PATH,
    RULES,
    SEED,
    SEEDS,
    TEXT,
    WEIGHT_RANGE,
    WEIGHTS,
    Check,
    at_least,
    distinct,
    each,
    is_interval,
    is_range,
    number,
    one_of,
)


class Field(NamedTuple):
    """One row of the table.

    `before` is the value that means what the code did before the field existed; None if the default does.
    """

    default: Any
    check: Check
    meaning: str
    before: Any = None


SCHEDULES = ("cosine", "linear", "adm_linear", "adm_cosine", "edm")

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
    "time": Field(
        "cosine",
        one_of("cosine", "logsnr", "adm_cosine", "adm_linear"),
        "the time by which λ enters the network; logsnr: λ itself, for training on the bound",
    ),
    "dtype": Field("float32", one_of("float32", "bfloat16"), "dtype of activations; parameters are float32"),
    "remat": Field(False, BOOL, "recompute activations in the backward pass: less memory, more time"),
}

OF_TRANSFORMER = ("patch_size", "depth", "bottleneck")
OF_UNETS = ("channel_mult", "num_res_blocks", "attention_resolutions", "resblock_updown", "scale_shift_norm")
"""Fields of the group model that the transformer does not read, as a line then says."""
FOREIGN: dict[str, tuple[str, ...]] = {
    "adm": (*OF_TRANSFORMER,),
    "transformer": ("label_from", "weight_range"),
    "mp": (*OF_TRANSFORMER, "resblock_updown", "scale_shift_norm", "predict", "fourier", "label_from", "weight_range"),
}
"""The fields of the group model that a network, by its name, does not have."""

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
    "model.network": Field(
        "adm",
        one_of("adm", "mp", "transformer"),
        "U-Net; mp: the magnitude-preserving one of arXiv:2312.02696; transformer: on patches, of arXiv:2511.13720",
    ),
    **{f"model.{name}": field for name, field in NETWORK.items()},
    "model.patch_size": Field(4, at_least(1), "height and width in pixels of the transformer's patches"),
    "model.depth": Field(12, at_least(1), "blocks of the transformer, whose width is base_channels"),
    "model.bottleneck": Field(0, at_least(0), "rank of the transformer's embedding of a patch; 0: full"),
    "model.predict": Field(
        "eps",
        one_of("eps", "x", "v", "mean"),
        "output of the network; v: α ε − σ x; mean: the mean of DDPM's next step",
    ),
    "model.learn_variance": Field(
        False, BOOL, "outputs for the variances of the steps too, trained by 0.001 of the bound"
    ),
    "model.label_from": Field(
        -1,
        at_least(-1),
        "level of the upward half, 0 the largest, from which the class is seen; scores share the rest; -1: no trunk",
    ),
    "model.fourier": Field(
        (),
        distinct(Check(int, lambda x: 0 <= x <= 10, "n"), "() or a tuple of integers from 0 to 10"),
        "n of the channels sin(2^n π z) and cos(2^n π z) beside z; (7, 8) tells 256 pixel values apart",
    ),
    "model.weight_range": Field(
        (),
        Check(tuple, lambda x: x == () or is_range(x), f"() or {WEIGHT_RANGE}"),
        "range of the guidance weight that is an input of a student, which --mode=distill sets; (): no input",
    ),
    "model.out_channels": Field(0, at_least(0), "output channels; 0: data.channels, or twice these"),
    "process.logsnr_min": Field(-20.0, LOGSNR, "smallest log-SNR λ, all noise"),
    "process.logsnr_max": Field(20.0, LOGSNR, "largest log-SNR λ, hardly any noise"),
    "process.schedule": Field(
        "cosine",
        one_of(*SCHEDULES, "learned"),
        "density of λ in training; adm_linear is DDPM's; learned: VDM's, the one with which the loss varies least, for "
        "the loss and the sampling grid of linear",
    ),
    "train.num_steps": Field(100_000, at_least(1), "optimizer steps in all"),
    "train.batch_size": Field(256, at_least(1), "images per step, over all devices"),
    "train.p_uncond": Field(0.1, number(0.0, 1.0), "probability of dropping the label"),
    "train.weight": Field(
        "eps",
        one_of("eps", "x", "v", "mean", "sigmoid"),
        "squared error of the loss; sigmoid: of ε, times sigmoid(b − λ) / p(λ)",
    ),
    "train.sigmoid_bias": Field(0.0, LOGSNR, "b of train.weight = 'sigmoid', in λ"),
    "train.variance_levels": Field(
        1000, at_least(2), "levels of the training schedule on which model.learn_variance trains"
    ),
    "train.low_discrepancy": Field(False, BOOL, "spread the λ of a batch evenly over their distribution"),
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
    "train.posthoc_ema": Field(
        (),
        distinct(LENGTH, f"() or a tuple such as (0.05, 0.1), each {LENGTH.words}"),
        "lengths, relative to training, of EMAs to store, from which sample.ema reconstructs others; two are enough",
    ),
    "train.posthoc_every_steps": Field(
        0, at_least(0), "steps between snapshots of these EMAs; 0: a 32nd of train.num_steps, rounded up"
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
    "distill.teacher": Field(
        "", PATH, "run, RUN or RUN:STEP, that a student learns from and begins with, if --init_from names none"
    ),
    "distill.weights": Field(
        (0.0, 4.0),
        Check(tuple, is_range, WEIGHT_RANGE),
        "range (lo, hi) of the weights w that a student learns; log(1 + w - lo) is uniform",
    ),
    "distill.num_steps": Field(10_000, at_least(1), "optimizer steps of a student, and of each halving"),
    "distill.batch_size": Field(256, at_least(1), "images per step of a student"),
    "distill.learning_rate": Field(
        2e-4, number(0.0, above=True), "learning rate of a student after the warm-up, falling linearly to 0"
    ),
    "distill.warmup_steps": Field(0, at_least(0), "steps of linear warm-up of a student's learning rate"),
    "distill.weight": Field("eps", one_of("eps", "x", "v"), "squared error of a student's loss, as train.weight"),
    "distill.halvings": Field(
        (),
        distinct(at_least(1), "() or a tuple of integers >= 1, falling, each half of the one before"),
        "sampling steps T of further students, each from the one before, as runs steps_T in the run's folder",
    ),
    "distill.sampling_steps": Field(
        0, at_least(0), "T that the student learns to sample in, of DDIM, which distill.halvings set; 0: any T"
    ),
    "guide_train.num_steps": Field(0, at_least(0), "optimizer steps of the small guide; 0: train.num_steps"),
    "guide_train.p_uncond": Field(
        1.0, number(0.0, 1.0), "probability of dropping the label of the small guide; 1.0: it sees no labels"
    ),
    "mesh.data": Field(-1, MESH_DATA, "devices along which the batch alone is divided; -1: those that fsdp leaves"),
    "mesh.fsdp": Field(1, at_least(1), "devices along which parameters are divided too"),
    "mesh.fsdp_across_slices": Field(
        False, BOOL, "divide parameters over devices of several slices, across the slower network", before=True
    ),
    "sample.step": Field(-1, at_least(-1), "step of training whose weights are sampled; -1: the newest"),
    "sample.ema": Field(
        0.0, EMA, "length of the EMA of the weights, relative to training, from train.posthoc_ema; 0.0: the run's own"
    ),
    "sample.num_steps": Field(256, at_least(1), "T, network evaluations per image and score"),
    "sample.schedule": Field("", one_of("", *SCHEDULES), "grid of λ between the same ends; '': that of training"),
    "sample.clean_end": Field(
        True, BOOL, "evaluate at process.logsnr_max too; False: T levels u = 1, ..., 1/T of the schedule, without u = 0"
    ),
    "sample.sampler": Field("ancestral", one_of("ancestral", "ddim", "dpm_solver", "sde_dpm_solver"), "step rule"),
    "sample.respacing": Field(
        "", TEXT, "steps of ADM's table, in place of a schedule: '250', '10,20,30' or 'ddim25'; '': none"
    ),
    "sample.variance": Field(
        "fixed",
        one_of("fixed", "learned"),
        "variance of the ancestral steps; fixed: by sample.v; learned: by the network",
    ),
    "sample.v": Field(0.3, number(0.0, 1.0), "interpolation of the ancestral sampler's log-variance"),
    "sample.w": Field((0.0, 1.0, 2.0, 4.0), each(number(-1.0), WEIGHTS, empty=False), "weights, columns of the grid"),
    "sample.guidance": Field(
        "classifier-free",
        one_of("classifier-free", "classifier", "classifier-mean"),
        "kind of guidance; classifier: shifts ε; classifier-mean: shifts the mean of each step, as ADM does",
    ),
    "sample.rule": Field("", TEXT, "rule that mixes the scores, of cfd.rules; '': the paper's; see cfd.modes.rules"),
    "sample.guide": Field("", GUIDE, "network that guidance leads away from; '': the unconditional score"),
    "sample.interval": Field((), Check(tuple, is_interval, INTERVAL), "λ interval that is guided; (): all"),
    "sample.doubled": Field(False, BOOL, "both scores in one batch of twice the size"),
    "sample.clip": Field(True, BOOL, "clip the predicted image to [-1, 1] at every step"),
    "sample.corrector": Field(
        0.0, number(0.0, 1.9), "size c of Langevin steps at each λ, in units of σ², before the sampler's step; 0: none"
    ),
    "sample.corrector_steps": Field(1, at_least(1), "Langevin steps at each λ, if sample.corrector is not 0"),
    "sample.predictor_guided": Field(
        True, BOOL, "w guides the sampler too; False: the corrector alone (predictor-corrector guidance)"
    ),
    "sample.clip_first": Field(False, BOOL, "as ADM does, clip before the classifier shifts ε, and not after"),
    "sample.classes": Field((), CLASSES, "classes, by number or name, rows of the grid; (): the first ten"),
    "sample.seeds": Field((0,), SEEDS, "seeds, one row per class and seed"),
    "sample.batch_size": Field(256, at_least(1), "images per batch, over all devices"),
    "eval.weights": Field(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0),
        distinct(number(-1.0), f"() for no sweep, as --config.eval.weights='()', or {WEIGHTS}"),
        "weights of the sweep; (): no sweep",
    ),
    "eval.steps": Field((), distinct(at_least(0), "() for sample.step, or integers >= 0"), "values of sample.step"),
    "eval.emas": Field(
        (), distinct(EMA, f"() for sample.ema, or a tuple of numbers, each {EMA.words}"), "values of sample.ema"
    ),
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
    "likelihood.classes": Field(
        False, BOOL, "accuracy on eval.test_split of taking the class with the lowest bound at w = 0"
    ),
    "likelihood.num_images": Field(1000, at_least(0), "images of each split, evenly spaced; 0: all"),
    "xla.compilation_cache": Field("", PATH, "folder of compiled programs that later starts use again; '': none"),
}

FIELDS |= {
    name.replace("model", "model_guide", 1): field._replace(meaning=f"{field.meaning} (of the small guide)")
    for name, field in FIELDS.items()
    if name.startswith("model.")
}
"""The small guide of a run is a network like its own."""

DEFAULTS: dict[str, Any] = {name: field.default for name, field in FIELDS.items()}
BEFORE: dict[str, Any] = {
    name: field.default if field.before is None else field.before for name, field in FIELDS.items()
}
"""The value of each field in a run that is older than the field."""
