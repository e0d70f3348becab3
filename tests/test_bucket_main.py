"""The command line with everything in a bucket: all modes, all flags that name a folder, and bad URLs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs import FakeGcs, Request
from jobs import Job, Start, starting
from tiny import tiny_config

from cfd import main
from cfd.config import complete
from cfd.errors import UserError
from cfd.runs import workdir


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starting(tmp_path / "compiled") as start:
        yield start


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mode_in_a_bucket(start: Start, bucket: FakeGcs, tmp_path: Path) -> None:
    """Training with a sweep, then modes that read the run, name it in each way, and write to another folder."""
    url, out = f"{bucket.url}/runs/mine", f"--out={bucket.url}/elsewhere"
    changes: dict[str, Any] = dict(train__num_steps=4, sample__num_steps=2, eval__num_samples=20)

    def call(mode: str, *flags: str, workdir: str = url, **more: Any) -> Job:
        job = start(tmp_path / "notes", mode=mode, workdir=workdir, more=flags, **changes, **more)
        assert job.finish(600) == [0], job.report()
        return job

    call("train", workdir=f"{url}/", eval__weights=(0.0, 1.0))
    run = set(bucket.names())
    assert {f"runs/mine/{name}" for name in ("config.json", "metrics.jsonl", "sweep.csv", "sweep.png")} <= run
    assert "runs/mine/lock" not in run
    assert main.named_run(f"{url}/config.json") == main.named_run(f"{url}/") == url
    assert complete(main.load_config(url)).train.num_steps == 4
    assert f"Wrote {bucket.url}/elsewhere/sample" in call("sample", out).text()
    assert f"Wrote {bucket.url}/elsewhere/report.html" in call("report", out).text()
    other: dict[str, Any] = dict(workdir=f"{bucket.url}/runs/next", eval__weights=(0.0,), train__p_uncond=0.5)
    call("train", f"--init_from={url}:4", **other)
    assert json.loads(bucket.objects["runs/next/config.json"].content)["init_from"]["run"] == url
    assert "| w |" in call("compare", out, f"--runs={bucket.url}/runs/next").text()
    assert {f"elsewhere/{name}" for name in ("report.html", "compare.md", "compare.png")} <= set(bucket.names())
    assert set(bucket.names("runs/mine/")) == run
    assert not list(tmp_path.rglob("gs:*")) and not Path("gs:").exists()


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_compiled(
    start: Start, bucket: FakeGcs, tmp_path: Path
) -> None:
    """A supervisor does not start the command again."""
    job = start(tmp_path / "notes", workdir="gs://nobodys/run", env={"CFD_SUPERVISED": "1"})
    assert job.finish() == [1]
    told, line = sorted(job.text().splitlines())
    assert line.startswith("error: --workdir is 'gs://nobodys/run', and there is no bucket gs://nobodys: correct")
    assert told == "cfd-final:"
    assert not list(tmp_path.rglob("compiled/*"))
    for path in ("gs://nobodys/run", "gs:/bucket/run", "s3://bucket/run"):
        with pytest.raises(UserError, match=f"--config is '{path}'"):
            main.load_config(path)


def test_a_folder_without_a_run_is_named(bucket: FakeGcs) -> None:
    with pytest.raises(UserError, match=f"{bucket.url}/run holds no run: train it first"):
        main.check_is_run(f"{bucket.url}/run")

    def refuse(request: Request) -> int | None:
        return 403 if request.method == "GET" and request.name else None

    bucket.fail = refuse
    words = rf"{bucket.url}/run cannot be read \(.*403.*\): the owner of the bucket can allow it"
    with pytest.raises(UserError, match=words):
        main.check_is_run(f"{bucket.url}/run")


def test_a_bucket_that_refuses_the_result_is_reported_in_a_line(start: Start, bucket: FakeGcs, tmp_path: Path) -> None:
    url = f"{bucket.url}/run"
    workdir.write_config(url, workdir.describe("diffusion", tiny_config().to_dict(), ("a", "b")))
    bucket.fail = lambda request: 403 if request.query.get("name") == "run/report.html" else None
    job = start(tmp_path / "notes", mode="report", workdir=url)
    assert job.finish() == [1]
    [line] = [line for line in job.text().splitlines() if line.startswith(("error: ", "Traceback"))]
    assert line.startswith(f"error: {url}/report.html was not read or written (")
    assert "403" in line and line.endswith("): start again when the bucket allows it")
    assert b"Traceback" in bucket.objects["run/errors.log"].content
