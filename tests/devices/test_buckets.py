"""Buckets: which paths are URLs, one line for each way in which a bucket cannot be used, and reading from it."""

import os
import socket
import sys
from functools import partial
from pathlib import Path

import fsspec.config
import gcsfs
import pytest
from etils.epath import backend as epath_backend
from gcs import FakeGcs

from cfd.devices import buckets
from cfd.errors import CommandError, InputError, PassingError, UserError
from cfd.runs import access

MALFORMED = ["gs:", "gs:/", "gs:/cfd-test/x", "gs://", "gs:///x", "gs:////x", "gs://B/x", "gs://b/x", "GS://cfd-test/x"]
FOREIGN = ["s3://b/x", "http://h/x", "https://storage.googleapis.com/b/x", "hdfs://h/x", "file:///x", "s3:/b/x"]


def refusal(url: str = f"{FakeGcs.url}/run", *, passes: bool = False, **options: bool) -> str:
    """The message with which a URL is refused, in one line. The error is a PassingError if and only if `passes`."""
    with pytest.raises(UserError) as raised:
        buckets.check("data.path", url, **options)
    assert isinstance(raised.value, PassingError) == passes
    message = str(raised.value)
    assert "\n" not in message and message.startswith(f"data.path is {url!r}, ")
    return message


def forget_clients() -> None:
    """Clients are made again, with the credentials of the moment."""
    epath_backend.fsspec_backend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def nowhere(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGcs:
    """A bucket and a machine without credentials, outside of Google Cloud."""
    monkeypatch.setitem(fsspec.config.conf, "gcs", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NO_GCE_CHECK", "GCE_METADATA_ROOT", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(buckets, "PRODUCT", tmp_path / "none")
    monkeypatch.setattr(buckets, "METADATA", bucket.address.removeprefix("http://"))  # a server of another kind
    forget_clients()
    return bucket


@pytest.fixture
def token(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that need no service to be taken for valid."""
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "secret"})
    monkeypatch.setenv("FETCH_RAW_TOKEN_EXPIRY", "false")
    forget_clients()


@pytest.mark.parametrize("path", ["runs/x", "/runs/x", "~/x", ".", "", "C:/x", "run:1", "a:b/c", "./gs:/x", "./s3:/x"])
def test_paths_on_this_machine_are_no_urls(path: str) -> None:
    assert not buckets.is_url(path)


def test_a_url_that_pathlib_has_shortened_is_still_one() -> None:
    assert buckets.is_url(Path("gs://cfd-test/run"))


@pytest.mark.parametrize("url", MALFORMED + FOREIGN)
def test_a_url_that_names_no_bucket_is_refused_without_a_request(
    url: str, bucket: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert buckets.is_url(url)
    message = refusal(url)
    assert ("gs://BUCKET/NAME" in message) and (url in FOREIGN) == ("not a scheme that is read" in message)
    assert not bucket.requests and not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["a//b", "a/../b", "a/./b", "/a", "a*", "a?", "[a]", "a\\b", "a#1", "a%2fb", "a\nb"])
def test_names_that_clients_read_differently_are_refused(key: str, bucket: FakeGcs) -> None:
    with pytest.raises(UserError, match=r"do not agree .*: give a name without them"):
        buckets.check("data.path", f"{bucket.url}/{key}")
    assert not bucket.requests


@pytest.mark.parametrize("key", ["", "/", "/run", "/run/", "/a b/ü=1,+&"])
def test_a_bucket_that_can_be_used_passes_and_is_left_as_it_was(key: str, bucket: FakeGcs) -> None:
    bucket.put("run/there", b"1")
    buckets.check("data.path", bucket.url + key)
    assert [request.method for request in bucket.requests] == ["GET"]
    buckets.check("data.path", bucket.url + key, write=True)
    assert bucket.names() == ["run/there"]
    written = [request.name for request in bucket.requests if request.method == "POST"]
    assert len(written) == 1 and written[0].rpartition("/")[0] == key.strip("/")


def test_a_bucket_that_does_not_exist(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start of a new run ends with it, and every start with a flag that names the bucket."""
    monkeypatch.setattr(buckets, "PAUSES", ())
    assert refusal("gs://no-such-bucket/run").endswith("there is no bucket gs://no-such-bucket: correct the name")
    for kind, look in (
        (InputError, partial(buckets.check, "data.path")),
        (InputError, partial(buckets.sizes, "data.path")),
        (InputError, partial(buckets.size, "data.labels")),
        (CommandError, partial(access.run_path, "--init_from")),
    ):
        with pytest.raises(kind, match="there is no bucket gs://no-such-bucket: correct the name"):
            look("gs://no-such-bucket/run")
        bucket.fail = lambda request: 503
        with pytest.raises(PassingError):
            look("gs://no-such-bucket/run")
        bucket.fail = lambda request: None
    message = refusal("gs://no-such-bucket/run", write=True)
    assert message.endswith("or make it with `gcloud storage buckets create gs://no-such-bucket`")


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("method, action", [("GET", "list"), ("POST", "write"), ("DELETE", "delete")])
def test_a_permission_that_the_account_lacks_is_named(bucket: FakeGcs, method: str, action: str) -> None:
    bucket.fail = lambda request: 403 if request.method == method else None
    message = refusal(write=True)
    assert f"the account of this machine has no permission to {action} objects there: give the account" in message
    command = (
        "`gcloud storage buckets add-iam-policy-binding gs://cfd-test --member=user:ADDRESS "
        "--role=roles/storage.objectUser`"
    )
    assert command in message
    if method != "GET":
        buckets.check("data.path", f"{bucket.url}/run")


@pytest.mark.usefixtures("token")
def test_credentials_that_are_refused(bucket: FakeGcs) -> None:
    bucket.fail = lambda request: 401
    assert "the credentials of this machine are refused: run `gcloud auth application-default login`" in refusal()


@pytest.mark.parametrize("status", [401, 403])
def test_no_credentials_at_all(nowhere: FakeGcs, status: int) -> None:
    """No metadata server is there: Google's clients are told not to look for it, which takes them half a minute."""
    nowhere.fail = lambda request: status
    message = refusal()
    assert "no credentials" in message and message.endswith(buckets.LOGIN)
    assert os.environ["NO_GCE_CHECK"] == "true"


def test_on_a_machine_of_google_cloud_its_metadata_server_is_looked_for(
    nowhere: FakeGcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server may take some seconds to start, and not answer at first."""
    monkeypatch.setattr(buckets, "PRODUCT", tmp_path / "product")
    buckets.PRODUCT.write_text("Google Compute Engine\n")
    assert buckets._may_have_metadata() and not nowhere.requests
    buckets.PRODUCT.write_text("Another\n")
    assert not buckets._may_have_metadata() and nowhere.requests
    monkeypatch.setattr(buckets, "METADATA", "127.0.0.1:1")
    assert not buckets._may_have_metadata()
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1234")
    assert buckets._may_have_metadata()


def test_a_key_file_that_does_not_exist_is_not_passed_over(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/key.json")
    assert "GOOGLE_APPLICATION_CREDENTIALS is '/no/key.json', which is no file: correct it, or unset it" in refusal()
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    buckets.check("data.path", f"{bucket.url}/run")  # the remedy


def test_gcsfs_that_is_missing_is_named(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert refusal().endswith("pip install gcsfs") and not bucket.requests


def test_a_bucket_that_is_busy_is_asked_again(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PAUSES", (0.0,) * 3)
    for status in (408, 429, 500, 503):
        bucket.reset_counts()
        bucket.fail = lambda request, status=status: status if len(bucket.requests) % 3 else None
        buckets.check("data.path", f"{bucket.url}/run", write=True)
        assert len(bucket.requests) == 9 and not bucket.objects
    bucket.fail = lambda request: 503
    assert "the service answers 503: start again later" in refusal(passes=True)


def test_a_write_whose_answers_are_lost_passes(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PAUSES", (0.0,) * 3)
    bucket.lose = lambda request: len(bucket.requests) % 2 == 1
    buckets.check("data.path", f"{bucket.url}/run", write=True)
    assert not bucket.objects


def test_a_service_that_cannot_be_reached(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    forget_clients()
    message = refusal(passes=True)
    assert "the service cannot be reached (" in message and message.endswith("check the network, and start again")


def test_sizes_are_those_of_all_objects_below_a_folder(bucket: FakeGcs) -> None:
    """One page of a listing has 1,000 names."""
    expected = {f"a/{i:04}": i % 7 for i in range(1001)} | {"b": 3, "empty/": 0}
    for name, size in expected.items():
        bucket.put(f"folder/{name}", b"x" * size)
    bucket.put("folder/", b"")
    bucket.put("folder2/other", b"1")
    assert buckets.sizes("data.path", f"{bucket.url}/folder/") == expected
    assert len(bucket.requests) == 2
    assert buckets.sizes("data.path", f"{bucket.url}/none") == {}
    assert len(buckets.sizes("data.path", bucket.url)) == 1005


def test_objects_are_read_whole_and_in_parts(bucket: FakeGcs) -> None:
    url = f"{bucket.url}/a b/#1%2f?.bin"
    bucket.put("a b/#1%2f?.bin", bytes(range(100)))
    bucket.put("empty", b"")
    assert buckets.read(url) == bytes(range(100))
    assert buckets.read(url, 10, 20) == bytes(range(10, 20))
    assert buckets.read(url, 90, 200) == bytes(range(90, 100)) and buckets.read(url, 100, 200) == b""
    assert buckets.read(f"{bucket.url}/empty") == b""
    with buckets.reader(url) as file:
        file.seek(50)
        assert file.read() == bytes(range(50, 100))
    assert buckets.size("data.path", f"{bucket.url}/empty") == 0
    assert buckets.size("data.path", f"{bucket.url}/none") is None
    with pytest.raises(UserError, match="there is no bucket gs://none"):
        buckets.size("data.path", "gs://none/x")


def test_an_object_that_cannot_be_read_is_an_os_error_with_a_reason(bucket: FakeGcs) -> None:
    url = f"{bucket.url}/x"
    with pytest.raises(FileNotFoundError):
        buckets.read(url)
    bucket.put("x", b"1")
    for status in (400, 401, 403):
        bucket.fail = lambda request, status=status: status
        with pytest.raises(OSError) as raised:
            buckets.read(url)
        assert not isinstance(raised.value, FileNotFoundError) and raised.value.strerror
