"""The bare command on the hosts of a Cloud TPU slice, which a metadata server on loopback announces.

The processes have CPUs. JAX_FORCE_TPU_INIT makes JAX believe that it runs on a TPU VM, and its own detection then asks
the metadata server.
"""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jobs import assert_same_run, command, environment, launch
from ports import free_port
from tiny import ROOT

from cfd.devices import parallel

Serve = Callable[..., tuple[str, list[str]]]

ON_A_TPU_VM = """
import os, runpy, sys
import jax
del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX has set it because this machine has no TPU chips
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a metadata server with attributes of a VM, and returns its address and the list of what it was asked."""
    servers = []

    def start(**attributes: str) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path.rpartition("/attributes/")[2])
                content = attributes.get(asked[-1].replace("-", "_"), "").encode()
                self.send_response(200 if content and self.headers["Metadata-Flavor"] == "Google" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def of_host(number: int, hosts: int) -> dict[str, str]:
    """The attributes that a TPU VM has: its number in the slice and the addresses of all hosts."""
    endpoints = ",".join(["unknown:unknown:127.0.0.1"] * hosts)
    return dict(agent_worker_number=str(number), worker_network_endpoints=endpoints, tpu_env="ZONE: 'here'\n")


def on_a_tpu_vm(metadata: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A process of a TPU VM that has this metadata server."""
    variables = environment(2, JAX_FORCE_TPU_INIT="1", GCE_METADATA_IP=metadata, **more)
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_STEP_NUM_TASKS"):
        variables.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", ON_A_TPU_VM, *arguments],
        env=variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts_of_a_slice_find_each_other_and_train_together(serve: Serve, tmp_path: Path) -> None:
    """The same run as that of one process with as many devices, which are twice as many as a batch has rows."""
    job = launch(tmp_path / "one" / "run", tmp_path / "cache", devices=4, of=1, train__batch_size=2)
    assert job.finish() == [0], job.report()
    (tmp_path / "found").mkdir()
    arguments = command(tmp_path / "found" / "run", tmp_path / "cache", "train", [], train__batch_size=2)[1:]
    port = dict(JAX_COORDINATOR_PORT=str(free_port()), JOB_NOTES=str(tmp_path / "found"))
    hosts = [on_a_tpu_vm(serve(**of_host(i, 2))[0], *arguments, **port) for i in range(2)]
    said = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    assert all("the metadata server of this TPU VM announces, 2 in all" in text for text in said)
    assert "5 steps in" in said[0] or "6 steps in" in said[0]
    assert "steps in" not in said[1]  # it is not process 0
    assert_same_run(tmp_path / "found" / "run", tmp_path / "one" / "run")


@pytest.mark.parametrize(
    ("variables", "asks"),
    [
        ({}, True),
        ({"CFD_NUM_PROCESSES": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
    ids=str,
)
def test_a_single_host_stays_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], asks: bool
) -> None:
    address, asked = serve(**of_host(0, 1 if asks else 2))
    on_this(monkeypatch, address, **variables)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it joined others"))
    parallel.init_distributed()
    assert bool(asked) == asks


def on_this(monkeypatch: pytest.MonkeyPatch, metadata: str, **variables: str) -> None:
    """Makes JAX believe that this process is on a TPU VM with this metadata server."""
    for name in [name for name in os.environ if name.startswith(("CFD_", "SLURM_", "TPU_", "MEGASCALE_"))]:
        monkeypatch.delenv(name)
    for name, value in ({"GCE_METADATA_IP": metadata} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)


@pytest.mark.slow
def test_rows_that_several_processes_hold_train_the_same(tmp_path: Path) -> None:
    one = launch(tmp_path / "one" / "run", tmp_path / "cache", train__batch_size=1)
    three = launch(tmp_path / "three" / "run", tmp_path / "cache", processes=3, train__batch_size=1)
    assert one.finish() == [0] and three.finish() == [0, 0, 0], one.report() + three.report()
    assert "is 1, fewer rows than the 3 devices" in three.text(0) and "fewer rows" not in three.text(1)
    assert_same_run(tmp_path / "three" / "run", tmp_path / "one" / "run")


def test_several_slices_of_single_hosts_are_several_hosts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(1))
    address, _ = serve(**of_host(0, 1) | {"tpu_env": "MEGASCALE_NUM_SLICES: '2'\n"})
    on_this(monkeypatch, address)
    parallel.init_distributed()
    on_this(monkeypatch, address, TPU_WORKER_HOSTNAMES="host0", MEGASCALE_NUM_SLICES="2")
    parallel.init_distributed()
    assert len(joined) == 2


def test_no_metadata_server_is_asked_on_another_machine(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up of a server that is not there would take seconds."""
    address, asked = serve(**of_host(0, 2))
    on_this(monkeypatch, address)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it joined others"))
    parallel.init_distributed()
    assert asked == []


def test_a_host_that_finds_others_and_cannot_join_them_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coordinator's port is taken. Each remedy in the message works."""
    address, _ = serve(**of_host(0, 2))

    def refuse(**_: Any) -> None:
        raise RuntimeError("UNKNOWN: port 8482\nis taken")

    on_this(monkeypatch, address)
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match=r"cannot be joined \(UNKNOWN: port 8482 is taken\): .*=1 starts a process"):
        parallel.init_distributed()
    on_this(monkeypatch, address, CFD_NUM_PROCESSES="1")
    parallel.init_distributed()


def test_a_coordinator_whose_port_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX can crash there, with a segmentation fault. Other processes than the first do not listen."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        on_this(monkeypatch, "", CFD_COORDINATOR=address, CFD_NUM_PROCESSES="2", CFD_PROCESS_ID="0")
        with pytest.raises(ValueError, match=f"another program listens at CFD_COORDINATOR = {address}, .* end it, or"):
            parallel.init_distributed()
        monkeypatch.setenv("CFD_PROCESS_ID", "1")
        parallel.init_distributed()
    monkeypatch.setenv("CFD_PROCESS_ID", "0")
    parallel.init_distributed()  # after the remedy
    assert len(joined) == 2


@pytest.mark.parametrize("address", ["host", "host:", ":1234", "host:x", "host:0", "host:70000"])
def test_a_coordinator_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    on_this(monkeypatch, "", CFD_COORDINATOR=address, CFD_NUM_PROCESSES="2", CFD_PROCESS_ID="1")
    with pytest.raises(ValueError, match=f"CFD_COORDINATOR is '{address}'; expected host:port"):
        parallel.init_distributed()


def test_a_metadata_server_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The devices then say whether there are others, as on the hosts of a slice that nobody announces."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        on_this(monkeypatch, f"127.0.0.1:{taken.getsockname()[1]}")
        parallel.init_distributed()
        said = capsys.readouterr().out
        assert "The metadata server of this TPU VM does not say which other hosts there are (" in said
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        with pytest.raises(ValueError, match=r"one of 4 of a TPU slice, .* set CFD_COORDINATOR=auto"):
            parallel.init_distributed()
