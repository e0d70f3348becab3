"""The small files of a run in a bucket: the same bytes as on a disk, and nothing that another job wrote is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs import FakeGcs, Request
from test_results import ROW
from test_workdir import config_json

from cfd.runs import files, manifest, npz, results, workdir
from cfd.runs.errors_log import append_error

LOST = ["answers arrive", "an answer is lost"]


def lose_one_answer(bucket: FakeGcs, name: str, faults: str) -> None:
    """Makes the server do what the next write to an object asks for, and answer with an error."""
    lost = iter([faults != LOST[0]])
    bucket.lose = lambda request: request.method == "POST" and request.name == name and next(lost, False)


def write_between(bucket: FakeGcs, name: str, content: bytes) -> None:
    """Another program writes to an object after this one has read it, before it writes to it."""
    contents = iter([content])

    def fail(request: Request) -> None:
        if request.method == "POST" and request.name == name and (new := next(contents, None)) is not None:
            bucket.put(name, new)

    bucket.fail = fail


@pytest.mark.parametrize("faults", LOST)
def test_config_is_that_of_a_local_run(bucket: FakeGcs, tmp_path: Path, faults: str) -> None:
    folder = f"{bucket.url}/run"
    lose_one_answer(bucket, "run/config.json", faults)
    for changes in ({}, {"train__num_steps": 7}):
        for place in (folder, tmp_path):
            workdir.write_config(place, config_json(**changes))
        assert bucket.objects["run/config.json"].content == (tmp_path / "config.json").read_bytes()
        assert workdir.read_config(folder) == config_json(**changes)
    generation = bucket.objects["run/config.json"].generation
    workdir.write_config(folder, config_json(train__num_steps=7))
    assert bucket.objects["run/config.json"].generation == generation
    assert bucket.names() == ["run/config.json"]


def test_a_run_in_a_bucket_that_has_begun_keeps_its_config(bucket: FakeGcs) -> None:
    """A step without a commit file does not count: its save was cut short."""
    folder = f"{bucket.url}/run"
    assert not workdir.has_config(folder) and not workdir.has_begun(folder)
    workdir.write_config(folder, config_json())
    bucket.put("run/checkpoints/2/state/x", b"x")
    bucket.put("run/metrics.jsonl", b"")
    assert workdir.has_config(folder) and not workdir.has_begun(folder)
    workdir.write_config(folder, config_json(seed=1))
    bucket.put("run/checkpoints/2/commit_success.txt", b"")
    assert workdir.has_begun(folder)
    with pytest.raises(ValueError, match=r"run/config\.json is another run's: seed: 1 there, 0 here") as refused:
        workdir.write_config(folder, config_json(seed=0))
    assert f"--init_from={folder}" in str(refused.value)
    del bucket.objects["run/config.json"]
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        workdir.write_config(folder, config_json(seed=1))


def test_the_config_of_another_job_is_not_overwritten(bucket: FakeGcs) -> None:
    folder, text = f"{bucket.url}/run", json.dumps(config_json(seed=5)).encode()
    write_between(bucket, "run/config.json", text)
    workdir.write_config(folder, config_json(seed=5))
    assert workdir.read_config(folder) == config_json(seed=5)
    write_between(bucket, "run/config.json", text)
    bucket.put("run/config.json", json.dumps(config_json(seed=4)).encode())
    with pytest.raises(ValueError, match=r"has just been changed by another job: end one of the two"):
        workdir.write_config(folder, config_json(seed=6))
    assert bucket.objects["run/config.json"].content == text


def test_a_refusal_to_read_is_a_line_with_a_role(bucket: FakeGcs) -> None:
    folder = f"{bucket.url}/run"
    workdir.write_config(folder, config_json())
    reads: list[Callable[[], Any]] = [
        lambda: workdir.read_config(folder),
        lambda: workdir.has_config(folder),
        lambda: results.whole_lines(f"{folder}/config.json"),
    ]
    bucket.fail = lambda request: 403
    for read in reads:
        with pytest.raises(ValueError, match=r"config\.json cannot be read \(.*403.*roles/storage\.objectViewer"):
            read()
    bucket.fail = lambda request: None  # as with this role
    for read in reads:
        assert read()


@pytest.mark.parametrize("faults", LOST)
def test_errors_follow_each_other_once(bucket: FakeGcs, faults: str) -> None:
    folder = f"{bucket.url}/run"
    assert append_error(folder, "--mode=train", "no run") is None and bucket.names() == []
    bucket.put("run/config.json", b"{}")
    lose_one_answer(bucket, "run/errors.log", faults)
    append_error(folder, "--mode=train", "the first")
    write_between(bucket, "run/errors.log", bucket.objects["run/errors.log"].content + b"of another job\n\n")
    append_error(folder, "--mode=train", "the second \udcff")
    append_error(folder, "--mode=train", "of its own", process=3)
    first, other, second, end = bucket.objects["run/errors.log"].content.decode().split("\n\n")
    assert first.endswith("\nthe first") and other == "of another job" and end == ""
    assert second.endswith("\nthe second \\udcff") and "--mode=train, process 0" in second
    assert b"of its own" in bucket.objects["run/errors.3.log"].content
    bucket.fail = lambda request: 403
    with pytest.raises(OSError, match=r"errors\.log|run"):
        append_error(folder, "--mode=train", "refused")


@pytest.mark.parametrize("faults", LOST)
def test_rows_are_those_of_a_local_run(bucket: FakeGcs, tmp_path: Path, faults: str) -> None:
    folder = f"{bucket.url}/run"
    assert results.read_rows(folder) == [] and results.swept_folder("run", folder) == "run"
    lose_one_answer(bucket, "run/sweep.csv", faults)
    rows = [ROW | dict.fromkeys(results.MEASURED, value) for value in (1.0, None, 0.1 + 0.2)]
    for row in rows:
        for place in (folder, str(tmp_path)):
            results.append_row(place, row)
    assert bucket.objects["run/sweep.csv"].content == (tmp_path / "sweep.csv").read_bytes()
    assert results.read_rows(folder) == results.read_rows(str(tmp_path)) and len(results.read_rows(folder)) == 3
    assert results.swept_folder("run", folder) == folder
    assert results.samples_path(folder, rows[0]).removeprefix(f"{folder}/") == (
        results.samples_path(str(tmp_path), rows[0]).removeprefix(f"{tmp_path}/")
    )


def test_a_row_that_another_job_adds_meanwhile_stays(bucket: FakeGcs, tmp_path: Path) -> None:
    rows = [ROW | dict.fromkeys(results.MEASURED, float(value)) for value in range(3)]
    for row in rows[:2]:
        results.append_row(str(tmp_path), row)
    results.append_row(f"{bucket.url}/run", rows[0])
    write_between(bucket, "run/sweep.csv", (tmp_path / "sweep.csv").read_bytes())
    results.append_row(f"{bucket.url}/run", rows[2])
    assert [row["fid"] for row in results.read_rows(f"{bucket.url}/run")] == [0.0, 1.0, 2.0]


def test_manifests_are_read_back(bucket: FakeGcs) -> None:
    folder, made = (
        f"{bucket.url}/run",
        {"weights": {"sha256": "x"}, "sampling": {"w": 1.0}, "environment": {"jax": "1"}},
    )
    name = manifest.manifest_name(made)
    assert manifest.read_manifest(folder, name) is None
    manifest.write_manifest(folder, made)
    assert manifest.read_manifest(folder, name) == made
    bucket.flip(f"run/manifests/{name}.json")
    assert manifest.read_manifest(folder, name) is None


def samples(path: str, images: np.ndarray) -> None:
    with npz.sample_writer(path, len(images), images.shape[1:]) as write:
        for start in range(0, len(images), 50):
            write(images[start : start + 50], np.arange(start, min(start + 50, len(images))))


def test_samples_are_the_same_file_and_are_read_in_parts(bucket: FakeGcs, tmp_path: Path) -> None:
    path, local = f"{bucket.url}/run/samples/x.npz", tmp_path / "samples" / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (1000, 128, 128, 1), np.uint8)  # 16 MB
    for place in (path, str(local)):
        samples(place, images)
    assert bucket.objects["run/samples/x.npz"].content == local.read_bytes()
    assert npz.npz_headers(path) == npz.npz_headers(local)
    bucket.reset_counts()
    np.testing.assert_array_equal(next(npz.npz_batches(path, "arr_0", 20)), images[:20])
    assert bucket.bytes_out < images.nbytes / 3
    np.testing.assert_array_equal(np.concatenate(list(npz.npz_batches(path, "arr_0", 300))), images)
    np.testing.assert_array_equal(npz.read_npz(path, ["arr_1"])["arr_1"], np.arange(1000))
    batches = npz.npz_batches(path, "arr_0", 20)
    next(batches)
    bucket.put("run/samples/x.npz", local.read_bytes())
    with pytest.raises(ValueError, match="replaced while it was read"):
        list(batches)
    bucket.flip("run/samples/x.npz")
    with pytest.raises(ValueError, match=r"x\.npz is not a sound \.npz file"):
        list(npz.npz_batches(path, "arr_0", 300))


def test_a_file_of_samples_is_whole_or_absent(bucket: FakeGcs) -> None:
    path, images = f"{bucket.url}/run/samples/x.npz", np.zeros((4, 2, 2, 1), np.uint8)
    with (
        pytest.raises(ValueError, match="4 samples were written where 5"),
        npz.sample_writer(path, 5, (2, 2, 1)) as write,
    ):
        write(images, np.zeros(4, np.int64))
    assert bucket.names() == []
    with pytest.raises(ValueError, match=r"x\.npz cannot be read \(No such file"):
        npz.read_npz(path)
    npz.write_npz(path, {"a": images})
    bucket.fail = lambda request: 403
    with pytest.raises(ValueError, match=r"x\.npz cannot be read \(.*403.*give a file that you may read"):
        npz.read_npz(path)
    with pytest.raises(OSError, match=r"403|Forbidden"):
        npz.write_npz(path, {"a": images})


def test_a_missing_file_has_no_size(bucket: FakeGcs) -> None:
    with pytest.raises(FileNotFoundError):
        files.size_of(f"{bucket.url}/run/x")
    bucket.put("run/x", b"")
    assert files.exists(f"{bucket.url}/run/x") and files.size_of(f"{bucket.url}/run/x") == 0
