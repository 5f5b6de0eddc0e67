"""/metrics, /healthz and /readyz of both programs, from a thread of their own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

Check = Callable[[], tuple[bool, str]]
"""Whether it is so, and a sentence about it."""


class Server:
    """A running server. `port` is the real one, where 0 was asked for."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self._http = http
        self.port: int = http.server_address[1]
        self._thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True  # a client that hangs must not keep the program alive


def serve(host: str, port: int, registry: CollectorRegistry, healthy: Check, ready: Check) -> Server:
    """Serve `registry` on /metrics, and the checks as 200 or 503 with their sentence. Raises OSError with a sentence."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._reply(200, content_type, encode(registry))
            elif path in ("/healthz", "/readyz"):
                good, sentence = (healthy if path == "/healthz" else ready)()
                self._reply(200 if good else 503, "text/plain; charset=utf-8", f"{sentence}\n".encode())
            else:
                self._reply(404, "text/plain; charset=utf-8", b"there are /metrics, /healthz and /readyz\n")

        def _reply(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass  # a probe every few seconds is no event of note

    try:
        return Server(_Http((host, port), Handler))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                error.errno, f"port {port} of {host} is taken by another program: set another metrics_port (0: any free one)"
            ) from None
        raise OSError(error.errno, f"cannot serve metrics on {host}:{port}: {error.strerror}") from None
