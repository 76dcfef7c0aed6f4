"""Models that no table lists: what they do otherwise is found out, or refused, and their answers are `hf`'s."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import build
from families import DEEPSEEK, KV, LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers_here import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from harness_ext.errors import ModelError
from harness_ext.models import pieces
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.self_check import find_reach

PICKS = {**DEEPSEEK, "index_n_heads": 2, "index_head_dim": 8, "max_position_embeddings": 512}
Prompt = tuple[None, list[int], list[int]]


def draw_prompts(*lengths: int) -> list[Prompt]:
    rng = random.Random(0)
    hay = [rng.randrange(3, 500) for _ in range(max(lengths))]
    return [(None, hay[:length], [rng.randrange(3, 500) for _ in range(2)]) for length in lengths]


def widen(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_picking(kind: str, picked: int) -> Any:
    torch.manual_seed(0)
    return widen(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **PICKS, index_topk=picked)))


def hold_to_hf(model: Any, prompts: list[Prompt], **options: Any) -> HFExtrapolate:
    """The model as `hf-extrapolate` has it, once it has given `hf`'s answers."""
    given = {"pretrained": model, "tokenizer": make_tokenizer("bpe")}
    theirs = HFLM(**given, max_length=512)
    expected = theirs._loglikelihood_tokens(prompts, disable_tqdm=True)
    ours = HFExtrapolate(**given, trained_length=LENGTH, **options)
    found = ours._loglikelihood_tokens(prompts, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    return ours


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("picked", [16, 200])
def test_attention_that_picks_its_keys_is_left_as_it_is(kind: str, picked: int) -> None:
    ours = hold_to_hf(make_picking(kind, picked), draw_prompts(40, 120, 250, 300), chunk=64)
    assert ours.model.config._attn_implementation == "sdpa"
    assert ours._reader.sharing.make is None
    assert find_reach(ours._reader.forward, 8) > picked


def test_a_drawn_answer_needs_no_check_of_attention_that_picks() -> None:
    ours = HFExtrapolate(pretrained=make_picking("deepseek_v32", 16), tokenizer=make_tokenizer("bpe"), trained_length=LENGTH)
    asked = {"until": ["@@@"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0}
    request = Instance("generate_until", {}, ("The old farmer carried a box near the river. " * 2, asked), 0, ("t", 0, 1))
    assert ours.generate_until([request], disable_tqdm=True) != [""]


def test_prompts_of_no_more_tokens_than_are_picked_share() -> None:
    ours = hold_to_hf(make_picking("deepseek_v32", 200), draw_prompts(40, 120, 150), chunk=64)
    assert ours._reader.sharing.make is not None


def test_attention_that_is_told_what_to_attend_to_in_a_way_of_its_own_is_refused() -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="attention was given indices, which it does not know"):
        pieces.attend(None, query, query, query, None, indices=torch.zeros(1, 3, 2, dtype=torch.long))


class NamedAttention(LlamaAttention):
    """A family's code that does something else where attention is not called `sdpa`."""

    def forward(self, hidden_states: Any, *args: Any, **rest: Any) -> Any:
        outputs, weights = super().forward(hidden_states, *args, **rest)
        return (outputs if self.config._attn_implementation == "sdpa" else 2 * outputs), weights


def test_a_family_that_looks_for_sdpa_by_its_name_is_found_out() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = NamedAttention
    ours = hold_to_hf(model, draw_prompts(20, 90, 120), chunk=16)
    assert not pieces.is_installed(ours.model)
    assert ours._reader.sharing.make is not None


class Tuned(LlamaForCausalLM):
    """Prompt tuning: five tokens in front of all that is read, and their logits in front of the others."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, use_cache: Any = None, **rest: Any) -> Any:
        front = torch.arange(5)[None].expand(input_ids.shape[0], -1)
        embedded = self.model.embed_tokens(torch.cat((front, input_ids), dim=1))
        rest.pop("attention_mask", None)
        return super().forward(inputs_embeds=embedded, use_cache=False, **rest)


def test_tokens_that_prompt_tuning_puts_in_front_are_none_of_the_prompts() -> None:
    model = build("llama")
    model.__class__ = Tuned
    assert hold_to_hf(model, draw_prompts(20, 70, 5), batch_size=2)._reader.sharing.make is None


class WaveConfig(LlamaConfig):
    model_type = "wave"


class Wave(LlamaForCausalLM):
    """Its positions are rows of a buffer, which no module's kind or name gives away."""

    config_class = WaveConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("wave", torch.zeros(config.max_position_embeddings, config.hidden_size), persistent=False)

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **rest: Any) -> Any:
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        embedded = self.model.embed_tokens(input_ids) + self.wave[torch.arange(start, start + input_ids.shape[1])]
        return super().forward(inputs_embeds=embedded, past_key_values=past_key_values, **rest)


def test_where_an_unlisted_model_ends_is_tried_before_its_attention_is_ours() -> None:
    ours = HFExtrapolate(pretrained=widen(Wave(WaveConfig(**KV))), tokenizer=make_tokenizer("bpe"))
    assert [limit.outcome for limit in ours.length_limits] == ["hard_limit"]
    assert ours.length_limits[0].tokens == LENGTH
    assert pieces.is_installed(ours.model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_model_with_quantised_products_is_run() -> None:
    model = torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    ours = HFExtrapolate(pretrained=model, tokenizer=make_tokenizer("bpe"))
    assert ours._reader.forward.vocabulary == model.config.vocab_size
    assert len(ours._loglikelihood_tokens(draw_prompts(20, 30), disable_tqdm=True)) == 2


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("context", "continuation"), [([], [7]), ([7, 8], [])])
def test_a_request_without_tokens_is_refused_before_any_forward(exact: bool, context: list[int], continuation: list[int]) -> None:
    ours = HFExtrapolate(pretrained=build("llama"), tokenizer=make_tokenizer("bpe"), exact=exact)
    ours.model.forward = None  # nothing is read
    with pytest.raises(ModelError, match=r"^the (context|continuation) of \('A b', ' c'\) has no tokens"):
        ours._loglikelihood_tokens([(None, [5, 6], [7]), (("A b", " c"), context, continuation)], disable_tqdm=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_answers_that_are_made_otherwise_than_token_by_token_are_hfs(more: dict[str, Any], rows: int) -> None:
    text = "The old farmer carried a box near the river. " * 4
    asked = {"until": ["@@@"], "max_gen_toks": 8, "do_sample": False, **more}
    requests = [
        Instance("generate_until", {}, (text[start:stop], asked), index, ("t", index, 1))
        for index, (start, stop) in enumerate([(0, 90), (0, 91), (5, 60), (0, 14)])
    ]
    given = {"pretrained": build("llama"), "tokenizer": make_tokenizer("bpe")}
    expected = HFLM(**given, max_length=512).generate_until(requests, disable_tqdm=True)
    ours = HFExtrapolate(**given, trained_length=LENGTH, batch_size=rows)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
