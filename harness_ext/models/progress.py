"""One bar for a run of very unlike prompts: in tokens, with a time left that knows that late tokens cost more than early ones."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from harness_ext.positions import text_config

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def find_even_position(model: Any) -> float:
    """The position, in tokens, at which reading a token costs twice what it costs at the beginning.

    A token takes 2 operations for each parameter that is no embedding (Kaplan et al., arXiv 2001.08361, §2.1), and each layer's
    attention 4 × width for each token before it. Of a mixture's experts, all are counted; so that the time left is rather too
    long. Infinite where nothing is attended to.
    """
    config = text_config(model.config)
    try:
        heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    except RuntimeError:  # a config whose layers differ in it says so in this way
        return float("inf")
    if not isinstance(heads, int) or not isinstance(layers, int) or not heads * layers:
        return float("inf")
    width = config.hidden_size  # heads may differ from layer to layer; together they are about as wide
    embeddings = {id(weight) for module in (model.get_input_embeddings(),) for weight in module.parameters()}
    parameters = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    return float(parameters / (2 * layers * width))


def cost(start: int, stop: int, even: float) -> float:
    """What reading tokens [start, stop) costs, in tokens at the beginning.

    >>> cost(0, 10, float("inf")), cost(0, 100, 100.0), cost(100, 200, 100.0)
    (10.0, 150.0, 250.0)
    """
    return (stop - start) * (1 + (start + stop) / 2 / even)


class TokenBar:
    """The bar. Quiet where `quiet`, and where standard error is no terminal."""

    def __init__(self, name: str, tokens: int, total_cost: float, even: float, *, quiet: bool) -> None:
        """`tokens`, `total_cost`: of the whole run."""
        self.tokens, self.even, self.done = tokens, even, 0
        self.bar = tqdm(total=total_cost, desc=name, bar_format=FORMAT, disable=True if quiet else None)

    def update(self, start: int, stop: int, rows: int = 1) -> None:
        """`rows` rows were read from token `start` to `stop`."""
        self.done += rows * (stop - start)
        if not self.bar.disable:
            seconds = self.bar.format_dict["elapsed"]
            self.bar.set_postfix_str(
                f"{self.done:,}/{self.tokens:,} tokens, {self.done / max(seconds, 1e-9):,.0f}/s", refresh=False
            )
        self.bar.update(rows * cost(start, stop, self.even))

    def drop(self, start: int, stop: int, rows: int = 1) -> None:
        """`rows` rows need not be read from token `start` to `stop`."""
        self.tokens -= rows * (stop - start)
        self.bar.total -= rows * cost(start, stop, self.even)

    def __enter__(self) -> TokenBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
