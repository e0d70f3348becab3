"""launch/tpu_pod.sh on the two hosts of tpu_slice.py."""

import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT
from tpu_slice import Slice, end, soon, until


@pytest.fixture
def tpu(tmp_path: Path) -> Iterator[Slice]:
    made = Slice(tmp_path)
    yield made
    made.clean_up()


def test_a_job_is_run_on_all_hosts(tpu: Slice) -> None:
    tpu.finish(0)
    code, said = tpu.run("--config.seed=1")
    assert code == 0, said
    assert "Training.\nOver.\n" in said and "finished" in said
    assert tpu.started(1, 1)
    for call in [*tpu.calls(" ssh "), *tpu.calls(" scp ")]:
        assert call.startswith("gcloud compute tpus queued-resources ") and "--batch-size=all" in call
    assert tpu.calls("uv venv -q --python 3.13") and tpu.calls("uv pip install -q -e .[tpu,tfds,gcs]")


def test_words_and_values_survive_two_shells(tpu: Slice) -> None:
    """A program on the hosts gets the arguments that a shell here would give it."""
    values = ["--b=2 --c=3", "it's", 'a "quoted" $HOME `x` \\ value', "", "*"]
    assignments = " ".join(f"V{number}={shlex.quote(value)}" for number, value in enumerate(values))
    tpu.finish(0)
    code, said = tpu.run("--config.sample.w=(0.0, 1.5)", "--config.name=it's $HOME", TPU_ENV=assignments)
    assert code == 0 and tpu.started(1, 1), said
    seen = json.loads((tpu.folder / "host1" / "seen").read_text())
    assert [seen["environment"][f"V{number}"] for number in range(len(values))] == values
    assert seen["environment"]["CFD_COORDINATOR"] == "auto" and seen["environment"]["CFD_SUPERVISED"] == "1"
    assert seen["arguments"] == [
        *("-m", "cfd.main", "--config=configs/a.py", "--workdir=gs://b/run"),
        *("--config.sample.w=(0.0, 1.5)", "--config.name=it's $HOME"),
    ]


@pytest.mark.parametrize("environment", ["A", "A=1 --b=2", "A='1"])
def test_a_malformed_environment_is_refused_before_anything_is_asked_for(tpu: Slice, environment: str) -> None:
    code, said = tpu.run(TPU_ENV=environment)
    assert code == 1 and said.startswith("tpu_pod: TPU_ENV ") and said.count("\n") == 1
    assert not (tpu.folder / "calls").exists()


def test_capacity_is_waited_for_with_growing_pauses(tpu: Slice) -> None:
    """Seven answers without capacity are no faults, of which three would be enough to give up."""
    waiting = "WAITING_FOR_RESOURCES"
    tpu.states("NONE", waiting, waiting, "FAILED\tno capacity", "NONE", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE")
    tpu.finish(0)
    code, said = tpu.run(TPU_CREATE_FLAGS="--spot --network=mine")
    assert code == 0, said
    assert "slice is FAILED (no capacity): it is deleted and asked for again" in said
    assert "slice is WAITING_FOR_RESOURCES; the next look is in 2 s" in said
    created = tpu.calls(" create slice ")
    assert len(created) == 3 and len(tpu.calls(" delete slice --force")) == 2
    assert all("--node-id=slice --accelerator-type=v5litepod-16 --runtime-version=version" in call for call in created)
    assert all("--spot --network=mine" in call for call in created)
    assert tpu.pauses()[:6] == [1, 2, 4, 8, 16, 20]  # doubled, up to 20 times the first


def test_several_slices_are_asked_for_together(tpu: Slice) -> None:
    tpu.states("NONE", "ACTIVE")
    tpu.finish(0)
    code, said = tpu.run(TPU_SLICES="2")
    assert code == 0, said
    assert "--node-count=2 --node-prefix=slice" in tpu.calls(" create ")[0]


def test_an_error_of_the_service_is_waited_out(tpu: Slice) -> None:
    tpu.states("ERROR: UNAVAILABLE", "NONE", "ACTIVE")
    (tpu.folder / "refusal").write_text("ERROR: RESOURCE_EXHAUSTED: Quota limit, no more capacity")
    tpu.finish(0)
    code, said = tpu.run()
    assert code == 0, said
    assert "no more capacity" in said and "ERROR: UNAVAILABLE" in said and len(tpu.calls(" create ")) == 1
    assert "ask for more quota; this waits" in said


REFUSALS = ["PERMISSION_DENIED", "NOT_FOUND: no network", "ALREADY_EXISTS", "Failed to find attribute [project]"]


@pytest.mark.parametrize("refusal", [*REFUSALS, "Reauthentication failed."])
def test_what_waiting_does_not_mend_is_final(tpu: Slice, refusal: str) -> None:
    tpu.states("NONE")
    (tpu.folder / "refusal").write_text(f"ERROR: {refusal}\n")
    code, said = tpu.run()
    assert code == 1 and refusal in said and not tpu.pauses()


@pytest.mark.parametrize("config", ["configs/b.py", "configs/ignored.py", f"{ROOT}/configs/digits.py"])
def test_a_config_that_the_hosts_would_not_have_is_refused_before_a_slice_is_asked_for(tpu: Slice, config: str) -> None:
    (tpu.checkout / "configs" / "ignored.py").touch()
    (tpu.checkout / ".gitignore").write_text("ignored.py\n")
    code, said = tpu.run(config=config)
    assert code == 2 and f"the config {config} would not be on the hosts" in said and not tpu.pauses()


def test_the_job_outlives_a_killed_script_and_a_second_start_follows_it(tpu: Slice) -> None:
    first = tpu.start()
    until(first, "Training.")
    os.killpg(first.pid, signal.SIGKILL)  # with its ssh: the laptop is gone
    first.wait()
    second = tpu.start()
    said = until(second, "Training.")
    assert "the job runs already" in said
    tpu.finish(0)
    assert "Over." in until(second, "finished") and second.wait(30) == 0
    assert tpu.started(1, 1) and len(tpu.calls(" scp ")) == 1


def test_another_job_is_not_disturbed_and_can_be_stopped(tpu: Slice) -> None:
    until(tpu.start(), "Training.")
    code, said = tpu.run("--config.seed=2")
    assert code == 1 and "another job runs on slice: stop it with launch/tpu_pod.sh --stop" in said
    assert "--workdir=gs://b/run" in said and tpu.started(1, 1)
    remedy = tpu.start("--stop")
    assert "Saved." in remedy.communicate(timeout=60)[0] and remedy.returncode == 0
    tpu.finish(0)
    assert tpu.run("--config.seed=2")[0] == 0 and tpu.started(2, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_the_job_which_saves(tpu: Slice, number: int) -> None:
    process = tpu.start()
    until(process, "Training.")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Saved." in said and "the same command resumes it" in said


def test_a_closed_terminal_leaves_the_job_alone(tpu: Slice) -> None:
    process = tpu.start()
    until(process, "Training.")
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 129 and "the job goes on; the same command follows it again" in said
    again = tpu.start()  # the remedy
    until(again, "the job runs already")
    tpu.finish(0)
    assert "Over." in again.communicate(timeout=60)[0] and again.returncode == 0


def test_a_script_that_waits_for_capacity_can_be_stopped(tpu: Slice) -> None:
    tpu.states("WAITING_FOR_RESOURCES")
    process = tpu.start()
    until(process, "the next look is in 4 s")
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "gcloud compute tpus queued-resources delete slice --zone=zone --force" in said


def test_a_job_on_some_hosts_only_starts_again_on_all(tpu: Slice) -> None:
    """The script was killed between two hosts, or a host was restarted."""
    first = tpu.start()
    assert tpu.started(1, 1)
    os.killpg(first.pid, signal.SIGKILL)
    end(tpu.folder / "host1")
    second = tpu.start()
    said = until(second, "Training.")
    assert "the job runs on 1 of 2 hosts only: it starts again on all" in said
    tpu.finish(0)
    second.communicate(timeout=60)
    assert second.returncode == 0 and tpu.started(2, 2)


def test_a_preempted_slice_is_asked_for_again_and_the_job_goes_on(tpu: Slice) -> None:
    process = tpu.start()
    until(process, "Training.")
    assert tpu.started(1, 1)
    tpu.states("SUSPENDED", "NONE", "ACTIVE")
    for number in range(2):
        end(tpu.folder / f"host{number}")
    said = until(process, "Training.")
    assert "asked for again" in said
    tpu.finish(0)
    process.communicate(timeout=60)
    assert process.returncode == 0 and tpu.started(2, 2) and len(tpu.calls(" create ")) == 1


def test_hosts_that_cannot_be_reached_are_tried_again(tpu: Slice) -> None:
    """That is no fault: the machine of the script may be offline."""
    (tpu.folder / "unreachable").touch()
    tpu.finish(0)
    process = tpu.start()
    assert soon(lambda: len(tpu.pauses()) >= 5)
    (tpu.folder / "unreachable").unlink()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert tpu.pauses()[:5] == [1, 2, 4, 8, 16]


@pytest.mark.slow
def test_a_job_that_fails_three_times_at_the_same_place_gives_up(tpu: Slice) -> None:
    """The supervisors on the hosts count the faults, and the script shows the last lines of every host."""
    tpu.finish(3)
    code, said = tpu.run()
    assert code == 1 and "failed with exit code 3 (no checkpoint yet), 3 times at the same place: gave up" in said
    assert tpu.started(3, 3)
    assert "host0: supervise: failed with exit code 3 (no checkpoint yet), 3 times" in said and "host1: " in said


@pytest.mark.slow
def test_a_host_that_was_restarted_is_no_reason_to_give_up(tpu: Slice) -> None:
    """The other host has waited for it in vain, three times."""
    process = tpu.start()
    until(process, "Training.")
    assert tpu.started(1, 1)
    end(tpu.folder / "host1")
    tpu.finish(3)
    until(process, "a host has lost its processes")
    tpu.finish(0)
    assert process.communicate(timeout=60) and process.returncode == 0 and tpu.started(4, 2)


def test_an_installation_that_fails_three_times_is_enough(tpu: Slice) -> None:
    (tpu.folder / "no-packages").touch()
    code, said = tpu.run()
    assert code == 1 and said.count("no packages") == 6 and "could not be started three times" in said
    assert tpu.started(0, 0)
