"""Answers kept as they come, so that a run that is killed goes on where it was.

One file for each set of prompts under one model: its name is a hash of all that the answers follow from, so that another model, dtype,
override, version or prompt never reads a stale one. It goes when the evaluation has ended well; what stays is what was interrupted. Where the user
names a folder (lm_eval's `--use_cache`), the file is there, stays, and is for whatever prompts that model is asked. SQLite in
WAL mode: a process that dies leaves the last whole transaction, and several may write.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness_ext.cells import Unmeasured

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the files; part of every name."""
WAIT = 60
"""Seconds, for another process that has a file."""
DAYS = 30
"""After which an interrupted run's file is taken to be given up."""


def find_folder() -> Path:
    """Where the files are: `HARNESS_EXT_CACHE`, or the user's cache folder."""
    given, cache = os.environ.get("HARNESS_EXT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(cache) if cache else Path.home() / ".cache") / "harness_ext"


def name_prompt(sequence: Sequence[int], *facts: Any) -> str:
    """SHA-256 of what an answer follows from beside what all have in common: the prompt, as token ids (and positions), and facts of its own."""
    found = hashlib.sha256(json.dumps(facts, default=str).encode())
    found.update(np.asarray(sequence, dtype=">u8").tobytes())
    return found.hexdigest()


def name_scope(facts: Mapping[str, Any], names: Iterable[str] = ()) -> str:
    """SHA-256 of what answers follow from: facts of the model and the run, and prompts in their order, by name."""
    found = hashlib.sha256(json.dumps([FORMAT, facts], sort_keys=True, default=str).encode())
    for name in names:
        found.update(name.encode())
    return found.hexdigest()


class Journals:
    """Those of the evaluation that goes on; none where none does."""

    def __init__(self) -> None:
        self.opened: list[Journal] | None = None
        self._cache: Path | None = None

    @contextlib.contextmanager
    def evaluating(self, cache: Path | None) -> Iterator[None]:
        """Around an evaluation. Files of one that ended well go when the process ends: by then its results are written; in the folder of a `cache` they
        stay. Says on Ctrl-C what is finished and how to go on."""
        forget_finished()
        opened: list[Journal] = []
        self.opened, self._cache = opened, cache
        try:
            yield
        except KeyboardInterrupt:
            kept, asked = sum(journal.kept for journal in opened), sum(journal.asked for journal in opened)
            folders = sorted({str(journal.file.parent) for journal in opened}) or [str(find_folder() / "interrupted")]
            print(
                f"\nInterrupted: {kept} of {asked} answers that were begun are kept in {', '.join(folders)}. "
                "The same command goes on from them.",
                file=sys.stderr,
            )
            raise
        finally:
            for journal in opened:
                journal.close()
            self.opened = self._cache = None
        _finished.extend(opened)

    def open(
        self, facts: Mapping[str, Any], sequences: Sequence[Sequence[int]], own: Sequence[Any], *, cached: bool = True
    ) -> Journal:
        """Where the answers to prompts, as token ids, are kept. `facts`: what all answers follow from besides; `own`: what each does.

        Not `cached`: as if there were no cache.
        """
        assert self.opened is not None, "an evaluation goes on"
        names = [name_prompt(sequence, one) for sequence, one in zip(sequences, own, strict=True)]
        if cached and self._cache is not None:
            journal = Journal(self._cache / f"{name_scope(facts)[:32]}.sqlite", names, lasting=True)
        else:
            journal = Journal(find_folder() / "interrupted" / f"{name_scope(facts, names)[:32]}.sqlite", names)
        self.opened.append(journal)
        return journal


_finished: list[Journal] = []


@atexit.register
def forget_finished() -> None:
    """Deletes the files of evaluations that ended well."""
    while _finished:
        _finished.pop().forget()


class Journal:
    """The answers to some prompts, by their number among these. What it cannot keep is lost with a warning, and nothing else."""

    def __init__(self, file: Path, names: Sequence[str], *, lasting: bool = False) -> None:
        """`names`: of the prompts (`name_prompt`). `lasting`: it stays, with answers to other prompts, too."""
        self.file, self.names, self.lasting, self.kept = file, names, lasting, 0
        self._connection: sqlite3.Connection | None = None
        self._connection = self._open()

    @property
    def asked(self) -> int:
        """Prompts in all."""
        return len(self.names)

    def _name(self, number: int) -> str:
        return self.names[number] if number >= 0 else str(number)

    def read(self) -> dict[int, Any]:
        """The answers that are there."""
        if self._connection is None:
            return {}
        try:
            there = dict(self._connection.execute("SELECT name, answer FROM answers").fetchall())
            beside = [int(name) for name in there if name.startswith("-")]
            found = {
                number: json.loads(there[self._name(number)])
                for number in (*beside, *range(self.asked))
                if self._name(number) in there
            }
            self.kept = sum(number >= 0 for number in found)
        except (sqlite3.DatabaseError, ValueError) as error:
            self._set_aside(error)
            return {}
        if self.kept:
            since = "already" if self.lasting else "from an interrupted run"
            log.warning("%d of %d answers are there %s: %s (delete it to start anew)", self.kept, self.asked, since, self.file)
        return found

    def write(self, answers: Mapping[int, Any]) -> None:
        """Keeps answers that are JSON; they are on the disk when this returns. What is numbered below 0 is none, and stands beside them."""
        if self._connection is None or not answers:
            return
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?)",
                    [(self._name(number), json.dumps(answer)) for number, answer in answers.items()],
                )
            self.kept += sum(number >= 0 for number in answers)
        except sqlite3.Error as error:
            log.warning("answers are not kept any more, should the run be interrupted: %s: %s", self.file, error)
            self.close()

    def close(self) -> None:
        """Leaves the file for the same run to go on from."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def forget(self) -> None:
        """Deletes the file, unless it is lasting: the run has ended well."""
        self.close()
        if self.lasting:
            return
        for ending in ("", "-wal", "-shm"):
            self.file.with_name(self.file.name + ending).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection | None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self.lasting:
                _drop_old(self.file.parent)
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or a disk that is full or cannot be written to
                log.warning("answers are not kept, should the run be interrupted: %s: %s", self.file, error)
                return None
            self._set_aside(error)
            return self._connection
        except OSError as error:
            log.warning("answers are not kept, should the run be interrupted: %s", error)
            return None

    def _connect(self) -> sqlite3.Connection:
        """Processes that make a file at the same moment are told that it is locked: SQLite does not wait by itself while its mode is changed."""
        until = time.monotonic() + WAIT
        while True:
            try:
                return self._connect_once()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    def _connect_once(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=WAIT)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("CREATE TABLE IF NOT EXISTS answers (name TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            connection.execute("SELECT count(*) FROM answers").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def set_aside(self, reason: str) -> None:
        """Puts the file out of the way, and begins a new one: its answers are not to be believed. Says why."""
        self.kept = 0
        if self._connection is not None:
            self._move("stale", reason)

    def _set_aside(self, error: Exception) -> None:
        self._move("damaged", f"it is damaged ({error})")

    def _move(self, ending: str, reason: str) -> None:
        self.close()
        aside = self.file.with_name(f"{self.file.name}.{ending}-{time.time_ns()}")
        try:
            for ending in ("-wal", "-shm"):
                self.file.with_name(self.file.name + ending).unlink(missing_ok=True)
            self.file.rename(aside)
            log.warning("%s is not gone on from: %s; it is now %s, and its prompts are run again", self.file, reason, aside.name)
            self._connection = self._connect()
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "%s is not gone on from: %s; it cannot be put aside, and answers are not kept: %s", self.file, reason, error
            )


@dataclass(frozen=True, slots=True)
class Kept:
    """Answers that are there before a run, by the number of their prompt, and where those go that come."""

    known: Mapping[int, Any] = field(default_factory=dict)
    """As JSON has them: (log-likelihood, is greedy) is a list."""
    write: Callable[[Mapping[int, Any]], None] = lambda answers: None

    def likelihoods(self) -> dict[int, tuple[float, bool]]:
        """What is known of scored prompts."""
        return {number: (total, greedy) for number, (total, greedy) in self.known.items()}

    def add(self, answers: Mapping[int, Any]) -> None:
        """Keeps answers. An outcome is none: another time it may be one."""
        self.write({number: answer for number, answer in answers.items() if not isinstance(answer, Unmeasured)})


def _drop_old(folder: Path) -> None:
    limit = time.time() - DAYS * 86400
    for file in folder.iterdir():
        try:
            if file.stat().st_mtime < limit:
                file.unlink()
        except OSError:  # another process was first
            continue
