"""The paper's experiment on real handwritten digits (8x8, scikit-learn's copy of the UCI set)."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The digits experiment."""
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="digits",
                name="",
                split="train",
                path="",
                image_size=8,
                channels=1,
                num_classes=10,
                flip=False,
                on_bad_image="raise",
                num_workers=1,
            ),
            model=dict(
                num_classes=10,
                out_channels=1,
                base_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(4,),
                head_channels=32,
                num_heads=0,
                resblock_updown=True,
                scale_shift_norm=True,
                dropout=0.0,
                time="cosine",
                dtype="float32",
                remat=False,
            ),
            process=dict(logsnr_min=-20.0, logsnr_max=20.0),
            train=dict(
                num_steps=1500,
                batch_size=128,
                p_uncond=0.1,
                learning_rate=1e-3,
                warmup_steps=100,
                adam_b1=0.9,
                adam_b2=0.999,
                weight_decay=0.0,
                grad_clip=1.0,
                ema_decay=0.995,
                num_microbatches=1,
                nonfinite_limit=3,
                checkpoint_every_steps=500,
                keep_checkpoints=2,
                log_every_steps=50,
                sample_every_steps=500,
            ),
            mesh=dict(data=-1, fsdp=1),
            sample=dict(
                num_steps=64,
                sampler="ancestral",
                v=0.3,
                w=(0.0, 1.0, 2.0, 4.0),
                interval=(),
                doubled=False,
                clip=True,
                classes=(),
                seeds=(0,),
                batch_size=250,
            ),
            eval=dict(
                weights=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0),
                num_samples=500,
                seed=1000,
                features="classifier",
                inception_path="",
                test_split="test",
                classifier_steps=400,
            ),
            xla=dict(compilation_cache=""),
        )
    )
