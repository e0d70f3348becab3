"""The reference and the feature networks in a bucket: the same bytes as on a disk, and errors in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from gcs import FakeGcs, Request
from meshes import mesh_of
from tiny import tiny_config

from cfd.data.batches import load_arrays
from cfd.errors import UserError
from cfd.evaluation import inception, reference
from cfd.evaluation.features import FeatureNetwork, Outputs, open_classifier, read_recipe, recipe
from cfd.modes import settings, sweep
from cfd.runs import npz

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning")


def means(images: np.ndarray) -> Outputs:
    """Features without a network: the mean of each quarter of an image."""
    return Outputs(images.reshape(len(images), 4, -1).mean(axis=2), None, np.full((len(images), 2), 0.5))


NETWORK = FeatureNetwork("classifier", "a" * 64, means)


def opened(folder: str, path: str = "") -> reference.Reference:
    train = settings.open_split(tiny_config(), "train")
    return reference.open_reference(folder, NETWORK, train, "name", path=path, image_shape=(8, 8, 1), num_workers=1)


@pytest.mark.parametrize("from_file", [False, True])
def test_the_statistics_in_a_bucket_are_those_on_a_disk(from_file: bool, tmp_path: Path, bucket: FakeGcs) -> None:
    path = url = ""
    if from_file:
        path, url = str(tmp_path / "images.npz"), f"{bucket.url}/images.npz"
        npz.write_npz(path, {"arr_0": np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)})
        bucket.put("images.npz", Path(path).read_bytes())
    train = settings.open_split(tiny_config(), "train")
    hashes = {reference.reference_hash(NETWORK, train, path=place, data={}) for place in (path, url)}
    assert len(hashes) == 1
    opened(str(tmp_path), path)
    local = tmp_path / "features" / "reference_name.npz"
    for _ in range(2):  # the second reads the file of the first
        found = opened(f"{bucket.url}/run", url)
        assert bucket.objects["run/features/reference_name.npz"].content == local.read_bytes()
        for key, array in npz.read_npz(local).items():
            np.testing.assert_array_equal(getattr(found, key), array)


def test_the_classifier_of_a_run_in_a_bucket_is_used_again(tmp_path: Path, bucket: FakeGcs) -> None:
    train = settings.open_split(tiny_config(), "train")
    made: dict[str, Any] = dict(num_steps=2, flip=False, seed=0)
    first = open_classifier(f"{bucket.url}/run", mesh_of(1), train, train, **made)
    assert bucket.names("run") == ["run/features/classifier.json", "run/features/classifier.npz"]
    (tmp_path / "features").mkdir()
    for name in bucket.names("run"):
        (tmp_path / name.removeprefix("run/")).write_bytes(bucket.objects[name].content)
    local = open_classifier(str(tmp_path), mesh_of(1), train, train, **made)
    again = open_classifier(f"{bucket.url}/run", mesh_of(1), train, train, **made)
    images = load_arrays(train, np.arange(9))[0]
    for network in (local, again):
        assert network.weights_hash == first.weights_hash
        np.testing.assert_array_equal(network.extract(images).pool, first.extract(images).pool)
    assert sweep.classifier_folder(f"{bucket.url}/run", str(tmp_path / "out")) == f"{bucket.url}/run"
    assert sweep.classifier_folder(f"{bucket.url}/run", f"{bucket.url}/out") == f"{bucket.url}/run"

    wanted = recipe(train, **made)
    bucket.flip("run/features/classifier.npz")
    with pytest.raises(ValueError, match=r"not a sound .*: remove the folder gs://cfd-test/run/features, and"):
        read_recipe(f"{bucket.url}/run", wanted)
    bucket.fail = lambda request: 403 if request.name.endswith(".json") else None
    with pytest.raises(ValueError, match=r"classifier.json cannot be read .*Storage Object Viewer") as refused:
        read_recipe(f"{bucket.url}/run", wanted)
    assert "remove" not in str(refused.value)


def test_inception_in_a_bucket(tmp_path: Path, bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    params: Any = {"fc": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    monkeypatch.setattr(inception, "param_shapes", lambda: {("fc", "kernel"): (2, 3)})
    url = f"{bucket.url}/deep/inception.npz"
    for path in (url, tmp_path / "inception.npz"):
        inception.save_params(path, params)
        found = flatten_dict(inception.load_params(path))
        np.testing.assert_array_equal(found["fc", "kernel"], params["fc"]["kernel"])
        assert unflatten_dict(found).keys() == params.keys()
    assert inception.weights_hash(url) == inception.weights_hash(tmp_path / "inception.npz")
    changes = dict(data__channels=3, model__out_channels=3, eval__features="inception", eval__inception_path=url)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    npz.write_npz(f"{bucket.url}/images.npz", {"arr_0": images})
    config = tiny_config(**changes, eval__reference=f"{bucket.url}/images.npz", data__source="adm")
    assert sweep.check(config, str(tmp_path / "run")) is None


@pytest.mark.parametrize("field", ["reference", "inception_path"])
def test_a_file_that_cannot_be_read_is_said_in_one_line_before_training(
    field: str, tmp_path: Path, bucket: FakeGcs
) -> None:
    def check(url: str) -> str:
        changes: dict[str, Any] = {f"eval__{field}": url}
        changes |= dict(eval__features="inception", data__channels=3, model__out_channels=3) if "path" in field else {}
        with pytest.raises(UserError) as caught:
            sweep.check(tiny_config(**changes), str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    begin = f"config.eval.{field} is '{bucket.url}/x.npz'"
    assert check(f"{bucket.url}/x.npz").startswith(f"{begin}, which is no file; ")
    bucket.put("x.npz", b"no archive")
    assert check(f"{bucket.url}/x.npz").startswith(f"{bucket.url}/x.npz is not a sound .npz file")
    assert "no bucket gs://cfd-other" in check("gs://cfd-other/x.npz")
    assert "s3://cfd-test/x.npz" in check("s3://cfd-test/x.npz")

    def refuse(request: Request) -> int | None:
        return 403 if request.name == "x.npz" else None

    bucket.fail = refuse
    refused = check(f"{bucket.url}/x.npz")
    assert refused.startswith(f"{begin}, which cannot be read (") and "roles/storage.objectViewer" in refused
    bucket.fail = lambda request: 403
    assert check(f"{bucket.url}/x.npz").startswith(begin)
