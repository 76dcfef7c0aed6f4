"""The page on why a longer input is a problem: what its rules make of planted outcomes. No model is run."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonlines
import pytest
from conftest import REPOSITORY

TRAINED = 256
MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0)
PROMPTS = [(depth / 9, sample) for depth in range(10) for sample in range(4)]
HARD: dict[float, Any] = {0.5: 40, 1.0: 40, 2.0: "hard_limit", 4.0: "hard_limit", 8.0: "hard_limit"}
HELD: dict[float, Any] = dict.fromkeys(MULTIPLES, 40)
LOST: dict[float, Any] = {0.5: 40, 1.0: 40, 2.0: 39, 4.0: 20, 8.0: 0}
UNABLE: dict[float, Any] = {0.5: 40, 1.0: 33, 2.0: 0, 4.0: 0, 8.0: 0}
FACTS: dict[str, Any] = {
    "models": {
        name: {
            "schemes": [scheme],
            "trained_length": TRAINED,
            "parameters": 1000,
            "steps": 9,
            "seed": 0,
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "vocab_size": 16,
            **own,
        }
        for name, scheme, own in (
            ("learned", "learned", {}),
            ("rope", "rotary", {}),
            ("transformer-xl", "relative", {"segment_length": 64, "memory_length": 192}),
        )
    },
    "state": {"transformer-xl": {"256": 10, "2048": 10}, "memformer": {"256": 20, "2048": 30}},
    "cost": {
        "rope": {
            "machine": "two CPU cores",
            "best_of": 3,
            "tokens": [1024, 2048],
            "seconds": [1.0, 4.0],
            "exponents": [2.0],
            "multiply_adds_per_token": [
                {"depending_on_length": 1.0, "not_depending_on_length": 2, "output_layer_per_position": 3} for _ in range(2)
            ],
        }
    },
    "head": {"rope": {"positions": 2048, "largest_difference": 1e-6, "largest_logit": 10.0, "parameters": 128}},
    "sight": {"transformer-xl": {"tokens": 2048, "farthest": 447}},
    "alike": {"clip_distance": 32, "tokens": 2048, "largest_difference_past_clip": 0.0, "spread_below_clip": 4.0},
    "table": {"tokens": 257, "error": "IndexError", "message": "index out of range in self"},
    "distance": {},
}
Plant = Callable[..., Path]


@pytest.fixture(scope="module")
def why() -> Any:
    """docs/why.py and what it imports, by name."""
    sys.path.insert(0, str(REPOSITORY / "docs"))
    try:
        return importlib.import_module("why")
    finally:
        sys.path.pop(0)


@pytest.fixture
def verdicts(why: Any) -> Any:
    return sys.modules["why_verdicts"]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """(run=scores, …, facts=…) → a folder of kept runs; scores: multiple → exact answers, or the outcome."""

    def make(facts: Mapping[str, Any] | None = None, **runs: Mapping[float, Any]) -> Path:
        for run, scores in runs.items():
            tasks = (
                ["passkey_extrapolate"]
                if "table" in run
                else ["passkey_extrapolate", "niah_single_extrapolate", "copy_extrapolate"]
            )
            keep(tmp_path / run.replace("_", "-"), tasks, scores)
        if facts is not None:
            (tmp_path / "facts.json").write_text(json.dumps(facts))
        return tmp_path

    return make


def keep(folder: Path, tasks: list[str], scores: Mapping[float, Any]) -> None:
    """Writes a run as benchmarks/keep.py leaves it; of a length that was not measured a few answers, as when memory runs out."""
    folder.mkdir()
    outcomes = {multiple: score if isinstance(score, str) else "measured" for multiple, score in scores.items()}
    lengths = [
        {
            "length": int(multiple * TRAINED),
            "multiple": multiple,
            "outcome": outcome,
            "reason": "" if outcome == "measured" else "why",
        }
        for multiple, outcome in outcomes.items()
    ]
    (folder / "results.json").write_text(json.dumps({"configs": {task: {"lengths": lengths} for task in tasks}}))
    for task in tasks:
        with jsonlines.open(folder / f"{task}.jsonl", "w") as rows:
            for multiple, score in scores.items():
                exact = 3 if isinstance(score, str) else score
                for place, (depth, sample) in enumerate(PROMPTS[:3] if isinstance(score, str) else PROMPTS):
                    rows.write(
                        {
                            "doc": {"length": int(multiple * TRAINED), "multiple": multiple, "depth": depth, "sample": sample},
                            "filtered_resps": ["exact" if place < exact else "missed"],
                            "prompt_hash": f"{task} {multiple} {place}",
                        }
                    )


@pytest.mark.parametrize(
    ("scores", "running", "working", "said"),
    [
        (HARD, "hard limit", "untested", "hard limit past 1×"),
        (HELD, "runs", "holds", "holds"),
        (LOST, "runs", "degrades", "degrades at 4× and 8×"),
        (UNABLE, "runs", "cannot", "cannot do the task within its window (0.82 at 1×)"),
        ({**HELD, 8.0: "out_of_memory"}, "in part", "untested", "some lengths were not measured"),
        ({**LOST, 8.0: "out_of_memory"}, "in part", "degrades", "degrades at 4×"),
        ({**HARD, 8.0: "interrupted"}, "in part", "untested", "some lengths were not measured"),
    ],
)
def test_planted_outcomes_get_the_right_words(
    why: Any, verdicts: Any, plant: Plant, scores: Any, running: str, working: str, said: str
) -> None:
    finding = verdicts.read_findings(plant(rope=scores))["rope", "passkey"]
    assert (verdicts.judge_running(finding), verdicts.judge_working(finding)) == (running, working)
    assert sys.modules["why_tables"].say_working(finding) == said


def test_a_run_that_is_not_there_is_no_finding(why: Any, verdicts: Any, plant: Plant) -> None:
    finding = verdicts.read_findings(plant(rope=HELD))["alibi", "copy"]
    assert (verdicts.judge_running(finding), verdicts.judge_working(finding)) == ("not run", "untested")


@pytest.mark.parametrize(
    ("scores", "outcomes"),
    [
        (HARD, ["exception", "exception", "exception"]),
        (LOST, ["nothing", "degradation", "degradation"]),
        (UNABLE, ["cannot do the task"] * 3),
        ({**LOST, 8.0: "out_of_memory"}, ["nothing", "degradation", "not settled"]),
    ],
)
def test_a_model_shows_an_exception_degradation_or_nothing(verdicts: Any, plant: Plant, scores: Any, outcomes: list[str]) -> None:
    finding = verdicts.read_findings(plant(rope=scores))["rope", "copy"]
    assert [verdicts.judge_outcome(finding, multiple) for multiple in (2.0, 4.0, 8.0)] == outcomes


def test_all_tests_of_the_page_are_one_family(verdicts: Any, plant: Plant) -> None:
    """6 lost of 40 is p = 0.031 alone, and nothing among nine."""
    findings = verdicts.read_findings(plant(rope={**HELD, 8.0: 34}))
    assert verdicts.count_tests(findings) == 9
    test = findings["rope", "copy"].tests[-1]
    assert (test.only_window, test.only_here, test.p, test.p_holm) == (6, 0, 0.03125, pytest.approx(9 * 0.03125))
    assert verdicts.judge_working(findings["rope", "copy"]) == "holds"


def test_an_extended_table_is_compared_with_the_bare_window(why: Any, verdicts: Any, plant: Plant) -> None:
    """An extension that spoils the window itself is found out at 1×."""
    findings = verdicts.read_findings(plant(learned=HARD, learned_table_tile={**HELD, 1.0: 0}))
    assert sys.modules["why_tables"].say_working(findings["learned-table-tile", "passkey"]) == "degrades at 1×"


def test_different_prompts_are_refused(verdicts: Any, plant: Plant) -> None:
    folder = plant(rope=HELD, nope=HELD)
    file = folder / "nope" / "copy_extrapolate.jsonl"
    file.write_text(file.read_text().replace("copy_extrapolate 2.0 7", "another"))
    with pytest.raises(ValueError, match=r"rope and nope|nope and rope"):
        verdicts.read_findings(folder)


@pytest.mark.parametrize(
    ("answers", "conclusion"),
    [
        ([True, True], "borne out"),
        ([False, False], "not borne out"),
        ([True, False], "in part"),
        ([True, None], "not settled"),
        ([], "not settled"),
    ],
)
def test_a_verdict_follows_from_its_checks(verdicts: Any, answers: list[bool | None], conclusion: str) -> None:
    assert verdicts.conclude([verdicts.Check(asked="so", answer=answer) for answer in answers]) == conclusion


def test_checks_follow_the_facts(why: Any, plant: Plant) -> None:
    evidence = why.read_evidence(plant(facts=FACTS, learned=HARD, rope=LOST))
    page = why.write_page(evidence)
    sections = {claim.title: page.split(f". {claim.title}\n")[1].split("\n## ")[0] for claim in why.CLAIMS}
    assert "**Verdict: borne out.** `learned`: hard limit past 1×" in sections["A learned table"]
    assert "`IndexError: index out of range in self` at 257 tokens" in sections["A learned table"]
    assert "**Verdict: borne out.** `rope`: degrades at 4× and 8×" in sections["Rotary angles"]
    assert (
        "does not grow with the text: **no** (transformer-xl 10 bytes; memformer 20 and 30 bytes)" in sections["Segment recurrence"]
    )
    assert "2 × 192 + 64 − 1 = 447" in sections["Segment recurrence"]
    assert "**Verdict: borne out.**" in sections["The output layer"]
    assert "**Verdict: not settled.**" in sections["Cost"]  # one of its two models was not timed
    assert "**Verdict: not settled.** `alibi`: not run" in sections["ALiBi"]


def test_distances_tell_what_memory_reaches(why: Any, plant: Plant) -> None:
    """The first prompts stand 600 tokens back, out of sight; 10 of 40 are answered from there."""
    near = {f"passkey_extrapolate 8.0 {place}": 600 if place < 20 else 100 for place in range(40)}
    folder = plant(facts={**FACTS, "distance": near}, transformer_xl={**HELD, 8.0: 10}, memformer=HELD)
    page = why.write_page(why.read_evidence(folder))
    assert "It answers nothing from beyond what it sees: **no** (10 of 20 more than 447 tokens back)" in page
    assert "what stands within one layer's memory: **no** (0 of 20 at most 192 tokens back)" in page


@pytest.mark.parametrize("facts", [None, FACTS])
def test_the_page_names_every_claim_and_rule(why: Any, plant: Plant, facts: Any) -> None:
    folder = plant(facts=facts, learned=HARD, rope=LOST) if facts else plant()
    page = why.write_page(why.read_evidence(folder))
    for claim in why.CLAIMS:
        assert page.count(claim.said) == 2  # its section, and the table at the end
    for word, rule in why.RULES.items():
        assert f"- *{word}*: {rule}" in page


def test_an_unmeasured_length_is_never_a_number(why: Any, verdicts: Any, plant: Plant) -> None:
    """Though answers of a few prompts are there: 3 of 3 exact would be 1.00."""
    evidence = why.read_evidence(plant(alibi={**HELD, 8.0: "out_of_memory"}, rope=HELD))
    finding = evidence.findings["alibi", "passkey"]
    assert sys.modules["why_tables"].show_score(finding, 8.0) == "out_of_memory"
    assert [point["multiple"] for point in why.list_points(finding)] == [0.5, 1.0, 2.0, 4.0]
    (row,) = [line for line in why.write_page(evidence).splitlines() if line.startswith("| alibi | passkey |") and "[" in line]
    assert row.split("|")[7].strip() == "out_of_memory"
    assert "`out_of_memory`: why." in why.write_page(evidence)


def test_a_line_ends_with_its_table(why: Any, plant: Plant) -> None:
    evidence = why.read_evidence(plant(learned=HARD, rope=HELD))
    ends = {model: why.ends_after(evidence.findings[model, "copy"], TRAINED) for model in ("learned", "rope")}
    assert ends == {"learned": True, "rope": False}
    assert "table ends" in json.dumps(why.draw_panel(evidence, "copy").to_dict())


def test_the_page_and_its_figure_are_the_same_bytes_twice(why: Any, plant: Plant, tmp_path: Path) -> None:
    folder, written = plant(facts=FACTS, learned=HARD, rope=LOST), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        why.main(folder, tmp_path / name)
        written.append([(tmp_path / name / file).read_bytes() for file in ("why.md", "why.svg")])
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["why_verdicts", "why_tables"])
def test_the_examples_hold(why: Any, name: str) -> None:
    assert doctest.testmod(sys.modules[name]).failed == 0
