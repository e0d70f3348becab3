"""The ImageNet configs start on 8 to 1,024 devices without a flag, and say truly how many devices repeat work."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT

PROGRAM = """
import json, sys, tempfile
from types import SimpleNamespace
from cfd.config import complete
from cfd.data.sources import Dataset
from cfd.devices import parallel, xla
from cfd.main import load_config
from cfd.modes import settings, train, train_classifier

class Compiled(Exception):
    pass

def compiled(step, state, batch, *_, **__):
    raise Compiled(batch["image"])

def open_split(config, split):
    nothing = dict.fromkeys(("read", "read_label", "read_labels"))
    names, size = tuple(map(str, range(1000))), config.data.image_size
    return Dataset(**nothing, num_examples=1281167, image_size=size, channels=3, class_names=names,
                   on_bad_image="raise", identity="")

xla.compiled, settings.open_split = compiled, open_split
xla.lowered = lambda *_, **__: SimpleNamespace(compile=lambda: None)  # the initial state's program
for name in ("imagenet64", "imagenet128"):
    config = load_config(name)
    config.model.num_res_blocks = config.classifier.num_res_blocks = 1  # a fraction of the time of tracing
    config = complete(config)
    parallel.check_batch("sample.batch_size", config.sample.batch_size, parallel.make_mesh(**config.mesh))
    for mode in (train.train, train_classifier.train_classifier):
        with tempfile.TemporaryDirectory() as folder:
            try:
                mode(config, folder)
            except Compiled as caught:
                image = caught.args[0]
        index = image.sharding.devices_indices_map(image.shape)
        rows = sorted({part[0].indices(image.shape[0])[:2] for part in index.values()})
        print(json.dumps(dict(name=name, mode=mode.__name__, devices=len(index), batch=image.shape[0], rows=rows)))
"""


@pytest.mark.parametrize("devices", [8, 256, 1024])
def test_imagenet_starts_on_any_slice_without_a_flag(devices: int) -> None:
    """Everything up to the compilation of the first step: the checks, the mesh, the shapes and their divisions."""
    environment = os.environ | dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    batches = {(run["name"], run["mode"]): run["batch"] for run in found}
    assert batches == {  # the paper's and ADM's
        ("imagenet64", "train"): 2048,
        ("imagenet64", "train_classifier"): 256,
        ("imagenet128", "train"): 256,
        ("imagenet128", "train_classifier"): 256,
    }
    for run in found:
        parts, split = run["rows"], min(devices, run["batch"])
        assert run["devices"] == devices and len(parts) == split
        assert [row for low, high in parts for row in range(low, high)] == list(range(run["batch"]))
        assert len({high - low for low, high in parts}) == 1
    few = "is 256, fewer rows than the 1024 devices: 256 of them share the work of a step, and the other 768 repeat it"
    said = [line for line in done.stdout.splitlines() if few in line]
    fields = ["classifier_train.batch_size", "train.batch_size", "classifier_train.batch_size"]
    assert [line.split()[0] for line in said] == (fields if devices == 1024 else [])
    assert ("they draw 1024 at a time" in done.stdout) == (devices == 1024)
