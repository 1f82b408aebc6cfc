"""A server that runs requests as an NDIF server does, where nothing of the caller's can be imported.

``remote="local"`` runs the caller's own tracer on the caller's own model, so it cannot tell whether a request
says all that a server needs. This is the other end of nnsight's client: run as ``python -I remote_server.py``
it prints its address, and for each request it builds the model from its key (kept for the next one), applies
the request's environment, rebuilds the block, runs it, and sends back what was saved. ``-I`` keeps the
working directory and this folder off the path: this package and its dependencies are all there is.

The protocol is nnsight 0.8's: a websocket at /subscribe, which says a session id and then the job's states,
and a form with the request posted to /request.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import linecache
import queue
import struct
import threading
import traceback
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import torch
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from nnsight.tracing.util import clean_traceback

HANDSHAKE = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
TEXT, BINARY = 0x81, 0x82
MODELS: dict[str, Any] = {}
SESSIONS: dict[str, queue.Queue[ResponseModel]] = {}
ONE_AT_A_TIME = threading.Lock()


def run(request: RequestModel, payload: bytes) -> bytes:
    """What the block saved, as the bytes that go back."""
    if request.model_key not in MODELS:
        model = Remotable.from_model_key(request.model_key, dispatch=True, trust_remote_code=False)
        model._module.requires_grad_(False)
        MODELS[request.model_key] = model
    model = MODELS[request.model_key]
    model._remoteable_set_env(request.env)
    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(payload, persistent, compress=request.compress)
    inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()
        model.interleaver.cancel()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    if not request.compress:
        return buffer.getvalue()
    import zstandard

    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def answer(request: RequestModel, payload: bytes, job: str) -> ResponseModel:
    """The last state of a job: its result, or its error as text."""
    with ONE_AT_A_TIME:
        kept = {id(cache): dict(cache) for cache in (linecache.cache, SOURCES, BLOCKS)}
        try:
            return ResponseModel(id=job, status=Status.COMPLETED, data=run(request, payload))
        except Exception as error:
            lines = traceback.format_exception(type(error), error, clean_traceback(error.__traceback__))
            return ResponseModel(id=job, status=Status.ERROR, description="".join(lines))
        finally:
            for cache in (linecache.cache, SOURCES, BLOCKS):
                cache.clear()
                cache.update(kept[id(cache)])


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/subscribe: a websocket that says a session id, and then how the session's job ends."""
        accept = hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + HANDSHAKE).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accept).decode())
        self.end_headers()
        session = uuid4().hex
        SESSIONS[session] = queue.Queue()
        self.frame(TEXT, json.dumps({"session_id": session}).encode())
        last = SESSIONS[session].get()
        if last.status == Status.COMPLETED:
            self.frame(BINARY, last.pickle())
        else:
            self.frame(TEXT, last.model_dump_json().encode())
        self.close_connection = True

    def frame(self, kind: int, data: bytes) -> None:
        """Send one frame of a websocket."""
        length = len(data)
        if length < 126:
            head = struct.pack("!BB", kind, length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", kind, 126, length)
        else:
            head = struct.pack("!BBQ", kind, 127, length)
        self.wfile.write(head + data)
        self.wfile.flush()

    def do_POST(self) -> None:
        """/request: a form with the envelope and the payload."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = {part.get_param("name", header="content-disposition"): part for part in parts(head + body)}
        request = RequestModel.model_validate_json(form["data"].get_payload(decode=True))
        job = uuid4().hex
        received = ResponseModel(id=job, status=Status.RECEIVED).model_dump_json().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(received)))
        self.end_headers()
        self.wfile.write(received)
        self.wfile.flush()
        SESSIONS[request.session_id].put(answer(request, form["blob"].get_payload(decode=True), job))

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def parts(message: bytes) -> list[Any]:
    """The parts of a multipart message."""
    return BytesParser().parsebytes(message).get_payload()


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
