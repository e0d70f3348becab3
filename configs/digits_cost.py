"""What guidance costs, and what it costs in FID to pay less, on real handwritten digits: 8x8, those of UCI.

    python -m cfd.main --config=digits_cost
    python -m cfd.main --config=digits_cost --mode=cost

It trains as the config digits does, and then the small guide, in guide/ of the run's folder: a network without classes
that needs 7 % of the operations, on the same batches. Then it measures 500 images in each of 58 cells, guided in seven
ways, with and without the small guide: two passes, in an interval alone, and with a second score at every second,
fourth or eighth step, or where it differs enough. --mode=cost times batches of all ways in turns, and writes cost.md,
cost.csv and cost.png. A shared trunk and a student are runs of their own, which share the feature classifier:

    for run in trunk student; do mkdir -p runs/$run && cp -r runs/digits_cost/features runs/$run; done
    python -m cfd.main --config=digits_cost --workdir=runs/trunk --config.model.label_from=0 \\
        --config.eval.guides="('',)"
    python -m cfd.main --config=digits_student --mode=distill --workdir=runs/student --init_from=runs/digits_cost \\
        --config.eval.weights="(0.0, 0.1, 0.3, 1.0, 4.0)"
    python -m cfd.main --config=digits_cost --mode=cost --runs=runs/trunk,runs/student

configs/README.md has the table, and the command for three more rules. In short: the second score at every fourth step,
with its difference extrapolated between, costs 1.25 times an unguided image and keeps FID within 2 % up to w = 1. The
small guide is for w <= 0.1. A trunk that the class enters late (model.label_from) follows the class less well.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The digits experiment, with a grid of the ways to guide that save evaluations."""
    network = dict(
        base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
    )
    return ConfigDict(
        dict(
            data=dict(source="digits", image_size=8, channels=1, num_workers=1),
            model=dict(network),
            model_guide=dict(
                network="mp",
                base_channels=8,
                channel_mult=(1, 1),
                num_res_blocks=1,
                attention_resolutions=(),
                head_channels=8,
            ),
            train=dict(
                num_steps=800,
                batch_size=128,
                p_uncond=0.1,
                learning_rate=1e-3,
                warmup_steps=100,
                ema_decay=0.995,
                checkpoint_every_steps=200,
                log_every_steps=50,
                sample_every_steps=0,
            ),
            classifier=dict(network),
            classifier_train=dict(num_steps=600, batch_size=128, learning_rate=1e-3),
            sample=dict(num_steps=32, v=0.3, batch_size=250),
            eval=dict(
                weights=(0.1, 0.3, 1.0, 4.0),
                rules=(
                    ("", (0.0, 0.1, 0.3, 1.0, 4.0)),
                    "interval(-2, 4)",
                    "every(2)",
                    "every(4)",
                    "every(8)",
                    "extrapolated(4)",
                    "similar(0.97, 4)",
                ),
                guides=("", "guide"),
                num_samples=500,
                classifier_steps=400,
            ),
        )
    )
