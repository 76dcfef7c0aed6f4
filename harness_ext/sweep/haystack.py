"""The filler between the needles: sentences without end, from one of five sources.

`noise` (the passkey task's five sentences, repeated), `text` (running text made here from word lists), `needles`
(needles only, each with another key and value), a text file, or a column of a `datasets` dataset.
"""

from __future__ import annotations

import codecs
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness_ext.errors import HaystackError
from harness_ext.model_view import first_line
from harness_ext.sweep import words

GENERATED = ("noise", "text", "needles")
MAX_CHARACTERS = 20_000_000
"""How much of a file or dataset is read: five million tokens or so."""
MAX_SENTENCE = 300
"""Characters; a longer run without a sentence's end (a table, code, no punctuation) is cut into pieces."""
PIECE = 40
"""Characters of a piece at most, cut at a space, or anywhere: where needles may stand is between pieces."""

Sentences = Callable[[random.Random, Callable[[str], bool]], Iterator[str]]
"""A generator of randomness, and which keys and values are taken → sentences without end; one line of text each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Haystack:
    """A source of filler."""

    name: str
    """What it is, for records: `noise`, `text`, `needles`, `file:NAME`, `dataset:NAME`."""
    sentences: Sentences
    """Where the filler comes from."""
    source: str = ""
    """The text the sentences come from, in which nothing that is asked may occur; empty where that cannot happen."""


def open_haystack(spec: str | Mapping[str, object], *, distractors: Sentences) -> Haystack:
    """The haystack that `spec` names: one of `GENERATED`, a path, `{"file": path}` or `{"dataset": name, "column": name}`.

    `distractors` makes the sentences of `needles`. Raises HaystackError with what was asked, found and possible.
    """
    if isinstance(spec, str) and spec in GENERATED:
        return {
            "noise": Haystack(name="noise", sentences=_noise),
            "text": Haystack(name="text", sentences=_running_text),
            "needles": Haystack(name="needles", sentences=distractors),
        }[spec]
    if isinstance(spec, str):
        spec = {"file": spec}
    if isinstance(spec, Mapping) and set(spec) == {"file"}:
        return _from_text(_read_file(Path(str(spec["file"]))), f"file:{Path(str(spec['file'])).name}")
    if isinstance(spec, Mapping) and "dataset" in spec:
        return _from_text(_read_dataset(spec), f"dataset:{spec['dataset']}")
    raise HaystackError(
        f"haystack: asked for {spec!r}; expected one of {', '.join(GENERATED)}, the path of a text file, "
        '{"file": path} or {"dataset": name, "column": column}'
    )


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, in order, white space folded.

    >>> split_sentences("One. Two!\\n\\nThree is\\nlonger? Four")
    ['One.', 'Two!', 'Three is longer?', 'Four']
    """
    sentences: list[str] = []
    for piece in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text):
        sentence = " ".join((piece or "").split())
        sentences += [sentence] if 0 < len(sentence) <= MAX_SENTENCE else _cut(sentence)
    return sentences


def _cut(run: str) -> Iterator[str]:
    """A run of words in pieces."""
    start = 0
    while start < len(run):
        end = len(run) if len(run) - start <= PIECE else run.rfind(" ", start + 1, start + PIECE + 1)
        end = end if end > start else start + PIECE
        if piece := run[start:end].strip():
            yield piece
        start = end


def _noise(rng: random.Random, taken: Callable[[str], bool]) -> Iterator[str]:
    return itertools.cycle(words.NOISE)


def _running_text(rng: random.Random, taken: Callable[[str], bool]) -> Iterator[str]:
    patterns: tuple[Callable[[], str], ...] = (
        lambda: f"The {pick(words.ADJECTIVES)} {pick(words.PEOPLE)} {pick(words.VERBS)} a {pick(words.THINGS)} {place()}.",
        lambda: f"One {pick(words.TIMES)} the {pick(words.PEOPLE)} {pick(words.VERBS)} the {pick(words.THINGS)}.",
        lambda: f"{place().capitalize()} a {pick(words.PEOPLE)} {pick(words.VERBS)} every {pick(words.THINGS)}.",
        lambda: f"Nobody {pick(words.VERBS)} the {pick(words.THINGS)} that {pick(words.TIMES)}.",
    )

    def pick(options: tuple[str, ...]) -> str:
        return rng.choice(options)

    def place() -> str:
        return f"{pick(words.PREPOSITIONS)} the {pick(words.PLACES)}"

    while True:
        yield rng.choice(patterns)()


def _from_text(text: str, name: str) -> Haystack:
    sentences = split_sentences(text)
    if not sentences:
        raise HaystackError(f"haystack {name}: asked for text, found none; give a source with at least one sentence")

    def cycle(rng: random.Random, taken: Callable[[str], bool]) -> Iterator[str]:
        start = rng.randrange(len(sentences))
        return itertools.islice(itertools.cycle(sentences), start, None)

    return Haystack(name=name, sentences=cycle, source=" ".join(sentences))


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise HaystackError(
            f"haystack: asked for the file {str(path)!r}, which is not there; give the path of a text file, "
            f"or one of {', '.join(GENERATED)}"
        )
    try:
        with path.open("rb") as file:
            found = file.read(4 * MAX_CHARACTERS)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(found, final=len(found) < 4 * MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise HaystackError(
            f"haystack file {str(path)!r}: expected UTF-8 text, found {error.object[error.start : error.start + 4]!r} "
            f"at byte {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise HaystackError(f"haystack file {str(path)!r} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise HaystackError(f"haystack file {str(path)!r}: expected text, found a zero byte; give a text file")
    if not text.strip():
        raise HaystackError(f"haystack file {str(path)!r} is empty; give a text file with at least one sentence")
    return text[:MAX_CHARACTERS]


def _read_dataset(spec: Mapping[str, object]) -> str:
    unknown = set(spec) - {"dataset", "name", "split", "column", "data_files"}
    if unknown or "column" not in spec:
        found = f"unknown field {min(unknown)!r}" if unknown else "no column"
        raise HaystackError(f"haystack dataset: {found}; expected dataset and column, and if need be name, split, data_files")
    import datasets  # seconds to import, and only here

    column, options = str(spec["column"]), {key: spec[key] for key in ("name", "data_files") if key in spec}
    asked = f"haystack dataset {spec['dataset']!r}"
    try:
        rows = datasets.load_dataset(str(spec["dataset"]), split=str(spec.get("split", "train")), **options)
    except (OSError, ValueError, RuntimeError, TypeError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise HaystackError(f"{asked} cannot be loaded: {first_line(error)}") from None
    if column not in rows.column_names:
        raise HaystackError(f"{asked}: asked for column {column!r}, found {', '.join(rows.column_names)}")
    parts: list[str] = []
    size = 0
    for value in rows[column]:
        if not isinstance(value, str):
            raise HaystackError(f"{asked}: column {column!r} holds {type(value).__name__}, expected text")
        parts.append(value)
        size += len(value)
        if size > MAX_CHARACTERS:
            break
    return "\n\n".join(parts)
