"""A small Llama-shaped decoder in which only the way it takes positions can be chosen.

Pre-norm RMSNorm, SwiGLU, no biases, tied embeddings: the body of transformers' Llama, of which `reference/rope` is one (and of
SmolLM3, of which `reference/nope` is one). transformers has no class with this body and these schemes, and another class
(GPT-2, BLOOM, XLNet) would change norm, activation and size together with the scheme.

| `position_scheme` | source | past the trained length |
|---|---|---|
| `learned` | Radford et al. 2019 (GPT-2) | the table ends: IndexError |
| `sinusoidal` | Vaswani et al., arXiv 1706.03762, §3.5 | computed for any position |
| `relative` | Shaw et al., arXiv 1803.02155: distances clipped at `clip_distance`, keys' term only (their §4.3) | far tokens look equally far |
| `alibi` | Press et al., arXiv 2108.12409 | a line goes on |
| `transformer-xl` | Dai et al., arXiv 1901.02860 | streams: `memory_length` positions of each layer carried on |
| `memformer` | Wu et al., arXiv 2010.06891 | streams: `memory_slots` vectors carried on |

Importing this module registers the model with transformers' Auto classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RECURRENT = ("transformer-xl", "memformer")
ROWS = 512
"""Queries whose scores are held at a time: memory then grows with the length and not with its square."""


@strict
class ReferenceConfig(PreTrainedConfig):
    """One of the reference models; the lengths are in tokens."""

    model_type = "harness_ext_reference"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, transformers' own form

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    position_scheme: str = "learned"
    clip_distance: int = 32
    segment_length: int = 64
    memory_length: int = 192
    memory_slots: int = 32
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of each position (any shape): (..., width), in float32 (arXiv 1706.03762, §3.5)."""
    inverse = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * inverse
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x (batch, heads, tokens, head_dim) turned by the rotary angles of positions (tokens,) (arXiv 2104.09864)."""
    sin, cos = sinusoids(positions, x.shape[-1]).to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head (arXiv 2108.12409, §3), for a power of two.

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)])


class Attention(nn.Module):
    """Causal attention whose scores may have a term of query and distance."""

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.width = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head_dim)."""
        return x.reshape(*x.shape[:-1], self.heads, self.width).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scaling: float | None = None) -> Tensor:
        """(batch, tokens, heads, head_dim), from states (batch, heads, tokens, head_dim), causally without a mask (batch or 1, heads or 1, queries, keys)."""
        seen: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, key, value, mask, scaling=scaling)[0]
        return seen

    def join(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads, head_dim) → (batch, tokens, width), through the output projection."""
        joined: Tensor = self.o_proj(x.flatten(2))
        return joined

    def term(self, query: Tensor, distance: Tensor) -> Tensor | None:
        """What is added to the scores, (batch, heads, queries, keys), for distances (batch or 1, queries, keys) ≥ 0; or None."""
        return None

    def forward(self, x: Tensor, positions: Tensor, real: Tensor | None, past: DynamicCache | None) -> Tensor:
        """x: (batch, tokens, width). positions: (batch or 1, keys), cached ones too. real: (batch, keys), False for padding."""
        query, key, value = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        if past is not None:
            key, value = past.update(key, value, self.layer)
        tokens, keys = query.shape[2], key.shape[2]
        if real is None and tokens == keys and type(self).term is Attention.term:
            return self.join(self.attend(query, key, value))
        order = torch.arange(keys, device=x.device)
        rows = []
        for start in range(0, tokens, ROWS):
            block = slice(keys - tokens + start, min(keys - tokens + start + ROWS, keys))
            part, seen = query[:, :, start : start + ROWS], slice(0, block.stop)
            allowed = (order[block, None] >= order[None, seen])[None, None]
            if real is not None:  # a row of padding sees itself, since nothing at all would be no number
                allowed = allowed & (real[:, None, None, seen] | (order[block, None] == order[None, seen]))
            distance = (positions[:, block, None] - positions[:, None, seen]).clamp(min=0)
            term = self.term(part, distance)
            mask = allowed if term is None else torch.where(allowed, term, torch.finfo(x.dtype).min)
            rows.append(self.attend(part, key[:, :, seen], value[:, :, seen], mask))
        return self.join(torch.cat(rows, dim=1))


class AlibiAttention(Attention):
    """Scores fall by slope × distance (arXiv 2108.12409). In float32, from the distance itself, so that far keys stay apart."""

    def term(self, query: Tensor, distance: Tensor) -> Tensor:
        return (-slopes(self.heads).to(query.device)[:, None, None] * distance[:, None]).to(query.dtype)


class RelativeAttention(Attention):
    """Each distance up to `clip_distance` has a learned key of its own, all farther ones share the last (arXiv 1803.02155)."""

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.clip = config.clip_distance
        self.embed_distances = nn.Embedding(self.clip + 1, self.width)

    def term(self, query: Tensor, distance: Tensor) -> Tensor:
        by_distance = query @ self.embed_distances.weight.T / math.sqrt(self.width)
        return by_distance.gather(-1, distance.clamp(max=self.clip)[:, None].expand(*query.shape[:3], -1))


class SegmentAttention(Attention):
    """A segment sees itself and `memory_length` positions before it (arXiv 1901.02860, §3.3).

    Content and position are scored apart, q·k + u·k + q·Wr + v·Wr, where r is the sinusoid of the distance. Other than in the
    paper, gradients pass through the memory: at 256 tokens there is no need to stop them.
    """

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.memory = config.memory_length
        self.reach = config.memory_length + config.segment_length
        self.r_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.embed_biases = nn.Embedding(2 * self.heads, self.width)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """x: (batch, tokens, width), tokens of one segment."""
        query, key, value = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        if stream.offset == 0:  # a new segment: what is out of its reach is dropped
            stream.layers[self.layer] = [kept[:, :, -self.memory :] for kept in stream.layers[self.layer]]
        key, value = stream.extend(self.layer, key, value)
        tokens, keys = query.shape[2], key.shape[2]
        distance = torch.arange(keys - tokens, keys, device=x.device)[:, None] - torch.arange(keys, device=x.device)
        content, position = self.embed_biases.weight.reshape(2, self.heads, 1, self.width).unbind(0)
        r = self.r_proj(sinusoids(torch.arange(self.reach, device=x.device), x.shape[-1]).to(x.dtype))
        r = r.reshape(-1, self.heads, self.width).transpose(0, 1)
        term = (query + position) @ r.transpose(-1, -2) / math.sqrt(self.width)
        term = term.gather(-1, distance.clamp(min=0).expand(*query.shape[:3], -1))
        mask = torch.where(distance >= 0, term, torch.finfo(x.dtype).min)
        return self.join(self.attend(query + content, key, value, mask))


class MemoryAttention(Attention):
    """A segment sees itself, by rotary angles that start anew in each segment, and the memory's slots, which have no position."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """x: (batch, tokens, width), tokens of one segment, normalised as the memory is."""
        positions = torch.arange(stream.offset, stream.offset + x.shape[1], device=x.device)
        query, key, value = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        key, value = stream.extend(self.layer, rotate(key, positions), value)
        slots = F.rms_norm(stream.memory, stream.memory.shape[-1:])
        slot_keys, slot_values = self.split(self.k_proj(slots)), self.split(self.v_proj(slots))
        # One product scores both: turned queries meet turned keys in the first half, bare ones the slots in the second.
        both = torch.cat((rotate(query, positions), query), dim=-1)
        keys = torch.cat((F.pad(slot_keys, (self.width, 0)), F.pad(key, (0, self.width))), dim=2)
        values = F.pad(torch.cat((slot_values, value), dim=2), (0, self.width))
        order = torch.arange(key.shape[2], device=x.device)
        allowed = F.pad(order[-x.shape[1] :, None] >= order[None], (slot_keys.shape[2], 0), value=True)
        seen = self.attend(both, keys, values, allowed, scaling=1 / math.sqrt(self.width))
        return self.join(seen[..., : self.width])


class MemoryWriter(nn.Module):
    """After a segment each slot attends to itself and to the segment's tokens, and is normalised anew (arXiv 2010.06891)."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.embed_slots = nn.Embedding(config.memory_slots, config.hidden_size)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(3))

    def first(self, batch: int) -> Tensor:
        """The memory before anything was read, (batch, slots, width)."""
        return F.normalize(self.embed_slots.weight, dim=-1).expand(batch, -1, -1)

    def forward(self, memory: Tensor, segment: Tensor) -> Tensor:
        """The memory, (batch, slots, width), after a segment, (batch, tokens, width)."""

        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)

        slots = F.rms_norm(memory, memory.shape[-1:])
        query = split(self.q_proj(slots))
        scores = query @ split(self.k_proj(segment)).transpose(-1, -2)
        itself = (query * split(self.k_proj(slots))).sum(-1, keepdim=True)
        weights = torch.softmax(torch.cat((itself, scores), dim=-1) / math.sqrt(query.shape[-1]), dim=-1)
        read = weights[..., :1] * split(memory) + weights[..., 1:] @ split(self.v_proj(segment))
        written: Tensor = F.normalize(read.transpose(1, 2).flatten(2) + self.embed_slots.weight, dim=-1)
        return written


ATTENTION: dict[str, type[Attention]] = {
    "learned": Attention,
    "sinusoidal": Attention,
    "relative": RelativeAttention,
    "alibi": AlibiAttention,
    "transformer-xl": SegmentAttention,
    "memformer": MemoryAttention,
}


class Stream:
    """What a recurrent model carries from call to call: its size does not depend on how much it has read."""

    def __init__(self, layers: int) -> None:
        self.seen = 0
        self.offset = 0
        """Position in the segment of the next token."""
        self.layers: list[list[Tensor]] = [[] for _ in range(layers)]
        """Keys and values of each layer, (batch, heads, kept, head_dim)."""
        self.memory: Tensor = torch.empty(0)
        """Memformer's slots, (batch, slots, width)."""
        self.segment: list[Tensor] = []
        """Memformer's last hidden states of the segment so far."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        return self.seen

    def extend(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Adds keys and values to a layer's; returns all of them."""
        kept = self.layers[layer]
        self.layers[layer] = [torch.cat(pair, dim=2) for pair in zip(kept, (key, value), strict=True)] if kept else [key, value]
        return self.layers[layer]


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm and added to its input."""

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = ATTENTION[config.position_scheme](config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        y = self.post_attention_layernorm(x)
        changed: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return changed


class ReferenceModel(PreTrainedModel):
    """Token ids in, last hidden states out."""

    config_class = ReferenceConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_scheme == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_scheme == "memformer":
            self.writer = MemoryWriter(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        keep: int = 0,
    ) -> tuple[Tensor, Any]:
        """(last hidden states (batch, tokens, width), cache), from input_ids (batch, tokens).

        `keep`: only the last so many hidden states are returned; all for 0.
        """
        if self.config.position_scheme in RECURRENT:
            return self.stream(input_ids, attention_mask, position_ids, past_key_values, keep)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        real = attention_mask.bool() if attention_mask is not None and not attention_mask.all() else None
        if position_ids is None:
            counted = real.cumsum(-1).sub(1).clamp(min=0) if real is not None else None
            all_ids = torch.arange(past + input_ids.shape[1], device=input_ids.device)[None] if counted is None else counted
            position_ids = all_ids[:, past:]
        positions = position_ids
        if past_key_values is not None:  # cached keys keep the positions that they were given
            before = getattr(past_key_values, "positions", position_ids[:, :0])[:, :past]
            positions = torch.cat((before.expand(len(position_ids), -1), position_ids), dim=1)
            past_key_values.positions = positions
        x = self.embed_tokens(input_ids)
        if self.config.position_scheme == "learned":
            x = x + self.embed_positions(position_ids)
        if self.config.position_scheme == "sinusoidal":
            x = x * math.sqrt(x.shape[-1]) + sinusoids(position_ids, x.shape[-1]).to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, real, past_key_values)
        return self.norm(x[:, -keep:]), past_key_values

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Any, keep: int
    ) -> tuple[Tensor, Stream]:
        """`forward` of a recurrent scheme: segment by segment, so that memory does not grow with the input.

        Raises ValueError for padded rows, whose segments would not begin where they do alone.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(f"{self.config.position_scheme} reads segments, which padding would shift: run one prompt at a time")
        stream = past if isinstance(past, Stream) else Stream(len(self.layers))
        if self.config.position_scheme == "memformer" and not stream.seen:
            stream.memory = self.writer.first(len(input_ids))
        size, rows, left = self.config.segment_length, [], input_ids.shape[1]
        while left:
            piece = input_ids[:, -left:][:, : size - stream.offset]
            left -= piece.shape[1]
            x = self.embed_tokens(piece)
            for layer in self.layers:
                x = layer(x, stream)
            x = self.norm(x)
            if not keep or left < keep:
                rows.append(x)
            stream.seen += piece.shape[1]
            stream.offset = (stream.offset + piece.shape[1]) % size
            if self.config.position_scheme == "memformer":
                stream.segment.append(x)
                if stream.offset == 0:
                    stream.memory = self.writer(stream.memory, torch.cat(stream.segment, dim=1))
                    stream.segment, stream.layers = [], [[] for _ in self.layers]
        return torch.cat(rows, dim=1)[:, -keep:], stream


class ReferenceForCausalLM(PreTrainedModel, GenerationMixin):
    """A reference model with its output layer, which is applied position by position."""

    config_class = ReferenceConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012, transformers' own form

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        self.model = ReferenceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens or logits_to_keep, vocabulary) of input_ids (batch, tokens)."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x, past = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep)
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=past if use_cache else None)


AutoConfig.register(ReferenceConfig.model_type, ReferenceConfig, exist_ok=True)
AutoModelForCausalLM.register(ReferenceConfig, ReferenceForCausalLM, exist_ok=True)
