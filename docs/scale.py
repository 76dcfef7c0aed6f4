"""What it takes to measure many models far past their trained length: `python docs/scale.py` writes docs/scale.md.

Arithmetic over published shapes of models and vendors' data sheets, beside what was measured here (results/reading.jsonl). Nothing is run.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness_ext.results.tables import lay_out

REPOSITORY = Path(__file__).parent.parent
TRAINED = 131_072
"""Tokens: the window that most models of the table advertise."""
MULTIPLES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
DEPTHS, NEEDLES, SAMPLES = 10, 16, 10
"""The tasks' defaults."""
UTILISATION = 0.4
"""Of a card's peak, in prefill: an assumption."""
FILLED = 0.9
"""Of a card's memory that weights and cache may take: an assumption."""
BYTES = 2
"""Of a weight or a cached value: bfloat16."""
TEXT = 4.5
"""Bytes of English text a token: an assumption."""
START = 193.0
"""Seconds from an engine's start to its first answer: vLLM on a CPU, docs/speed.md; a GPU's is not measured here."""
NETWORK = 1.25e8
"""Bytes a second that a machine downloads weights at: an assumption, 1 Gbit/s."""
QUESTION = 64
"""Tokens of a question and its answer, behind the haystack."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with grouped queries."""

    name: str
    parameters: float
    layers: int
    width: int
    """Heads × values a head."""
    cached: int
    """Values of keys and values that a token leaves a layer."""
    count: int
    """Of the thousand."""

    def compute(self, start: float, stop: float) -> float:
        """Floating-point operations that read tokens `start` to `stop`: two a parameter and token (Kaplan et al., arXiv 2001.08361,
        section 2.1), and attention's two products, 4 × width operations a layer for each token that a token sees, half of them where it begins with
        itself."""
        return self.read(stop - start) + self.attend(start, stop)

    def read(self, tokens: float) -> float:
        return 2 * self.parameters * tokens

    def attend(self, start: float, stop: float) -> float:
        return 4 * self.layers * self.width * (stop**2 - start**2) / 2

    def cache(self, tokens: float) -> float:
        """Bytes of keys and values."""
        return BYTES * self.layers * self.cached * tokens

    @property
    def weights(self) -> float:
        """Bytes."""
        return BYTES * self.parameters


MODELS = (
    Model("0.5B (Qwen2.5-0.5B's shape)", 0.494e9, 24, 14 * 64, 2 * 2 * 64, 400),
    Model("3B (Llama-3.2-3B's)", 3.21e9, 28, 24 * 128, 2 * 8 * 128, 300),
    Model("8B (Llama-3.1-8B's)", 8.03e9, 32, 32 * 128, 2 * 8 * 128, 250),
    Model("70B (Llama-3.1-70B's)", 70.6e9, 80, 64 * 128, 2 * 8 * 128, 50),
)
"""From the checkpoints' config.json; how many of each there are is an assumption."""


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator, as NVIDIA's data sheet has it; figures with sparsity halved."""

    name: str
    peak: float
    """Operations a second in bfloat16, dense."""
    memory: float
    """Bytes."""


CARDS = (
    Card("A100 80 GB SXM", 312e12, 80e9),
    Card("H100 SXM", 989e12, 80e9),
    Card("H200 SXM", 989e12, 141e9),
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A task over lengths."""

    name: str
    lengths: tuple[float, ...]
    samples: int = SAMPLES
    depths: int = DEPTHS

    def read(self) -> Sequence[tuple[float, float]]:
        """From where to where tokens are read for one sample, each distinct token once."""
        if self.name == "loss":
            return [(0, max(self.lengths))]
        if self.name == "niah_sweep":  # each length is read once, and its questions behind it
            return [(0, length) for length in self.lengths] + [(length - QUESTION, length) for length in self.lengths] * NEEDLES
        spans = [(length * depth / (self.depths - 1), length) for length in self.lengths for depth in range(self.depths)]
        return [(0, max(start for start, _ in spans)), *spans]

    def ask(self) -> Sequence[tuple[float, float]]:
        """As many prompts as there are, each whole."""
        if self.name == "loss":  # 32 buckets of the longest
            return [(0, max(self.lengths) * part / 32) for part in range(1, 33)]
        return [(0, length) for length in self.lengths] * (NEEDLES if self.name == "niah_sweep" else self.depths)

    def compute(self, model: Model, *, shared: bool = True) -> float:
        """Operations for all samples."""
        return self.samples * sum(model.compute(start, stop) for start, stop in (self.read() if shared else self.ask()))

    def count(self, *, shared: bool = True) -> float:
        """Tokens of all samples."""
        return self.samples * sum(stop - start for start, stop in (self.read() if shared else self.ask()))


LENGTHS = tuple(multiple * TRAINED for multiple in MULTIPLES)
SWEEPS = tuple(Sweep(name, LENGTHS) for name in ("passkey", "niah_sweep", "loss"))


def hours(operations: float, card: Card = CARDS[1]) -> float:
    """Of one card."""
    return operations / (card.peak * UTILISATION) / 3600


def count_cards(model: Model, tokens: float, card: Card) -> int:
    """That hold the weights and the cache of one prompt."""
    return math.ceil((model.weights + model.cache(tokens)) / (card.memory * FILLED))


def total(sweeps: Sequence[Sweep], *, shared: bool = True) -> float:
    """Operations of the thousand models."""
    return sum(model.count * sweep.compute(model, shared=shared) for model in MODELS for sweep in sweeps)


def show_prompt() -> str:
    """One prompt by its length."""
    rows = [
        [
            model.name,
            f"{length:,.0f}",
            f"{model.compute(0, length) / 1e15:,.3g}",
            f"{model.attend(0, length) / model.compute(0, length):.0%}",
            f"{model.cache(length) / GIB:,.1f}",
            *(str(count_cards(model, length, card)) for card in CARDS),
            f"{60 * hours(model.compute(0, length)):,.2g}",
        ]
        for model in MODELS
        for length in (TRAINED / 16, TRAINED, 8 * TRAINED)
    ]
    header = [
        "model",
        "tokens",
        "PFLOP",
        "attention",
        "cache, GiB",
        *(card.name.split()[0] + "s" for card in CARDS),
        "H100 minutes",
    ]
    return lay_out(header, rows, right=tuple(range(1, len(header))))


def show_sweeps() -> str:
    """One model by its task."""
    rows = [
        [
            model.name,
            sweep.name,
            f"{sweep.count(shared=False) / 1e6:,.0f}",
            f"{sweep.count() / 1e6:,.0f}",
            f"{hours(sweep.compute(model, shared=False)):,.3g}",
            f"{hours(sweep.compute(model)):,.3g}",
            f"{sweep.compute(model, shared=False) / sweep.compute(model):.1f}",
        ]
        for model in MODELS
        for sweep in SWEEPS
    ]
    header = ["model", "task", "M tokens asked", "computed", "H100 hours, each prompt whole", "shared", "saved, times"]
    return lay_out(header, rows, right=tuple(range(2, len(header))))


def show_thousand() -> str:
    """The thousand models, on each card."""
    rows = []
    for card in CARDS:
        whole, shared = (hours(total(SWEEPS, shared=kind), card) for kind in (False, True))
        rows.append([card.name, f"{whole:,.0f}", f"{shared:,.0f}", f"{shared / 64 / 24:,.1f}"])
    return lay_out(["card", "card hours, each prompt whole", "shared", "days on 64 cards"], rows, right=(1, 2, 3))


def show_lengths() -> str:
    """Which lengths the hours go to: what the sweep up to each adds."""
    parts = [total([Sweep(sweep.name, LENGTHS[:count]) for sweep in SWEEPS]) for count in range(1, len(LENGTHS) + 1)]
    added = [parts[0], *(later - earlier for earlier, later in itertools.pairwise(parts))]
    rows = [
        [f"{multiple:g}×", f"{length:,.0f}", f"{hours(more):,.0f}", f"{more / parts[-1]:.1%}"]
        for multiple, length, more in zip(MULTIPLES, LENGTHS, added, strict=True)
    ]
    return lay_out(["multiple", "tokens", "H100 hours", "of all"], rows, right=(0, 1, 2, 3))


def show_savings() -> str:
    """What can be dropped, and what is left of the hours."""
    up_to = {multiple: tuple(length for length in LENGTHS if length <= multiple * TRAINED) for multiple in (2, 4)}
    choices = {
        "all of it": SWEEPS,
        "without passkey: niah_sweep asks for 16 depths of one context": SWEEPS[1:],
        "and up to 4×": tuple(Sweep(sweep.name, up_to[4]) for sweep in SWEEPS[1:]),
        "and up to 2×": tuple(Sweep(sweep.name, up_to[2]) for sweep in SWEEPS[1:]),
        "passkey with five depths, the rest as it is": (Sweep("passkey", LENGTHS, depths=5), *SWEEPS[1:]),
        "five samples of all": tuple(Sweep(sweep.name, LENGTHS, samples=5) for sweep in SWEEPS),
    }
    rows = [[name, f"{hours(total(sweeps)):,.0f}", f"{total(sweeps) / total(SWEEPS):.1%}"] for name, sweeps in choices.items()]
    small = sum(model.count * sweep.compute(model) for model in MODELS[:-1] for sweep in SWEEPS)
    rows.append(["all of it, without the fifty largest models", f"{hours(small):,.0f}", f"{small / total(SWEEPS):.1%}"])
    return lay_out(["what is run", "H100 hours", "of all"], rows, right=(1, 2))


def show_rest() -> str:
    """What is no prefill."""
    count, weights = sum(model.count for model in MODELS), sum(model.count * model.weights for model in MODELS)
    asked = count * sum(sweep.count(shared=False) for sweep in SWEEPS)
    prompts = count * sum(len(sweep.ask()) * sweep.samples for sweep in SWEEPS)
    rows = [
        ["weights, downloaded once", f"{weights / 1e12:,.1f} TB", f"{weights / NETWORK / 3600:,.0f} h on one line of 1 Gbit/s"],
        ["and by every one of 30 parts", f"{30 * weights / 1e12:,.0f} TB", f"{30 * weights / NETWORK / 3600:,.0f} h: share a disk"],
        ["starts, one a model", f"{count:,}", f"{count * START / 3600:,.0f} h at {START:.0f} s each"],
        ["starts, 30 parts a model", f"{30 * count:,}", f"{30 * count * START / 3600:,.0f} h"],
        [
            "samples files, with the prompts' text",
            f"{asked * TEXT / 1e12:,.1f} TB",
            f"{asked / 1e12:,.2f} T tokens at {TEXT} bytes",
        ],
        [
            "published records, without it",
            f"{prompts * weigh_prompt() / 1e9:,.1f} GB",
            f"{prompts / 1e6:,.2f} M prompts, {weigh_prompt():,.0f} bytes each",
        ],
    ]
    return lay_out(["what", "how much", "that is"], rows, right=(1,))


def show_measured() -> str:
    """What was measured of sharing, beside what the formulas above give for the same work."""
    rows = {row["row"]: row for row in map(json.loads, (REPOSITORY / "results" / "reading.jsonl").read_text().splitlines())}
    lengths = (256, 512, 1024, 2048)
    made = {
        "passkey": Sweep("passkey", lengths, samples=2),
        "sweep": Sweep("niah_sweep", (2048,), samples=1),
        "loss": Sweep("loss", (4096,), samples=1),
    }
    table = [
        [
            name,
            f"{rows[name]['computed']:,}",
            f"{sweep.count():,.0f}",
            f"{rows[name]['asked'] / rows[name]['computed']:.1f}",
            f"{rows[name]['ratio']:.1f}",
        ]
        for name, sweep in made.items()
    ]
    return lay_out(
        ["work", "tokens computed, measured", "by formula", "asked for each", "faster than hf, measured"], table, right=(1, 2, 3, 4)
    )


def weigh_prompt() -> float:
    """Bytes of a published record a prompt, over the records in results/."""
    files = [file.read_text(encoding="utf-8") for file in (REPOSITORY / "results").glob("*/*.jsonl")]
    return sum(map(len, files)) / sum(text.count('"sample":') for text in files)


def write_page() -> str:
    """The page."""
    return "\n\n".join(_write()) + "\n"


def _write() -> Iterator[str]:
    longest, large = 8 * TRAINED, MODELS[-1]
    shares = total(SWEEPS, shared=False) / total(SWEEPS)
    unit = max(SWEEPS, key=lambda sweep: sweep.compute(large))
    yield f"""\
# A thousand models, up to a million tokens

`python docs/scale.py` writes this page: every number is made by the function that its heading names, from published shapes of models, vendors' data sheets and assumptions, which stand at the
script's beginning. **No GPU was run for it**: cards' peaks are data-sheet figures, and that prefill reaches {UTILISATION:.0%} of them is an assumption; hours scale with its inverse.
A model trained on {TRAINED:,} tokens is run at {len(MULTIPLES)} multiples of that, {MULTIPLES[0]:g} to {MULTIPLES[-1]:g}, which is {LENGTHS[0]:,.0f} to {LENGTHS[-1]:,.0f} tokens, {SAMPLES} samples a task, {DEPTHS} depths
(passkey) or {NEEDLES} needles in one context (niah_sweep), and 32 buckets of running text (loss). The thousand are {", ".join(f"{model.count} of {model.name}" for model in MODELS)}."""
    yield f"## One prompt (`show_prompt`)\n\n{show_prompt()}"
    yield f"""\
Reading n tokens takes 2·N·n operations for the N parameters and 4·layers·width·n²/2 for attention. Columns of cards: how many hold the weights and that prompt's cache in bfloat16 within {FILLED:.0%} of their memory.
At a million tokens attention is {MODELS[0].attend(0, longest) / MODELS[0].compute(0, longest):.0%} of the work of the smallest model and {large.attend(0, longest) / large.compute(0, longest):.0%} of the largest's, and the cache of one prompt of the 8B model takes {MODELS[2].cache(longest) / MODELS[2].weights:.1f} times its weights.
A model with windows or a fixed state has neither, and is cheaper by that."""
    yield f"## One model (`show_sweeps`)\n\n{show_sweeps()}"
    yield "What sharing saves was measured on short prompts (docs/speed.md); the formulas beside it (`show_measured`), which leave out what prompts of two lengths share behind a needle at the same place:"
    yield show_measured()
    yield f"## The thousand (`show_thousand`, `show_lengths`)\n\n{show_thousand()}"
    yield show_lengths()
    yield f"""\
The bottleneck is attention over the longest length: the last multiple takes more than all the others together, and sharing, {shares:.1f} times in all, does not change that, since what is left is each prompt's own
end. Faster kernels at long lengths and more cards help; downloads and starts come after:"""
    yield f"## What is no prefill (`show_rest`)\n\n{show_rest()}"
    starts = 30 * sum(model.count for model in MODELS) * START / 3600
    yield f"""\
A start for each of thirty parts of every model is {starts / hours(total(SWEEPS)):.0%} of the hours above, and one a model {starts / 30 / hours(total(SWEEPS)):.1%}: only models that take longer than one can wait are worth splitting."""
    yield f"## What to drop (`show_savings`)\n\n{show_savings()}"
    yield f"""\
Each later line of the first four drops what the one before dropped too. Samples are the last thing to drop: an interval is over samples' haystacks ([statistics.md](statistics.md)).

## Parts

```
harness-ext run --shard 3/16 --model … --model_args … --tasks … --output_path out/part-3 --log_samples
harness-ext merge out/part-* --output_path out
```

A part is whole samples of tasks: {len(SWEEPS)} tasks × {SAMPLES} samples are {len(SWEEPS) * SAMPLES} units a model, dealt out by the square of their lengths with what they share counted once; parts differ by at most one unit's cost.
The longest unit bounds how soon a model can be done: a sample of {unit.name} takes the largest model {hours(unit.compute(large)) / unit.samples:,.0f} H100 hours, on the {count_cards(large, longest, CARDS[1])} cards that are the fewest to hold it {hours(unit.compute(large)) / unit.samples / count_cards(large, longest, CARDS[1]):,.1f} hours.
Across models, a job a model needs no parts at all. `examples/slurm.sh` submits a job array and the job that joins; `examples/ray_shards.py` does the same on a Ray cluster.

- What a part holds follows from lm_eval's arguments and the tasks' records, not from the machine. Parts of one model answer the same prompts as the run in one piece, with the same scores; under `exact=True` on one kind of
  machine the samples are the same bytes. By default a part shares what its own prompts have in common, so a log-likelihood may differ in its last bits (2e-6 on a CPU in float32).
- `merge` refuses parts whose weights, model arguments, override in effect, dtype, package versions, tasks, prompts or device type differ, and says which field does. It names parts that are missing, there twice or
  cut off. Another card of the same type, another host, another date make no other run: the results file lists each part's hardware under `parts`, and under `hardware` the names of all and the smallest numbers.
  Answers near a tie may then differ as they do between any two cards. Time is summed over parts.
- A part that is killed goes on with the same command. Its answers are kept in `HARNESS_EXT_CACHE`: put it where the next try finds it. Each part has files of its own there, so that no
  two machines use one at a time, which SQLite could not bear on a network file system.
- A part is run by one process, on as many cards as the model takes (`parallelize=True`, `tensor_parallel_size=N`): more parts stand in for more processes."""


if __name__ == "__main__":
    (REPOSITORY / "docs" / "scale.md").write_text(write_page(), encoding="utf-8")
