"""Token sequences → a schedule that computes each distinct token once.

The sequences make a tree: a node for each run of tokens that the same sequences have in common. A schedule walks it depth
first, so that a cache holds one path from the root at any time, and hands out steps: run these tokens on top of that many
cached ones. How a step is walked back from depends on the cache: one that can be cut (keys and values, token by token) goes
down the heaviest path in one run and is cut back branch by branch; one that cannot (a recurrent state) is copied where the
tree branches, lighter branches first, so that at most log₂(sequences) copies are held beside it.

No tensors here: tokens are whole numbers, ids below 2³¹ or (`placement`) ids and positions in one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

APART = 2**31
"""What stands in place of a last token that is not to be shared; no tokenizer has so many tokens."""

ALIKE = 4 / 3
"""Times its own length that a leaf is padded to at most, to be run with others that go on from the same tokens."""


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens, [start, stop) of every sequence that passes through it."""

    start: int
    stop: int
    sequence: int
    """One of the sequences that pass through it."""
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    leaves: int = 1
    """Nodes without children at or below it."""
    copies: int = 0
    """Copies of the cache that have to be held at once to walk it without cutting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Positions whose logits a sequence asks for, and that a step computes."""

    sequence: int
    row: int
    """Of the step."""
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Tokens from `start` on, run on a cache that holds the first `start` tokens of the same sequences."""

    rows: tuple[int, ...]
    """Sequences, one a row of the batch, each run to its own end (one row: to `stop`). Nothing is run on top of several rows."""
    start: int
    stop: int
    """The longest row's."""
    reads: tuple[Read, ...]
    copy: bool = False
    """Whether the cache as it stands is needed again, and a copy has to be run on. Only where caches cannot be cut."""
    resume: bool = False
    """Whether to go back first to the cache that was last put aside so. Only where caches cannot be cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps, in order, and what they come to."""

    steps: tuple[Step, ...]
    asked: int
    """Tokens of all sequences."""
    computed: int
    """Tokens of all steps: the distinct ones, two tokens being the same where everything before them is the same too; and some twice, where
    none may be read alone."""
    longest: int
    """Tokens of the longest sequence."""
    copies: int
    """Caches held at most beside the one that is run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How much may be run at once."""

    rows: int = 1
    tokens: int = 0
    """Rows × the longest row, cached tokens included; a single row may have more."""
    equal: bool = False
    """Rows have one length."""
    leaves: int = 0
    """Rows × their longest, cached tokens aside, that may go on from the same cached tokens whatever else is said; 0 where each row
    needs a copy of those."""
    forward: int = 0
    """Tokens that may be read again to save a forward: what fewer tokens would be saved by is read with each branch."""


def plan(
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[int],
    batch: Batch,
    *,
    cut: bool = True,
    apart: bool = False,
    alone: bool = True,
) -> Schedule:
    """The schedule for `sequences`, none of them empty, that reads the logits of each from position `wanted[i]` on.

    `cut`: the cache can be cut back to any length. `apart`: the last token of each distinct sequence is computed for that
    sequence alone, in a step that ends there, since something else goes on from it (a generated answer). `alone`: a step may have one
    token; otherwise only one that nothing goes on from has.

    >>> found = plan([[7, 8, 9, 1], [7, 8, 9, 2, 3], [7, 8, 4]], [3, 3, 2], Batch())
    >>> [(step.rows, step.start, step.stop) for step in found.steps], found.asked, found.computed
    ([((0,), 0, 3), ((1,), 3, 5), ((0,), 3, 4), ((2,), 2, 3)], 12, 7)
    """
    root, ends = build_tree(sequences, apart=apart)
    weigh(root)
    if batch.forward or not alone:
        _push_down(root, ends, lambda size, branches: size * (branches - 1) < batch.forward or (size == 1 and not alone))
        weigh(root)
    lengths = [len(sequence) for sequence in sequences]
    walked = list(_walk_and_cut(root, lengths, batch) if cut else _walk_and_copy(root, lengths, batch))
    places = {
        id(node): (number, row) for number, (_, rows) in enumerate(walked) for row, nodes in enumerate(rows) for node in nodes
    }
    reads: list[list[Read]] = [[] for _ in walked]
    for sequence, (end, first) in enumerate(zip(ends, wanted, strict=True)):
        node: Node | None = end
        while node is not None and node.stop > first and node.parent is not None:
            step, row = places[id(node)]
            reads[step].append(Read(sequence=sequence, row=row, start=max(first, node.start), stop=node.stop))
            node = node.parent
    steps = tuple(dataclasses.replace(step, reads=tuple(found)) for (step, _), found in zip(walked, reads, strict=True))
    return Schedule(
        steps=steps,
        asked=sum(lengths),
        computed=sum(count_tokens(step, lengths) for step in steps),
        longest=max(lengths, default=0),
        copies=0 if cut else root.copies,
    )


def plan_whole(sequences: Sequence[Sequence[int]], wanted: Sequence[int], batch: Batch) -> Schedule:
    """The schedule that shares nothing: every sequence whole, equal ones too, longest first."""
    lengths = [len(sequence) for sequence in sequences]
    order, steps = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)), []
    while order:
        count = max(1, min(batch.rows, batch.tokens // lengths[order[0]]))
        if batch.equal:
            count = sum(lengths[index] == lengths[order[0]] for index in order[:count])
        rows, order = tuple(order[:count]), order[count:]
        reads = tuple(Read(sequence=index, row=row, start=wanted[index], stop=lengths[index]) for row, index in enumerate(rows))
        steps.append(Step(rows=rows, start=0, stop=lengths[rows[0]], reads=reads))
    return Schedule(steps=tuple(steps), asked=sum(lengths), computed=sum(lengths), longest=max(lengths, default=0), copies=0)


def leave_out(steps: Sequence[Step], known: Container[int]) -> tuple[Step, ...]:
    """The steps that still have to be run where the answers of the sequences `known` are there already.

    A step is run if it reads for another sequence, or if one that is run stands on tokens that it computed. It is run as it stands, so
    that every token is computed in the same company as without `known`, and every answer is the same to the last bit.
    """
    wanted = [any(read.sequence not in known for read in step.reads) for step in steps]
    for number, parent in reversed([*enumerate(find_parents(steps))]):
        if wanted[number] and parent >= 0:
            wanted[parent] = True
    return tuple(step for step, is_wanted in zip(steps, wanted, strict=True) if is_wanted)


def gather(schedule: Schedule, lengths: Sequence[int], batch: Batch, *, joins: bool) -> tuple[Schedule, list[tuple[Step, ...]]]:
    """The steps in companies, in their order: those whose rows are gone on from together, padded to one length, as many as `batch` holds.

    `joins`: rows of several steps can be, and a step is cut in two where it fills a company; otherwise each that reads is one. A step is in the
    company of what it is the first to be needed for. `lengths`: tokens of each sequence.
    """
    companies: list[list[Step]] = []
    rows = longest = 0
    waiting: list[Step] = []
    for step in schedule.steps:
        if not step.reads:
            waiting.append(step)
            continue
        left = range(len(step.rows))
        while left:
            stop = lengths[step.rows[left[0]]]
            fitting = min(batch.rows, batch.tokens // max(longest, stop)) - rows
            if not joins or not companies or fitting < 1 or (batch.equal and stop != longest):
                companies.append([])
                rows = longest = 0
                fitting = max(1, min(batch.rows, batch.tokens // stop)) if joins else len(left)
            part, left = left[:fitting], left[fitting:]
            companies[-1] += [*waiting, take_rows(step, part, stop)]
            rows, longest, waiting = rows + len(part), max(longest, stop), []
    steps = tuple(itertools.chain.from_iterable(companies))
    return dataclasses.replace(schedule, steps=steps), [tuple(company) for company in companies]


def leave_out_whole(steps: Sequence[Step], companies: Sequence[tuple[Step, ...]], known: Container[int]) -> list[tuple[Step, ...]]:
    """As `leave_out`, of companies of `steps`: one that reads for another sequence is run as it stands."""
    reads = [[read.sequence for step in company for read in step.reads] for company in companies]
    done = {sequence for own in reads if all(sequence in known for sequence in own) for sequence in own}
    left = {id(step) for step in leave_out(steps, done)}
    return [tuple(step for step in company if id(step) in left) for company in companies]


def find_parents(steps: Sequence[Step]) -> list[int]:
    """The step that computed the last of the tokens that each step stands on, by number, −1 where it stands on nothing.

    Where caches are copied, the step before it, since what that left is gone on from.
    """
    if any(step.copy or step.resume for step in steps):
        return [number - 1 if step.start else -1 for number, step in enumerate(steps)]
    parents, path = [], list[int]()
    for number, step in enumerate(steps):
        while path and steps[path[-1]].start >= step.start:
            path.pop()
        parents.append(path[-1] if path else -1)
        if len(step.rows) == 1:
            path.append(number)
    return parents


def leave_read(step: Step, done: int) -> Step:
    """A step that failed after token `done`, without what it has read."""
    return dataclasses.replace(
        step, reads=tuple(dataclasses.replace(r, start=max(r.start, done)) for r in step.reads if r.stop > done)
    )


def take_rows(step: Step, rows: Sequence[int], stop: int) -> Step:
    """Some rows of a step as a step of their own; `stop`: the longest one's."""
    if len(rows) == len(step.rows):
        return step
    reads = tuple(dataclasses.replace(read, row=rows.index(read.row)) for read in step.reads if read.row in rows)
    return dataclasses.replace(step, rows=tuple(step.rows[row] for row in rows), stop=stop, reads=reads)


def count_tokens(step: Step, lengths: Sequence[int]) -> int:
    """Tokens that a step computes, padding aside."""
    return step.stop - step.start if len(step.rows) == 1 else sum(lengths[row] - step.start for row in step.rows)


def build_tree(sequences: Sequence[Sequence[int]], *, apart: bool = False) -> tuple[Node, list[Node]]:
    """The root, an empty node, and the node that each sequence ends in. Sequences that are equal end in the same node.

    Big-endian bytes sort as the tokens do, and compare a thousand times faster than lists.
    """
    arrays = [np.asarray(sequence, dtype=">u8") for sequence in sequences]
    if apart:
        firsts: dict[bytes, int] = {}
        for index, array in enumerate(arrays):
            arrays[index] = array.copy()
            arrays[index][-1] = APART + firsts.setdefault(array.tobytes(), index)
    keys = [array.tobytes() for array in arrays]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    root = Node(0, 0, -1)
    ends, path = [root] * len(keys), [root]
    for before, index in itertools.pairwise([-1, *order]):
        common = 0 if before < 0 else count_common(arrays[before], arrays[index])
        last = None
        while path[-1].stop > common:
            last = path.pop()
        if path[-1].stop < common:
            assert last is not None
            path.append(_split(last, common))
        if common < len(arrays[index]):
            leaf = Node(common, len(arrays[index]), index, path[-1])
            path[-1].children.append(leaf)
            path.append(leaf)
        ends[index] = path[-1]
    return root, ends


def count_common(one: np.ndarray, other: np.ndarray) -> int:
    """Leading tokens in common."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _split(node: Node, at: int) -> Node:
    """Puts a new node for the tokens before `at` above `node`; returns it."""
    assert node.parent is not None
    upper = Node(node.start, at, node.sequence, node.parent, [node])
    node.parent.children[node.parent.children.index(node)] = upper
    node.start, node.parent = at, upper
    return upper


def _push_down(root: Node, ends: list[Node], is_light: Callable[[int, int], bool]) -> None:
    """Where a node with others below it is light, by its tokens and how many branches end at or below it, each of those gets its tokens, too, and so
    does a leaf for the sequences that end there."""
    ending: dict[int, list[int]] = {}
    for sequence, end in enumerate(ends):
        ending.setdefault(id(end), []).append(sequence)
    stack = [root]
    while stack:
        above = stack.pop()
        waiting, above.children = above.children[::-1], []
        while waiting:
            node = waiting.pop()
            branches = node.leaves + (id(node) in ending)
            if not node.children or not is_light(node.stop - node.start, branches):
                above.children.append(node)
                continue
            for below in node.children:
                below.start, below.parent = node.start, above
            waiting += node.children[::-1]
            if id(node) in ending:
                leaf = Node(node.start, node.stop, node.sequence, above)
                above.children.append(leaf)
                for sequence in ending[id(node)]:
                    ends[sequence] = leaf
        stack += above.children


def weigh(root: Node) -> None:
    """Fills in `leaves` and `copies` of every node, and puts each one's children in order, the most leaves first."""
    stack, downwards = [root], []
    while stack:
        node = stack.pop()
        downwards.append(node)
        stack += node.children
    for node in reversed(downwards):
        if node.children:
            node.leaves = sum(child.leaves for child in node.children)
            most, *rest = sorted((child.copies for child in node.children), reverse=True)
            node.copies = max(most, 1 + rest[0]) if rest and node.parent else most
            node.children.sort(key=lambda child: (-child.leaves, -child.stop))


Walked = tuple[Step, list[list[Node]]]
"""A step, still without its reads, and the nodes that each of its rows computes."""


def _walk_and_cut(node: Node, lengths: Sequence[int], batch: Batch) -> Iterator[Walked]:
    """`node` and what is below it: down the path of most leaves in one run, then back up along it, branch by branch.

    A branch off that path has at most half of the leaves, so the recursion is log₂(leaves) deep.
    """
    path = [node]
    while inner := _list_inner(path[-1]):
        path.append(inner[0])
    if path[-1].stop > 0:
        yield Step(rows=(path[-1].sequence,), start=node.start, stop=path[-1].stop, reads=()), [path]
    for above in reversed(path):
        for child in _list_inner(above)[1:]:  # the first of them is on the path
            yield from _walk_and_cut(child, lengths, batch)
        yield from _run_leaves(above, lengths, batch)


def _walk_and_copy(node: Node, lengths: Sequence[int], batch: Batch) -> Iterator[Walked]:
    """What is below `node`, the root, where nothing has to be copied; then as `_descend` does."""
    yield from _run_leaves(node, lengths, batch)
    for child in _list_inner(node):
        yield from _descend(child, copy=False, resume=False)


def _descend(node: Node, copy: bool, resume: bool) -> Iterator[Walked]:
    """`node` and what is below it: each branch on a copy, but for the one that needs most copies itself, which comes last."""
    while True:
        yield Step(rows=(node.sequence,), start=node.start, stop=node.stop, reads=(), copy=copy, resume=resume), [[node]]
        if not node.children:
            return
        *before, last = sorted(node.children, key=lambda child: (child.copies, child.leaves))
        for number, child in enumerate(before):
            yield from _descend(child, copy=True, resume=number > 0)
        node, copy, resume = last, False, bool(before)


def _run_leaves(above: Node, lengths: Sequence[int], batch: Batch) -> Iterator[Walked]:
    """The leaves right below a node, longest first, as many at a time as `batch` allows."""
    leaves = sorted((child for child in above.children if not child.children), key=lambda leaf: -leaf.stop)
    while leaves:
        count = max(1, min(batch.rows, batch.tokens // leaves[0].stop, len(leaves)))
        if above.stop:
            longest = leaves[0].stop - above.stop
            alike = sum(ALIKE * (leaf.stop - above.stop) >= longest for leaf in leaves)
            count = max(count, min(alike, batch.leaves // longest))
        if batch.equal:
            count = sum(leaf.stop == leaves[0].stop for leaf in leaves[:count])
        if batch.forward:
            count = _count_alike([leaf.stop - above.stop for leaf in leaves[:count]], batch.forward)
        chosen, leaves = leaves[:count], leaves[count:]
        rows = tuple(leaf.sequence for leaf in chosen)
        yield Step(rows=rows, start=above.stop, stop=chosen[0].stop, reads=()), [[leaf] for leaf in chosen]


def _count_alike(sizes: Sequence[int], forward: int) -> int:
    """How many leaves, the longest first, are run at once without more padding than a forward is worth, or than `ALIKE` allows."""
    count, own = 1, sizes[0]
    while count < len(sizes) and (count + 1) * sizes[0] - own - sizes[count] <= max(forward, (ALIKE - 1) * (own + sizes[count])):
        own += sizes[count]
        count += 1
    return count


def _list_inner(node: Node) -> list[Node]:
    return [child for child in node.children if child.children]
