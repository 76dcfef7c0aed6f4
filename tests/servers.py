"""A small server over a small model, as OpenAI's API has it, and servers that misbehave in one way each."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = dict[str, Any]
Wire = Callable[["Handler", Mapping[str, Any]], bool]
"""Answers by itself (True), or leaves that to the server."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@dataclass
class Fault:
    """One way to misbehave, past `after` questions, with prompts of at least `least` tokens, at most `times` times."""

    wire: Wire | None = None
    """On the connection."""
    ask: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """In what the model is given, which the answer does not tell."""
    say: Callable[[Answer], Answer] | None = None
    """In what is answered."""
    cut: int | None = None
    """Tokens of the prompt that the model reads, the last ones; the others are cut."""
    least: int = 0
    after: int = 0
    times: int | None = None


@dataclass
class Model:
    """Log-probabilities of a transformers model, one question at a time."""

    model: Any
    tokenizer: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after each token, (tokens, vocabulary)."""
        with self.lock, torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def encode(self, prompt: str | list[int]) -> list[int]:
        return list(prompt) if isinstance(prompt, list) else list(self.tokenizer.encode(prompt))

    def complete(self, ids: list[int], body: Mapping[str, Any], chat: bool) -> tuple[Answer, int]:
        """The choice, and how many tokens were generated."""
        echo, tops = body.get("echo", False), (body.get("top_logprobs") if chat else body.get("logprobs"))
        whole, rows, made = list(ids), [], 0
        stops = [text for text in (body.get("stop") or []) if text]
        while made < body.get("max_tokens", 16):
            rows = self.read(whole)
            whole.append(int(rows[-1].argmax()))
            made += 1
            if whole[-1] == self.tokenizer.eos_token_id or any(text in self.tokenizer.decode(whole[len(ids) :]) for text in stops):
                break
        text = self.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
        ends = [text.find(stop) for stop in stops if stop in text]
        text = text[: min(ends)] if ends else text
        shown = range(0 if echo else len(ids), len(whole))
        logprobs = [None if at == 0 else rows[at - 1] for at in shown]
        names = [self.tokenizer.decode([whole[at]]) for at in shown]
        best = [None if row is None else row.topk(max(1, int(tops or 1))) for row in logprobs]
        top = [None if one is None else self._name(one, row, whole[at]) for one, row, at in zip(best, logprobs, shown, strict=True)]
        own = [None if row is None else float(row[whole[at]]) for row, at in zip(logprobs, shown, strict=True)]
        if chat:
            said = [
                {"token": name, "logprob": value, "top_logprobs": [{"token": t, "logprob": v} for t, v in (likely or {}).items()]}
                for name, value, likely in zip(names, own, top, strict=True)
            ]
            found = {
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": said} if body.get("logprobs") else None,
            }
        else:
            listed = {"tokens": names, "token_logprobs": own, "top_logprobs": top}
            found = {"text": (self.tokenizer.decode(ids) if echo else "") + text, "logprobs": listed if tops else None}
        return found, made

    def _name(self, best: Any, row: torch.Tensor, own: int) -> dict[str, float]:
        """Text → log-probability: of the likeliest, and of the token that is there, as vLLM has it."""
        named = {self.tokenizer.decode([own]): float(row[own])}
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            named.setdefault(self.tokenizer.decode([token]), value)
        return named


class Handler(BaseHTTPRequestHandler):
    """A question in, an answer out."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body, served = json.loads(text), self.server.served
        served.keys.add(self.headers.get("Authorization"))
        served.asked.append(body)
        chat = self.path.endswith("/chat/completions")
        if chat:
            laid_out = served.model.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            prompts: list[Any] = [served.model.tokenizer.encode(laid_out, add_special_tokens=False)]
        else:
            given = body["prompt"]
            prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        ids = [served.model.encode(prompt) for prompt in prompts]
        fault = served.choose(max(map(len, ids)))
        if fault.wire and fault.wire(self, body):
            return
        if fault.ask:
            body = fault.ask(dict(body))
        choices, made = [], 0
        for index, prompt in enumerate(ids):
            choice, count = served.model.complete(prompt[-fault.cut :] if fault.cut else prompt, body, chat)
            choices.append({"index": index, "finish_reason": "length" if count >= body.get("max_tokens", 16) else "stop", **choice})
            made += count
        read = sum(min(len(prompt), fault.cut or len(prompt)) for prompt in ids)
        answer: Answer = {"object": "text_completion", "model": body["model"], "choices": choices}
        answer["usage"] = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        self.answer(200, json.dumps(fault.say(answer) if fault.say else answer).encode())

    def answer(self, status: int, text: bytes, kind: str = "application/json", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(text) if length is None else length),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Served:
    """A server that runs: its address, what it was asked, and with which keys."""

    model: Model
    fault: Fault
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    misbehaved: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chat(self) -> str:
        return self.url.replace("/completions", "/chat/completions")

    def choose(self, tokens: int) -> Fault:
        fault = self.fault
        with self.lock:
            if (
                tokens < fault.least
                or len(self.asked) <= fault.after
                or (fault.times is not None and self.misbehaved >= fault.times)
            ):
                return Fault()
            self.misbehaved += 1
        return fault


@contextlib.contextmanager
def serve(model: Model, fault: Fault | None = None) -> Iterator[Served]:
    """A server on a free port of this machine."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    served = Served(model, fault or Fault(), f"http://127.0.0.1:{http.server_address[1]}/v1/completions")
    http.served = served  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        http.shutdown()
        http.server_close()


# ---------------------------------------------------------------------- on the connection


def fail(status: int, message: str = "no", **headers: str) -> Wire:
    """Answers with an error, as OpenAI words it."""

    def wire(handler: Handler, _: Mapping[str, Any]) -> bool:
        handler.answer(status, json.dumps({"error": {"message": message, "code": status}}).encode(), **headers)
        return True

    return wire


def send(text: bytes, kind: str = "application/json", length: int | None = None) -> Wire:
    """Sends these bytes."""

    def wire(handler: Handler, _: Mapping[str, Any]) -> bool:
        handler.close_connection = True
        handler.answer(200, text, kind, length)
        return True

    return wire


def wait(seconds: float) -> Wire:
    """Answers late."""

    def wire(handler: Handler, _: Mapping[str, Any]) -> bool:
        time.sleep(seconds)
        return False

    return wire


def hang_up(handler: Handler, _: Mapping[str, Any]) -> bool:
    """Closes the connection without a word."""
    handler.close_connection = True
    handler.connection.close()
    return True


def drip(handler: Handler, _: Mapping[str, Any]) -> bool:
    """Keeps the connection alive with a space now and then, and never answers."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    handler.close_connection = True
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    return True


# ---------------------------------------------------------------------- in the answer


def each_logprobs(change: Callable[[dict[str, Any]], Any]) -> Callable[[Answer], Answer]:
    """Changes the log-probabilities of every choice."""

    def say(answer: Answer) -> Answer:
        for choice in answer["choices"]:
            if choice["logprobs"]:
                choice["logprobs"] = change(choice["logprobs"])
        return answer

    return say


def shift(found: dict[str, Any]) -> dict[str, Any]:
    """As llama-cpp-python has it: each token with the log-probability of the next one, and the last token missing."""
    return {
        "tokens": found["tokens"][:-1],
        "token_logprobs": [None, *found["token_logprobs"][2:]],
        "top_logprobs": [None, *found["top_logprobs"][2:]],
    }


def shift_whole(found: dict[str, Any]) -> dict[str, Any]:
    """Off by one, of the length that it should have."""
    for name in ("token_logprobs", "top_logprobs"):
        found[name] = [None, *found[name][2:], found[name][-1]] if len(found[name]) > 1 else found[name]
    return found
