"""The compilation cache in a bucket, on a disk that processes share, and on a disk of each host."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gcs import FakeGcs
from jobs import environment
from ports import free_port

from cfd.devices import xla
from cfd.errors import UserError

PROGRAM = """
import collections, sys
import jax
import jax.numpy as jnp
from cfd.devices import parallel, xla

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
parallel.init_distributed()
xla.use_compilation_cache(sys.argv[1])
events.clear()
jax.jit(lambda: jnp.sin(jnp.arange(8.0)))().block_until_ready()
print(*(events[f"/jax/compilation_cache/cache_{name}"] for name in ("hits", "misses")))
"""
"""Compiles one program, and prints how often it was found in the cache and how often not."""


def job(folder: str, *hosts: Path) -> tuple[list[str], list[str]]:
    """The last lines of the processes of a job, and their errors. Each is in the working directory of its host."""
    several = {"CFD_COORDINATOR": f"127.0.0.1:{free_port()}", "CFD_NUM_PROCESSES": str(len(hosts))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder],
            cwd=host,
            env=environment(1, **(several | {"CFD_PROCESS_ID": str(i)} if len(hosts) > 1 else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, host in enumerate(hosts)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), outputs
    return [out.splitlines()[-1] for out, _ in outputs], [errors for _, errors in outputs]


def test_a_cache_in_a_bucket_serves_the_next_process(bucket: FakeGcs, tmp_path: Path) -> None:
    url = f"{bucket.url}/run/cache"
    assert job(url, tmp_path)[0] == ["0 1"]
    assert bucket.names("run/cache/jit_")
    assert job(url, tmp_path)[0] == ["1 0"]
    assert not list(tmp_path.iterdir()), "no folder gs: is made"


def test_a_cache_that_hosts_do_not_share_is_reported_in_a_line(tmp_path: Path) -> None:
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
    words = f"config.xla.compilation_cache is {hosts[0]}/cache, which 1 of 2 processes do not share with process 0"
    for there, alone in ((hosts, 1), (hosts[:1] * 2, 0)):
        _, errors = job("cache", *there)
        said = [line for line in "".join(errors).splitlines() if "compilation_cache" in line]
        assert len(said) == alone and all(words in line for line in said), errors
        assert not list((hosts[0] / "cache").glob(".shared*"))


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://bucket/cache", "s3: is not a scheme that is read"),
        ("gs:/cfd-test/cache", "does not have the form gs://BUCKET/NAME"),
        ("gs://no-such-bucket/cache", "there is no bucket gs://no-such-bucket: correct the name, or make it"),
        ("gs://cfd-test/cache", "has no permission to write objects there"),
    ],
)
def test_a_cache_in_a_bucket_that_cannot_be_used_is_refused(
    bucket: FakeGcs, tmp_path: Path, url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = jax.config.values["jax_compilation_cache_dir"]
    bucket.fail = lambda request: 403 if request.method == "POST" else None
    with pytest.raises(UserError, match=rf"^config\.xla\.compilation_cache is '{url}', .*{message}"):
        xla.use_compilation_cache(url)
    assert jax.config.values["jax_compilation_cache_dir"] == before and not list(tmp_path.iterdir())
