"""A real server that speaks OpenAI's chat protocol, with good and bad days; and a random model that talks nonsense."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from mllm.testing import tiny_model

HANG, DRIP, CUT = "hang", "drip", "cut"
"""Manners: never answers; answers byte by byte, slowly; hangs up in the middle."""


class Reply(NamedTuple):
    """What the server sends in place of a chat completion."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = {}
    manner: str = ""


class Server:
    """Answers every request by `reply(body, number)`: a text, a status, or a dict of the fields of `Reply`.

    Attributes:
        url: Its address.
        bodies: What was asked, decoded, in the order of arrival.
        headers: The headers of each request.
    """

    def __init__(self, reply: Callable[[dict, int], Any]):
        self.reply, self.bodies, self.headers = reply, [], []
        self.is_over, self._lock = threading.Event(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()

    def note(self, body: dict, headers: dict) -> int:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            return len(self.bodies) - 1


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Server]]:
    """Start a server: `serve(lambda body, number: "text")`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[Server] = []

    def start(reply: Callable[[dict, int], Any]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model and its processor. Its logits and what it sees are scaled up: it says something else of others."""
    model, processor = tiny_model(tmp_path_factory.mktemp("talker"), encoder="siglip_vision_model")
    for module, factor in ((model.get_output_embeddings(), 20), (model.model.image_tower.connector, 4)):
        for parameter in module.parameters():
            parameter.data *= factor
    return model.eval(), processor


def _handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = server.note(body, {"path": self.path, **dict(self.headers)})
            reply = server.reply(body, number)
            if isinstance(reply, str):
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
                usage = {"prompt_tokens": 7, "completion_tokens": 3}
                reply = Reply(json.dumps({"choices": [choice], "usage": usage}).encode())
            else:
                fields = (
                    {"status": reply, "body": b'{"error": {"message": "not today"}}'}
                    if isinstance(reply, int)
                    else reply
                )
                reply = Reply(**fields)
            try:
                self._send(reply)
            except OSError:  # the client has gone
                self.close_connection = True

        def _send(self, reply: Reply) -> None:
            if reply.manner == HANG:
                server.is_over.wait()
            self.send_response(reply.status)
            length = len(reply.body) + (10 if reply.manner == CUT else 0)
            for name, value in (("Content-Length", str(length)), *reply.headers.items()):
                self.send_header(name, value)
            self.end_headers()
            step = 1 if reply.manner == DRIP else max(len(reply.body), 1)
            for start in range(0, len(reply.body), step):
                self.wfile.write(reply.body[start : start + step])
                self.wfile.flush()
                if reply.manner == DRIP and server.is_over.wait(0.02):
                    return

        def log_message(self, *args):
            """Quiet."""

    return Handler
