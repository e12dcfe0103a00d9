"""Servers on 127.0.0.1 that answer as engines do, around any function that computes logits.

Each class of `FLAVOURS` speaks one engine's protocol, shaped after that engine's own answers;
`Hostile` ones answer whatever they are told to. Nothing here knows the package under test.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import Tensor

Logits = Callable[[Sequence[int]], Tensor]
"""Logits `[T, V]` of a sequence."""


@dataclass
class Engine:
    """What is behind the protocol: a model, and what the server was configured with."""

    logits: Logits
    tokenizer: Tokenizer | None = None
    name: str = "tiny"
    context: int = 1 << 20
    tells_context: bool = True
    keeps: int = 1 << 20
    """Tokens of a prompt that are not cut off silently."""
    most_new: int = 1
    """Tokens after which it stops by itself."""
    most_top: int = 20
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Every request that was posted."""
    headers: list[dict[str, str]] = field(default_factory=list)
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """Log probabilities `[T, V]`; what a longer sequence gave serves its beginnings."""
        asked = tuple(tokens)
        for longer, found in self.known.items():
            if longer[: len(asked)] == asked:
                return found[: len(asked)]
        found = self.logits(tokens).float().log_softmax(-1)
        self.known[asked] = found
        return found

    def generated(self, tokens: Sequence[int], count: int) -> list[tuple[int, Tensor]]:
        """Tokens that follow, each with the log probabilities `[V]` it was chosen by."""
        found: list[tuple[int, Tensor]] = []
        told = list(tokens)
        for _ in range(min(count, self.most_new)):
            row = self.logprobs(told)[-1]
            told.append(int(row.argmax()))
            found.append((told[-1], row))
        return found


def top_of(row: Tensor, count: int) -> dict[int, float]:
    best = row.topk(count)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class RefusedError(Exception):
    """The server says no."""

    def __init__(self, status: int, content: dict[str, Any]):
        super().__init__(status)
        self.status, self.content = status, content


class Handler(BaseHTTPRequestHandler):
    """One request; flavours say what to answer."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._serve(json.loads(body))

    def _serve(self, asked: dict[str, Any] | None) -> None:
        self.engine.headers.append(dict(self.headers.items()))
        if self.engine.key and self.headers.get("Authorization") != f"Bearer {self.engine.key}":
            self.reply(401, {"error": {"message": "Unauthorized"}})
            return
        try:
            if asked is None:
                self.reply(200, self.got())
            else:
                self.engine.asked.append(asked)
                self.reply(200, self.posted(asked))
        except RefusedError as no:
            self.reply(no.status, no.content)

    def reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if self.protocol_version == "HTTP/1.1":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def got(self) -> dict[str, Any]:
        if self.path == "/v1/models":
            listed = {"id": self.engine.name, "object": "model"}
            return {"object": "list", "data": [listed | self.listed()]}
        raise RefusedError(404, {"detail": "Not Found"})

    def listed(self) -> dict[str, Any]:
        return {}

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        raise RefusedError(404, {"detail": "Not Found"})

    def fits(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self.engine.context:
            most = f"This model's maximum context length is {self.engine.context} tokens."
            raise RefusedError(400, {"error": {"message": most, "type": "BadRequestError"}})


class VLLM(Handler):
    """/v1/completions with prompt_logprobs, keyed by token id."""

    def got(self) -> dict[str, Any]:
        return {"version": "0.0.test"} if self.path == "/version" else super().got()

    def listed(self) -> dict[str, Any]:
        context = self.engine.context if self.engine.tells_context else None
        return {"owned_by": "vllm", "max_model_len": context}

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        tokens, top = asked["prompt"][: self.engine.keeps], asked["prompt_logprobs"]
        if self.path != "/v1/completions" or asked["model"] != self.engine.name:
            raise RefusedError(404, {"error": {"message": "The model does not exist."}})
        self.fits(tokens)
        if top > self.engine.most_top:
            most = f"Requested prompt logprobs of {top}, which is greater than max allowed"
            raise RefusedError(400, {"error": {"message": most}})
        rows = self.engine.logprobs(tokens)
        prompt = [None] + [
            {str(i): {"logprob": p, "rank": 1, "decoded_token": "x"} for i, p in given.items()}
            for given in (
                {following: float(row[following]), **top_of(row, top)}
                for row, following in zip(rows, tokens[1:], strict=False)
            )
        ]
        new = self.engine.generated(tokens, asked["max_tokens"])
        logprobs = {
            "tokens": [f"token_id:{token}" for token, _ in new],
            "token_logprobs": [float(row[token]) for token, row in new],
            "top_logprobs": [
                {f"token_id:{i}": p for i, p in top_of(row, top).items()} for _, row in new
            ],
            "text_offset": [0 for _ in new],
        }
        choice = {"index": 0, "text": "", "logprobs": logprobs, "prompt_logprobs": prompt}
        return {"choices": [choice], "usage": {"prompt_tokens": len(tokens)}}


class Echo(Handler):
    """OpenAI's echo and logprobs, at most five, tokens as their texts."""

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        if set(asked) - {
            "model",
            "prompt",
            "max_tokens",
            "temperature",
            "stream",
            "echo",
            "logprobs",
        }:
            raise RefusedError(400, {"error": {"message": "Unrecognized request argument"}})
        if not asked.get("echo") or asked["logprobs"] > 5:
            raise RefusedError(400, {"error": {"message": "logprobs: at most 5, with echo"}})
        tokens, tokenizer = asked["prompt"], self.engine.tokenizer
        assert tokenizer is not None
        rows = self.engine.logprobs(tokens)
        new = self.engine.generated(tokens, asked["max_tokens"])
        every = [*zip(tokens[1:], rows, strict=False), *new]

        def text(token: int) -> str:
            return tokenizer.decode([token], skip_special_tokens=False)

        logprobs = {
            "tokens": [text(tokens[0]), *(text(token) for token, _ in every)],
            "token_logprobs": [None, *(float(row[token]) for token, row in every)],
            "top_logprobs": [None, *(
                {text(i): p for i, p in top_of(row, asked["logprobs"]).items()}
                for _, row in every
            )],
        }  # fmt: skip
        return {"choices": [{"text": "", "index": 0, "logprobs": logprobs}]}


class SGLang(Handler):
    """/generate with return_logprob."""

    def got(self) -> dict[str, Any]:
        if self.path == "/server_info":
            return {"mem_fraction_static": 0.9, "version": "0.0.test", "context_length": None}
        return super().got()

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.path != "/generate":
            raise RefusedError(404, {"detail": "Not Found"})
        tokens, top = asked["input_ids"], asked["top_logprobs_num"]
        rows = self.engine.logprobs(tokens)
        new = self.engine.generated(tokens, asked["sampling_params"]["max_new_tokens"])
        scored = list(zip(tokens[1:], rows, strict=False))

        def listed(row: Tensor) -> list[Any]:
            return [[p, i, None] for i, p in top_of(row, top).items()]

        return {
            "text": "",
            "meta_info": {
                "prompt_tokens": len(tokens),
                "input_token_logprobs": [
                    [None, tokens[0], None],
                    *([float(row[token]), token, None] for token, row in scored),
                ],
                "input_top_logprobs": [None, *(listed(row) for _, row in scored)],
                "output_token_logprobs": [[float(row[t]), t, None] for t, row in new],
                "output_top_logprobs": [listed(row) for _, row in new],
            },
        }


class LlamaCpp(Handler):
    """/completion with n_probs: new tokens only."""

    def got(self) -> dict[str, Any]:
        if self.path == "/props":
            settings = {"n_ctx": self.engine.context}
            return {"default_generation_settings": settings, "build_info": "b0-test"}
        return super().got()

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.path != "/completion":
            raise RefusedError(404, {"error": {"message": "File Not Found"}})
        tokens = asked["prompt"]
        row = self.engine.logprobs(tokens)[-1]
        best = [
            {"id": i, "token": "x", "bytes": [120], "logprob": p}
            for i, p in top_of(row, asked["n_probs"]).items()
        ]
        return {
            "content": "x",
            "truncated": False,
            "tokens_evaluated": len(tokens),
            "completion_probabilities": [{**best[0], "top_logprobs": best}],
        }


class MlxLm(Handler):
    """/v1/completions of mlx-lm: texts only, logprobs as in chats, ten at most.

    Its answers have no length: they end with the connection.
    """

    protocol_version = "HTTP/1.0"

    def posted(self, asked: dict[str, Any]) -> dict[str, Any]:
        if type(asked.get("logprobs")) is not bool:
            raise RefusedError(400, {"error": "logprobs must be of type bool"})
        if asked["top_logprobs"] > 11:
            raise RefusedError(400, {"error": "top_logprobs must be at most 11"})
        if not isinstance(asked["prompt"], str):
            raise RefusedError(404, {"error": "TextEncodeInput must be a text"})
        assert self.engine.tokenizer is not None
        tokens = self.engine.tokenizer.encode(asked["prompt"]).ids
        row = self.engine.logprobs(tokens)[-1]
        best = [
            {"id": i, "token": "x", "logprob": p}
            for i, p in reversed(top_of(row, asked["top_logprobs"]).items())
        ]
        content = [{**best[0], "top_logprobs": best}]
        return {
            "choices": [{"index": 0, "text": "x", "logprobs": {"content": content}}],
            "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1},
        }


FLAVOURS: dict[str, type[Handler]] = {
    "vLLM": VLLM,
    "echo": Echo,
    "SGLang": SGLang,
    "llama.cpp": LlamaCpp,
    "mlx-lm": MlxLm,
}


class Hostile(BaseHTTPRequestHandler):
    """Lists a model, then answers every other request as it is told."""

    protocol_version = "HTTP/1.1"
    act: ClassVar[Callable[[Hostile], None]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.say(b'{"data": [{"id": "tiny"}]}')
        else:
            self.say(b"{}", status=404)

    def do_POST(self) -> None:
        self.content = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            type(self).act(self)
        except OSError:
            self.close_connection = True

    def prompt(self) -> list[int]:
        """The token ids that were sent, as many as texts would be made into."""
        asked = json.loads(self.content)["prompt"]
        return asked if isinstance(asked, list) else list(asked.encode())

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (given | {n.replace("_", "-"): v for n, v in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def raw(self, content: bytes) -> None:
        """Bytes instead of an answer."""
        self.wfile.write(content)
        self.close_connection = True

    def drip(self) -> None:
        """The head of an answer, a byte at a time and without end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        while True:
            self.wfile.write(b"a")
            time.sleep(0.05)

    def endless(self, piece: bytes, pause: float = 0.0) -> None:
        """Chunks without end, until whoever reads has left."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(pause)


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server's address while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(flavour: str, engine: Engine) -> Iterator[str]:
    """An engine's server while the context lasts."""
    with running(type("Bound", (FLAVOURS[flavour],), {"engine": engine})) as url:
        yield url
