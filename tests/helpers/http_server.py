"""A real HTTP server on this machine, which can be made to fail."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """Its URL, what it was asked for, and how it answers."""

    url: str
    asked: Counter[str]  # the number of requests for each file
    answer: dict[str, Any] = field(default_factory=dict)  # file -> how to answer its next requests


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `state` counts requests and decides which ones fail."""

    def __init__(self, state: Server, *arguments: Any, **settings: Any) -> None:
        self.state = state
        super().__init__(*arguments, **settings)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.state.asked[name] += 1
        todo = self.state.answer.get(name, [])
        what = todo.pop(0) if todo else "whole"
        if isinstance(what, int):
            self.send_error(what)
            return
        if what == "whole":
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if what == "short":
            self.wfile.write(data[: len(data) // 2])
        elif what == "changed":
            self.wfile.write(data[:5000] + b"?" + data[5001:])

    def log_message(self, *arguments: Any) -> None:
        pass


def start(state: Server, folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    make = partial(Handler, state, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), make)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def stop(server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()
