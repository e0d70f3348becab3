"""DDPM's ablation on digits: which quantity the network predicts, and with which weights its error is trained.

Ho, Jain and Abbeel (arXiv:2006.11239), Table 2, on CIFAR-10, without labels: the bound gives better likelihoods, and
the unweighted error of ε better samples. This config is the cell of ε and the unweighted error, L_simple. All six:

    for predict in mean eps x; do
      for loss in --config.process.schedule=linear --config.train.weight=$predict; do
        flags="--config=digits_ddpm --workdir=runs/digits_ddpm/$predict-${loss##*=} --config.model.predict=$predict"
        python -m cfd.main $flags $loss && python -m cfd.main $flags $loss --mode=likelihood
      done
    done

With process.schedule = "linear" and train.weight = "eps", the loss is the bound, whatever the network predicts. With
the other flag, it is the unweighted error of the predicted quantity, at the λ of DDPM's 1000 steps. All cells sample by
the same 32 steps between the same ends. The data and the network are those of `digits`; p_uncond = 1 trains the
unconditional model alone, which w = −1 samples.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """DDPM on digits: ε and L_simple."""
    return ConfigDict(
        dict(
            data=dict(source="digits", image_size=8, channels=1, num_workers=1),
            model=dict(
                base_channels=32,
                channel_mult=(1, 1),
                num_res_blocks=1,
                attention_resolutions=(4,),
                head_channels=32,
                time="adm_linear",
                predict="eps",
            ),
            process=dict(logsnr_min=-10.117673, logsnr_max=9.21024, schedule="adm_linear"),
            train=dict(
                num_steps=800,
                batch_size=128,
                p_uncond=1.0,
                weight="eps",
                learning_rate=1e-3,
                warmup_steps=100,
                ema_decay=0.995,
                checkpoint_every_steps=200,
                log_every_steps=50,
                sample_every_steps=800,
            ),
            classifier=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            classifier_train=dict(num_steps=600, batch_size=128, learning_rate=1e-3),
            sample=dict(num_steps=32, schedule="adm_linear", v=0.3, w=(-1.0,)),
            eval=dict(weights=(-1.0,), num_samples=500, classifier_steps=400),
            likelihood=dict(num_images=0),
        )
    )
