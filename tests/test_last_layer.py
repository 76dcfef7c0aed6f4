"""What nobody reads of the last layer is not computed, and nothing else is any different for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from families import FAMILIES, LENGTH
from torch import Tensor

from harness_ext.models import kernels, last_layer, pieces
from harness_ext.models.forward import Forward
from harness_ext.models.self_check import Finding, find_state

TOKENS, PAST, READ = 40, 30, 3
"""Of a chunk, before it, and of it those whose logits are read."""
CHOSEN = ("llama", "gpt2", "gemma3", "mistral-window", "deepseek_v3", "gpt_neox", "mixtral", "opt", "smollm3", "qwen3")
"""With tables, windows, experts, keys wider than values."""


def prepare(model: Any) -> tuple[Forward, Finding, Tensor]:
    """A model's forward, with attention in pieces, what was found that it can go on from, and tokens (1, PAST + TOKENS)."""
    assert pieces.install(model)
    forward = Forward(model, torch.device("cpu"))
    return forward, find_state(forward, LENGTH, PAST + TOKENS), torch.randint(3, 100, (1, PAST + TOKENS))


def build_longer(family: str) -> Any:
    """A model of a family, with a table that is long enough."""
    known = FAMILIES[family]
    return build(family, **({known.length_field: PAST + TOKENS} if known.hard and known.length_field else {}))


def open_state(forward: Forward, found: Finding, tokens: Tensor, **changes: Any) -> Any:
    """A state after PAST tokens."""
    assert found.make is not None
    state = found.make(PAST + TOKENS)
    for name, value in changes.items():
        setattr(state, name, value)
    with torch.inference_mode():
        forward(tokens[:, :PAST], state, ())
    return state


def list_states(state: Any) -> list[Tensor]:
    return [kept for layer in state.cache.layers for kept in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", CHOSEN)
@torch.inference_mode()
def test_a_chunk_of_which_nothing_is_read_leaves_what_it_always_leaves(family: str) -> None:
    forward, found, tokens = prepare(build_longer(family))
    assert found.make is not None
    assert found.make(0).attentions == forward.model.config.num_hidden_layers, found.said
    whole, short = (open_state(forward, found, tokens, **changes) for changes in ({"attentions": 0}, {}))
    assert forward(tokens[:, PAST:], short, ()).shape == (1, 0, forward.vocabulary)
    forward(tokens[:, PAST:], whole, ())
    for kept, expected in zip(list_states(short), list_states(whole), strict=True):
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("family", CHOSEN)
@torch.inference_mode()
def test_logits_that_are_read_are_what_they_are_when_all_are_read(family: str) -> None:
    forward, found, tokens = prepare(build_longer(family))
    plain = forward(tokens, None, range(PAST + TOKENS - READ, PAST + TOKENS))
    short = open_state(forward, found, tokens)
    torch.testing.assert_close(forward(tokens[:, PAST:], short, range(TOKENS - READ, TOKENS)), plain, atol=1e-3, rtol=1e-4)
    copied = open_state(forward, found, tokens).copied(2)
    for row in forward(tokens[:, PAST:].expand(2, -1), copied, range(TOKENS - READ, TOKENS)):
        torch.testing.assert_close(row[None], plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("copied", [False, True])
@torch.inference_mode()
def test_what_is_not_read_is_not_computed(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, found, tokens = prepare(build("llama"))
    state = open_state(forward, found, tokens)
    state = state.copied() if copied else state
    queries: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        queries.append(query.shape[2] if given["is_causal"] else 0)
        return kernels.attend_on_cpu(query, key, value, **given)

    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.Kernel(run=attend, square=True))
    *before, last = (layer.mlp for layer in forward.model.model.layers)
    ran: list[Any] = []
    for mlp in (*before, last):
        mlp.register_forward_hook(lambda module, *_: ran.append(module))
    forward(tokens[:, PAST:-10], state, ())
    assert ran == before, "the last layer does not go on"
    assert sum(queries) == len(before) * (TOKENS - 10), "nor attend"
    ran.clear()
    queries.clear()
    forward(tokens[:, -10:], state, range(10 - READ, 10))
    assert ran == [*before, last]
    assert sum(queries) == len(before) * 10 + READ, "it attends for those that are read"


class WritesLater(torch.nn.Module):
    """A layer, and after it an attention of its own that transformers' interface knows nothing of, with a cache."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, past_key_values: Any = None, **given: Any) -> Tensor:
        hidden = self.layer(hidden, *args, past_key_values=past_key_values, **given)
        own = keys = hidden[:, None]
        if past_key_values is not None:
            keys, _ = past_key_values.update(own, own, self.layer.self_attn.layer_idx + 1)
        if (shared := getattr(keys, pieces.SHARED, None)) is not None:
            keys = torch.cat((shared.expand(len(own), -1, -1, -1), keys), dim=2)
        seen = torch.ones(own.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - own.shape[2])
        return hidden + F.scaled_dot_product_attention(own, keys, keys, attn_mask=seen)[:, 0]


@torch.inference_mode()
def test_a_model_that_writes_into_its_cache_after_its_last_attention_is_read_to_its_end() -> None:
    model = build("llama")
    model.model.layers[-1] = WritesLater(model.model.layers[-1])
    forward, found, tokens = prepare(model)
    assert found.make is not None
    assert found.make(0).forks, found.said
    assert not found.make(0).attentions, found.said
    plain = forward(tokens, None, (PAST + TOKENS - 1,))
    state = open_state(forward, found, tokens)
    torch.testing.assert_close(forward(tokens[:, PAST:], state, (TOKENS - 1,)), plain, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_a_forward_that_attends_in_blocks_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the last call is then not the last layer's, and no block is as long as the chunk."""
    forward, found, tokens = prepare(build("llama"))
    own, last = pieces.attend, forward.model.config.num_hidden_layers

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        middle, left = query.shape[2] // 2, query.shape[2] - query.shape[2] // 2
        first, _ = own(module, query[:, :, :middle], key[:, :, :-left], value[:, :, :-left], mask, **given)
        return torch.cat((first, own(module, query[:, :, middle:], key, value, mask, **given)[0]), dim=1), None

    assert found.make is not None
    state = open_state(forward, found, tokens)
    plain = forward(tokens, None, (PAST + TOKENS - 1,))
    monkeypatch.setitem(pieces.AttentionInterface._global_mapping, pieces.NAME, attend)
    assert state.attentions == last
    torch.testing.assert_close(forward(tokens[:, PAST:], state, (TOKENS - 1,)), plain, atol=1e-3, rtol=1e-4)


def test_what_is_read_in_one_thread_says_nothing_of_another() -> None:
    with last_layer.cut_short(last=1, tokens=8, unread=8):
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(last_layer.count_unread(8)))
        thread.start()
        thread.join()
        assert found == [0]
        with pytest.raises(last_layer.ForwardEndedError):
            last_layer.count_unread(8)
    assert last_layer.count_unread(8) == 0


@torch.inference_mode()
def test_rows_that_share_a_context_without_copies_are_given_all_of_theirs() -> None:
    forward, found, tokens = prepare(build("llama"))
    plain = forward(tokens, None, range(PAST + TOKENS - READ, PAST + TOKENS))
    for row in forward(tokens[:, PAST:].expand(3, -1), open_state(forward, found, tokens).forked(3), range(TOKENS - READ, TOKENS)):
        torch.testing.assert_close(row[None], plain, atol=1e-3, rtol=1e-4)
