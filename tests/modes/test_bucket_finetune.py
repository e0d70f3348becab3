"""A run in a bucket as the source of another: `load`, `load_classifier` and `--init_from=gs://BUCKET/RUN[:STEP]`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import opened, same_bits
from gcs import FakeGcs
from tiny import tiny_config

from cfd.loading import load, load_classifier
from cfd.modes import finetune
from cfd.networks.classifier import Classifier
from cfd.networks.model import module
from cfd.runs import checkpoint, workdir


def make_run(folder: str, kind: str = "diffusion") -> Any:
    """A run with checkpoints of steps 3 and 5, whose weights are random. Returns its config."""
    config = tiny_config()
    size, zeros = config.data.image_size, (jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    if kind == "diffusion":
        net, zeros = module(dict(config.model), size), (*zeros, jnp.zeros(1, jnp.int32))
    else:
        net = Classifier(image_size=size, **config.classifier)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *zeros)["params"]
    workdir.write_config(folder, workdir.describe(kind, config.to_dict(), tuple("0123456789")))
    with opened(folder) as manager:
        for step in (3, 5):
            rng = np.random.default_rng(step)
            ema = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
            checkpoint.save(manager, step, {"ema": ema}, data_state={}, config_json=workdir.read_config(folder))
    return config


def test_a_run_in_a_bucket_is_loaded(bucket: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, read in (("diffusion", load), ("classifier", load_classifier)):
        make_run(f"{bucket.url}/{kind}", kind)
        make_run(str(tmp_path / kind), kind)
        there, here = (read(f"{place}/{kind}/", 3) for place in (bucket.url, tmp_path))
        assert same_bits(*([x for x in jax.tree.leaves(t) if isinstance(x, jax.Array)] for t in (there, here)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier", "diffusion"]


def test_a_new_run_begins_with_one_in_a_bucket(bucket: FakeGcs, tmp_path: Path) -> None:
    url = f"{bucket.url}/old"
    config = make_run(url)
    assert finetune.parse(url) == (url, None) and finetune.parse(f"{url}/:3") == (url, 3)
    bucket.put("old:7/config.json", b"{}")  # a folder with such a name
    assert finetune.parse(f"{url}:7") == (f"{url}:7", None)
    for named, step in ((url, 5), (f"{url}:3", 3)):
        start = finetune.find(config, str(tmp_path / "new"), named)
        assert start is not None and start.source[:2] == (url, step)
        assert start.source.weights_hash == load(url, step).weights_hash
    for folder in ("empty", "empty/"):
        with pytest.raises(ValueError, match="the run's own folder"):
            finetune.check(config, f"{bucket.url}/{folder}", f"{bucket.url}/empty")
    with pytest.raises(ValueError, match=r"gs://cfd-test/old has no step 4: --init_from=\S+ takes one of \[3, 5\]"):
        finetune.check(config, str(tmp_path / "new"), f"{url}:4")
    for step in (3, 5):
        for part in ("", "state/", "meta/"):
            del bucket.objects[f"old/checkpoints/{step}/{part}commit_success.txt"]
    with pytest.raises(
        ValueError, match=r"has no checkpoint: .* without a commit file .* not used: 3, 5\..* python -c"
    ):
        finetune.check(config, str(tmp_path / "new"), url)
