"""Guidance rules and guides compared on CIFAR-10 at 32x32.

    python -m cfd.main --config=cifar10_rules --config.data.path=FOLDER
    python -m cfd.main --config=cifar10_rules --config.data.path=FOLDER --mode=compare

It trains as the config cifar10 does, which says how FOLDER looks, and keeps a snapshot every 20,000 steps. Then it
samples and measures 10,000 images in each of 86 cells: 14 rules, with and without a guide, at three or four weights
each. The guide, "@20000", is the run itself after a tenth of its training (autoguidance, arXiv:2406.02507).

This experiment has not been run. The numbers of the rules are those of the config digits_rules, scaled to 3,072 values
per image where they are norms: look at a few cells first, for example with --config.eval.num_samples=1000.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The CIFAR-10 experiment, with a grid of rules and guides."""
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
                snapshot_every_steps=20_000,
            ),
            classifier=dict(
                base_channels=64,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16, 8),
                head_channels=64,
            ),
            classifier_train=dict(num_steps=100_000, batch_size=256, learning_rate=3e-4),
            sample=dict(num_steps=64, v=0.3),
            eval=dict(
                weights=(0.1, 0.3, 1.0),
                rules=(
                    ("", (0.0, 0.1, 0.3, 1.0)),
                    ("interval(-2, 4)", (0.1, 0.5, 2.0)),
                    ("ramp(-4, 2)", (0.1, 0.5, 2.0)),
                    ("exponential(0.5, 0)", (0.1, 0.5, 2.0)),
                    ("middle(-6, 6)", (0.1, 0.5, 2.0)),
                    "negative_window(-0.5, -6, -2)",
                    ("apg(0, 14, -0.5)", (0.1, 0.5, 2.0)),
                    ("cfgpp()", (-0.8, -0.7, -0.5)),
                    "cfg_zero_star(-10)",
                    "rescale(0.7)",
                    ("power_law(1)", (0.007, 0.03, 0.09)),
                    "tangential()",
                    ("feedback(0.9, 0.01, 0, 1)", (-0.5, -0.2, 0.0)),
                    "dynamic_threshold(99.5)",
                ),
                guides=("", "@20000"),
                num_samples=10_000,
                features="classifier",
                classifier_steps=4000,
            ),
        )
    )
