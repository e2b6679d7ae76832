"""Serves sentence embeddings as JSON over HTTP, with the standard library alone around the model.

Requests that arrive within a few milliseconds of each other share batches; texts of a batch have similar lengths, and
padding is not computed. Checkpoints are those of HBERT, BERT, RoBERTa and DistilBERT.

    python examples/serve_embeddings.py --model path/of/a/checkpoint --port 8000
    curl http://127.0.0.1:8000/embed -d '{"texts": ["a first text", "and a second"]}'

GET /health says what is served. There is neither encryption nor authentication: it listens on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hbert
from hbert.finetune.encoding import encode_texts
from hbert.finetune.inference import Runner, pooled_states
from hbert.finetune.models import load_encoder, load_text_tokenizer, text_length
from hbert.finetune.options import prepare_process
from hbert.pretrain.machine import resolve_dtype

MOST_TEXTS = 256  # of a request; with so many waiting, the model starts
MOST_BYTES = 1 << 20  # of a request
WHAT_THERE_IS = "there are POST /embed and GET /health"

Request = tuple[list[str], "Future[np.ndarray]"]


class Embedder:
    """Turns texts into unit vectors: the mean of the last hidden states. One thread computes for all requests.

    Args:
        folder: a checkpoint with its tokenizer.
        wait: seconds that the first request waits for others to share its batches.
        dtype: "fp32", "bf16", "int8", or "auto": bf16 where the processor has instructions for it.

    Attributes:
        requests, rounds: requests answered, and how many times the model was run for them.
    """

    def __init__(self, folder: str | Path, wait: float = 0.005, dtype: str = "auto") -> None:
        encoder = load_encoder(str(folder), torch.device("cpu") if dtype == "int8" else None)
        tokenizer = load_text_tokenizer(str(folder), encoder)
        self.width = encoder.config.hidden_size
        self.max_length = text_length(encoder, tokenizer, None, pair=False)
        self.wait, self.requests, self.rounds = wait, 0, 0
        fast: Any = hbert.optimize(encoder, resolve_dtype(dtype, encoder.device))
        self._runner = Runner(fast, tokenizer, pooled_states("mean", normalize=True))
        self._queue: queue.Queue[Request] = queue.Queue(maxsize=1024)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Starts the thread that computes."""
        self._thread.start()

    def submit(self, texts: Sequence[str]) -> Future[np.ndarray]:
        """The vectors of texts, float32 [N, H], as soon as they are there.

        Raises:
            queue.Full: too many requests are waiting.
        """
        future: Future[np.ndarray] = Future()
        self._queue.put_nowait((list(texts), future))
        return future

    def _work(self) -> None:
        while True:
            requests = self._next_requests()
            texts = [text for part, _ in requests for text in part]
            try:
                vectors = self._runner.run(encode_texts(self._runner.tokenizer, texts, None, self.max_length))
            except Exception as error:  # of these requests; the next ones are served
                for _, future in requests:
                    future.set_exception(error)
                continue
            self.requests, self.rounds = self.requests + len(requests), self.rounds + 1
            start = 0
            for part, future in requests:
                future.set_result(vectors[start : start + len(part)])
                start += len(part)

    def _next_requests(self) -> list[Request]:
        """The next request, and those that come within ``wait`` seconds, until they have MOST_TEXTS texts or more."""
        requests = [self._queue.get()]
        deadline = time.monotonic() + self.wait
        while sum(len(texts) for texts, _ in requests) < MOST_TEXTS:
            try:
                requests.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return requests


class BadRequest(Exception):
    """A request that cannot be answered: status and message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def texts_of(body: bytes) -> list[str]:
    """The texts of the body of a request.

    Raises:
        BadRequest: it is not {"texts": [...]} with 1 to MOST_TEXTS strings.
    """
    try:
        texts = json.loads(body)["texts"]
    except (ValueError, TypeError, KeyError):
        raise BadRequest(HTTPStatus.BAD_REQUEST, 'the body must be JSON: {"texts": ["...", ...]}') from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest(HTTPStatus.BAD_REQUEST, '"texts" must be a list of one or more strings')
    if len(texts) > MOST_TEXTS:
        raise BadRequest(HTTPStatus.BAD_REQUEST, f"{len(texts)} texts; at most {MOST_TEXTS} in a request")
    return texts


class Handler(BaseHTTPRequestHandler):
    """POST /embed and GET /health."""

    protocol_version = "HTTP/1.1"
    embedder: Embedder

    def do_GET(self) -> None:
        """What is served, and how much so far."""
        if self.path != "/health":
            return self._answer(HTTPStatus.NOT_FOUND, {"error": WHAT_THERE_IS})
        served = self.embedder
        self._answer(
            HTTPStatus.OK,
            {
                "width": served.width,
                "max_length": served.max_length,
                "requests": served.requests,
                "rounds": served.rounds,
            },
        )

    def do_POST(self) -> None:
        """The vectors of texts, in their order."""
        try:
            vectors = self.embedder.submit(texts_of(self._body())).result()
        except BadRequest as error:
            return self._answer(error.status, {"error": str(error)})
        except queue.Full:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many requests are waiting"})
        except Exception as error:
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})
        self._answer(HTTPStatus.OK, {"vectors": vectors.tolist()})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True  # the body stays unread
            if not length.isdigit():
                raise BadRequest(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
            raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MOST_BYTES} bytes")
        body = self.rfile.read(int(length))
        if self.path != "/embed":
            raise BadRequest(HTTPStatus.NOT_FOUND, WHAT_THERE_IS)
        return body

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: one line a request would be most of the output."""


def make_server(embedder: Embedder, port: int) -> ThreadingHTTPServer:
    """A server on the loopback interface; port 0 takes a free one. The embedder is started."""
    embedder.start()
    return ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"embedder": embedder}))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint with its tokenizer (default: MiniLM, downloaded once)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default 8000)")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="that a request waits for others (default 5)")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="(default auto: bf16 or fp32)"
    )
    args = parser.parse_args()
    prepare_process()
    if args.model is None:
        import defaults
    embedder = Embedder(args.model or defaults.minilm(), args.wait_ms / 1e3, args.dtype)
    with make_server(embedder, args.port) as server:
        print(f"{embedder.width} numbers a text at http://127.0.0.1:{server.server_port}/embed", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
