"""`python -m cfd.main` with a network of two layers, made-up images and, on request, faults; it starts in seconds.

Everything else is the real command: its flags, its loop, its checkpoints and its signals. Environment variables:
JOB_STEP_SECONDS   seconds added to each step
JOB_CORES          number of cores to run on
JOB_HANG           "main:S" or "loader:S": the main thread or the data-loading thread sleeps for ever at step S;
                   "error:S": the main thread raises an error
JOB_HANG_PROCESS   the number of the process with the fault
JOB_WAIT           "S:FILE": the main thread does not begin step S before FILE exists
JOB_NOTES          the folder of steps.jsonl, if it is not the run's
Each step, save and start of a loop adds a line to steps.jsonl. Unlike metrics.jsonl, it keeps steps that are repeated.
"""

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

if cores := os.environ.get("JOB_CORES"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import cfd.main
import cfd.modes.fit
import cfd.modes.settings
import cfd.modes.train
from cfd.data.sources import Dataset
from cfd.devices import preemption
from cfd.losses import eps_loss
from cfd.modes import settings
from cfd.modes.sampler import Network
from cfd.runs import checkpoint, log

SIZE, WIDTH, CLASSES, EXAMPLES = 8, 128, 10, 100


def init(key: Any) -> Any:
    key_in, key_out = jax.random.split(key)
    return {
        "in": 0.1 * jax.random.normal(key_in, (SIZE * SIZE, WIDTH)),
        "class": jnp.zeros((CLASSES + 1, WIDTH)),
        "logsnr": jnp.zeros(WIDTH),
        "out": 0.1 * jax.random.normal(key_out, (WIDTH, SIZE * SIZE)),
    }


def eps_of_params(params: Any) -> Any:
    def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
        h = z.reshape(len(z), -1) @ params["in"] + params["class"][labels] + logsnr[:, None] * params["logsnr"][None]
        return (jnp.tanh(h) @ params["out"]).reshape(z.shape)

    return eps_fn


def diffusion(config: Any) -> Any:
    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return eps_loss(
            key,
            eps_of_params(params),
            x,
            labels,
            p_uncond=config.train.p_uncond,
            schedule=settings.training_schedule(config),
        )

    return init, loss_fn


def hangs(where: str, step: int) -> bool:
    place, _, at = os.environ.get("JOB_HANG", ":0").partition(":")
    here = os.environ.get("JOB_HANG_PROCESS", "0") == os.environ.get("CFD_PROCESS_ID", "0")
    return place == where and step == int(at) and here


def wait(step: int) -> None:
    at, _, file = os.environ.get("JOB_WAIT", "0:").partition(":")
    while step == int(at) and not os.path.exists(file):
        time.sleep(0.01)


def open_split(config: Any, split: str) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, SIZE, SIZE, 1), np.uint8)
    labels = np.arange(EXAMPLES, dtype=np.int32) % CLASSES
    reads = iter(range(1, 2**62))

    def read(i: int) -> tuple[np.ndarray, int]:
        if hangs("loader", next(reads)):
            time.sleep(1e6)
        return images[i], int(labels[i])

    names = tuple(f"class {c}" for c in range(CLASSES))
    return Dataset(
        read=read,
        read_label=lambda i: int(labels[i]),
        read_labels=lambda: labels,
        num_examples=EXAMPLES,
        image_size=SIZE,
        channels=1,
        class_names=names,
        on_bad_image="raise",
        identity=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def note(**values: Any) -> None:
    if os.environ.get("CFD_PROCESS_ID", "0") == "0":
        status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
        values |= dict(rss=int(status["VmRSS"].split()[0]) * 1024, fds=len(os.listdir("/proc/self/fd")))
        values |= dict(threads=threading.active_count(), os_threads=int(status["Threads"]), time=time.time())
        with open(Path(os.environ.get("JOB_NOTES") or flags.FLAGS.workdir) / "steps.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")


def slowed(requested: Any) -> Any:
    first = iter([True])

    def slow() -> bool:
        if next(first, False):
            note(started=True)
        time.sleep(float(os.environ.get("JOB_STEP_SECONDS", "0")))
        return requested()

    return slow


def hanging(batches: Any) -> Any:
    def with_hang(*arguments: Any, start_step: int = 0, **keywords: Any) -> Any:
        inner = batches(*arguments, start_step=start_step, **keywords)
        count = iter(range(start_step + 1, 2**62))

        class Hanging:
            skipped = 0

            def __next__(self) -> Any:
                step = next(count)
                wait(step)
                if hangs("main", step):
                    time.sleep(1e6)
                if hangs("error", step):
                    raise ValueError("image 7 is bad")
                return next(inner)

            def close(self) -> None:
                inner.close()

        return Hanging()

    return with_hang


def noted(write_metrics: Any) -> Any:
    def write(log: Any, step: int, metrics: Any) -> None:
        write_metrics(log, step, metrics)
        note(step=step, loss=metrics["loss"])

    return write


def timed(save: Any) -> Any:
    def timed_save(manager: Any, step: int, *arguments: Any, **keywords: Any) -> None:
        start = time.perf_counter()
        save(manager, step, *arguments, **keywords)
        note(saved=step, seconds=time.perf_counter() - start)

    return timed_save


if __name__ == "__main__":
    cfd.modes.train.diffusion = diffusion
    network = Network(eps_of_params, (SIZE, SIZE, 1))
    cfd.modes.settings.network_of = cfd.modes.settings.network_of_run = lambda _: network
    cfd.modes.settings.open_split = open_split
    cfd.modes.fit.batches = hanging(cfd.modes.fit.batches)
    preemption.requested = slowed(preemption.requested)
    log.write_metrics = noted(log.write_metrics)
    checkpoint.save = timed(checkpoint.save)
    app.run(cfd.main.main, flags_parser=cfd.main.parse_flags)
