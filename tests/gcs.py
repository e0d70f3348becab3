"""A bucket of Google Cloud Storage in memory, behind a web server on loopback, with faults that tests ask for.

It has the part of the JSON API that TensorStore, gcsfs, google-cloud-storage and ArrayRecord's reader use: generations,
preconditions, listings, and uploads in one or several requests.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "cfd-test"
JSON = ("Content-Type", "application/json")
Query = dict[str, str]


class Stored(NamedTuple):
    """One object: its content, its generation, and when it was written."""

    content: bytes
    generation: int
    written: float


class Request(NamedTuple):
    """One request that the server received. `name` is the object's, decoded, or "" for a request about no object."""

    method: str
    path: str
    query: Query
    name: str


class FakeGcs:
    """The server of one bucket.

    - `url` is the bucket's, "gs://cfd-test". `environment` points every client at the server.
    - `objects` maps names to Stored. `put` and `flip` change an object as another client could.
    - `fail(request)`, if it returns a status, makes the server answer with it and do nothing.
    - `lose(request)`, if true, makes the server do what is asked and answer with status 503.
    - `requests`, `bytes_in` and `bytes_out` are counted from the start, or from `reset_counts`.
    - With `updates_per_second`, a faster update of the same object is answered with status 429, as the service does.
    """

    url = f"gs://{BUCKET}"

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.fail: Callable[[Request], int | None] = lambda request: None
        self.lose: Callable[[Request], bool] = lambda request: False
        self.updates_per_second: float | None = None
        self.mutex = threading.RLock()
        self.generation = 1_000_000
        self.uploads: dict[str, tuple[str, bytearray, Query]] = {}
        self.reset_counts()
        self.server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"gcs": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "FakeGcs":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that send every client to this server, without a search for credentials."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs and google-cloud-storage
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,  # ArrayRecord
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_ROOT": "127.0.0.1:1",
            "GOOGLE_CLOUD_PROJECT": "test",
        }

    def reset_counts(self) -> None:
        """Forgets the requests, and counts bytes from 0."""
        self.requests: list[Request] = []
        self.bytes_in = self.bytes_out = 0

    def put(self, name: str, content: bytes, query: Mapping[str, str] = {}) -> int:
        """Writes an object, unless a precondition in `query` fails. Returns the status of the answer."""
        with self.mutex:
            found = self.objects.get(name)
            if not holds(found, query):
                return 412
            if self.updates_per_second and found and time.time() - found.written < 1 / self.updates_per_second:
                return 429
            self.generation += 1
            self.objects[name] = Stored(bytes(content), self.generation, time.time())
            return 200

    def flip(self, name: str, position: int = -1) -> None:
        """Changes one byte of an object: by default, the one in its middle."""
        content = bytearray(self.objects[name].content)
        content[len(content) // 2 if position < 0 else position] ^= 0xFF
        self.put(name, bytes(content))

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects that begin with `prefix`, in order."""
        with self.mutex:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def metadata(self, name: str) -> dict[str, Any]:
        content, generation, written = self.objects[name]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written))
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{generation}",
            "bucket": BUCKET,
            "name": name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "timeCreated": stamp,
            "updated": stamp,
            "storageClass": "STANDARD",
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }


class Server(ThreadingHTTPServer):
    """Clients may hang up in the middle of an answer, as ArrayRecord's reader does."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def holds(found: Stored | None, query: Mapping[str, str]) -> bool:
    """Whether the preconditions of a request hold. Generation 0 stands for no object."""
    generation = found.generation if found else 0
    wanted, unwanted = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
    return wanted in (None, str(generation)) and unwanted != str(generation)


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    gcs: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    lost = False

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Nothing is printed."""

    def reply(self, status: int, body: bytes | Mapping[str, Any] = b"", *headers: tuple[str, str]) -> None:
        if self.lost:
            status, body, headers = 503, b"the answer was lost", ()
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), (*headers, JSON)
        has_body = status not in (204, 304)
        self.send_response(status)
        for header in (*headers, ("Content-Length", str(len(body)))) if has_body else headers:
            self.send_header(*header)
        self.end_headers()
        if has_body and self.command != "HEAD":
            self.gcs.bytes_out += len(body)
            self.wfile.write(body)

    def refuse(self, status: int) -> None:
        reason = {304: "notModified", 404: "notFound", 412: "conditionNotMet", 429: "rateLimitExceeded"}.get(status, "")
        error = {"code": status, "message": reason, "errors": [{"reason": reason, "message": reason}]}
        self.reply(status, {"error": error})

    def received(self) -> bytes:
        """The body of the request."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.gcs.bytes_in += len(content)
        return content

    def any_method(self) -> None:
        url = urlsplit(self.path)
        path, query = re.sub("/+", "/", url.path), dict(parse_qsl(url.query, keep_blank_values=True))
        content = self.received()
        self.lost = False
        action = next((match for pattern in ROUTES if (match := pattern.match(path))), None)
        parts = {key: unquote(part) for key, part in action.groupdict().items() if part} if action else {}
        request = Request(self.command, path, query, parts.get("name") or query.get("name", ""))
        self.gcs.requests.append(request)
        if status := self.gcs.fail(request):
            return self.refuse(status)
        self.lost = self.gcs.lose(request)
        if action is None or parts.get("bucket", BUCKET) != BUCKET:
            return self.refuse(404)
        ROUTES[action.re](self, parts, query, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = any_method

    def bucket(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        self.reply(200, {"kind": "storage#bucket", "id": BUCKET, "name": BUCKET, "projectNumber": "1"})

    def object(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        name, gcs = parts["name"], self.gcs
        with gcs.mutex:
            found = gcs.objects.get(name)
            if found is None or query.get("generation", str(found.generation)) != str(found.generation):
                return self.refuse(404)
            if not holds(found, query):
                return self.refuse(304 if self.command == "GET" and "ifGenerationNotMatch" in query else 412)
            if self.command == "DELETE":
                del gcs.objects[name]
                return self.reply(204)
            metadata = gcs.metadata(name)
        if query.get("alt") != "media":
            return self.reply(200, metadata)
        headers = [
            ("Content-Type", metadata["contentType"]),
            ("ETag", metadata["etag"]),
            ("x-goog-generation", metadata["generation"]),
            ("x-goog-metageneration", "1"),
            ("x-goog-hash", f"md5={metadata['md5Hash']}"),
            ("x-goog-stored-content-length", metadata["size"]),
        ]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        body, size = found.content, len(found.content)
        if wanted is None or not size:
            return self.reply(200, body, *headers)
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= size:
            return self.refuse(416)
        self.reply(206, body[start:end], *headers, ("Content-Range", f"bytes {start}-{end - 1}/{size}"))

    def listing(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        limit, after = int(query.get("maxResults", 1000)), query.get("pageToken", "")
        items, folders = [], set()
        following = {}
        with self.gcs.mutex:
            for name in self.gcs.names(prefix):
                if name <= after or name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                    continue
                head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                if mark:
                    folders.add(prefix + head + mark)
                elif len(items) == limit:
                    following = {"nextPageToken": items[-1]["name"]}
                    break
                else:
                    items.append(self.gcs.metadata(name))
        self.reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders), **following})

    def upload(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        gcs, kind = self.gcs, query.get("uploadType")
        if kind == "media":
            return self.store(query["name"], content, query)
        if kind == "multipart":
            found = re.search('boundary="?([^";]+)', self.headers["Content-Type"])
            assert found, self.headers["Content-Type"]
            _, first, second, *_ = content.split(b"--" + found.group(1).strip("'").encode())
            metadata, data = (re.split(rb"\r?\n\r?\n", part.lstrip(b"\r\n"), maxsplit=1)[1] for part in (first, second))
            name = query.get("name") or json.loads(metadata)["name"]
            return self.store(name, re.sub(rb"\r?\n\Z", b"", data), query)
        if "upload_id" not in query:
            number = str(len(gcs.uploads))
            gcs.uploads[number] = query.get("name") or json.loads(content)["name"], bytearray(), query
            place = f"{gcs.address}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            return self.reply(200, b"", ("Location", place), ("X-GUploader-UploadID", number))
        name, held, preconditions = gcs.uploads[query["upload_id"]]
        held += content
        if self.headers.get("Content-Range", "bytes 0-0/0").endswith("/*"):
            return self.reply(308, b"", *([("Range", f"bytes=0-{len(held) - 1}")] if held else []))
        self.store(name, bytes(held), preconditions)

    def copy(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        name, gcs = parts["name"], self.gcs
        with gcs.mutex:
            if name not in gcs.objects:
                return self.refuse(404)
            target = parts.get("moved") or parts["copied"]
            status = gcs.put(target, gcs.objects[name].content, query)
            if status != 200:
                return self.refuse(status)
            metadata = gcs.metadata(target)
            if "moved" in parts:
                del gcs.objects[name]
                return self.reply(200, metadata)
        size = metadata["size"]
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        self.reply(200, done | {"resource": metadata})

    def compose(self, parts: dict[str, str], query: Query, content: bytes) -> None:
        with self.gcs.mutex:
            sources = [source["name"] for source in json.loads(content)["sourceObjects"]]
            if not self.gcs.objects.keys() >= set(sources):
                return self.refuse(404)
            self.store(parts["name"], b"".join(self.gcs.objects[name].content for name in sources), query)

    def store(self, name: str, content: bytes, query: Query) -> None:
        with self.gcs.mutex:
            status = self.gcs.put(name, content, query)
            if status == 200:
                self.reply(200, self.gcs.metadata(name))
            else:
                self.refuse(status)


_OBJECT = r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)"
ROUTES: dict[re.Pattern[str], Callable[[Handler, dict[str, str], Query, bytes], None]] = {
    re.compile(rf"(?:/download)?{_OBJECT}\Z"): Handler.object,
    re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o\Z"): Handler.listing,
    re.compile(r"(?:/resumable)?/upload/storage/v1/b/(?P<bucket>[^/]+)/o\Z"): Handler.upload,
    re.compile(rf"{_OBJECT}/(?:rewriteTo/b/[^/]+/o/(?P<copied>[^/]+)|moveTo/o/(?P<moved>[^/]+))\Z"): Handler.copy,
    re.compile(rf"{_OBJECT}/compose\Z"): Handler.compose,
    re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)\Z"): Handler.bucket,
}
"""{path: the method of Handler that answers}."""
