"""A Google Cloud Storage of this machine's own: the JSON API over HTTP, as far as its clients use it here.

Objects live in memory, have generations (conditional writes) and CRC-32C sums, and there are no folders, no renames and
no appending: what an object store lacks, this one lacks. gcsfs, google-cloud-storage and TensorStore's own driver all
speak to it, in this process and in children, by the environment that `environment` gives.
"""

import base64
import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c


class Store(ThreadingHTTPServer):
    """`objects`: (bucket, name) -> (generation, bytes, time of writing). `requests` counts them by method."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[int, bytes, float]] = {}
        self.uploads: dict[str, tuple[tuple[str, str], dict[str, str], bytearray]] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients hang up where they have enough, or are killed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What sends the clients here instead of to Google, without asking anybody for credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The objects of a bucket, sorted."""
        with self.lock:
            return sorted(name for owner, name in self.objects if owner == bucket and name.startswith(prefix))


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """A running store, stopped at the end."""
    with Store() as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Store

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        try:
            self._serve()
        except ConnectionError:
            raise
        except Exception as error:  # what no client here has asked before: none of them tries this again
            self._fail(400, f"the test's store does not know this request: {error!r}")

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = url.path.removeprefix("/upload").removeprefix("/download").removeprefix("/storage/v1/b/")
        bucket, _, rest = path.partition("/")
        with self.server.lock:
            self.server.requests.append(f"{self.command} {url.path}")
            if not rest:
                return self._send({"kind": "storage#bucket", "name": bucket, "id": bucket, "storageClass": "STANDARD"})
            if url.path.startswith("/upload"):
                return self._upload(unquote(bucket), query, body)
            if rest == "o":
                return self._list(unquote(bucket), query)
            name, *target = (unquote(part) for part in rest.removeprefix("o/").split("/"))
            self._object((unquote(bucket), name), target, query)

    def _object(self, key: tuple[str, str], target: list[str], query: dict[str, str]) -> None:
        found = self.server.objects.get(key)
        if found is None:
            return self._fail(404, f"No such object: {key[0]}/{key[1]}")
        if not self._allowed(found[0], query):
            return None
        if self.command == "DELETE":
            del self.server.objects[key]
            return self._send(b"", 204)
        if target:  # rewriteTo/b/BUCKET/o/NAME or moveTo/o/NAME
            moved = target[0] == "moveTo"
            resource = self._store((key[0] if moved else target[2], target[-1]), found[1])
            if moved:
                del self.server.objects[key]
            return self._send(resource if moved else {"done": True, "resource": resource})
        return self._media(found) if query.get("alt") == "media" else self._send(self._resource(key))

    def _media(self, found: tuple[int, bytes, float]) -> None:
        data, headers, status = found[1], {"x-goog-generation": str(found[0]), "ETag": str(found[0])}, 200
        if "Range" in self.headers:
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, len(data) - int(stop))
            last = min(int(stop), len(data) - 1) if start and stop else len(data) - 1
            if first > last:
                return self._fail(416, "the range is not satisfiable")
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(data)}", 206
            data = data[first : last + 1]
        self._send(data, status, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = [name for name in self.server.names(bucket, prefix) if name >= query.get("startOffset", "")]
        names = [name for name in names if name < query["endOffset"]] if query.get("endOffset") else names
        items, prefixes = [], dict[str, None]()
        for name in names:
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes[prefix + head + found] = None
            else:
                items.append(self._resource((bucket, name)))
        self._send({"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            return self._resume(query["upload_id"], body)
        kind = query["uploadType"]
        if kind == "multipart":
            boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            _, about, rest = body.split(boundary, 2)
            line = b"\r\n" if rest.startswith(b"\r\n") else b"\n"
            data = rest.partition(2 * line)[2].rpartition(line + boundary)[0]
            key = (bucket, json.loads(about.partition(2 * line)[2])["name"])
        else:
            key, data = (bucket, query.get("name") or json.loads(body)["name"]), body
        if not self._allowed(self.server.objects.get(key, (0,))[0], query):
            return None
        if kind == "resumable":
            upload = str(next(self.server.numbers))
            self.server.uploads[upload] = (key, query, bytearray())
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
            return self._send({}, 200, {"Location": where})
        return self._send(self._store(key, data))

    def _resume(self, upload: str, body: bytes) -> None:
        key, query, data = self.server.uploads[upload]
        if self.command == "DELETE":
            del self.server.uploads[upload]
            return self._send(b"", 499)
        data += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(data) < int(total):
            return self._send(b"", 308, {"Range": f"bytes=0-{len(data) - 1}"})
        del self.server.uploads[upload]
        if self._allowed(self.server.objects.get(key, (0,))[0], query):
            self._send(self._store(key, bytes(data)))
        return None

    def _allowed(self, generation: int, query: dict[str, str]) -> bool:
        """Whether the conditions on the object's generation hold (0: there is none); answers where they do not."""
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._fail(412, "conditionNotMet")
        elif query.get("ifGenerationNotMatch") == str(generation):
            self._send(b"", 304)
        else:
            return True
        return False

    def _store(self, key: tuple[str, str], data: bytes) -> dict[str, object]:
        self.server.objects[key] = (next(self.server.numbers), data, time.time())
        return self._resource(key)

    def _resource(self, key: tuple[str, str]) -> dict[str, object]:
        generation, data, written = self.server.objects[key]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(written)) + f".{int(written % 1 * 1000):03d}Z"
        return {
            "kind": "storage#object",
            "bucket": key[0],
            "name": key[1],
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "timeCreated": moment,
            "updated": moment,
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }

    def _fail(self, status: int, message: str) -> None:
        self._send({"error": {"code": status, "message": message}}, status)

    def _send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)
