"""A student of the digits run, whose guidance weight is an input: one evaluation per step, for every w in [0, 4].

    python -m cfd.main --config=digits
    python -m cfd.main --config=digits_student --mode=distill

Meng et al., On Distillation of Guided Diffusion Models (arXiv:2210.03142), stage one. The student begins with the
weights of runs/digits. It takes a tenth of its teacher's training steps, each with eight times as many images, and is
then swept as its teacher was.

Stage two halves the number of steps, down to one evaluation per image. It needs a network that predicts v, and so a
teacher that does:

    python -m cfd.main --config=digits --config.model.predict=v --config.train.weight=v --workdir=runs/digits_v
    python -m cfd.main --config=digits_student --mode=distill --init_from=runs/digits_v \\
        --workdir=runs/digits_v_student --config.model.predict=v --config.distill.weight=v \\
        --config.distill.batch_size=512 --config.distill.learning_rate=3e-3 --config.distill.halvings='(8, 4, 2, 1)'

The students of 8, 4, 2 and 1 steps are the runs runs/digits_v_student/steps_8 and so on.

Stage one leaves the teacher's parameters as they are and learns only the input w (cfd/networks/weight.py): 109,345 of
463,426 parameters. Everything that w adds is 0 at w = 0, where the student is therefore its teacher. An evaluation has
1.07 times the operations of one of the teacher.

Measured on digits (seed 1000, T = 32, FID-500), after a tenth of the teacher's steps, with the RMSE of the pixels in
[-1, 1] against the teacher's images of the same noise:

         w      teacher: FID, IS, recall   student: FID, IS, recall   RMSE
         0.0     4.53  9.837  0.928         4.53  9.837  0.928        0.000
         0.1     5.27  9.872  0.901         5.33  9.860  0.901        0.009
         0.2     6.18  9.906  0.876         6.33  9.918  0.875        0.016
         0.3     7.19  9.951  0.848         7.47  9.960  0.850        0.021
         0.4     8.25  9.969  0.816         8.69  9.980  0.809        0.028
         0.5     9.26  9.986  0.791         9.95  9.981  0.783        0.032
         0.6    10.21  9.995  0.768        11.16  9.989  0.753        0.037
         0.7    11.10  9.997  0.742        12.32  9.995  0.730        0.042
         0.8    11.92  9.998  0.724        13.40  9.998  0.710        0.046
         0.9    12.67  9.998  0.709        14.46  9.999  0.688        0.050
         1.0    13.37  9.998  0.693        15.48  9.999  0.661        0.053
         2.0    18.26  9.998  0.551        23.31  9.999  0.479        0.105
         3.0    21.84  9.997  0.451        28.34  9.999  0.354        0.155
         4.0    25.36  9.996  0.371        31.76  10.000 0.278        0.200

The aim was 2 % of FID, IS and recall and an RMSE of 0.02 at every w. All of it is reached for w = 0 and 0.1, the RMSE
up to w = 0.2, recall up to 0.8, and IS everywhere. From w = 0.2 on, FID is 2 to 30 % higher: use the run itself where
this matters.

Stage two, measured in the same way with the commands above. The teacher of 800 steps predicts v, and each student takes
80 steps. FID-500 at w = 0, 0.3, 1 and 4:

         teacher, two passes, T = 32     4.82   8.15  15.42  27.80
         student of stage one, T = 32    4.82   8.61  17.99  35.78
         student of 8 steps              5.83  11.01  22.73  43.80
         student of 4 steps              6.36  11.51  22.94  43.17
         student of 2 steps              6.83  12.30  23.88  42.55
         student of 1 step               7.78  14.44  27.16  43.84
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
                batch_size=1024,
                learning_rate=1e-2,
                warmup_steps=5,
            ),
            classifier=dict(
                base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,), head_channels=32
            ),
            sample=dict(num_steps=32, v=0.3),
            eval=dict(num_samples=500, classifier_steps=400),
        )
    )
