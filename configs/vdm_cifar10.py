"""A variational diffusion model of CIFAR-10: Kingma et al. (arXiv:2107.00630), who report 2.65 bits per dimension on
the test set for training without augmented data.

    python -m cfd.main --config=vdm_cifar10 --config.data.path=FOLDER
    python -m cfd.main --config=vdm_cifar10 --config.data.path=FOLDER --mode=likelihood

FOLDER is as in the config `cifar10`. The network does not change the resolution: 32 residual blocks of 128 channels on
the way down and 33 on the way up, attention in the middle alone, and Fourier features with n = 7 and 8. It embeds λ
itself. It is trained on the bound, without classes and without flips, with the learned schedule and times of low
discrepancy. The ends of λ, the batch, the optimizer, the EMA and the number of steps are those of the configuration
that google-research/vdm publishes (configs/cifar10.py).

Three things differ from VDM. Its network adds z to its output. The schedule of its CIFAR-10 model learns its two ends
and is linear between them; here the ends are fixed, and what is between them is learned. Gradients are clipped at a
norm of 1. This config was not run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """VDM on CIFAR-10."""
    return ConfigDict(
        dict(
            data=dict(source="folder", path="data/cifar10", image_size=32, in_memory=True),
            model=dict(
                base_channels=128,
                channel_mult=(1,),
                num_res_blocks=32,
                attention_resolutions=(),
                head_channels=0,
                num_heads=1,
                dropout=0.1,
                time="logsnr",
                fourier=(7, 8),
            ),
            process=dict(logsnr_min=-5.0, logsnr_max=13.3, schedule="learned"),
            train=dict(
                num_steps=10_000_000,
                batch_size=128,
                p_uncond=1.0,
                low_discrepancy=True,
                learning_rate=2e-4,
                warmup_steps=100,
                adam_b2=0.99,
                weight_decay=0.01,
                ema_decay=0.9999,
                checkpoint_every_steps=10_000,
                sample_every_steps=100_000,
            ),
            classifier=dict(
                base_channels=64,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16, 8),
                head_channels=64,
            ),
            sample=dict(num_steps=1000, v=0.0, w=(-1.0,)),
            eval=dict(weights=(-1.0,), num_samples=50_000, classifier_steps=4000),
            likelihood=dict(num_steps=1000, num_images=0),
        )
    )
