"""ImageNet 64x64: the experiment of Section 4.1 and Table 1 of Ho and Salimans, Classifier-Free Diffusion Guidance
(arXiv:2207.12598). λ in [−20, 20], v = 0.3, 400,000 steps, 50,000 samples per weight. Best FID at w = 0.1:

                  p_uncond = 0.1     p_uncond = 0.2     p_uncond = 0.5
         w        FID      IS        FID      IS        FID      IS
         0.0      1.8      53.71     1.8      52.9      2.21     47.61
         0.1      1.55     66.11     1.62     64.58     1.91     56.1
         0.2      2.04     78.91     2.1      76.99     2.08     65.6
         0.3      3.03     92.8      2.93     88.64     2.65     74.92
         0.4      4.3      106.2     4        101.11    3.44     84.27
         0.5      5.74     119.3     5.19     112.15    4.34     92.95
         0.6      7.19     131.1     6.48     122.13    5.27     102
         0.7      8.62     141.8     7.73     131.6     6.23     109.8
         0.8      10.08    151.6     8.9      140.82    7.25     116.9
         0.9      11.41    161       10.09    150.26    8.21     124.6
         1.0      12.6     170.1     11.21    158.29    9.13     131.1
         2.0      21.03    225.5     18.79    212.98    16.16    183
         3.0      24.83    250.4     22.36    237.65    19.75    208.9
         4.0      26.22    260.2     23.84    248.97    21.48    225.1

The network and the optimizer are those of Dhariwal and Nichol's 64x64 model (ADM, arXiv:2105.05233, Appendix I, and the
README of openai/guided-diffusion): 192 channels, multipliers 1, 2, 3, 4, 3 residual blocks, attention at 32, 16 and 8,
64 channels per head, residual blocks that resample, scale-shift norm, dropout 0.1, batch 2048, learning rate 3e-4, Adam
with β = (0.9, 0.999) and no weight decay, EMA 0.9999, 16-bit activations. ADM trained it for 540,000 iterations;
num_steps here is the paper's. T = 256 for this table is in the earlier version of the paper, of the NeurIPS 2021
Workshop on Deep Generative Models and Downstream Applications.

Five things differ from ADM. The network learns ε alone and not the variance, so that it has 3 outputs and the plain
loss. λ is continuous, follows the cosine schedule, and enters the network as that schedule's own time, whereas ADM
trained on 1000 discrete steps of the cosine schedule. Labels are dropped with p_uncond = 0.1. Activations are bfloat16
instead of float16, so that no loss scaling is needed. Gradients are clipped at a norm of 1. To sample from ADM's
own weights instead, import them: `python -m cfd.convert adm 64x64_diffusion.pt OUT`.

The noisy classifier of classifier guidance is ADM's (128 channels, depth 4, attention pooling), with the flags that its
README gives for 128x128: 300,000 iterations of batch 256, learning rate 3e-4, weight decay 0.05. The learning rate is
constant here, whereas ADM anneals it to 0. λ is drawn as for the diffusion model.

    python -m cfd.convert inception pt_inception-2015-12-05-6726825d.pth inception.npz
    python -m cfd.main --config=imagenet64

The second command is the same on every host of a TPU slice, and takes any number of devices that divides 2048. On more
than 256 devices, sampling draws one image per device, and most devices repeat the work of others in the classifier's
steps of 256 rows.

The data set is TFDS's `imagenet_resized/64x64` (extra tfds), prepared once as ArrayRecord below data.path, which is
~/tensorflow_datasets if it is empty. The first start without it prints the command that prepares it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The ImageNet 64x64 experiment."""
    return ConfigDict(
        dict(
            data=dict(source="tfds", name="imagenet_resized/64x64", image_size=64, flip=True, num_workers=16),
            model=dict(
                base_channels=192,
                channel_mult=(1, 2, 3, 4),
                num_res_blocks=3,
                attention_resolutions=(32, 16, 8),
                head_channels=64,
                dropout=0.1,
                dtype="bfloat16",
            ),
            process=dict(logsnr_min=-20.0, logsnr_max=20.0),
            train=dict(
                num_steps=400_000,
                batch_size=2048,
                p_uncond=0.1,
                learning_rate=3e-4,
                ema_decay=0.9999,
                sample_every_steps=25_000,
            ),
            classifier=dict(
                base_channels=128,
                channel_mult=(1, 2, 3, 4),
                num_res_blocks=4,
                attention_resolutions=(32, 16, 8),
                head_channels=64,
            ),
            classifier_train=dict(num_steps=300_000, batch_size=256, learning_rate=3e-4, weight_decay=0.05),
            sample=dict(num_steps=256, v=0.3),
            eval=dict(
                num_samples=50_000, features="inception", inception_path="inception.npz", test_split="validation"
            ),
        )
    )
