"""A real web server on the loopback interface that misbehaves on demand. It stops with its test."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest


@dataclass
class Page:
    """What stands at one path, and how the server misbehaves there.

    Attributes
    ----------
    body : bytes
        The file.
    ranges : bool
        Whether ranges are served.
    if_range : bool
        Whether a range of another version is refused.
    etag, modified : str
        Validators; "" for none.
    faults : list
        One per request, in order: an int status, ("cut", n) to close after n bytes, ("status", code, headers,
        body), ("stall", n, seconds), ("length", n) to announce another length,
        ("swap", body, etag) to become another file. None: no fault.
    always : object
        The fault of every request after those.
    """

    body: bytes
    ranges: bool = True
    if_range: bool = True
    etag: str = ""
    modified: str = ""
    faults: list = field(default_factory=list)
    always: object = None
    type: str = "application/octet-stream"
    headers: dict = field(default_factory=dict)


class Loopback:
    """The server, its pages by path, and the requests it saw: (path, headers)."""

    def __init__(self, port: int = 0) -> None:
        self.pages: dict[str, Page | Callable] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def put(self, path: str, body: bytes, **how) -> str:
        """Put a file at a path, with an ETag unless told otherwise; returns its address."""
        how.setdefault("etag", f'"{hashlib.md5(body).hexdigest()}"')
        self.pages[path] = Page(body, **how)
        return self.base + path

    def asked(self, path: str) -> list[dict[str, str]]:
        """Headers of every request for a path."""
        return [headers for seen, headers in self.seen if urlsplit(seen).path == path]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(loopback):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                loopback.seen.append((self.path, dict(self.headers)))
                page = loopback.pages.get(urlsplit(self.path).path)
                if callable(page):
                    page = page(parse_qs(urlsplit(self.path).query))
                if page is None:
                    return self.answer(404, {}, b"<html>no such page</html>")
                fault = page.faults.pop(0) if page.faults else page.always
                kind = fault[0] if isinstance(fault, tuple) else fault
                if isinstance(kind, int):
                    return self.answer(kind, {}, b"try later")
                if kind == "status":
                    return self.answer(*fault[1:])
                if kind == "swap":
                    page.body, page.etag = fault[1:]
                self.serve(page, fault if isinstance(fault, tuple) else ("", 0))

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def answer(self, status, headers, body):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def serve(self, page, fault):
                body, status, headers = page.body, 200, {"Content-Type": page.type} | page.headers
                headers |= {"ETag": page.etag} if page.etag else {}
                headers |= {"Last-Modified": page.modified} if page.modified else {}
                wanted = self.headers.get("Range")
                same = self.headers.get("If-Range") in (None, page.etag, page.modified)
                if page.ranges and wanted and (same or not page.if_range):
                    first = int(wanted.removeprefix("bytes=").split("-")[0])
                    if first >= len(page.body):
                        return self.answer(416, {"Content-Range": f"bytes */{len(page.body)}"}, b"")
                    headers["Content-Range"] = f"bytes {first}-{len(page.body) - 1}/{len(page.body)}"
                    body, status = page.body[first:], 206
                announced = fault[1] if fault[0] == "length" else len(body)
                self.send_response(status)
                for name, value in {"Content-Length": str(announced), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have gone
                    self.send_body(body, fault)
                if announced != len(body) or fault[0] in ("cut", "stall"):
                    self.close_connection = True

            def send_body(self, body, fault):
                kind = fault[0]
                if kind == "cut":
                    self.wfile.write(body[: fault[1]])
                elif kind == "stall":
                    self.wfile.write(body[: fault[1]])
                    self.wfile.flush()
                    time.sleep(fault[2])
                else:
                    self.wfile.write(body)

        return Handler


@pytest.fixture
def loopback():
    """A server for one test."""
    server = Loopback()
    yield server
    server.stop()
