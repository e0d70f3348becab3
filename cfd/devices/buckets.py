"""Buckets, gs://NAME: which paths are URLs, whether a bucket can be used, and reading what lies in it.

Every request carries the credentials that gcsfs finds. An error that a user can correct is raised as a UserError.
"""

import contextlib
import errno
import http.client
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from cfd.errors import CommandError, InputError, PassingError, UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|\Z)|gs:|.*://", re.DOTALL | re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, if a bucket is busy or cannot be reached."""
PATIENCE = 15.0
"""Seconds after which there is no further attempt, whatever the attempts took."""
TIMEOUT = (5.0, 30.0)
"""Seconds to connect and to wait for an answer."""
METADATA, METADATA_SECONDS = "169.254.169.254", 1.0
"""The address of the metadata server of Google Cloud, and the seconds for its answer if the machine is not Google's."""
PRODUCT = Path("/sys/class/dmi/id/product_name")
LOGIN = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service "
    "account"
)


class _Answer(NamedTuple):
    """The answer of the service: an HTTP status, or 0 if there is none, and the body, or why there is no answer."""

    status: int
    body: str


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, malformed ones such as gs:/NAME included, and not a path on this machine."""
    return _URL.match(os.fspath(path)) is not None


def check(name: str, url: str, *, write: bool = False) -> None:
    """Raises UserError unless the bucket of `url` can be listed and, with `write`, be written to and deleted from.

    `name` is the field or flag that holds the URL, for the message. The form of the URL is checked first, without a
    request. Nothing is left in the bucket. A bucket that is busy or out of reach is tried for 15 seconds, and missing
    credentials show in a few seconds, except on a machine of Google Cloud, where the metadata server is waited for.
    """
    bucket, key = split(name, url)
    session, base, headers = _connect(name, url)
    with session:
        objects = f"storage/v1/b/{quote(bucket)}/o"
        prefix = f"{key}/" if key else ""
        found = _ask(session, "GET", f"{base}{objects}?maxResults=1&prefix={quote(prefix, safe='')}", headers)
        _raise_unless_ok(name, url, found, headers, "list", write)
        if write:
            probe = quote(f"{prefix}.writable-{uuid.uuid4().hex}", safe="")
            found = _ask(session, "POST", f"{base}upload/{objects}?uploadType=media&name={probe}", headers)
            _raise_unless_ok(name, url, found, headers, "write", write)
            found = _ask(session, "DELETE", f"{base}{objects}/{probe}", headers)
            if found.status != 404:  # an attempt whose answer was lost has deleted it
                _raise_unless_ok(name, url, found, headers, "delete", write)


def has_credentials(name: str, url: str) -> bool:
    """Whether requests to the bucket carry credentials. Without them, only a public bucket can be read."""
    session, _, headers = _connect(name, url)
    session.close()
    return bool(headers)


def sizes(name: str, url: str) -> dict[str, int]:
    """The size in bytes of every object below the folder `url`, by its name relative to it, in order.

    The name of an empty folder ends with a slash. Raises UserError as `check` does.
    """
    bucket, key = split(name, url)
    prefix = f"{key}/" if key else ""
    session, base, headers = _connect(name, url)
    address = (
        f"{base}storage/v1/b/{quote(bucket)}/o?fields=items(name,size),nextPageToken&prefix={quote(prefix, safe='')}"
    )
    found: dict[str, int] = {}
    token = ""
    with session, tqdm(desc="list objects", unit="object", unit_scale=True, disable=None) as bar:
        while True:
            answer = _ask(session, "GET", address + (f"&pageToken={quote(token, safe='')}" if token else ""), headers)
            _raise_unless_ok(name, url, answer, headers, "list", False)
            page = json.loads(answer.body)
            items = page.get("items", ())
            found |= {item["name"][len(prefix) :]: int(item["size"]) for item in items if item["name"] != prefix}
            bar.update(len(items))
            token = page.get("nextPageToken", "")
            if not token:
                return found


def size(name: str, url: str) -> int | None:
    """The size of an object in bytes, or None if there is no such object. Raises UserError as `check` does."""
    bucket, key = split(name, url)
    session, base, headers = _connect(name, url)
    with session:
        answer = _ask(session, "GET", f"{base}storage/v1/b/{quote(bucket)}/o/{quote(key, safe='')}", headers)
    if answer.status == 404:
        check(name, url)  # the bucket may be the one that does not exist
        return None
    _raise_unless_ok(name, url, answer, headers, "read", False)
    return int(json.loads(answer.body)["size"])


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes [start, end) of an object, or fewer at its end, by default all, from any thread.

    gcsfs asks up to six times. Raises FileNotFoundError if there is no such object, and OSError if it cannot be read.
    """
    from gcsfs.retry import HttpError

    with _as_os_error(url):
        try:
            return _files().cat_file(url, start=start, end=end)
        except HttpError as error:
            if error.code == 416:  # the range begins behind the end
                return b""
            raise


def reader(url: str) -> Any:
    """An object as a binary file that is read in blocks. Raises as `read` does."""
    with _as_os_error(url):
        return _files().open(url, "rb", cache_type="readahead")  # gcsfs's own choice leaves tasks behind


def _files() -> Any:
    """gcsfs's file system, the one that etils uses, which keeps the credentials."""
    from etils.epath.backend import fsspec_backend

    return fsspec_backend.fs("gs://")


@contextlib.contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Raises every error as an OSError with a reason."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # the exceptions of gcsfs have no common class
        raise OSError(errno.EIO, _line(error) or type(error).__name__, url) from error


def split(name: str, url: str) -> tuple[str, str]:
    """The bucket of a URL gs://BUCKET/KEY, and KEY without a slash at its end.

    Raises CommandError, which calls the URL `name`, for another scheme and for a malformed URL.
    """
    scheme = url.partition(":")[0]
    if scheme.lower() != "gs":
        raise CommandError(
            f"{name} is {url!r}, and {scheme}: is not a scheme that is read: give gs://BUCKET/NAME, or a path on this "
            "machine to which the files are copied"
        )
    bucket, _, key = url[len("gs://") :].partition("/")
    key = key.rstrip("/")
    if not url.startswith("gs://") or not _BUCKET.fullmatch(bucket):
        raise CommandError(
            f"{name} is {url!r}, which does not have the form gs://BUCKET/NAME: correct it; the name of a bucket has "
            "at least 3 lower-case letters, digits, '-', '_' and '.'"
        )
    parts = key.split("/") if key else []
    if {"", ".", ".."} & {*parts} or re.search(r"[\\\[\]*?#%\x00-\x1f\x7f]", key):
        raise CommandError(
            rf"{name} is {url!r}, and its clients do not agree about empty parts, '.', '..' and \ [ ] * ? # % in a "
            "name: give a name without them"
        )
    return bucket, key


def _connect(name: str, url: str) -> tuple[Any, str, dict[str, str]]:
    """An HTTP session, the address of the service, and the headers with the credentials, all as gcsfs has them."""
    try:
        import gcsfs  # noqa: F401 (the import of a part of it may succeed without it, if it was imported before)
        import requests
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError
    except ImportError as error:
        raise UserError(f"{name} is {url!r}, and buckets need gcsfs ({error}): pip install gcsfs") from error
    key_file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    if key_file and not os.path.isfile(key_file):
        raise UserError(
            f"{name} is {url!r}, and the environment variable GOOGLE_APPLICATION_CREDENTIALS is {key_file!r}, which is "
            "no file: correct it, or unset it and run `gcloud auth application-default login`"
        )
    if not _may_have_metadata():
        os.environ.setdefault("NO_GCE_CHECK", "true")  # Google's clients look for the server for half a minute
    headers: dict[str, str] = {}
    try:
        with _silent("google.auth._default"):  # the answer of the bucket says more than its warning
            system = _files()
            system.credentials.apply(headers)
    except (GoogleAuthError, ValueError, OSError) as error:
        raise PassingError(
            f"{name} is {url!r}, and the credentials cannot be used ({_line(error)}): {LOGIN}"
        ) from error
    except HttpError as error:
        cause = error.__cause__ or error
        raise PassingError(
            f"{name} is {url!r}, and the credentials cannot be used ({_line(cause)}): {LOGIN}"
        ) from error
    return requests.Session(), system.base.removesuffix("storage/v1/"), headers


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Drops the warnings of a logger meanwhile."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _may_have_metadata() -> bool:
    """Whether this may be a machine of Google Cloud, whose metadata server gives credentials.

    Its own machines are known by their name, because the server may take some seconds to start with a container.
    """
    if any(os.environ.get(f"GCE_METADATA_{kind}") for kind in ("HOST", "ROOT", "IP")):
        return True
    try:
        if PRODUCT.read_text().startswith("Google"):
            return True
    except OSError:
        pass  # not Linux, or a container without this file
    connection = http.client.HTTPConnection(METADATA, timeout=METADATA_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/", headers={"Metadata-Flavor": "Google"})
            return connection.getresponse().getheader("Metadata-Flavor") == "Google"
        except (OSError, http.client.HTTPException):
            return False


def _ask(session: Any, method: str, address: str, headers: dict[str, str]) -> _Answer:
    """The answer to a request, which is repeated after each of PAUSES while the service is busy or out of reach."""
    import requests

    answer, deadline = _Answer(0, ""), time.monotonic() + PATIENCE
    for pause in (*PAUSES, None):
        try:
            response = session.request(method, address, headers=headers, timeout=TIMEOUT, allow_redirects=False)
            answer = _Answer(response.status_code, response.text)
        except requests.exceptions.RequestException as error:
            answer = _Answer(0, str(getattr(error.args[0], "reason", error) if error.args else error))
        again = answer.status in (0, 408, 429) or answer.status >= 500
        if not again or pause is None or time.monotonic() > deadline:
            break
        time.sleep(pause)
    return answer


def _said(text: str) -> str:
    """The message in the body of an answer with an error."""
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a proxy answers with text of its own
        text = json.loads(text)["error"]["message"]
    return _line(text)


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def _raise_unless_ok(name: str, url: str, found: _Answer, headers: dict[str, str], action: str, write: bool) -> None:
    """Raises UserError, with the remedy, unless the answer to a request that does `action` is a success.

    If there is no such bucket, it is an InputError: a later start finds none either.
    """
    bucket = "gs://" + url.removeprefix("gs://").partition("/")[0]
    begin, says = f"{name} is {url!r}", _said(found.body)
    said = f" ({says})" if says else ""
    if 200 <= found.status < 300:
        return
    if found.status == 404:
        make = f", or make it with `gcloud storage buckets create {bucket}`" if write else ""
        raise InputError(f"{begin}, and there is no bucket {bucket}: correct the name{make}")
    if found.status == 401:
        what = "the credentials of this machine are refused" if headers else "this machine has no credentials"
        raise UserError(f"{begin}, and {what}{said}: {LOGIN}")
    if found.status == 403:
        role = "roles/storage.objectUser" if write else "roles/storage.objectViewer"
        who = "the account of this machine" if headers else "this machine, which has no credentials,"
        remedy = (
            f"give the account the role {role}, with `gcloud storage buckets add-iam-policy-binding {bucket} "
            f"--member=user:ADDRESS --role={role}` (serviceAccount:ADDRESS for a service account); a virtual machine "
            "also needs --scopes=cloud-platform"
        )
        raise UserError(
            f"{begin}, and {who} has no permission to {action} objects there{said}: {remedy if headers else LOGIN}"
        )
    if found.status == 0:
        raise PassingError(f"{begin}, and the service cannot be reached{said}: check the network, and start again")
    raise PassingError(
        f"{begin}, and the service answers {found.status}{said}: start again later, or give another place"
    )
