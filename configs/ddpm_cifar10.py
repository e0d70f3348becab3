"""DDPM on CIFAR-10, without labels: Ho, Jain and Abbeel (arXiv:2006.11239), who report FID 3.17 and IS 9.46.

    python -m cfd.convert inception pt_inception-2015-12-05-6726825d.pth inception.npz
    python -m cfd.main --config=ddpm_cifar10 --config.data.path=FOLDER
    python -m cfd.main --config=ddpm_cifar10 --config.data.path=FOLDER --mode=likelihood

FOLDER is as in the config `cifar10`. L_simple is the plain loss of ε with the λ of DDPM's table of β, from 1e-4 to 0.02
in 1000 steps. The network is that of its Appendix B: 128 channels, multipliers 1, 2, 2, 2, two residual blocks per
level, attention at 16 with one head, an embedding that is added, and convolutions that change the resolution. So are
dropout 0.1, random flips, Adam with the learning rate 2e-4, the batch of 128, EMA 0.9999 and 800,000 steps; the warm-up
of 5,000 steps and the clipping of gradients at a norm of 1 are those of its released code. p_uncond = 1 trains the
unconditional model alone, which w = −1 samples. v = 1 is the variance β of its reverse steps, and v = 0 the other one.

Two things differ from DDPM. λ is continuous between the entries of the table. The features of FID and IS are those of
the Inception network in PyTorch, not of TensorFlow's first version. This config was not run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """DDPM on CIFAR-10."""
    return ConfigDict(
        dict(
            data=dict(source="folder", path="data/cifar10", image_size=32, flip=True, in_memory=True),
            model=dict(
                base_channels=128,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16,),
                head_channels=0,
                num_heads=1,
                resblock_updown=False,
                scale_shift_norm=False,
                dropout=0.1,
                time="adm_linear",
            ),
            process=dict(logsnr_min=-10.117673, logsnr_max=9.21024, schedule="adm_linear"),
            train=dict(
                num_steps=800_000,
                batch_size=128,
                p_uncond=1.0,
                learning_rate=2e-4,
                warmup_steps=5000,
                grad_clip=1.0,
                ema_decay=0.9999,
                checkpoint_every_steps=5000,
                sample_every_steps=50_000,
            ),
            classifier=dict(
                base_channels=64,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16, 8),
                head_channels=64,
            ),
            sample=dict(num_steps=1000, v=1.0, w=(-1.0,)),
            eval=dict(weights=(-1.0,), num_samples=50_000, features="inception", inception_path="inception.npz"),
            likelihood=dict(num_steps=1000, v=1.0, num_images=0),
        )
    )
