"""Keys, tokens and passwords: found among arguments that would be written down, and taken out of what strangers say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from harness_ext.errors import ModelError

NAME = re.compile(
    r"([a-z]+[-_])*((api|access|subscription)[-_]?key|password|passwd|secret|credentials?|authorization)"
    r"|((use_)?(hf|hub|auth|access|api|bearer)[-_])?token|headers?|key",
    re.IGNORECASE,
)
"""What an argument that holds a secret is called, or a header of a request; `token_id`, `tokenizer` and `add_bos_token` are others."""
PARAMETER = re.compile(r"key|token|secret|sig|pass|auth", re.IGNORECASE)
"""Part of the names of URL parameters that hold one."""
SHAPE = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})")
"""Hugging Face's and OpenAI's."""
USER = re.compile(r"(?<=://)[^\s/@]+@")
"""The user and password of an address."""
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
SHORTEST = 8
"""Characters; a shorter value of one of `VARIABLES` is looked for nowhere, since it may be part of a word."""
HIDDEN = "***"


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raises ModelError where an argument, at any depth, holds a secret: lm_eval writes arguments to its log and into results."""
    for name in find(arguments):
        raise ModelError(
            f"{name} holds a key, a token or a password, and arguments are written to the log and into results; leave it out, and set "
            "HF_TOKEN for the hub, or OPENAI_API_KEY for a server"
        )


def find(value: Any, name: str = "") -> Iterator[str]:
    """The names of the arguments that hold secrets.

    >>> list(find({"model_args": {"pretrained": "org/name", "token": "x", "prefix_token_id": 1}, "use_auth_token": True}))
    ['token']
    >>> list(find("pretrained=x,api_key=y")), list(find({"base_url": "https://ann:pw@host/v1"}))
    (['api_key'], ['base_url'])
    >>> list(find("base_url=http://host/v1,token=y")), list(find({"header": {"x-team": "y"}}))
    (['token'], ['header'])
    """
    if isinstance(value, Mapping) and value and NAME.fullmatch(name):
        yield name
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from find(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from find(item, name)
    elif isinstance(value, str) and value:
        if NAME.fullmatch(name) or SHAPE.search(value) or (len(value) >= SHORTEST and value in _known()) or in_address(value):
            yield name or "an argument"
        elif "=" in value:
            yield from find(dict(part.strip().split("=", 1) for part in value.split(",") if "=" in part))


def in_address(text: str) -> bool:
    """Whether a text is an address that holds a user, a password or a key."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    named = any(PARAMETER.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    return bool(parts.scheme and parts.netloc) and bool(parts.password or parts.username or named)


def hide(text: str) -> str:
    """`text` without the secrets of the environment, without those of a known shape, and without users and passwords in addresses.

    >>> hide("cannot reach https://ann:pw@mirror/api with hf_" + "x" * 34)
    'cannot reach https://***@mirror/api with ***'
    """
    for value in _known():
        text = text.replace(value, HIDDEN)
    return SHAPE.sub(HIDDEN, USER.sub(f"{HIDDEN}@", text))


def _known() -> list[str]:
    return [value for name in VARIABLES if len(value := os.environ.get(name, "").strip()) >= SHORTEST]
