"""Sharing what prompts have in common changes no answer; where it would, it is found out and left."""

from __future__ import annotations

import itertools
import random
import weakref
from typing import Any

import pytest
import torch
from conftest import build, build_long
from families import FAMILIES, LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.utils._python_dispatch import TorchDispatchMode

from harness_ext.models import kernels, pieces, self_check
from harness_ext.models.forward import Forward
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.rounding import draw
from harness_ext.models.self_check import find_state
from harness_ext.models.state import Cuttable

APART = {
    *("openai-gpt", "xlm", "reformer", "cpmant", "xlnet", "mamba", "falcon_mamba", "recurrent_gemma", "bamba", "minimax", "jamba"),
    *("llama-dynamic", "llama-longrope", "phi3-longrope"),
}
"""Families whose prompts cannot share: no cache, an attention that is not causal, or chunks that are another computation."""
COPIED = {
    "mamba2",
    "rwkv",
    "lfm2",
    "falcon_h1",
    "qwen3_next",
    "qwen3_5",
    "olmo_hybrid",
    "zamba2-rotary",
    "zamba2",
    "granitemoehybrid",
}
COPIED |= {"kimi_linear", "nemotron_h"}
"""Families whose state can be gone on from, and not cut back."""
PAIRS = {"zamba2", "zamba2-rotary", "nemotron_h", "rwkv"}
"""Of those, the ones that compute one token after others in another way than among them, or only where there is one row."""
DECODERS = sorted(name for name, family in FAMILIES.items() if not family.seq2seq)
SAME_AS_HF = (
    *("llama", "mistral-window", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi", "gpt_neox", "deepseek_v3"),
    *("smollm3", "cohere2", "gpt2", "opt", "gpt_neo", "gptj", "bloom", "falcon-alibi", "mpt", "xglm", "llama-dynamic"),
    *("phi3-longrope", "mamba", "mamba2", "rwkv", "qwen3_next", "jamba", "nemotron_h", "zamba2"),
)


def longer(family: str) -> dict[str, Any]:
    """Changes to a family's configuration that let it run to twice LENGTH where a table would end."""
    known = FAMILIES[family]
    return {known.length_field: 2 * LENGTH} if known.hard and known.length_field else {}


def prompts() -> list[tuple[None, list[int], list[int]]]:
    """Prompts of a sweep, past LENGTH: they branch off one haystack, off each other, contain each other, or stand alone."""
    rng = random.Random(0)
    hay, other = ([rng.randrange(3, 500) for _ in range(120)] for _ in range(2))
    made = [(hay[:place] + other[:40] + hay[place:size], 3) for place, size in ((10, 60), (30, 60), (30, 80), (77, 80), (60, 60))]
    made += [(hay, 1), (hay, 4), (hay[:50], 2), (hay[:50], 2), (other, 1), (other[:7], 1), (hay[:110] + other[:2], 2)]
    # Branches of one token, one of which branches again, and is a whole prompt:
    made += [([*hay[:90], *branch], 1) for branch in ([7], [8], [9], [9, 7], [9, 8])]
    return [(None, context, [rng.randrange(3, 500) for _ in range(count)]) for context, count in made]


def score(model: Any) -> list[tuple[float, bool]]:
    return list(model._loglikelihood_tokens(prompts(), disable_tqdm=True))


@pytest.mark.parametrize("family", SAME_AS_HF)
def test_shared_answers_past_the_trained_length_are_those_of_hf(family: str, saved: Any) -> None:
    folder = str(saved(family, **longer(family)))
    options = {"device": "cpu", "dtype": "float32"}
    pinned = family in ("llama-dynamic", "phi3-longrope")  # hf's depend on what it ran before
    if pinned:
        expected = [score_alone(folder, prompt) for prompt in prompts()]
    else:
        expected = list(
            HFLM(pretrained=folder, max_length=2 * LENGTH, **options)._loglikelihood_tokens(prompts(), disable_tqdm=True)
        )
    for chunk, batch_size in ((512, 1), (16, 1), (16, 4)):
        model = HFExtrapolate(pretrained=folder, chunk=chunk, batch_size=batch_size, trained_length=LENGTH, **options)
        found = score(model)
        assert model._reader.sharing is not None
        assert (model._reader.sharing.make is None) == (family in APART and not pinned)
        for (likelihood, greedy), (known, known_greedy) in zip(found, expected, strict=True):
            assert likelihood == pytest.approx(known, abs=1e-4 * max(1.0, abs(known) / 10))
            assert greedy == known_greedy


def score_alone(folder: str, prompt: Any) -> tuple[float, bool]:
    """A prompt's answer from a model that has run nothing else, read whole."""
    model = HFExtrapolate(pretrained=folder, exact=True, device="cpu", dtype="float32", trained_length=LENGTH)
    return model._loglikelihood_tokens([prompt], disable_tqdm=True)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_family_can_go_on_from_is_found_out(family: str) -> None:
    model = build_long(family)
    found = find_state(Forward(model, torch.device("cpu")), LENGTH, 400)
    assert (found.make is None) == (family in APART), found.said
    if found.make is not None:
        assert found.make(0).cuts == (family not in COPIED), found.said
        assert found.make(0).alone == (family not in PAIRS), found.said


def test_the_self_check_asks_for_room_for_what_it_reads_and_has_let_go_of_all_before_it_reads_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    forward = Forward(model, torch.device("cpu"))
    rooms, held = list[int](), list[int]()
    made = weakref.WeakSet[Any]()

    class Noted(Cuttable):
        """Notes how much room was asked for, and how many others were held then."""

        def __init__(self, room: int, **options: Any) -> None:
            rooms.append(room)
            held.append(len(made))
            made.add(self)
            super().__init__(room, **options)

    monkeypatch.setattr(self_check, "Cuttable", Noted)
    assert self_check.find_state(forward, LENGTH, 4 * LENGTH).make is not None
    assert max(rooms) == self_check.find_reach(forward, LENGTH) < 4 * LENGTH
    assert held[rooms.index(max(rooms))] == 0


@pytest.mark.parametrize(
    ("said", "times", "kind"), [("can't allocate memory", 1, 0), ("can't allocate memory", 2, 1), ("no", 1, 1)]
)
def test_memory_that_runs_out_once_in_the_self_check_tells_nothing_of_the_model(
    said: str, times: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    assert pieces.install(model)
    forward = Forward(model, torch.device("cpu"))
    usual = self_check.find_state(forward, LENGTH, 2 * LENGTH)
    failures = iter([RuntimeError(said)] * times)

    class Failing(Cuttable):
        """Cannot be made at first."""

        def __init__(self, room: int, **options: Any) -> None:
            for error in failures:
                raise error
            super().__init__(room, **options)

    monkeypatch.setattr(self_check, "Cuttable", Failing)
    found = self_check.find_state(forward, LENGTH, 2 * LENGTH)
    assert usual.make is not None
    assert found.make is not None
    assert (found.make(0).forks, found.make(0).attentions > 0) == [(True, True), (False, True)][kind]
    assert (found.said == usual.said) == (kind == 0)


@pytest.mark.parametrize("family", DECODERS)
def test_attention_in_pieces_is_found_out_like_any_other_and_kept_where_it_is_the_same(family: str) -> None:
    model = build_long(family)
    if not pieces.install(model):
        assert model.config._attn_implementation != pieces.NAME
        return
    found = find_state(Forward(model, torch.device("cpu")), LENGTH, 400)
    assert (found.make is None) == (family in APART), found.said


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "past"), [(1, 30), (7, 1), (7, 30), (30, 7), (30, 0), (300, 0), (600, 100), (290, 45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_pieces_is_softmax_over_all_keys_up_to_each_querys(
    heads: int, key_heads: int, tokens: int, past: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    query = torch.randn(2, heads, tokens, 16)
    key, value = torch.randn(2, 2, key_heads, past + tokens, 16)
    given = (states.to(dtype) for states in (query, key, value))
    found = pieces.attend(module, *given, None, scaling=0.3)[0].transpose(1, 2).float()  # type: ignore[arg-type]
    every_key, every_value = (states.repeat_interleave(heads // key_heads, dim=1) for states in (key, value))
    seen = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
    weights = torch.softmax((0.3 * query @ every_key.transpose(-1, -2)).masked_fill(~seen, float("-inf")), dim=-1)
    torch.testing.assert_close(found, weights @ every_value, atol=2e-6 if dtype == torch.float32 else 3e-2, rtol=0)


def attend_by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `kernels.Kernel.run` says, for as many keys as there are: a card's kernel, but for its rounding."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.transpose(-1, -2)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(
    ("tokens", "keys", "causal"), [(9, 9, True), (9, 23, True), (64, 64, True), (9, 50, False), (64, 33, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_gives_softmax_and_its_weight_for_the_queries_it_is_given(
    heads: int, key_heads: int, tokens: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, heads, tokens, 16), *torch.randn(2, 2, key_heads, keys, 16)
    found = kernels.attend_on_cpu(*(states.to(dtype) for states in (query, key, value)), is_causal=causal, scale=0.3)
    for one, expected in zip(found, attend_by_definition(query, key, value, is_causal=causal, scale=0.3), strict=True):
        torch.testing.assert_close(one.float(), expected, atol=2e-6 if dtype == torch.float32 else 3e-2, rtol=0)


class KernelCalls(TorchDispatchMode):
    """Keeps how many queries and keys the CPU's kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.sizes.add((args[0].shape[2], args[1].shape[2]))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_in_bfloat16_pieces_of_every_length_are_few_kinds_for_a_kernel_that_compiles_each() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    rng = random.Random(0)
    with KernelCalls() as calls:
        for _ in range(200):
            tokens, past = rng.randrange(2, 500), rng.randrange(1, 900)
            given = torch.randn(1, 4, tokens, 8), *torch.randn(2, 1, 2, past + tokens, 8)
            pieces.attend(module, *(states.bfloat16() for states in given), None, scaling=0.3)  # type: ignore[arg-type]
    assert len(calls.sizes) > 20
    assert {size % kernels.STEPS[torch.bfloat16] for sizes in calls.sizes for size in sizes} == {0}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next", "deepseek_v3", "gemma3", "mistral-window"])
def test_a_kernel_that_is_causal_after_any_keys_is_given_all_of_them_at_once(
    family: str, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = str(saved(family, **longer(family))), {"device": "cpu", "dtype": "float32"}
    expected = HFLM(pretrained=folder, max_length=2 * LENGTH, **options)._loglikelihood_tokens(prompts(), disable_tqdm=True)
    seen: list[tuple[int, int, bool]] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((query.shape[2], key.shape[2], given["is_causal"]))
        return attend_by_definition(query, key, value, **given)

    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.Kernel(run=attend, square=False))
    model = HFExtrapolate(pretrained=folder, chunk=16, trained_length=LENGTH, **options)
    for (likelihood, greedy), (known, known_greedy) in zip(score(model), expected, strict=True):
        assert likelihood == pytest.approx(known, abs=1e-4 * max(1.0, abs(known) / 10))
        assert greedy == known_greedy
    assert pieces.is_installed(model.model)
    if family in ("llama", "gpt2"):  # the others have layers with masks, or none whose values are as wide as their keys
        assert any(0 < tokens < keys and causal for tokens, keys, causal in seen)


@pytest.mark.parametrize("width", [16, 20, 64, 264])
@pytest.mark.parametrize("flash", [False, True])
def test_what_a_cards_kernels_give_has_the_shapes_that_pieces_are_joined_in(
    width: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "can_use_flash_attention", lambda _: flash)
    query = torch.empty(2, 8, 30, width, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 100, width, dtype=torch.bfloat16, device="meta")
    outputs, sums = kernels.attend_on_card(query, key, key, is_causal=True, scale=None)
    assert (outputs.shape, outputs.dtype) == (query.shape, query.dtype)
    assert (sums.shape, sums.dtype) == (query.shape[:3], torch.float32)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_that_begin_with_the_same_keys_attend_to_them_as_if_each_had_a_copy(heads: int, key_heads: int, tokens: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    query = torch.randn(5, heads, tokens, 16)
    own, shared = torch.randn(2, 5, key_heads, tokens, 16), torch.randn(2, 1, key_heads, 30, 16)
    found = pieces.attend(
        module, query, *pieces.put_after((shared[0], shared[1]), own[0].clone(), own[1].clone()), None, scaling=0.3
    )[0]
    copies = torch.cat([shared.expand(-1, 5, -1, -1, -1), own], dim=3)
    key, value = copies.repeat_interleave(heads // key_heads, dim=2)
    seen = torch.ones(tokens, 30 + tokens, dtype=torch.bool).tril(30)
    weights = torch.softmax((0.3 * query @ key.transpose(-1, -2)).masked_fill(~seen, float("-inf")), dim=-1)
    torch.testing.assert_close(found.transpose(1, 2), weights @ value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_single_query_attends_to_the_keys_that_its_mask_leaves(heads: int, key_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    query, (key, value) = torch.randn(3, heads, 1, 16), torch.randn(2, 3, key_heads, 30, 16)
    seen = torch.ones(3, 1, 1, 30, dtype=torch.bool)
    if masked:
        seen[0, ..., :7], seen[1, ..., 20:] = False, False
    found = pieces.attend(module, query, key, value, seen if masked else None, scaling=0.3)[0]
    every_key, every_value = (states.repeat_interleave(heads // key_heads, dim=1) for states in (key, value))
    weights = torch.softmax((0.3 * query @ every_key.transpose(-1, -2)).masked_fill(~seen, float("-inf")), dim=-1)
    torch.testing.assert_close(found.transpose(1, 2), weights @ every_value, atol=2e-6, rtol=0)


def test_rows_that_begin_with_the_same_keys_are_refused_where_a_mask_is_needed() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    shared, own = torch.randn(2, 1, 2, 30, 16), torch.randn(2, 5, 2, 3, 16)
    given = pieces.put_after((shared[0], shared[1]), own[0].clone(), own[1].clone())
    with pytest.raises(NotImplementedError):
        pieces.attend(module, torch.randn(5, 2, 3, 16), *given, torch.ones(1, 1, 3, 33, dtype=torch.bool), scaling=0.3)


def test_a_bias_of_positions_is_not_dropped_by_attention_in_pieces() -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    bias = torch.randn(1, 2, 5, 20)
    found = pieces.attend(module, query, key, value, None, scaling=0.3, position_bias=bias)[0].transpose(1, 2)
    seen = torch.ones(5, 20, dtype=torch.bool).tril(15)
    weights = torch.softmax((0.3 * query @ key.transpose(-1, -2) + bias).masked_fill(~seen, float("-inf")), dim=-1)
    torch.testing.assert_close(found, weights @ value, atol=2e-6, rtol=0)


def test_a_window_and_padding_keep_their_masks(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("mistral-window")), device="cpu", dtype="float32")
    assert model.model.config._attn_implementation == pieces.NAME
    assert pieces.mask(batch_size=1, q_length=3, kv_length=9, q_offset=6, device="cpu") is None
    padded = torch.ones(1, 9, dtype=torch.bool)
    padded[0, 0] = False
    found = pieces.mask(batch_size=1, q_length=3, kv_length=9, q_offset=6, attention_mask=padded, device="cpu")
    assert found is not None
    assert found[0, 0].sum(-1).tolist() == [6, 7, 8]


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gpt2"])
def test_each_distinct_token_goes_through_the_model_once(family: str, saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved(family, **longer(family))), chunk=16, device="cpu", dtype="float32")
    score(model)  # with the self-check
    read: list[int] = []
    model.model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    before = model._reader.computed
    score(model)
    sequences = [[*context, *continuation][:-1] for _, context, continuation in prompts()]
    distinct = len({tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))})
    assert sum(read) == distinct == model._reader.computed - before
    assert max(read) <= 16


def test_a_sweep_says_in_its_results_how_many_tokens_it_asked_and_computed(saved: Any, evaluate: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), trained_length=200, device="cpu", dtype="float32")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 2], depths=10, samples=2)
    reading = results["config"]["reading"]
    assert reading["asked"] == 20 * (200 + 400) - 40  # the last token of each answer is scored, and never read
    assert reading["computed"] < reading["asked"] / 1.8
    assert "cut back" in reading["sharing"]


def test_exact_shares_nothing_and_reads_every_prompt_whole(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), exact=True, chunk=16, device="cpu", dtype="float32")
    read: list[int] = []
    model._reader.prepare(1)  # what it finds out of the output layer comes before
    model.model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    score(model)
    assert sorted(read) == sorted(len(context) + len(continuation) - 1 for _, context, continuation in prompts())


def test_low_precision_shares_within_its_rounding_and_not_where_rounding_would_hide_a_difference(saved: Any) -> None:
    exact, shared = (
        score(HFExtrapolate(pretrained=str(saved("llama")), exact=exact, device="cpu", dtype="bfloat16")) for exact in (True, False)
    )
    for (likelihood, _), (known, _) in zip(shared, exact, strict=True):
        assert likelihood == pytest.approx(known, rel=0.03, abs=0.3)
    jamba = HFExtrapolate(pretrained=str(saved("jamba")), device="cpu", dtype="bfloat16")
    jamba._reader.prepare(100)
    assert jamba._reader.sharing is not None
    assert jamba._reader.sharing.make is None
    assert "rounding hides" in jamba._reader.sharing.said


def test_the_self_check_never_reads_past_the_end_of_a_table(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("gpt2")), device="cpu", dtype="float32")
    for size in (20, LENGTH - 1, LENGTH):
        model._loglikelihood_tokens([(None, [7] * size, [8])], disable_tqdm=True)
        assert model._reader.sharing is not None
        assert model._reader.sharing.make is not None, model._reader.sharing.said


def test_a_model_that_cannot_share_says_why_in_the_log(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    score(HFExtrapolate(pretrained=str(saved("mamba")), device="cpu", dtype="float32"))
    assert "every prompt is read whole: keys and values that are cut back: ValueError: it puts no keys and values" in caplog.text
    assert "a copied state: logits differ" in caplog.text


@pytest.mark.parametrize("ends", [[5, 6, 7], [2], 2])
def test_a_model_with_several_tokens_that_end_a_text_shares_like_any_other(ends: int | list[int]) -> None:
    model = build("llama", eos_token_id=ends)
    assert pieces.install(model)
    found = find_state(Forward(model, torch.device("cpu")), LENGTH, 2 * LENGTH)
    assert found.make is not None, found.said
    assert found.make(0).forks
    assert found.make(0).attentions
    drawn = set(draw(Forward(model, torch.device("cpu")), 5000)[0].tolist())
    assert not drawn & ({ends} if isinstance(ends, int) else {*ends})


def test_a_model_with_weights_spread_by_a_device_map_shares_too(saved: Any) -> None:
    options = {"pretrained": str(saved("llama")), "device": "cpu", "dtype": "float32"}
    spread = HFExtrapolate(
        **options, device_map={"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"} | {"": "cpu"}
    )
    for found, known in zip(score(spread), score(HFExtrapolate(**options, exact=True)), strict=True):
        assert found == (pytest.approx(known[0], abs=1e-4), known[1])


def test_prompts_of_different_lengths_share_nothing_under_frequencies_of_their_own(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama-dynamic")), device="cpu", dtype="float32")
    hay = list(range(5, 105))
    same = [(None, [*hay[:60], key, *hay[60:]], [7]) for key in (3, 4, 5)]
    model._loglikelihood_tokens(same, disable_tqdm=True)
    assert model._reader.computed == 60 + 3 * 41
    model._loglikelihood_tokens([(None, hay[:size], [7]) for size in (60, 80, 100)], disable_tqdm=True)
    assert model._reader.computed == 60 + 3 * 41 + 240


def test_finished_answers_are_kept_before_the_end(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_ext.models.ledger.FLUSH", 0)
    monkeypatch.setattr("harness_ext.models.foresight.MOST_LANES", 1)  # so that it is known which come first
    options = {"pretrained": str(saved("llama")), "device": "cpu", "dtype": "float32"}
    model = HFExtrapolate(**options)
    forwards = itertools.count()
    forward = model.model.forward
    model._reader.prepare(21)  # the self-check is no part of the run

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(forwards) == 3:
            raise RuntimeError("the power went off")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", failing)
    asked = [(None, [i] * 20, [9, 8]) for i in range(10, 16)]
    with pytest.raises(RuntimeError, match="power"), model.evaluating():
        model._loglikelihood_tokens(asked, disable_tqdm=True)
    again = HFExtrapolate(**options)
    with again.evaluating():
        found = again._loglikelihood_tokens(asked, disable_tqdm=True)
    assert again._reader.resumed == 3
    for i, answer in zip(range(10, 16), found, strict=True):
        assert answer == (pytest.approx(score_one(saved, i)[0], abs=1e-4), False)


def score_one(saved: Any, token: int) -> Any:
    model = HFExtrapolate(pretrained=str(saved("llama")), exact=True, device="cpu", dtype="float32")
    return model._loglikelihood_tokens([(None, [token] * 20, [9, 8])], disable_tqdm=True)[0]


def test_rolling_windows_are_read_in_chunks_and_sum_up_to_what_hf_says(saved: Any) -> None:
    text = Instance("loglikelihood_rolling", {}, ("The old farmer carried a box near the river. " * 30,), 0, ("t", 0, 1))
    options = {"pretrained": str(saved("llama")), "device": "cpu", "dtype": "float32"}
    found = HFExtrapolate(**options, chunk=24).loglikelihood_rolling([text], disable_tqdm=True)
    assert found == pytest.approx(HFLM(**options).loglikelihood_rolling([text], disable_tqdm=True), rel=1e-6)


def test_few_logits_are_held_at_a_time(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_ext.models.forward.SCORES", 600 * 10)  # ten positions of this vocabulary
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    score(model)
    seen: list[int] = []
    model.model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    prompt = [(None, [7, 8, 9], list(range(10, 60)))]
    found = model._loglikelihood_tokens(prompt, disable_tqdm=True)
    assert max(seen) == 10
    known = HFLM(pretrained=str(saved("llama")), device="cpu", dtype="float32", max_length=100)._loglikelihood_tokens(prompt)
    assert found[0] == (pytest.approx(known[0][0], abs=1e-3), known[0][1])
