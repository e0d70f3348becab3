"""What guidance costs on CIFAR-10, and what it costs in FID to pay less.

    python -m cfd.main --config=cifar10_cost
    python -m cfd.main --config=cifar10_cost --mode=cost

It trains the network of the config cifar10, in a shorter run, and then the small guide, a network without classes that
needs 5 % of its operations, on the same batches. Then it measures 10,000 images in each of 58 cells, guided in seven
ways, with and without the small guide. --mode=cost times batches of all ways in turns, and writes cost.md, cost.csv and
cost.png. For the student and the shared trunk, which are runs of their own:

    for run in trunk student; do mkdir -p runs/$run && cp -r runs/cifar10_cost/features runs/$run; done
    python -m cfd.main --config=cifar10_cost --workdir=runs/trunk --config.model.label_from=0 \\
        --config.eval.guides="('',)"
    python -m cfd.main --config=cifar10_cost --mode=distill --workdir=runs/student --init_from=runs/cifar10_cost \\
        --config.distill.learning_rate=1e-2 --config.eval.rules="()" --config.eval.guides="()" \\
        --config.eval.weights="(0.0, 0.1, 0.3, 1.0, 4.0)"
    python -m cfd.main --config=cifar10_cost --mode=cost --runs=runs/trunk,runs/student

It has not been run yet, and the student's learning rate, that of digits, is a guess.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The CIFAR-10 experiment, with a grid of the ways to guide that save evaluations."""
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
            model_guide=dict(
                base_channels=32,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(8,),
                head_channels=32,
                dropout=0.1,
            ),
            train=dict(
                num_steps=30_000,
                batch_size=256,
                p_uncond=0.1,
                learning_rate=2e-4,
                warmup_steps=1000,
                ema_decay=0.9999,
                ema_warmup=True,
            ),
            sample=dict(num_steps=64, v=0.3, batch_size=1000),
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
                num_samples=10_000,
                features="classifier",
                classifier_steps=4000,
            ),
        )
    )
