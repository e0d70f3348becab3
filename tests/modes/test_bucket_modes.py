"""The modes with a run in a bucket: they write the same bytes as on a disk."""

import json
from pathlib import Path
from typing import Any

import mixing
import pytest
from gcs import FakeGcs
from meshes import mesh_of
from swept import pixels, swept
from test_report import run_folder
from tiny import tiny_config

from cfd.devices import parallel
from cfd.evaluation.features import FeatureNetwork
from cfd.losses import eps_loss
from cfd.modes import settings, sweep, train
from cfd.modes.compare import compare
from cfd.modes.report import report
from cfd.modes.sample import sample
from cfd.modes.train_classifier import check_same_images
from cfd.runs import results, workdir

DIGITS = tuple("0123456789")


def on_disk(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_bucket(bucket: FakeGcs, folder: str) -> dict[str, bytes]:
    """The content of every object of a folder."""
    return {name.removeprefix(f"{folder}/"): bucket.objects[name].content for name in bucket.names(f"{folder}/")}


def put(bucket: FakeGcs, folder: Path, name: str) -> str:
    """A copy of a local folder in the bucket."""
    for path, content in on_disk(folder).items():
        bucket.put(f"{name}/{path}", content)
    return f"{bucket.url}/{name}"


def begin(folder: Any, **changes: Any) -> None:
    workdir.write_config(folder, workdir.describe("diffusion", tiny_config(**changes).to_dict(), DIGITS))


@pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning")
def test_samples_and_sweeps_are_those_of_a_disk(
    bucket: FakeGcs, mixing_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, byte by byte. A sweep that is repeated measures nothing again."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(sweep, "open_features", lambda *_: FeatureNetwork("classifier", "f" * 64, pixels))
    monkeypatch.chdir(mixing_run)
    config, folders = tiny_config(eval__weights=(0.0, 2.0), eval__intervals=((), (-30.0, 0.0))), ("here", "gs")
    places = {"here": str(mixing_run / "run"), "gs": f"{bucket.url}/run"}
    for name in folders:
        begin(places[name])
        path = sample(config, places[name], places[name])
        assert path.startswith(f"{places[name]}/samples/sample_step_0000007_") and path.endswith(".png")
        assert len(sweep.sweep(config, places[name], places[name])) == 4
        report(places[name], places[name])
    local = on_disk(mixing_run / "run")
    kinds = ("config.json", "sweep.csv", "sweep.png", "report.html", "samples/sweep", "samples/sample_", "manifests/")
    assert all(any(name.startswith(kind) for name in local) for kind in kinds)
    assert in_bucket(bucket, "run") == {name: content for name, content in local.items() if name != "lock"}
    generation = bucket.objects["run/sweep.csv"].generation
    rows = results.read_rows(places["gs"])
    assert sweep.sweep(config, places["gs"], places["gs"]) == rows
    assert bucket.objects["run/sweep.csv"].generation == generation
    assert [path.name for path in mixing_run.iterdir()] == ["run"]


def test_reports_are_those_of_a_disk(bucket: FakeGcs, tmp_path: Path) -> None:
    """The page shows the images of the sweep, of which it reads only the first ones."""
    local = run_folder(tmp_path / "run", tiny_config(), list(DIGITS))
    folder, out = put(bucket, local, "runs/run"), f"{bucket.url}/pages"
    assert report(folder, out) == f"{out}/report.html"
    assert bucket.objects["pages/report.html"].content == Path(report(str(local), str(local))).read_bytes()
    elsewhere = report(folder, str(tmp_path / "out"))
    assert Path(elsewhere).read_bytes() == (local / "report.html").read_bytes()
    bucket.put("runs/run/metrics.jsonl", b'{"step": 1}\nx\n')
    with pytest.raises(ValueError, match=r"gs://cfd-test/runs/run/metrics\.jsonl: line 2 is damaged"):
        report(folder, out)


def test_comparisons_are_those_of_a_disk(bucket: FakeGcs, tmp_path: Path) -> None:
    for name, p_uncond in (("half", 0.5), ("tenth", 0.1)):
        begin(swept(tmp_path / name, p_uncond), train__p_uncond=p_uncond)
    half, tenth = tmp_path / "half", tmp_path / "tenth"
    folder, other = put(bucket, half, "half"), put(bucket, tenth, "tenth")
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    assert compare(tiny_config(), folder, [other], folder) == text
    assert compare(tiny_config(), folder, [str(tenth)], f"{bucket.url}/out") == text
    for name in ("compare.md", "compare.png"):
        assert bucket.objects[f"half/{name}"].content == bucket.objects[f"out/{name}"].content
        assert bucket.objects[f"half/{name}"].content == (half / name).read_bytes()


def test_a_run_in_a_bucket_is_a_config(bucket: FakeGcs) -> None:
    folder = f"{bucket.url}/run"
    with pytest.raises(ValueError, match=rf"{folder} is a folder without config\.json"):
        settings.config_of_run(folder)
    begin(folder, train__p_uncond=0.25)
    assert settings.config_of_run(folder).train.p_uncond == 0.25
    settings.check_class_names(folder, DIGITS, "train")
    check_same_images(tiny_config(), folder, DIGITS)
    with pytest.raises(ValueError, match=r"data\.channels = 1, not 3"):
        check_same_images(tiny_config(data__channels=3), folder, DIGITS)
    guided = tiny_config(sample__guidance="classifier")
    with pytest.raises(ValueError, match=rf"{folder}/classifier holds no noisy classifier"):
        settings.check_classifier(guided, folder)
    content = workdir.describe("classifier", guided.to_dict(), DIGITS)
    workdir.write_config(settings.classifier_folder(folder), content)
    settings.check_classifier(guided, folder)
    with pytest.raises(ValueError, match=f"the folder of its diffusion model, which is usually {folder}$"):
        settings.config_of_run(f"{folder}/classifier")


def test_a_program_trains_into_a_bucket_and_resumes(
    bucket: FakeGcs, mixing_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the command line. The losses and pictures are those of a local run, and no folder `gs:` is made."""

    def loss(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return eps_loss(key, mixing.eps_of_params(params), x, labels, p_uncond=0.1)

    monkeypatch.setattr(train, "diffusion", lambda config: (lambda key: mixing.params(), loss))
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.chdir(mixing_run)
    config = tiny_config(train__num_steps=3, train__sample_every_steps=2, train__checkpoint_every_steps=2)
    for folder in ("run", f"{bucket.url}/run"):
        train.train(config, folder)
    assert [path.name for path in mixing_run.iterdir()] == ["run"]
    local, there = on_disk(mixing_run / "run"), in_bucket(bucket, "run")
    same = ("config.json", "samples/step_0000002.png", "samples/step_0000003.png")
    assert {name: there[name] for name in same} == {name: local[name] for name in same}
    lines, same = [json.loads(line) for line in there["metrics.jsonl"].splitlines()], ("step", "loss", "grad_norm")
    expected = [json.loads(line) for line in local["metrics.jsonl"].splitlines()]
    assert [[line[key] for key in same] for line in lines] == [[line[key] for key in same] for line in expected]
    assert [line["step"] for line in lines] == [1, 2, 3]
    config.train.num_steps = 4
    bucket.fail = lambda request: 403 if request.method == "POST" and "/samples/" in request.name else None
    train.train(config, f"{bucket.url}/run")  # a picture that the service refuses ends nothing
    assert "run/samples/step_0000004.png was not written: PERMISSION_DENIED" in caplog.text
    lines = [json.loads(line) for line in in_bucket(bucket, "run")["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_url_that_is_no_bucket_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "open_split", lambda *_: pytest.fail("the data were opened"))
    for folder in ("s3://bucket/run", "gs:/bucket/run", "gs://B/run"):
        with pytest.raises(ValueError, match="gs://BUCKET"):
            train.train(tiny_config(), folder)
    assert not list(tmp_path.iterdir())
