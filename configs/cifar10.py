"""Classifier-free guidance on CIFAR-10 at 32x32.

The U-Net of Nichol and Dhariwal's CIFAR-10 models (arXiv:2102.09672: 128 channels, multipliers 1, 2, 2, 2, three
residual blocks a level, attention at 16 and 8) in ADM's form; p_uncond, λ and v as in the ImageNet 64 experiment of Ho
and Salimans (arXiv:2207.12598). Metrics come from a small classifier of the training images, not from Inception.

    python -m cfd.main --config=configs/cifar10.py --config.data.path=FOLDER

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg (or PNG). A prepared TFDS copy works as well:
--config.data.source=tfds --config.data.name=cifar10 --config.data.path=TFDS_DIR.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The CIFAR-10 experiment."""
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="folder",
                name="",
                split="train",
                path="data/cifar10",
                image_size=32,
                channels=3,
                num_classes=10,
                flip=True,
                on_bad_image="raise",
                in_memory=True,
                num_workers=2,
            ),
            model=dict(
                num_classes=10,
                out_channels=3,
                base_channels=128,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=3,
                attention_resolutions=(16, 8),
                head_channels=64,
                num_heads=0,
                resblock_updown=True,
                scale_shift_norm=True,
                dropout=0.1,
                dtype="float32",
                remat=False,
                time="cosine",
            ),
            process=dict(logsnr_min=-20.0, logsnr_max=20.0),
            train=dict(
                num_steps=200_000,
                batch_size=256,
                p_uncond=0.1,
                learning_rate=2e-4,
                warmup_steps=1000,
                adam_b1=0.9,
                adam_b2=0.999,
                weight_decay=0.0,
                grad_clip=1.0,
                ema_decay=0.9999,
                ema_warmup=True,
                num_microbatches=1,
                nonfinite_limit=3,
                checkpoint_every_steps=5000,
                keep_checkpoints=2,
                log_every_steps=100,
                sample_every_steps=10_000,
                watchdog_seconds=600,
            ),
            classifier=dict(
                num_classes=10,
                base_channels=64,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16, 8),
                head_channels=64,
                num_heads=0,
                resblock_updown=True,
                scale_shift_norm=True,
                dropout=0.0,
                time="cosine",
                dtype="float32",
                remat=False,
            ),
            classifier_train=dict(num_steps=100_000, batch_size=256, learning_rate=0.0003, weight_decay=0.05),
            mesh=dict(data=-1, fsdp=1),
            sample=dict(
                num_steps=256,
                sampler="ancestral",
                v=0.3,
                w=(0.0, 1.0, 2.0, 4.0),
                guidance="classifier-free",
                interval=(),
                doubled=False,
                clip=True,
                classes=(),
                seeds=(0,),
                batch_size=256,
            ),
            eval=dict(
                weights=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0),
                num_steps=(),
                v=(),
                intervals=(),
                num_samples=50_000,
                labels="balanced",
                seed=1000,
                features="classifier",
                inception_path="",
                reference="",
                test_split="test",
                classifier_steps=4000,
            ),
            xla=dict(compilation_cache=""),
        )
    )
