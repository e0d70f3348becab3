"""ImageNet 128x128: the experiment of Section 4.3 and Table 2 of Ho and Salimans, Classifier-Free Diffusion Guidance
(arXiv:2207.12598). λ in [−20, 20], v = 0.2, 2.7 million steps, 50,000 samples per weight. Best FID at w = 0.3:

                  T = 128            T = 256            T = 1024
         w        FID      IS        FID      IS        FID      IS
         0.0      8.11     81.46     7.27     82.45     7.22     81.54
         0.1      5.31     105.01    4.53     106.12    4.5      104.67
         0.2      3.7      130.79    3.03     132.54    3        130.09
         0.3      3.04     156.09    2.43     158.47    2.43     156
         0.4      3.02     183.01    2.49     183.41    2.48     180.88
         0.5      3.43     206.94    2.98     207.98    2.96     204.31
         0.6      4.09     227.72    3.76     228.83    3.73     226.76
         0.7      4.96     247.92    4.67     249.25    4.69     247.89
         0.8      5.93     265.54    5.74     267.99    5.71     265.52
         0.9      6.89     280.19    6.8      283.41    6.81     281.14
         1.0      7.88     295.29    7.86     297.98    7.8      294.56
         2.0      15.9     378.56    15.93    377.37    15.75    373.18
         3.0      19.77    409.16    19.77    407.44    19.56    405.68
         4.0      21.55    422.29    21.53    421.03    21.45    419.06

The network and the optimizer are those of Dhariwal and Nichol's 128x128 model (ADM, arXiv:2105.05233, Appendix I, and
the README of openai/guided-diffusion): 256 channels, multipliers 1, 1, 2, 3, 4, 2 residual blocks, attention at 32, 16
and 8, 4 heads, residual blocks that resample, scale-shift norm, dropout 0.0, batch 256, learning rate 1e-4, Adam with β
= (0.9, 0.999) and no weight decay, EMA 0.9999, 16-bit activations. ADM trained it for 4,360,000 iterations; num_steps
here is the paper's.

Five things differ from ADM. The network learns ε alone and not the variance, so that it has 3 outputs and the plain
loss. λ is continuous, follows the cosine schedule, and enters the network as that schedule's own time, whereas ADM
trained on 1000 discrete steps of the linear schedule. Labels are dropped with p_uncond = 0.1. Activations are bfloat16
instead of float16, so that no loss scaling is needed. Gradients are clipped at a norm of 1. To sample from ADM's
own weights instead, import them: `python -m cfd.convert adm 128x128_diffusion.pt OUT`.

The noisy classifier of classifier guidance is ADM's (128 channels, depth 2, attention pooling), with the flags that its
README gives for 128x128: 300,000 iterations of batch 256, learning rate 3e-4, weight decay 0.05. The learning rate is
constant here, whereas ADM anneals it to 0. λ is drawn as for the diffusion model.

    python -m cfd.convert inception pt_inception-2015-12-05-6726825d.pth inception.npz
    python -m cfd.main --config=imagenet128

The second command is the same on every host of a TPU slice, and takes any number of devices that divides 256. On more
devices, such as 1,024, 256 of them share the work of a training step and the others repeat it; sampling then draws one
image per device.

The data set is TFDS's `imagenet2012` (extra tfds), prepared once as ArrayRecord below data.path, which is
~/tensorflow_datasets if it is empty. The first start without it prints the command that prepares it. Images are reduced
to 128x128 as they are read, and stay as they are stored whatever their EXIF orientation says, as ADM's do. Images with
fewer than 128 pixels on a side, which ADM enlarges, are skipped and counted in the metrics.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The ImageNet 128x128 experiment."""
    return ConfigDict(
        dict(
            data=dict(
                source="tfds",
                name="imagenet2012",
                image_size=128,
                flip=True,
                on_bad_image="skip",
                exif_orientation=False,
                num_workers=16,
            ),
            model=dict(
                base_channels=256,
                channel_mult=(1, 1, 2, 3, 4),
                num_res_blocks=2,
                attention_resolutions=(32, 16, 8),
                head_channels=0,
                num_heads=4,
                dtype="bfloat16",
            ),
            process=dict(logsnr_min=-20.0, logsnr_max=20.0),
            train=dict(
                num_steps=2_700_000,
                batch_size=256,
                p_uncond=0.1,
                learning_rate=1e-4,
                ema_decay=0.9999,
                sample_every_steps=25_000,
            ),
            classifier=dict(
                base_channels=128,
                channel_mult=(1, 1, 2, 3, 4),
                num_res_blocks=2,
                attention_resolutions=(32, 16, 8),
                head_channels=64,
            ),
            classifier_train=dict(num_steps=300_000, batch_size=256, learning_rate=3e-4, weight_decay=0.05),
            sample=dict(num_steps=256, v=0.2),
            eval=dict(
                num_samples=50_000, features="inception", inception_path="inception.npz", test_split="validation"
            ),
        )
    )
