"""Real processes that look at a run which another process trains, or which they may only read."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import command, environment, losses, starting, wait_for_step
from tiny import ROOT

from cfd.runs import results

OBEDIENT = (sys.executable, str(ROOT / "tests" / "permissions.py"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_looked_at_while_it_trains_and_when_it_may_only_be_read(tmp_path: Path) -> None:
    """Sampling, sweeping and reporting need no lock, and with --out no permission. Training does not notice."""
    folder, cache, out = tmp_path / "run", tmp_path / "cache", tmp_path / "out"
    fields = dict(eval__num_samples=20, eval__weights=(0.0, 1.0), sample__num_steps=4, sample__seeds=(3,))

    def call(mode: str, *more: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        line = [*OBEDIENT, *command(folder, cache, mode, list(more), **fields | changes)]
        return subprocess.run(
            line, cwd=ROOT, env=environment(1, JOB_NOTES=str(tmp_path)), capture_output=True, text=True
        )

    def works(mode: str, *more: str, **changes: Any) -> None:
        done = call(mode, *more, **changes)
        assert done.returncode == 0, done.stdout + done.stderr

    def is_refused(mode: str, words: str, *more: str) -> None:
        done = call(mode, *more)
        assert done.returncode == 1 and words in done.stderr and "give --out=DIR" in done.stderr, done.stderr

    with starting(cache) as start:
        job = start(folder, env={"JOB_STEP_SECONDS": "0.1"}, train__num_steps=100_000, train__checkpoint_every_steps=5)
        wait_for_step(job, 6)
        works("report")
        works("sample")
        is_refused("sweep", f"locked by pid {job.processes[0].pid}")
        works("sweep", f"--out={out}")
        works("report", f"--out={out}")
        assert "Guidance explorer" in (out / "report.html").read_text()
        assert job.processes[0].poll() is None
        job.send(signal.SIGTERM)
        assert job.finish() == [75], job.report()
    assert len(losses(folder)) > 6 and not (folder / "sweep.csv").exists()
    assert len(list((folder / "samples").glob("sample_*.npz"))) == 1

    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    before = contents(folder)
    for mode in ("report", "sample", "sweep", "compare"):
        is_refused(mode, "cannot be written (Permission denied)")
    another = tmp_path / "another"
    works("sample", f"--out={another}")
    works("sweep", f"--out={another}", eval__weights=(0.0, 2.0), sample__sampler="ddim", eval__v=())
    works("report", f"--out={another}")
    assert [row["w"] for row in results.read_rows(str(another))] == [0.0, 2.0]
    assert len(list((another / "samples").glob("sample_*.npz"))) == 1
    assert contents(folder) == before
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
