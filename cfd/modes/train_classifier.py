"""`--mode=train_classifier`: the noisy classifier of classifier guidance, in a run folder of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from cfd.config import Config, with_classes
from cfd.devices import parallel
from cfd.errors import UserError
from cfd.fields import BEFORE
from cfd.modes import settings
from cfd.modes.fit import fit
from cfd.networks.classifier import Classifier, classifier_loss
from cfd.runs import workdir


def train_classifier(config: Config, folder: str, *, allow_fresh_start: bool = False) -> None:
    """Train the noisy classifier of the run in `folder`, or resume it. Its own run folder is `folder`/classifier.

    `config.classifier` is the network. `config.classifier_train` takes precedence over `config.train`. Raises
    ValueError as `check_same_images` and `check_same_fields` do, and everything that `train` raises.
    """
    config = settings.of_run(config, settings.classifier_folder(folder))
    mesh = parallel.make_mesh(**config.mesh)
    dataset = settings.open_split(config, config.data.split)
    config = with_classes(config, len(dataset.class_names))
    check_same_images(config, folder, dataset.class_names)
    check_same_fields(config, folder)
    net = Classifier(image_size=config.data.image_size, **config.classifier)
    shape = (1, *settings.image_shape(config))
    train = ConfigDict({**config.train.to_dict(), **config.classifier_train.to_dict(), "posthoc_ema": ()})
    schedule = settings.training_schedule(config)

    def init(key: Array) -> Any:
        return net.init(key, jnp.zeros(shape), jnp.zeros(1))["params"]

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        key_loss, key_dropout = jax.random.split(key)

        def classifier_fn(z: Array, logsnr: Array) -> Any:
            return net.apply({"params": params}, z, logsnr, train=True, rngs={"dropout": key_dropout})

        return classifier_loss(key_loss, classifier_fn, x, labels, schedule=schedule)

    fit(
        settings.training_of(config, train),
        settings.classifier_folder(folder),
        mesh,
        dataset,
        workdir.describe("classifier", config.to_dict(), dataset.class_names),
        init,
        loss_fn,
        settings.optimizer_of(train),
        None,
        allow_fresh_start=allow_fresh_start,
    )


def check_same_images(config: Config, folder: str, class_names: tuple[str, ...]) -> None:
    """Raises ValueError if `folder` holds another run than a diffusion model of the config's images and classes."""
    if not workdir.has_config(folder):
        return
    workdir.check_kind(folder)
    data = config.data
    workdir.check_images(folder, image_size=data.image_size, channels=data.channels, num_classes=data.num_classes)
    settings.check_class_names(folder, class_names, data.split)


def check_same_fields(config: Config, folder: str) -> None:
    """Raises ValueError if the run in `folder` records another `classifier`, or if its range of λ is not covered.

    A run without a step has no settled config. A classifier that has begun is resumed with its own config.
    """
    if not workdir.has_begun(folder) or workdir.has_begun(settings.classifier_folder(folder)):
        return
    run = workdir.read_config(folder)["config"]
    if "classifier" in run:  # an imported network records none
        there, here = ({"config": {"classifier": of_run["classifier"]}} for of_run in (run, config.to_dict()))
        if differences := workdir.config_differences(there, here, BEFORE):
            raise UserError(
                f"{folder} is a run with another classifier: {workdir.abbreviate(differences)}. Give the run's own "
                f"config, which --config={folder} is; or train this classifier with another --workdir, and move its "
                f"folder `classifier` to {settings.classifier_folder(folder)}"
            )
    remedy = f"give the run's own process.logsnr_min and process.logsnr_max, as --config={folder} does"
    settings.check_range("the classifier of this config", config.process.to_dict(), run["process"], remedy)
