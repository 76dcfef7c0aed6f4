"""Loss by position: texts cut exactly, a planted loss found again, and sums that are those of one forward."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import LENGTH
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from scripted import Scripted
from tokenizers_here import KINDS, corpus, make_tokenizer

from harness_ext.cells import Unmeasured
from harness_ext.compare import Asked, open_tasks
from harness_ext.errors import ComparisonError, HarnessExtError, HaystackError, LengthError, ModelError, TaskFileError
from harness_ext.model_view import ModelView
from harness_ext.models.hf import HFExtrapolate
from harness_ext.sweep.buckets import MIN_TOKENS, Passage, build_passage, plan_edges
from harness_ext.sweep.fit import Filler
from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.seeds import generator

TASK = "loss_extrapolate"
SMALL = {"trained_length": 300, "multiples": [0.5, 1, 2], "buckets": 5, "samples": 3}
EDGES = [150, 240, 300, 360, 480, 600]


class Split(TemplateLM):
    """lm_eval's own way of splitting a context and its continuation, over a tokenizer of the tests."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.view = ModelView(None, {"tokenizer": make_tokenizer(kind)})

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.view.encode(string)

    eot_token_id = loglikelihood_rolling = generate_until = _loglikelihood_tokens = None  # type: ignore[assignment]


class Planted(Scripted):
    """Loses `curve(position)` nats at each position; past `memory` tokens it has no room."""

    def __init__(self, curve: Callable[[int], float], memory: int = 10_000) -> None:
        super().__init__(lambda *_: True, max_length=10_000)
        self.curve, self.memory = curve, memory

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return [self.lose(*request.args) for request in requests]

    def lose(self, context: str, continuation: str) -> tuple[float, bool] | Unmeasured:
        self.prompts.append(context + continuation)
        start, stop = (len(make_tokenizer("bpe").encode(text)) for text in (context, context + continuation))
        if stop > self.memory:
            return Unmeasured(outcome="out_of_memory", reason="no room")
        return -sum(map(self.curve, range(start, stop))), False


def find(results: Any, kind: str) -> dict[int, float]:
    """Position → nats per token, of one kind of metric."""
    return {
        int(key.split(",")[0].removeprefix(f"{kind}@").split("(")[0]): value
        for key, value in results["results"][TASK].items()
        if key.startswith(f"{kind}@") and "_stderr" not in key
    }


def make_passage(kind: str, haystack: str, edges: list[int], sample: int = 0) -> Passage:
    view = ModelView(None, {"tokenizer": make_tokenizer(kind)})
    sentences = open_haystack(haystack, distractors=lambda rng, taken: iter(())).sentences(generator(sample), lambda _: False)
    return build_passage(Filler(sentences, view), edges, view)


@given(st.lists(st.integers(MIN_TOKENS, 100_000), min_size=1, max_size=8, unique=True).map(sorted), st.integers(1, 64))
def test_every_length_ends_a_bucket_and_no_bucket_of_the_grid_is_much_shorter_than_the_others(
    lengths: list[int], buckets: int
) -> None:
    edges = plan_edges(lengths, buckets)
    assert set(lengths) <= set(edges)
    assert edges == sorted(set(edges))
    assert edges[-1] == lengths[-1]
    width = lengths[-1] / min(buckets, max(1, lengths[-1] // MIN_TOKENS))
    for one, two in itertools.pairwise([0, *edges]):
        assert two - one >= min(width / 2, MIN_TOKENS / 2) - 1 or {one, two} <= {0, *lengths}
        assert two - one <= 2 * width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("haystack", ["text", "book"])
@pytest.mark.parametrize("length", [600, 1001, 4096])
def test_a_text_has_exactly_its_length_and_every_bucket_begins_where_the_one_before_ends(
    kind: str, haystack: str, length: int, tmp_path: Path
) -> None:
    if haystack == "book":
        haystack = str(tmp_path / "book.txt")
        (tmp_path / "book.txt").write_text(" ".join(s.replace(".", f", {n} times; wasn't it?") for n, s in enumerate(corpus())))
    edges = plan_edges([length // 4, length // 2, length], 16)
    for sample in range(3):
        passage = make_passage(kind, haystack, edges, sample)
        model = Split(kind)
        ids = model.tok_encode(passage.text)
        assert len(ids) == length == passage.cuts[-1].tokens
        assert 0 < passage.cuts[0].tokens < 12
        for (start, stop), edge in zip(itertools.pairwise(passage.cuts), edges, strict=True):
            context, continuation = model._encode_pair(
                passage.text[: start.characters], passage.text[start.characters : stop.characters]
            )
            assert context == ids[: start.tokens]
            assert continuation == ids[start.tokens : stop.tokens]
            assert re.search(r"\w+\W*$", passage.text[: stop.characters])
            assert edge - 24 < stop.tokens <= edge
            assert passage.text[stop.characters : stop.characters + 1] in ("", " ")


def test_a_text_reads_as_its_source_does() -> None:
    passage = make_passage("bpe", "noise", [300])
    assert passage.text in " ".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 40
    )


def test_a_planted_loss_is_found_in_its_buckets_and_averaged_up_to_each_length(evaluate: Any) -> None:
    def curve(position: int) -> float:
        return 1.0 if position < 300 else 1.0 + position / 100

    model = Planted(curve)
    results = evaluate(model, [TASK], tokenizer=make_tokenizer("bpe"), **SMALL)
    docs = [sample["doc"] for sample in results["samples"][TASK]]
    sliding, whole = find(results, "sliding"), find(results, "nonoverlapping")
    assert list(sliding) == EDGES
    assert list(whole) == [150, 300, 600]
    for edge in EDGES:
        spans = [range(doc["start"], doc["prompt_tokens"]) for doc in docs if doc["edge"] == edge]
        assert len(spans) == 3
        assert sliding[edge] == pytest.approx(sum(sum(map(curve, span)) / len(span) for span in spans) / 3)
    assert sliding[300] == whole[300] == pytest.approx(1.0)
    assert sliding[600] == pytest.approx(1 + 5.4, abs=0.1)
    ends = [(doc["start"], doc["prompt_tokens"]) for doc in docs if doc["sample"] == 1]
    assert [stop for _, stop in ends[:-1]] == [start for start, _ in ends[1:]]
    expected = [
        sum(map(curve, range(start, 600))) / (600 - start)
        for start in (next(doc["start"] for doc in docs if doc["sample"] == sample) for sample in range(3))
    ]
    assert whole[600] == pytest.approx(sum(expected) / 3)
    assert results["higher_is_better"][TASK] == dict.fromkeys(results["higher_is_better"][TASK], False)
    assert results["configs"][TASK]["edges"] == EDGES


def test_samples_have_texts_of_their_own_and_a_text_begins_each_of_its_requests(evaluate: Any) -> None:
    model = Planted(lambda _: 1.0)
    evaluate(model, [TASK], tokenizer=make_tokenizer("bpe"), **SMALL)
    texts = [model.prompts[len(EDGES) * sample : len(EDGES) * (sample + 1)] for sample in range(3)]
    assert len({text[-1] for text in texts}) == 3
    for text in texts:
        assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(text))


@pytest.fixture(params=[HFLM, HFExtrapolate])
def backend(request: pytest.FixtureRequest, saved: Any) -> Any:
    return request.param(pretrained=str(saved("llama")), device="cpu", dtype="float32", batch_size=4, max_length=400)


def test_the_buckets_of_a_text_add_up_to_one_forward_of_it(backend: Any, evaluate: Any) -> None:
    import torch

    results = evaluate(backend, [TASK], lengths=[100, 400], buckets=6, samples=2)
    for sample in range(2):
        parts = [part for part in results["samples"][TASK] if part["doc"]["sample"] == sample]
        text = "".join(parts[-1]["arguments"][0])
        ids = torch.tensor([backend.tok_encode(text)])
        assert ids.shape == (1, 400)
        with torch.inference_mode():
            logs = backend.model(ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        start = parts[0]["doc"]["start"]
        assert -sum(part["resps"][0][0][0] for part in parts) == pytest.approx(-float(logs[start - 1 :].sum()), rel=1e-4)
        for part in parts:
            span = slice(part["doc"]["start"] - 1, part["doc"]["prompt_tokens"] - 1)
            (loss,) = (value for name, value in part.items() if name.startswith("sliding@"))
            assert loss == pytest.approx(-float(logs[span].mean()), rel=1e-4)
        (whole,) = (value for name, value in parts[-1].items() if name.startswith("nonoverlapping@"))
        assert whole == pytest.approx(-float(logs[start - 1 :].mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("limit", "buckets", "lengths"), [(5, EDGES[:5], [150, 300]), (2, EDGES[:2], [150]), (9, EDGES, [150, 300, 600])]
)
def test_a_limit_takes_whole_texts_first_and_averages_no_part_of_one(
    evaluate: Any, limit: int, buckets: list[int], lengths: list[int]
) -> None:
    results = evaluate(Planted(lambda _: 1.0), [TASK], limit=limit, tokenizer=make_tokenizer("bpe"), **SMALL)
    assert list(find(results, "sliding")) == buckets
    assert list(find(results, "nonoverlapping")) == lengths


def test_a_length_whose_buckets_are_not_all_there_has_no_average(load: Any) -> None:
    task = load(TASK, tokenizer=make_tokenizer("bpe"), max_length=10_000, **SMALL)
    task.build_all_requests(samples=[1, 2, 5])
    for instance in task.instances:
        instance.resps = [(-1.0, False)]
    task.apply_filters()
    scores = [task.process_results(instance.doc, [instance.filtered_resps["none"]]) for instance in task.instances]
    assert [[name.partition("@")[0] for name in score] for score in scores] == [["sliding"]] * 3


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_whole_texts(load: Any, processes: int) -> None:
    task = load(TASK, tokenizer=make_tokenizer("bpe"), max_length=10_000, **SMALL)
    shares = [[doc["sample"] for _, doc in task.doc_iterator(rank=rank, world_size=processes)] for rank in range(processes)]
    assert sorted(itertools.chain(*shares)) == sorted([0, 1, 2] * len(EDGES))
    assert not set(shares[0]) & set(shares[1])
    with pytest.raises(LengthError, match="at least 12"):
        task.doc_iterator(rank=0, world_size=2, limit=11)


def test_what_does_not_fit_into_memory_has_no_loss_and_says_so(evaluate: Any) -> None:
    results = evaluate(Planted(lambda _: 1.0, memory=301), [TASK], tokenizer=make_tokenizer("bpe"), **SMALL)
    assert list(find(results, "sliding")) == EDGES[:3]
    assert list(find(results, "nonoverlapping")) == [150, 300]
    lengths = results["configs"][TASK]["lengths"]
    assert [cell["outcome"] for cell in lengths] == ["measured", "measured", "out_of_memory"]
    assert results["samples"][TASK][-1]["filtered_resps"] == ["out_of_memory"]


def test_memory_that_runs_out_under_the_backend_is_an_outcome(evaluate: Any, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", trained_length=100)
    monkeypatch.setattr(model.model, "forward", _fails(torch.OutOfMemoryError("out of memory")))
    results = evaluate(model, [TASK], multiples=[1], buckets=2, samples=1)
    assert find(results, "sliding") == {}
    assert [cell["outcome"] for cell in results["configs"][TASK]["lengths"]] == ["out_of_memory"]


def _fails(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward


def test_a_position_table_ends_the_sweep(evaluate: Any, saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("gpt2")), device="cpu", dtype="float32")
    results = evaluate(model, [TASK], multiples=[0.5, 1, 2], buckets=2, samples=1)
    assert max(find(results, "sliding")) == LENGTH
    assert [cell["outcome"] for cell in results["configs"][TASK]["lengths"]] == ["measured", "measured", "hard_limit"]


def test_a_length_shorter_than_a_bucket_is_left_out_or_an_error_where_it_was_asked_for(
    evaluate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ask = {"tokenizer": make_tokenizer("bpe"), "samples": 1, "trained_length": 20}
    results = evaluate(Planted(lambda _: 1.0), [TASK], **ask)
    assert list(find(results, "nonoverlapping")) == [20, 40, 80, 160]
    assert "left out 10 (0.5x) tokens, too_short: a bucket takes 16 tokens" in caplog.text
    with pytest.raises(LengthError, match="10 tokens was asked for, but a bucket takes 16"):
        evaluate(Planted(lambda _: 1.0), [TASK], **ask | {"lengths": [10, 100]})


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"buckets": 0}, TaskFileError, "metadata: field 'buckets': found 0; expected a whole number from 1"),
        ({"buckets": "many"}, TaskFileError, "metadata: field 'buckets'"),
        ({"bucket": 3}, TaskFileError, "did you mean 'buckets'"),
        ({"samples": 0}, TaskFileError, "'samples'"),
        ({"lengths": [64], "multiples": [1]}, TaskFileError, "give one of them"),
        ({"haystack": "needles"}, TaskFileError, "metadata: field 'haystack': found 'needles'"),
        ({"haystack": "nowhere.txt"}, HaystackError, "which is not there"),
    ],
)
def test_bad_metadata_is_one_error_when_the_task_loads(
    load: Any, metadata: dict[str, Any], error: type[HarnessExtError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(TASK, **metadata)


def test_fields_of_other_tasks_do_not_concern_this_one_nor_its_fields_them(load: Any) -> None:
    assert load(TASK, depths=3, samples=2).spec.samples == 2
    assert load("passkey_extrapolate", buckets=3, samples=2).spec.samples == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("needle: It is {value}.", "mine.yaml: unknown field 'needle'"),
        ("bukets: 4", "unknown field 'bukets', did you mean 'buckets'"),
        ("buckets: 1.5", "mine.yaml: field 'buckets': found 1.5; expected a whole number"),
        ("haystack: needles", "mine.yaml: field 'haystack': found 'needles'"),
    ],
)
def test_a_mistake_in_a_task_file_names_the_file_and_the_field(load: Any, tmp_path: Path, change: str, message: str) -> None:
    text = "task: mine\nclass: !function harness_ext.LossTask\nlengths: [200]\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert load("mine", include_path=tmp_path).spec.lengths == (200,)
    (tmp_path / "mine.yaml").write_text(f"{text}{change}\n")
    with pytest.raises(TaskFileError, match=message):
        load("mine", include_path=tmp_path)


def test_a_text_that_would_come_again_is_refused(evaluate: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join(corpus()[:20]))
    with pytest.raises(HaystackError, match=r"file:short\.txt holds \d+; what comes again is easy to predict"):
        evaluate(
            Planted(lambda _: 1.0), [TASK], tokenizer=make_tokenizer("bpe"), lengths=[800], haystack=str(tmp_path / "short.txt")
        )


def test_lengths_that_end_on_one_word_are_an_error(evaluate: Any) -> None:
    with pytest.raises(LengthError, match=r"no word ends between .* ask for fewer buckets, or lengths further apart"):
        evaluate(Planted(lambda _: 1.0), [TASK], tokenizer=make_tokenizer("byte"), lengths=[400, 401, 402], samples=3)


def test_a_tokenizer_that_ends_every_text_is_refused_by_hf_and_served_by_ours(saved: Any, evaluate: Any) -> None:
    options = {"pretrained": str(saved("llama")), "device": "cpu", "tokenizer": make_tokenizer("byte"), "max_length": 200}
    with pytest.raises(ModelError, match="use --model hf-extrapolate"):
        evaluate(HFLM(**options), [TASK], lengths=[200], samples=1)
    results = evaluate(HFExtrapolate(**options), [TASK], lengths=[200], samples=1)
    assert results["samples"][TASK][-1]["doc"]["prompt_tokens"] == 200


def test_a_chat_template_is_left_off_and_that_is_said(evaluate: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Chat(Planted):
        tokenizer_name = "chat"

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
            raise AssertionError

    model = Chat(lambda _: 1.0)
    evaluate(model, [TASK], options={"apply_chat_template": True}, tokenizer=make_tokenizer("bpe"), **SMALL)
    assert "scored as it is, without chat template" in caplog.text


def test_an_encoder_decoder_is_refused(load: Any) -> None:
    class Seq2Seq(Split):
        backend = "seq2seq"

    model = Seq2Seq("bpe")
    model.max_length = 1000  # type: ignore[attr-defined]
    task = load(TASK, **SMALL)
    task.bind(model)
    with pytest.raises(ModelError, match="use a causal model"):
        task.build_all_requests()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_puts_after_every_text_is_not_taken_for_text(kind: str) -> None:
    view = ModelView(None, {"tokenizer": make_tokenizer(kind)})
    ids = view.encode("The sky is blue.")
    assert view.encode("The sky is blue. Here")[: len(ids)] == ids
    bare = make_tokenizer(kind).encode("The sky is blue.", add_special_tokens=False)
    assert ids[-len(bare) :] == bare


def test_compare_which_compares_exact_matches_refuses_losses() -> None:
    with pytest.raises(ComparisonError, match="loss_extrapolate has no exact matches"):
        open_tasks(Asked(model="reference/rope", methods=("none", "yarn"), tasks=(TASK,)))
