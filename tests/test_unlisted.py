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
from harness_ext.positions import is_listed

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


class Bigram(LlamaForCausalLM):
    """Logits to which what follows on each token is added, beside the output layer."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        output = super().forward(input_ids, **rest)
        output.logits = output.logits + torch.sin(input_ids[..., None] * torch.arange(output.logits.shape[-1]))
        return output


class Fading(LlamaForCausalLM):
    """Logits that are scaled by where they stand among those that the output layer gives."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        output = super().forward(input_ids, **rest)
        output.logits = output.logits / (1 + torch.arange(output.logits.shape[1]) / 50)[:, None]
        return output


@pytest.mark.parametrize("kind", [Bigram, Fading])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("answer", [1, 3])
def test_an_output_layer_that_is_not_all_there_is_is_given_every_token(kind: type, exact: bool, answer: int) -> None:
    model = build("llama")
    model.__class__ = kind
    prompts = [(None, context, [7, 9, 8][:answer]) for _, context, _ in draw_prompts(40, 90, 120)]
    hold_to_hf(model, prompts, chunk=64, exact=exact)


@pytest.mark.parametrize("special", [0, 1, 2])
def test_positions_that_are_counted_from_the_tokens_are_found_out(special: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 600}
    config = AutoConfig.for_model("roberta", is_decoder=True, max_position_embeddings=400, **sizes)
    prompts = draw_prompts(40, 90, 120)
    for _, context, _ in prompts:
        context[5:30:6] = [special] * 5
    hold_to_hf(widen(AutoModelForCausalLM.from_config(config)), prompts, chunk=16)


class UnlistedConfig(LlamaConfig):
    model_type = "unlisted_llama"


class Sharpening(LlamaAttention):
    """Queries that are scaled by how many keys there are, past 1,400."""

    def forward(self, hidden_states: Any, *args: Any, **rest: Any) -> Any:
        cache = rest.get("past_key_values")
        seen = hidden_states.shape[1] + (cache.get_seq_length(self.layer_idx) if cache is not None else 0)
        own, self.scaling = self.scaling, self.scaling * max(1.0, seen / 1400)
        try:
            return super().forward(hidden_states, *args, **rest)
        finally:
            self.scaling = own


def test_what_turns_on_how_many_tokens_there_are_is_found_out_at_a_length_that_no_table_lists() -> None:
    known = build("llama")
    own = {**known.config.to_dict(), "max_position_embeddings": 1400, "model_type": UnlistedConfig.model_type}
    model = LlamaForCausalLM(UnlistedConfig(**own)).eval()
    model.load_state_dict(known.state_dict())
    for layer in model.model.layers:
        layer.self_attn.__class__ = Sharpening
    prompts = draw_prompts(300, 1500, 1520)
    given = {"pretrained": model, "tokenizer": make_tokenizer("bpe")}
    expected = HFLM(**given, max_length=2000)._loglikelihood_tokens(prompts, disable_tqdm=True)
    ours = HFExtrapolate(**given, chunk=512)
    found = ours._loglikelihood_tokens(prompts, disable_tqdm=True)
    assert not is_listed(model.config)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_a_dynamic_rope_of_a_familys_own_that_no_length_changes_is_left_as_it_is(exact: bool) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 100.0}
    model = build("hunyuan_v1_dense", rope_parameters=rope)
    hold_to_hf(model, draw_prompts(20, 50, 63, 66, 120), exact=exact)
    with pytest.raises(ModelError, match="'ntk_alpha' has no counterpart"):
        HFExtrapolate(pretrained=model, tokenizer=make_tokenizer("bpe"), trained_length=LENGTH, extend="yarn", factor=2.0)


def test_rows_that_are_read_in_chunks_do_not_meet_where_one_token_is_left() -> None:
    prompts = [(None, [token + 3 for token in context], answer) for _, context, answer in draw_prompts(64, 80)]
    others = [(None, context[::-1], answer) for _, context, answer in prompts]
    pairs = [pair for both in zip(prompts, others, strict=True) for pair in both]
    hold_to_hf(build("rwkv"), pairs, chunk=64, batch_size=2)


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
