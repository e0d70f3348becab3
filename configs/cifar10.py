"""Classifier-free guidance on CIFAR-10 at 32x32.

The network is the U-Net of Nichol and Dhariwal's CIFAR-10 models (arXiv:2102.09672) in ADM's form: 128 channels,
multipliers 1, 2, 2, 2, three residual blocks per level, attention at 16 and 8. p_uncond, λ and v are those of the
ImageNet 64 experiment of Ho and Salimans (arXiv:2207.12598). Metrics come from a small classifier of the training
images, not from Inception.

    python -m cfd.main --config=cifar10 --config.data.path=FOLDER

FOLDER contains train/<class>/*.jpg and test/<class>/*.jpg (or PNG, or WebP). A prepared TFDS copy works as well, with
the extra tfds: --config.data.source=tfds --config.data.name=cifar10 --config.data.path=TFDS_DIR.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The CIFAR-10 experiment."""
    return ConfigDict(
        dict(
            data=dict(source="folder", path="data/cifar10", image_size=32, flip=True, in_memory=True),
            model=dict(
                base_channels=128,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=3,
                attention_resolutions=(16, 8),
                head_channels=64,
                dropout=0.1,
            ),
            train=dict(
                num_steps=200_000,
                batch_size=256,
                p_uncond=0.1,
                learning_rate=2e-4,
                warmup_steps=1000,
                ema_decay=0.9999,
                ema_warmup=True,
            ),
            classifier=dict(
                base_channels=64,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16, 8),
                head_channels=64,
            ),
            classifier_train=dict(num_steps=100_000, batch_size=256, learning_rate=3e-4),
            sample=dict(num_steps=256, v=0.3),
            eval=dict(num_samples=50_000, features="classifier", classifier_steps=4000),
        )
    )
