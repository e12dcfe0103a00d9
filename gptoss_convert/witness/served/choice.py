"""Which server listens, and which protocol gives its log probabilities: found by asking it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.witness.served.answers import Question, ServerProtocol, UnsupportedError
from gptoss_convert.witness.served.completions import STYLES, Completions
from gptoss_convert.witness.served.connection import Connection, FailedError
from gptoss_convert.witness.served.llama_cpp import LlamaCpp
from gptoss_convert.witness.served.sglang import SGLang
from gptoss_convert.witness.served.words import Words

_TOPS = (20, 10, 5, 1)
"""Most likely tokens to ask for, as servers limit them: vLLM 20, mlx-lm 10, OpenAI 5."""


@dataclass(frozen=True)
class Server:
    """A server that can be asked: which it is, and how."""

    engine: str
    """Its own word, or "an OpenAI-compatible server"."""
    model: str | None
    """The name it serves the model under; None if it told none."""
    context: int | None
    """Tokens that fit into a prompt and its answer, if the server told."""
    protocol: ServerProtocol


def connect(
    connection: Connection, model: str | None, words: Words, vocab: int, probe: Question
) -> Server:
    """The server at the other end, asked in the first way that answers `probe`.

    Raises UsageError for a model it does not have, NetworkError if it cannot be reached or
    refuses access, InputError if no way gives log probabilities.
    """
    listed = _models(connection)
    name = _name(connection, model, listed)
    told = next((one for one in listed if one.get("id") == name), {})
    engine, context, native = _engine(connection, told)
    ways: list[Callable[[int], ServerProtocol]] = []
    if native:
        ways.append(lambda top: native(connection, vocab, top))
    else:
        for style in STYLES:
            for text in (False, True)[: 1 + (probe.text is not None)]:
                ways.append(
                    lambda top, style=style, text=text: Completions(
                        connection, name, words, vocab, style, text, top
                    )
                )
    shown = connection.shown(name) if name is not None else None
    return Server(engine, shown, context, _first(connection, ways, probe, engine))


def _first(
    connection: Connection,
    ways: list[Callable[[int], ServerProtocol]],
    probe: Question,
    engine: str,
) -> ServerProtocol:
    """The first way that gives log probabilities, with as many tokens as the server allows."""
    failures: list[InputError | FailedError] = []
    patience, connection.tries = connection.tries, 1
    try:
        for way in ways:
            for top in _TOPS:
                try:
                    way(top).ask(probe)
                except (InputError, FailedError) as error:
                    failures.append(error)
                else:
                    return way(top)
    finally:
        connection.tries = patience
    # What was said about the tokens themselves tells more than that a way is unknown.
    for error in failures:
        if isinstance(error, InputError) and not isinstance(error, UnsupportedError):
            raise error
    if all(isinstance(error, FailedError) for error in failures):
        raise failures[0]
    raise InputError(
        f"{connection.address}: {engine} gives no log probabilities, asked in {len(ways)} ways: "
        f"{failures[0]}"
    )


def _models(connection: Connection) -> list[dict[str, Any]]:
    """What `/v1/models` lists; nothing where there is no such list."""
    reply = connection.get("/v1/models")
    data = reply.content.get("data") if reply.status < 400 else None
    return [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []


def _name(connection: Connection, wanted: str | None, listed: list[dict[str, Any]]) -> str | None:
    """The served model's name: the one that is wanted, or the only one."""
    names = [one["id"] for one in listed if isinstance(one.get("id"), str)]
    choices = ", ".join(map(connection.shown, names[:8]))
    if wanted is None and len(names) > 1:
        raise UsageError(f"{connection.address}: serves {choices}; choose one by --model")
    if wanted is not None and names and wanted not in names:
        raise UsageError(f"--model {wanted}: {connection.address} serves {choices}")
    return wanted if wanted is not None else next(iter(names), None)


def _engine(
    connection: Connection, told: dict[str, Any]
) -> tuple[str, int | None, type[SGLang] | type[LlamaCpp] | None]:
    """The engine in words, its context, and the protocol that is its own."""
    if props := _object(connection, "/props", "default_generation_settings"):
        settings, build = props["default_generation_settings"], props.get("build_info")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        return _worded(connection, "llama.cpp", build), _length(context), LlamaCpp
    length = _length(told.get("max_model_len"))
    for path in ("/server_info", "/get_server_info"):
        if info := _object(connection, path, "mem_fraction_static"):
            engine = _worded(connection, "SGLang", info.get("version"))
            return engine, _length(info.get("context_length")) or length, SGLang
    if found := _object(connection, "/version", "version"):
        return _worded(connection, "vLLM", found["version"]), length, None
    return "an OpenAI-compatible server", length, None


def _object(connection: Connection, path: str, key: str) -> dict[str, Any] | None:
    """What an endpoint answers, if it is there and the answer has a key."""
    try:
        reply = connection.get(path)
    except InputError:  # a page for whatever is asked
        return None
    return dict(reply.content) if reply.status < 400 and key in reply.content else None


def _worded(connection: Connection, engine: str, version: object) -> str:
    return f"{engine} {connection.shown(version)}" if isinstance(version, str) else engine


def _length(value: object) -> int | None:
    """A number of tokens, if it is one."""
    return value if type(value) is int and value > 0 else None
