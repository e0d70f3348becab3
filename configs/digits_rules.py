"""Guidance rules and guides compared on real handwritten digits: 8x8, those of UCI.

    python -m cfd.main --config=digits_rules
    python -m cfd.main --config=digits_rules --mode=compare

It trains as the config digits does, but with train.ema_warmup, without which the EMA of an early step is mostly the
random initialisation, and keeps a snapshot every 80 steps. Then it samples and measures 500 images in each of 86 cells:
14 rules, with and without a guide, at three or four weights each. The guide, "@80", is the run itself after a tenth of
its training (autoguidance, arXiv:2406.02507). It costs no training of its own. --mode=compare brings all rules to the
strength of plain guidance at w = 0.1, 0.3 and 1 before it compares them.

The sweep takes 2.7 million network evaluations, six times those of the config digits, and resumes at any cell. On two
quiet cores (AMD EPYC), training and sweep took 7 min 40 s. The numbers of the rules fit these images: 64 pixels, where
the difference of the two clean images has a norm of 1 to 3 at λ between −3 and 1. The weights are chosen to bracket the
strength of plain guidance at w = 0.1 to 1. A negative w of cfgpp() is its own scale, λ = 1 + w (arXiv:2406.08070).
feedback() adds its own weight, at most 1, to w.

         matched to plain guidance at w = 0.3: FID-500, and the paired difference with its 95 % interval
         plain                          7.23
         apg(0, 2, -0.5)                6.47   -0.76 ± 0.25
         dynamic_threshold(95)          6.32   -0.91 ± 0.36
         negative_window(-0.5, -6, -2)  6.41   -0.82 ± 0.29
         plain, guide "@80"             9.11   +1.88 ± 6.27
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The digits experiment, with a grid of rules and guides."""
    return ConfigDict(
        dict(
            data=dict(source="digits", image_size=8, channels=1, num_workers=1),
            model=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            train=dict(
                num_steps=800,
                batch_size=128,
                p_uncond=0.1,
                learning_rate=1e-3,
                warmup_steps=100,
                ema_decay=0.995,
                ema_warmup=True,
                checkpoint_every_steps=200,
                snapshot_every_steps=80,
                log_every_steps=50,
                sample_every_steps=400,
            ),
            classifier=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            classifier_train=dict(num_steps=600, batch_size=128, learning_rate=1e-3),
            sample=dict(num_steps=32, v=0.3),
            eval=dict(
                weights=(0.1, 0.3, 1.0),
                rules=(
                    ("", (0.0, 0.1, 0.3, 1.0)),
                    ("interval(-2, 4)", (0.1, 0.5, 2.0)),
                    ("ramp(-4, 2)", (0.1, 0.5, 2.0)),
                    ("exponential(0.5, 0)", (0.1, 0.5, 2.0)),
                    ("middle(-6, 6)", (0.1, 0.5, 2.0)),
                    "negative_window(-0.5, -6, -2)",
                    ("apg(0, 2, -0.5)", (0.1, 0.5, 2.0)),
                    ("cfgpp()", (-0.8, -0.7, -0.5)),
                    "cfg_zero_star(-10)",
                    "rescale(0.7)",
                    ("power_law(1)", (0.05, 0.2, 0.6)),
                    "tangential()",
                    ("feedback(0.9, 0.01, 0, 1)", (-0.5, -0.2, 0.0)),
                    "dynamic_threshold(95)",
                ),
                guides=("", "@80"),
                num_samples=500,
                classifier_steps=400,
            ),
        )
    )
