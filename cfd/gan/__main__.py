"""A denoising diffusion GAN on images: `python -m cfd.gan CONFIG WORKDIR [GROUP.FIELD=VALUE ...]`.

    python -m cfd.gan digits runs/digits_gan --mlp=256 --latents=32 --penalty=0.05 --penalty_every=2 \\
        train.num_steps=6000 train.learning_rate=5e-4 train.ema_decay=0.998

CONFIG is what --config of `cfd.main` takes. The command trains on the data of the config, with the config's U-Net as
the generator and its classifier as the discriminator, or with --mlp as MLPs. It draws eval.num_samples images in
--levels steps, measures them as a sweep does, with the features that eval asks for, and writes gan.npz, gan.png and
gan.json in the folder. The same command again resumes. To compare the figures with those of another run, copy its
folder features/ into WORKDIR first.

The defaults of --latents, --penalty, --penalty_every and --levels are those of the paper for CIFAR-10. Its networks
have other blocks, and its discriminator a channel with the deviations in the batch; both are left out.

Both networks have one rate, train.learning_rate, which decays to 0 along a half cosine, and Adam with β = (0.5, 0.9).
train.ema_decay, train.batch_size and the other fields of `train` are as always; p_uncond, the loss weight, the clipping
of gradients and the warm-up are not used. Neither are model.predict, because the generator predicts x, and dropout.
"""

import argparse
import ast
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from jax import Array

from cfd.config import Config, check_name, complete, with_classes
from cfd.devices import notices, output, parallel, preemption, progress, seeds, watchdog, xla
from cfd.errors import CommandError, UserError
from cfd.evaluation.reference import open_reference, reference_hash
from cfd.evaluation.scores import score
from cfd.fields import DEFAULTS, FIELDS
from cfd.gan import losses
from cfd.gan.networks import Init, image_networks, mlp_networks
from cfd.loading import load_ema
from cfd.modes import figures, settings, sweep, tables
from cfd.modes.fit import fit
from cfd.modes.named import load_config
from cfd.modes.sampler import to_uint8
from cfd.runs import access, files, manifest, npz, workdir
from cfd.runs.results import fid_name


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws and measures. Returns 0, or 75 if it was asked to stop. An error of the user's is one line."""
    args = parse(argv)
    with output.lasting(lambda _: None), notices.warnings_in_lines():
        try:
            config = config_of(args.CONFIG, args.FIELDS)
            if not args.mlp:
                check_generator(config)
            args.WORKDIR = access.run_path("WORKDIR", args.WORKDIR)
            access.check_run_path(args.WORKDIR)
            parallel.process_count()
            xla.use_compilation_cache(config.xla.compilation_cache)
            watchdog.install(config.train.watchdog_seconds)
            with (
                preemption.stopping_on_request(),
                workdir.inputs_are_final(args.WORKDIR),
                access.lock(args.WORKDIR, "give another WORKDIR"),
            ):
                train(config, args.WORKDIR, args)
                print(measure(config, args.WORKDIR, args), flush=True)
            return 0
        except preemption.Stopped as stopped:
            print(stopped, flush=True)
            return preemption.EXIT_CODE
        except CommandError as error:
            refuse(str(error))
        except UserError as error:
            end(str(error))
        except OSError as error:
            if reason := files.reason_of_storage(error, args.WORKDIR):
                end(reason)
            raise
        finally:
            watchdog.off()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. A wrong one ends the command."""
    parser = argparse.ArgumentParser(prog="python -m cfd.gan", description="A denoising diffusion GAN on images.")
    parser.add_argument("CONFIG", help="the name of a config of the package, such as digits, a file, or a run's folder")
    parser.add_argument("WORKDIR", help="the folder of the run")
    parser.add_argument("FIELDS", nargs="*", default=[], help="fields of the config, as GROUP.FIELD=VALUE")
    parser.add_argument("--levels", type=int, default=4, help="T, evaluations of the generator per image")
    parser.add_argument("--latents", type=int, default=100, help="latents per image and step")
    parser.add_argument("--mlp", type=int, default=0, help="width of MLPs in place of the config's networks; 0: none")
    parser.add_argument("--penalty", type=float, default=0.02, help="weight of the gradient penalty")
    parser.add_argument("--penalty_every", type=int, default=15, help="steps per gradient penalty, on average")
    parser.error = refuse
    args, rest = parser.parse_known_intermixed_args(argv)
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        known = ", ".join(f"--{name}" for name in vars(args) if name.islower())
        refuse(f"{unknown[0]} is no flag: choose among {known}; a field of the config is GROUP.FIELD=VALUE")
    for name, low in (("levels", 1), ("latents", 1), ("penalty_every", 1), ("mlp", 0)):
        if getattr(args, name) < low:
            refuse(f"--{name} is {getattr(args, name)}; give an integer >= {low}")
    if not 0 <= args.penalty < math.inf:
        refuse(f"--penalty is {args.penalty}; give a finite number >= 0")
    return args


def refuse(message: str) -> NoReturn:
    """Ends a command that is wrong itself: every start of it would end alike, which launch/supervise.py is told."""
    progress.give_up()
    end(message)


def end(message: str) -> NoReturn:
    """Ends the command with an error in one line, and code 1."""
    sys.exit(f"error: {' '.join(message.split())}")


def config_of(named: str, changes: Sequence[str]) -> Config:
    """The complete config that CONFIG names, with fields changed. Raises CommandError if one is wrong."""
    config: Config = load_config(named)
    for change in changes:
        name, _, text = change.partition("=")
        check_name(name)
        group, _, field = name.rpartition(".")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            (config[group] if group else config).update({field: value})
        except TypeError:
            raise CommandError(f"config.{name} is {text!r}; expected {FIELDS[name].check.words}") from None
    try:
        return complete(config)
    except UserError as error:
        raise CommandError(str(error)) from error


def check_generator(config: Config) -> None:
    """Raises CommandError if the config's group model describes more than the plain U-Net that the generator is."""
    for field in ("network", "fourier", "learn_variance", "label_from", "weight_range"):
        if config.model[field] != (default := DEFAULTS[f"model.{field}"]):
            raise CommandError(
                f"model.{field} is {config.model[field]!r}, which the generator, a plain U-Net, does not have: add "
                f"model.{field}={default!r}, or --mlp=256"
            )


def networks_of(config: Config, latents: int, width: int = 0) -> tuple[Init, losses.Networks]:
    """The networks of a config whose classes are known, or MLPs of a width that is not 0."""
    if width:
        shape, classes = settings.image_shape(config), config.model.num_classes
        return mlp_networks(shape, width, latents, num_classes=classes, bounded=True)
    data = config.data
    return image_networks(config.model.to_dict(), config.classifier.to_dict(), data.image_size, data.channels, latents)


def train(config: Config, folder: str, args: argparse.Namespace) -> None:
    """Trains both networks in a run folder of kind "gan", or resumes there."""
    dataset = settings.open_split(config, config.data.split)
    config = with_classes(config, len(dataset.class_names))
    init, networks = networks_of(config, args.latents, args.mlp)
    logsnr, options = losses.levels(args.levels), dict(penalty=args.penalty, penalty_every=args.penalty_every)

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        return losses.loss(key, networks, params, x, labels, logsnr=logsnr, **options)

    rate = optax.cosine_decay_schedule(config.train.learning_rate, config.train.num_steps)
    content = workdir.describe("gan", config.to_dict(), dataset.class_names)
    content["gan"] = {"levels": logsnr.tolist(), "latents": args.latents, "mlp": args.mlp, **options}
    fit(
        settings.training_of(config, config.train),
        folder,
        parallel.make_mesh(**config.mesh),
        dataset,
        content,
        init,
        loss_fn,
        optax.adam(rate, 0.5, 0.9),
        None,
    )


def measure(config: Config, folder: str, args: argparse.Namespace) -> str:
    """Draws images with the moving average of the generator, measures them, and writes them. Returns a line."""
    dataset = settings.open_split(config, config.data.split)
    config, mesh = with_classes(config, len(dataset.class_names)), parallel.make_mesh(**config.mesh)
    evaluate, shape = config.eval, settings.image_shape(config)
    found, (_, networks) = load_ema(folder, "gan"), networks_of(config, args.latents, args.mlp)
    count, names = evaluate.num_samples, dataset.class_names
    labels = manifest.labels_of("balanced", evaluate.seed, count, len(names))

    @jax.jit
    def draw(params: Any, index: Array, labels: Array) -> Array:
        keys = jax.vmap(partial(jax.random.fold_in, seeds.key(evaluate.seed)))(index)
        return to_uint8(losses.sample(keys, networks, params, labels, shape, logsnr=losses.levels(args.levels)))

    size, batches = config.sample.batch_size, []
    for first in range(0, count, size):
        index = np.resize(np.arange(first, min(first + size, count), dtype=np.int32), size)
        watchdog.alive(slow=first == 0)
        batches.append(np.asarray(draw(found.params["g"], index, labels[index]))[: count - first])
        if preemption.requested():
            done = min(first + size, count)
            raise preemption.Stopped(f"Stopped after {done} of {count} images", "the same command draws all of them")
    images = np.concatenate(batches)
    shown = np.unique(labels)[:10]
    columns = min(8, *(np.count_nonzero(labels == c) for c in shown))
    rows = np.stack([images[labels == c][:columns] for c in shown])
    picture = figures.grid(rows, [names[c] if c >= 0 else "" for c in shown], [""] * columns)
    figures.save(os.path.join(folder, "gan.png"), picture)
    with npz.sample_writer(os.path.join(folder, "gan.npz"), count, shape) as write:
        write(images, labels)

    features = sweep.open_features(config, folder, folder, mesh, dataset)
    digest = reference_hash(features, dataset, path=evaluate.reference, data=config.data.to_dict())
    reference = open_reference(
        folder,
        features,
        dataset,
        digest,
        path=evaluate.reference,
        image_shape=shape,
        num_workers=config.data.num_workers,
    )
    scores = score(iter([(images, labels)]), count, features, reference).values
    files.write_atomically(os.path.join(folder, "gan.json"), json.dumps({"step": found.step} | scores, indent=1) + "\n")
    measured = {fid_name(count, features.name): scores["fid"], **{k: scores[k] for k in ("is", "precision", "recall")}}
    text = ", ".join(
        f"{tables.NAMES.get(key, key)} {value:.3f}" for key, value in measured.items() if value is not None
    )
    return f"Step {found.step}, T = {args.levels}: {text}. Wrote gan.npz, gan.png and gan.json in {folder}."


if __name__ == "__main__":
    sys.exit(main())
