"""What a model keeps of the tokens it has read, so that they need not be read again.

Two kinds, and which one a model admits is found out by trying (`self_check`): `Cuttable`, keys and values token by token, and
`Copied`, whatever else a model carries on (a recurrent state, or layers of several kinds), which can only be gone on from.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, Protocol

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from harness_ext.models import memory, pieces

CARRIED = ("past_key_values", "cache_params", "state", "mems")
"""Names under which transformers' models give back what they carry on, and take it again."""


class State(Protocol):
    """What is held of one row of tokens, or of several rows of as many."""

    cuts: bool
    """Whether it can be cut back to any length."""
    forks: bool
    """Whether rows that go on from it need no copies of it."""
    alone: bool
    """Whether one token may be read on top of it, and not only several."""
    joins: bool
    """Whether rows of several can be put together in one."""
    attentions: int
    """How often a forward on it attends, where the last time may be cut short (`last_layer`); 0 where it may not."""

    def arguments(self) -> dict[str, Any]:
        """What the model's forward is given beside the tokens."""
        ...

    def take(self, output: Any) -> None:
        """Keeps what the forward gave back."""
        ...

    def keep(self, tokens: int) -> None:
        """Drops all but the first `tokens` tokens."""
        ...

    def copied(self, rows: int = 1) -> State:
        """A state of its own with the same tokens, in each of `rows` rows."""
        ...

    def forked(self, rows: int) -> State:
        """As `copied`, to be read on from once, by one chunk, while this one is left as it is; it need not be a copy."""
        ...

    def joined(self, rows: int, width: int, room: int) -> State:
        """A state for so many rows of at most `width` tokens, which `put` brings, with room for `room`; padded on the left, with nothing."""
        ...

    def put(self, row: int, other: State, tokens: int, of: int = 0) -> None:
        """Copies the first `tokens` tokens of row `of` of another state into a row of this one, which `joined` made."""
        ...


class BufferLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values, (rows, heads, tokens, head_dim), in a buffer with room for what is to come.

    transformers' own layer grows by concatenation, which copies all of it for each run of tokens; here cutting back and going
    on elsewhere copies nothing.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__()
        self.room = room
        self.keys: Tensor
        self.values: Tensor
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self.buffers or stop > self.buffers[0].shape[-2]:
            old = (self.keys, self.values)
            self.buffers = self._make_room(stop, key_states, value_states)
            for buffer, kept in zip(self.buffers, old, strict=True):
                if start:
                    buffer[..., :start, :] = kept
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self.buffers)
        return self.keys, self.values

    def _make_room(self, stop: int, *states: Tensor) -> list[Tensor]:
        """Buffers for all that is to come, or, where so much does not fit, for no more than there is: shorter prompts may fit."""
        try:
            return [new.new_empty(*new.shape[:-2], max(self.room, stop), new.shape[-1]) for new in states]
        except (RuntimeError, MemoryError) as error:
            if self.room <= stop or not memory.is_out(error):
                raise
            self.room = 0
        return self._make_room(stop, *states)

    def repeated(self, rows: int) -> BufferLayer:
        """A layer of its own, each row of it what this one's is; with as much room for one row, for several with no more than their tokens take."""
        other = BufferLayer(self.room if rows == 1 else 0)
        if self.get_seq_length():
            other.update(*(kept.repeat_interleave(rows, dim=0) for kept in (self.keys, self.values)))
        return other

    def parts(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, (heads, tokens, head_dim), that follow one another in a row."""
        return [(self.keys[row], self.values[row])] if self.get_seq_length() else []


class ForkedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of rows that begin with the same ones, (1, heads, tokens, head_dim), which are not copied: `pieces` attends to them."""

    def __init__(self, shared: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.shared = shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The rows' own, all of them, which know what they begin with."""
        return pieces.put_after(self.shared, *super().update(key_states, value_states, *args, **kwargs))

    def parts(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """As `BufferLayer`'s."""
        own = [(self.keys[row], self.values[row])] if super().get_seq_length() else []
        return [(self.shared[0][0], self.shared[1][0]), *own]

    def get_seq_length(self) -> int:
        return int(self.shared[0].shape[-2] + super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def clear(layer: BufferLayer | ForkedLayer, rows: int, width: int, room: int) -> BufferLayer:
    """A layer of as many heads, with `width` tokens that are nothing in each of some rows."""
    other = BufferLayer(room)
    for part in layer.parts(0)[:1]:
        other.update(*(kept.new_zeros(rows, kept.shape[0], width, kept.shape[2]) for kept in part))
    return other


class Cuttable:
    """A full cache of keys and values, of sliding-window layers too, since they are to be cut back."""

    cuts = alone = joins = True

    def __init__(self, room: int, *, forks: bool = False, attentions: int = 0) -> None:
        """`room`: the most tokens that it will hold. `forks`: the model's attention is `pieces`."""
        self.forks, self.attentions = forks, attentions
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = functools.partial(BufferLayer, room)

    def arguments(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}

    def take(self, output: Any) -> None:
        """Nothing: the cache was written into. Raises ValueError where it was not: the model carries on something else."""
        if not any(layer.get_seq_length() for layer in self.cache.layers):
            raise ValueError("it puts no keys and values into a cache")

    def keep(self, tokens: int) -> None:
        # Not the cache's own `crop`: a forward that failed has come to some layers and not to others.
        for layer in self.cache.layers:
            layer.crop(min(0, tokens - layer.get_seq_length()))

    def copied(self, rows: int = 1) -> Cuttable:
        other = Cuttable(0, forks=self.forks, attentions=self.attentions)
        other.cache = copy.copy(self.cache)  # with whatever else a model has hung on it
        other.cache.layers = [layer.repeated(rows) for layer in self.cache.layers]
        return other

    def forked(self, rows: int) -> Cuttable:
        if not self.forks:
            return self.copied(rows)
        other = Cuttable(0, attentions=self.attentions)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [
            ForkedLayer((layer.keys, layer.values)) if layer.get_seq_length() else layer.repeated(rows)
            for layer in self.cache.layers
        ]
        return other

    def joined(self, rows: int, width: int, room: int) -> Joined:
        return Joined(rows, width, room)

    def put(self, row: int, other: State, tokens: int, of: int = 0) -> None:
        raise NotImplementedError("its rows are of one state")


class Joined(Cuttable):
    """Rows of several caches."""

    def __init__(self, rows: int, width: int, room: int) -> None:
        super().__init__(room)
        self.rows, self.width, self.room = rows, width, room

    def put(self, row: int, other: State, tokens: int, of: int = 0) -> None:
        assert isinstance(other, Cuttable)
        if not self.cache.layers and tokens:
            self.cache = copy.copy(other.cache)
            self.cache.layers = [clear(layer, self.rows, self.width, self.room) for layer in other.cache.layers]
        for layer, held in zip(self.cache.layers, other.cache.layers, strict=bool(tokens)):
            start = self.width - tokens
            for part in held.parts(of):
                stop = min(self.width, start + part[0].shape[-2])
                for kept, new in zip((layer.keys, layer.values), part, strict=True):
                    kept[row, :, start:stop] = new[:, : stop - start]
                start = stop


class Copied:
    """What the model itself makes and gives back. `alone`: one token after it is what it is among several; a few recurrent families compute it otherwise."""

    cuts = forks = joins = False
    attentions = 0

    def __init__(self, model: Any, *, alone: bool = True) -> None:
        self.alone = alone
        parameters = inspect.signature(model.forward).parameters
        self.names = [name for name in CARRIED if name in parameters]
        self.kept: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        return {**self.kept, "use_cache": True}

    def take(self, output: Any) -> None:
        """Raises ValueError where the model gives nothing back that it would take."""
        self.kept = {name: output[name] for name in self.names if name in output and output[name] is not None}
        if not self.kept:
            raise ValueError("it gives nothing back to go on from")

    def keep(self, tokens: int) -> None:
        raise NotImplementedError("what it carries on cannot be cut back")

    def copied(self, rows: int = 1) -> Copied:
        if rows > 1:
            raise NotImplementedError("what it carries on has one row")
        return copy.deepcopy(self)

    def forked(self, rows: int) -> Copied:
        return self.copied(rows)

    def joined(self, rows: int, width: int, room: int) -> Copied:
        raise NotImplementedError("what it carries on has one row")

    def put(self, row: int, other: State, tokens: int, of: int = 0) -> None:
        raise NotImplementedError("what it carries on has one row")
