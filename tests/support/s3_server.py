"""A real S3 server on loopback, and a proxy before it that disturbs what goes through."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import s3fs

ACCESS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Generator[str]:
    """Runs moto's server in a process of its own; yields its address."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(command, stdout=log, stderr=log) as server:
            try:
                _wait_for(address, server)
                yield address
            finally:
                server.kill()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "moto's server has ended"
        try:
            with urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("moto's server does not answer")


def make_bucket(address: str, name: str) -> None:
    """Makes a bucket."""
    request = urllib.request.Request(f"{address}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=60):
        pass


def uploads(address: str, bucket: str) -> int:
    """Returns how many uploads in parts are begun in a bucket and not ended."""
    with urllib.request.urlopen(f"{address}/{bucket}?uploads", timeout=60) as answer:
        return int(answer.read().count(b"<UploadId>"))


class Request:
    """A request on its way.

    Args:
        method: of HTTP.
        path: with the query.
        number: how many requests came before it.
        size: of its body, in bytes.
    """

    def __init__(self, method: str, path: str, number: int, size: int) -> None:
        self.method, self.path, self.number, self.size = method, path, number, size

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber=" in self.path

    @property
    def completes(self) -> bool:
        return self.method == "POST" and "uploadId=" in self.path

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type=" in self.path


# Called with each request; what it returns is done: None passes it on; a number is answered as the
# status, and of two the second as the body; "cut" passes half of it on and closes the connection;
# "lost" passes it on and closes the connection in place of the answer; "short" closes it in the
# middle of the answer; a function of the answer's status and body returns others.
Disturb = Callable[[Request], Any]


class Proxy:
    """Passes requests on to a server, disturbed as a test wants it.

    Args:
        target: the server's address.
    """

    def __init__(self, target: str) -> None:
        self.disturb: Disturb = lambda _: None
        self.requests: list[Request] = []
        self._guard = threading.Lock()
        host, port = target.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                proxy._pass_on(self, host, int(port))

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                # A client that is killed leaves its connection as it is.
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, handler: BaseHTTPRequestHandler, host: str, port: int) -> None:
        body = _body_of(handler)
        with self._guard:
            request = Request(handler.command, handler.path, len(self.requests), len(body))
            self.requests.append(request)
        what = self.disturb(request)
        if what == "cut":
            with socket.create_connection((host, port)) as raw:
                raw.sendall(_head_of(handler, len(body)) + body[: len(body) // 2])
            _drop(handler)
            return
        if isinstance(what, int):
            what = what, b"<Error><Code>InternalError</Code></Error>"
        if isinstance(what, tuple):
            _answer(handler, what[0], {}, what[1])
            return
        connection = http.client.HTTPConnection(host, port, timeout=120)
        headers = {name: value for name, value in handler.headers.items() if name != "Connection"}
        headers.pop("Transfer-Encoding", None)
        headers["Content-Length"] = str(len(body))
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        data, status, told = answer.read(), answer.status, dict(answer.getheaders())
        connection.close()
        if what == "lost":
            _drop(handler)
            return
        if callable(what):
            status, data = what(status, data)
            told.pop("Content-Length", None)
        _answer(handler, status, told, data, short=what == "short")


def _body_of(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Expect", "").lower() == "100-continue":
        # The base class has answered that already.
        pass
    if "chunked" in handler.headers.get("Transfer-Encoding", ""):
        found = b""
        while size := int(handler.rfile.readline().strip() or b"0", 16):
            found += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return found
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


def _head_of(handler: BaseHTTPRequestHandler, size: int) -> bytes:
    lines = [f"{handler.command} {handler.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in handler.headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _drop(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    data: bytes,
    short: bool = False,
) -> None:
    with contextlib.suppress(OSError):
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                handler.send_header(name, value)
        length = headers.get("Content-Length") or headers.get("content-length") or str(len(data))
        handler.send_header("Content-Length", length)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if short else data)
        if short:
            handler.wfile.flush()
            _drop(handler)


@contextlib.contextmanager
def reached(address: str) -> Generator[None]:
    """Lets S3 be at an address, here and in processes that are started."""
    told = {**ACCESS, "AWS_ENDPOINT_URL": address}
    s3fs.S3FileSystem.clear_instance_cache()
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server() as address:
        yield address


@pytest.fixture
def s3_url(s3_address: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty folder in S3."""
    bucket = f"bucket-{abs(hash(request.node.nodeid))}-{time.monotonic_ns()}"
    make_bucket(s3_address, bucket)
    with reached(s3_address):
        yield f"s3://{bucket}/runs/one"


@pytest.fixture
def proxy(s3_address: str, s3_url: str) -> Iterator[Proxy]:
    """What stands between the test and the S3 server."""
    made = Proxy(s3_address)
    try:
        with reached(made.address):
            yield made
    finally:
        made.close()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty folder in each kind of store."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "file":
        return f"file://{tmp_path}/runs/one"
    return f"memory://{tmp_path.name}-{time.monotonic_ns()}/runs/one"
