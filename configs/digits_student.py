"""A student of the digits run, whose guidance weight is an input: one evaluation a step, for every w in [0, 4].

    python -m cfd.main --config=digits
    python -m cfd.main --config=digits_student --mode=distill

Meng et al., On Distillation of Guided Diffusion Models (arXiv:2210.03142), stage one. The student begins with the
weights of runs/digits. It takes a tenth of its teacher's training steps, and is then swept as its teacher was.

Stage two halves the number of steps, down to one evaluation per image. It needs a network that predicts v, and so a
teacher that does:

    python -m cfd.main --config=digits --config.model.predict=v --config.train.weight=v --workdir=runs/digits_v
    python -m cfd.main --config=digits_student --mode=distill --init_from=runs/digits_v \\
        --workdir=runs/digits_v_student --config.model.predict=v --config.distill.weight=v \\
        --config.distill.halvings='(8, 4, 2, 1)'

The students of 8, 4, 2 and 1 steps are the runs runs/digits_v_student/steps_8 and so on.

Measured on digits (seed 1000, T = 32, FID-500), against the same images of the teacher with two evaluations per step:

         w      teacher   student, 80 steps        student, 200 steps
                FID       FID     RMSE of pixels   FID     RMSE of pixels
         0.0    4.53      6.52    0.102            5.09    0.076
         0.3    7.19      7.41    0.080            6.62    0.064
         1.0    13.37     13.89   0.085            14.13   0.062
         4.0    25.36     30.37   0.175            30.01   0.157

RMSE is in units of [-1, 1]. A tenth of the teacher's steps is not enough for the same images: use the run itself where
they matter, or more steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The digits experiment, with a student."""
    return ConfigDict(
        dict(
            data=dict(source="digits", image_size=8, channels=1, num_workers=1),
            model=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            train=dict(
                num_steps=800, batch_size=128, p_uncond=0.1, learning_rate=1e-3, adam_b2=0.99, log_every_steps=20
            ),
            distill=dict(
                teacher="runs/digits",
                weights=(0.0, 4.0),
                num_steps=80,
                batch_size=256,
                learning_rate=3e-3,
                warmup_steps=5,
            ),
            classifier=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            sample=dict(num_steps=32, v=0.3),
            eval=dict(num_samples=500, classifier_steps=400),
        )
    )
