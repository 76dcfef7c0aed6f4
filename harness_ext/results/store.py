"""Published records on disk: one file a run, `<developer>__<model>/<override>-<hash of the file>.jsonl`, written whole or not at all.

What is read may come from anybody: it is read as data within bounds, and no path in it is followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import msgspec

from harness_ext.errors import PublishError, RecordError
from harness_ext.results.records import LARGEST, PLAIN, SCHEMA_VERSION, Cell, PublishedRun, Run, to_plain

VERSION = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")
MAX_LINE = 2**20
"""Bytes of a line: a cell of ten thousand prompts, or a run of a hundred tasks."""
MAX_LINES = 20_000
"""Lines of a file: eight tasks at fifty lengths and fifty depths."""
MAX_FILE = 2**26
"""Bytes of a file."""
MAX_FILES = 100_000
"""Files of a folder."""
MAX_PROBLEMS = 100
"""Bad lines of a file, after which it is no file of records."""
MAX_DEPTH = 16
"""Objects and lists inside one another, in what a record leaves free."""
FOLDER = re.compile(r"[A-Za-z0-9._+-]+__[A-Za-z0-9._+-]+")
"""Names of the folders that hold records; others in the same place are somebody else's."""
FILE = re.compile(r"[A-Za-z0-9._+-]+-(?P<hash>[0-9a-f]{16})\.jsonl")
_DECODER = msgspec.json.Decoder(Run | Cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a published file."""

    file: str
    """Below the folder that was read."""
    line: int | None
    """From 1; None where it is the file."""
    message: str
    """What was found, what was expected, what to do."""

    def __str__(self) -> str:
        return to_plain(f"{self.file}{f' line {self.line}' if self.line else ''}: {self.message}", 600)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFile:
    """A file of records that could be read."""

    path: Path
    """Where it is."""
    name: str
    """Below the folder that was read."""
    published: PublishedRun
    """The records in it that are good."""
    lines: tuple[int, ...]
    """Of each cell."""
    digest: str
    """SHA-256 of its bytes."""


def to_bytes(published: PublishedRun) -> bytes:
    """The bytes of a run's file: the same for the same records."""
    text = io.StringIO()
    with jsonlines.Writer(text, dumps=lambda record: msgspec.json.encode(record, order="deterministic").decode()) as lines:
        lines.write_all([published.run, *published.cells])
    return text.getvalue().encode()


def name_file(run: Run, digest: str) -> str:
    """Where the file of a run, of this SHA-256, stands below the folder of all."""
    developer = run.model_info.developer or "local"
    name = run.model_info.id.rpartition("/")[2]
    return f"{safe_name(developer)}__{safe_name(name)}/{safe_name(run.override.method)}-{digest[:16]}.jsonl"


def write_run(folder: Path, published: PublishedRun) -> tuple[Path, bool]:
    """The file of a run, and whether it is new. It is there as a whole or not at all, and one that is there is left as it is.

    Raises PublishError where it cannot be written, as on a full disk.
    """
    name, content = lay_out(published)
    return folder / name, write_file(folder / name, content)


def lay_out(published: PublishedRun) -> tuple[str, bytes]:
    """A run's file: where it stands below the folder of all, and what is in it."""
    content = to_bytes(published)
    return name_file(published.run, hashlib.sha256(content).hexdigest()), content


def write_file(target: Path, content: bytes) -> bool:
    """Whether the file is new: it is there as a whole or not at all. Raises PublishError where it cannot be written."""
    try:
        if target.is_file() and not target.is_symlink() and target.read_bytes() == content:
            return False
        _make_folders(target.parent)
        _write_whole(target, content)
    except OSError as error:
        raise PublishError(
            f"{target} could not be written: {error.strerror or error}; nothing was changed there. Make room or choose another folder, "
            "and do it again: what is there already stays as it is"
        ) from None
    return True


def read_results(folder: Path) -> tuple[list[PublishedRun], list[Problem]]:
    """The runs published in a folder, by file name, and what could not be read."""
    files, problems = read_files(folder)
    return [file.published for file in files], problems


def read_files(folder: Path) -> tuple[list[RecordFile], list[Problem]]:
    """As `read_results`, with where each stands."""
    problems: list[Problem] = []
    files = []
    for path in list_files(folder, problems):
        file, found = read_file(path, str(path.relative_to(folder)))
        problems += found
        files += [file] if file else []
    return files, problems


def list_files(folder: Path, problems: list[Problem]) -> list[Path]:
    """The files of records in a folder, by name; what stands among them and is none goes to `problems`.

    Raises RecordError where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            models = sorted(entry.name for entry in entries if FOLDER.fullmatch(entry.name) and not entry.is_file())
    except OSError as error:
        raise RecordError(
            f"{folder} cannot be read: {error.strerror}; give a folder that `harness-ext publish --results` wrote"
        ) from None
    found: list[Path] = []
    for model in models:
        if (folder / model).is_symlink() or not (folder / model).is_dir():
            problems.append(
                Problem(file=model, line=None, message="expected a folder, found a link or a device; it was not followed")
            )
            continue
        with os.scandir(folder / model) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{model}/{entry.name}"
                if entry.name.startswith("."):
                    continue  # a publisher at work, or one that was killed
                if not entry.is_file(follow_symlinks=False) or not entry.name.endswith(".jsonl"):
                    problems.append(Problem(file=name, line=None, message="expected a file of records, .jsonl; it was not opened"))
                elif len(found) == MAX_FILES:
                    problems.append(Problem(file=name, line=None, message=f"more than {MAX_FILES} files; the rest was not read"))
                    return found
                else:
                    found.append(folder / name)
    return found


def read_file(path: Path, name: str) -> tuple[RecordFile | None, list[Problem]]:
    """A file's good records, and what is wrong with the others. None where there is no run in it that its cells could belong to."""
    problems: list[Problem] = []
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return None, [Problem(file=name, line=None, message="expected a file, found a device; it was not read")]
            if found.st_size > MAX_FILE:
                message = f"{found.st_size} bytes; expected at most {MAX_FILE}; it was not read"
                return None, [Problem(file=name, line=None, message=message)]
            digest = hashlib.sha256()
            run, cells, lines = _read_records(_bounded(file, digest), name, problems)
    except OSError as error:
        return None, [Problem(file=name, line=None, message=f"cannot be read: {error.strerror}")]
    if run is None:
        return None, problems
    published = PublishedRun(run=run, cells=tuple(cells))
    return RecordFile(path=path, name=name, published=published, lines=tuple(lines), digest=digest.hexdigest()), problems


def decode_record(line: str) -> Run | Cell:
    """One record. Raises ValueError that says what was found and expected."""
    try:
        record: Run | Cell = _DECODER.decode(line)
        if isinstance(record, Run):
            _check_version(record.schema_version)
            _check_free(record)
        if msgspec.json.encode(record, order="deterministic") != line.encode().rstrip(
            b"\n"
        ):  # which is a tenth of the time of the other
            json.loads(line, object_pairs_hook=_refuse_twice)
    except RecursionError:
        raise ValueError("lists or objects inside one another without end; expected a record") from None
    except msgspec.ValidationError:
        _check_version(msgspec.json.decode(line, type=_Versioned).schema_version)
        raise
    return record


class _Versioned(msgspec.Struct):
    schema_version: str = SCHEMA_VERSION


def _check_version(version: str) -> None:
    """Raises ValueError for records of another major version, and for those of a later minor one."""
    found, ours = (
        tuple(map(int, text.split("."))) for text in (version if VERSION.fullmatch(version) else "0.0.0", SCHEMA_VERSION)
    )
    if found[0] != ours[0] or found[:2] > ours[:2]:
        advice = "upgrade harness_ext" if found > ours else "publish the run again"
        raise ValueError(f"schema version {version[:20]}; this harness_ext reads {ours[0]}.0 to {ours[0]}.{ours[1]}: {advice}")


def _read_records(lines: Iterable[bytes], name: str, problems: list[Problem]) -> tuple[Run | None, list[Cell], list[int]]:
    """The run, its cells and their lines."""
    run, cells, numbers, number, orphans = None, [], [], 0, 0
    with jsonlines.Reader(lines, loads=decode_record) as reader:
        while True:
            number += 1
            if len(problems) >= MAX_PROBLEMS:
                problems.append(Problem(file=name, line=number, message=f"{MAX_PROBLEMS} bad lines; the rest was not read"))
                break
            try:
                record: Any = reader.read()
            except EOFError:
                break
            except jsonlines.InvalidLineError as error:
                problems.append(Problem(file=name, line=number, message=str(error.__cause__ or error)))
                continue
            except RecordError as error:
                problems.append(Problem(file=name, line=number, message=str(error)))
                break
            if isinstance(record, Run) and number > 1:
                problems.append(Problem(file=name, line=number, message="a second run; expected one a file, on its first line"))
            elif isinstance(record, Run):
                run = record
            elif run is None:
                orphans += 1
            elif record.evaluation_id != run.evaluation_id:
                message = f"a cell of run {record.evaluation_id}; expected one of {run.evaluation_id}, as on line 1"
                problems.append(Problem(file=name, line=number, message=message))
            else:
                cells.append(record)
                numbers.append(number)
    if run is None:
        left = f"; {orphans} cells without a run were left out" if orphans else ""
        problems.append(Problem(file=name, line=1, message=f"no run; expected one on the first line{left}"))
    return run, cells, numbers


def _bounded(file: io.BufferedReader, digest: Any) -> Iterator[bytes]:
    """The lines of a file. Raises RecordError, at the line, where they go past what a file of records may be."""
    total = 0
    for number in range(1, MAX_LINES + 2):
        line = file.readline(MAX_LINE + 1)
        digest.update(line)
        total += len(line)
        if not line:
            return
        if len(line) > MAX_LINE or total > MAX_FILE:
            raise RecordError(f"more than {MAX_LINE} bytes on a line, or {MAX_FILE} in the file; the rest was not read")
        if number > MAX_LINES:
            raise RecordError(f"more than {MAX_LINES} lines; the rest was not read")
        if line[-1:] != b"\n":
            raise RecordError("the line does not end; the file was cut off: publish it again")
        yield b"\0" + line if line.startswith((b"\xef\xbb\xbf", b"\x1e")) else line  # marks that jsonlines would pass over


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:40]!r} stands there twice; expected once")


def _check_free(run: Run) -> None:
    """Raises ValueError for what is no plain data, where a record leaves free what stands in it."""
    override = run.override
    free = [run.packages, run.model_info.model_args, override.options, override.before, override.after]
    for value in [*free, *(task.settings for task in run.tasks)]:
        _check_value(value, 0)


def _check_value(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"lists or objects more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_value(name, depth)
            _check_value(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, depth + 1)
    elif isinstance(value, str) and not re.match(PLAIN, value.replace("\n", "").replace("\t", "")):
        raise ValueError("a control character, or one that hides or reorders text; expected plain text")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a whole number above {LARGEST}; expected one that every reader of JSON holds")


def safe_name(name: str) -> str:
    """Part of a file name, whatever stands in `name`.

    >>> safe_name("../../etc/passwd"), safe_name("__x"), safe_name("")
    ('etc-passwd', 'x', 'unknown')
    """
    return re.sub(r"_{2,}", "_", re.sub(r"[^A-Za-z0-9._+-]+", "-", name)).strip("._-")[:80] or "unknown"


def _make_folders(folder: Path) -> None:
    """Makes a folder, so that it is there after a power cut."""
    for place in [*reversed(folder.parents), folder]:
        if not place.is_dir():
            with contextlib.suppress(FileExistsError):
                place.mkdir()
            _sync(place.parent)


def _write_whole(target: Path, content: bytes) -> None:
    """Writes a file under another name, and gives it its own when it is on the disk."""
    draft = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
