"""The embedded models: small, alike but for their positions, able within their trained length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import curve
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SmolLM3Config, SmolLM3ForCausalLM

from harness_ext.model_view import load_tokenizer, resolve
from harness_ext.models.extensions.extension import METHODS
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.inspection import inspect_model
from harness_ext.models.reference.modeling import ATTENTION, RECURRENT, ReferenceConfig, ReferenceForCausalLM, Stream

FOLDER = REPOSITORY / "harness_ext" / "models" / "reference"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
SCHEMES = {
    "rope": ("rotary",),
    "nope": ("none",),
    "learned": ("learned",),
    "sinusoidal": ("sinusoidal",),
    "relative": ("clipped",),
    "alibi": ("alibi",),
    "transformer-xl": ("relative",),
    "memformer": ("memory",),
}


def test_there_is_one_for_every_scheme() -> None:
    assert set(NAMES) == set(SCHEMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_says_how_it_takes_positions(name: str) -> None:
    (weights,) = (path for path in (FOLDER / name).iterdir() if path.suffix not in (".json", ".jinja"))
    assert weights.name == "model.safetensors"
    assert weights.stat().st_size <= 2_000_000
    found = inspect_model(f"reference/{name}")
    assert found.schemes == SCHEMES[name]
    assert found.trained_length is not None
    assert (found.trained_length.tokens, found.trained_length.source) == (256, "config.max_position_embeddings")
    assert (found.hard_limit is not None) == (name == "learned")
    assert found.decided == "by its family, config and modules"


@pytest.mark.parametrize("name", NAMES)
def test_they_differ_in_their_positions_alone(name: str) -> None:
    """The same tokenizer, and the same shapes of all weights that are not about positions (Memformer pays its writer by its MLP)."""
    rope, other = (AutoModelForCausalLM.from_pretrained(resolve(f"reference/{other}")) for other in ("rope", name))
    assert (FOLDER / name / "tokenizer.json").read_bytes() == (FOLDER / "rope" / "tokenizer.json").read_bytes()
    known, found = ({re.sub(r"mlp\.", "", key): value.shape for key, value in m.state_dict().items()} for m in (rope, other))
    extra = set(found) - set(known)
    assert set(known) <= set(found)
    assert all(re.search(r"embed_|r_proj|writer", key) for key in extra), extra
    different = {key for key in known if known[key] != found[key]}
    assert not different or (name == "memformer" and all("_proj" in key and "self_attn" not in key for key in different))
    assert abs(other.num_parameters() / rope.num_parameters() - 1) < 0.08


@pytest.mark.parametrize("name", NAMES)
def test_each_finds_passkeys_within_its_trained_length(name: str, evaluate: Any) -> None:
    model = HFExtrapolate(pretrained=f"reference/{name}", device="cpu", batch_size="auto")
    scores = curve(evaluate(model, ["passkey_extrapolate"], multiples=[0.5, 1]), "passkey_extrapolate")
    assert min(scores.values()) >= 0.95, scores


def test_rotary_angles_lose_passkeys_past_the_trained_length(evaluate: Any) -> None:
    model = HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size="auto")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 4, 8])
    scores = curve(results, "passkey_extrapolate")
    assert scores[256] - 0.3 > scores[1024] > scores[2048]
    assert results["max_length"] == 2048


def test_a_learned_table_ends_in_an_outcome(evaluate: Any) -> None:
    model = HFExtrapolate(pretrained="reference/learned", device="cpu")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 2, 4], samples=1, depths=2)
    assert set(curve(results, "passkey_extrapolate")) == {256}
    outcomes = [cell["outcome"] for cell in results["configs"]["passkey_extrapolate"]["lengths"]]
    assert outcomes == ["measured", "hard_limit", "hard_limit"]
    assert {name for name in METHODS if name.startswith("table-")} == {
        method.method for method in inspect_model("reference/learned").extends if method.applies
    }


@settings(max_examples=200)
@given(st.text())
def test_their_tokenizer_takes_any_text(text: str) -> None:
    tokenizer = load_tokenizer("reference/rope", {})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_they_load_by_the_auto_classes_without_trust(tmp_path: Path) -> None:
    for name in NAMES:
        folder = resolve(f"reference/{name}")
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
        again = HFExtrapolate(pretrained=str(tmp_path / name), device="cpu")  # any folder with such a model, under any name
        ids = torch.arange(3, 90)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again.model(ids).logits)
        assert AutoConfig.from_pretrained(tmp_path / name).max_position_embeddings == 256


@pytest.mark.parametrize("multiple", [0.5, 2])
def test_a_scored_and_a_generated_answer_agree(evaluate: Any, multiple: float) -> None:
    """The greedy match of one forward is what greedy decoding gives."""
    model = HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size=4)
    metadata = {"multiples": [multiple], "samples": 1, "depths": 4}
    scored = evaluate(model, ["passkey_extrapolate"], **metadata)["samples"]["passkey_extrapolate"]
    for sample in scored:
        prompt, answer = sample["arguments"][0]
        ids = model.tok_encode(prompt)
        new = model.model.generate(
            torch.tensor([ids]), max_new_tokens=len(model.tok_encode(prompt + answer)) - len(ids), do_sample=False
        )[0, len(ids) :]
        assert (model.tok_decode(new.tolist()) == answer) == sample["resps"][0][0][1]


@pytest.mark.parametrize("name", ["rope", "alibi", "transformer-xl"])
def test_they_answer_by_generation_too(name: str, evaluate: Any) -> None:
    model = HFExtrapolate(pretrained=f"reference/{name}", device="cpu", batch_size=1)
    results = evaluate(model, ["passkey_extrapolate_generate"], multiples=[1], samples=1)
    assert curve(results, "passkey_extrapolate_generate")[256] >= 0.8


def test_a_name_that_is_no_embedded_model_is_left_alone() -> None:
    assert resolve("org/model") == "org/model"


def random_model(scheme: str, **changes: Any) -> ReferenceForCausalLM:
    torch.manual_seed(0)
    model = ReferenceForCausalLM(ReferenceConfig(position_scheme=scheme, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("scheme", ATTENTION)
@pytest.mark.parametrize("cuts", [(50, 51, 130), (64, 128), (1, 2, 3, 200)])
def test_chunks_give_what_one_forward_gives(scheme: str, cuts: tuple[int, ...]) -> None:
    model, ids = random_model(scheme), torch.randint(0, 1024, (2, 230), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, past, parts = model(ids).logits, None, []
        for start, end in zip((0, *cuts), (*cuts, 230), strict=True):
            out = model(ids[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=5e-5)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("scheme", ATTENTION)
def test_no_token_sees_a_later_one(scheme: str) -> None:
    model, ids = random_model(scheme), torch.randint(0, 1024, (1, 200), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 150] = (ids[0, 150] + 1) % 1024
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    assert torch.equal(first[:, :150], second[:, :150])
    assert not torch.equal(first[:, 150:], second[:, 150:])


@pytest.mark.parametrize("scheme", [scheme for scheme in ATTENTION if scheme not in RECURRENT])
def test_padding_before_a_prompt_changes_nothing(scheme: str) -> None:
    model, ids = random_model(scheme), torch.randint(0, 1024, (1, 120), generator=torch.Generator().manual_seed(1))
    padded, mask = torch.nn.functional.pad(ids, (30, 0)), torch.nn.functional.pad(torch.ones_like(ids), (30, 0))
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 30:], model(ids).logits, rtol=0, atol=5e-5)


def test_a_recurrent_model_refuses_padding() -> None:
    ids = torch.zeros(1, 8, dtype=torch.long)
    for scheme in RECURRENT:
        with pytest.raises(ValueError, match="run one prompt at a time"):
            random_model(scheme)(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("scheme", RECURRENT)
def test_a_recurrent_model_streams(scheme: str) -> None:
    """What it carries on is as large after 20,000 tokens as after 1,000."""
    model = random_model(scheme)

    def carried(stream: Stream) -> int:
        tensors = [tensor for layer in stream.layers for tensor in layer] + [stream.memory, *stream.segment]
        return sum(tensor.numel() for tensor in tensors)

    sizes, past = [], None
    with torch.no_grad():
        for _ in range(40):
            past = model(torch.randint(0, 1024, (1, 512)), past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
            sizes.append(carried(past))
    assert past.get_seq_length() == 40 * 512
    assert len(set(sizes[1:])) == 1


def test_transformer_xl_sees_as_far_as_its_memory_over_its_layers() -> None:
    """A change farther back than layers × memory + segment has no effect at all; a nearer one has."""
    model = random_model("transformer-xl", memory_length=64, segment_length=32)
    ids = torch.randint(0, 1024, (1, 320), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        last = model(ids).logits[0, -1]
        for place, seen in ((10, False), (320 - 32 - 2 * 64 - 1, False), (320 - 64, True)):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % 1024
            assert torch.equal(model(other).logits[0, -1], last) != seen


def readable_twin(model: ReferenceForCausalLM, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of a short prompt, query by query and key by key, from the papers' formulas."""
    config, inner = model.config, model.model
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    x = inner.embed_tokens.weight[ids]
    places = torch.arange(len(ids), dtype=torch.float64)[:, None]
    pairs = 10000.0 ** (-torch.arange(0, config.hidden_size, 2, dtype=torch.float64) / config.hidden_size)
    waves = torch.cat(((places * pairs).sin(), (places * pairs).cos()), dim=1).float()
    if config.position_scheme == "learned":
        x = x + inner.embed_positions.weight[: len(ids)]
    if config.position_scheme == "sinusoidal":
        x = x * config.hidden_size**0.5 + waves
    for layer in inner.layers:
        own, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (projection(y).view(len(ids), heads, width) for projection in (own.q_proj, own.k_proj, own.v_proj))
        mixed = torch.zeros(len(ids), heads, width)
        for i in range(len(ids)):
            segment = i // config.segment_length * config.segment_length
            first = max(0, segment - config.memory_length) if config.position_scheme == "transformer-xl" else 0
            for head in range(heads):
                scores = []
                for j in range(first, i + 1):
                    score = q[i, head] @ k[j, head] / width**0.5
                    if config.position_scheme == "alibi":
                        score = score - 2.0 ** (-8 * (head + 1) / heads) * (i - j)
                    if config.position_scheme == "relative":
                        row = own.embed_distances.weight[min(i - j, config.clip_distance)]
                        score = score + q[i, head] @ row / width**0.5
                    if config.position_scheme == "transformer-xl":
                        r = own.r_proj(waves[i - j]).view(heads, width)[head]
                        u, w = own.embed_biases.weight.view(2, heads, width)[:, head]
                        score = ((q[i, head] + u) @ k[j, head] + (q[i, head] + w) @ r) / width**0.5
                    scores.append(score)
                mixed[i, head] = torch.stack(scores).softmax(0) @ v[first : i + 1, head]
        x = x + own.o_proj(mixed.flatten(1))
        y = layer.post_attention_layernorm(x)
        x = x + layer.down_proj(torch.nn.functional.silu(layer.gate_proj(y)) * layer.up_proj(y))
    logits: torch.Tensor = inner.norm(x) @ inner.embed_tokens.weight.T
    return logits


@pytest.mark.parametrize("scheme", [scheme for scheme in ATTENTION if scheme != "memformer"])
def test_each_scheme_is_its_papers_formula(scheme: str) -> None:
    model = random_model(scheme, clip_distance=6, segment_length=8, memory_length=12)
    ids = torch.randint(0, 1024, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], readable_twin(model, ids), rtol=0, atol=5e-5)


def memformer_twin(model: ReferenceForCausalLM, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary), segment by segment, slot by slot, query by query."""
    config, inner = model.config, model.model
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    angles = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        pairs = torch.complex(x[: width // 2].double(), x[width // 2 :].double()) * torch.polar(
            torch.ones_like(angles), angles * place
        )
        return torch.cat((pairs.real, pairs.imag)).float()

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    memory, rows = unit(inner.writer.embed_slots.weight), []
    for start in range(0, len(ids), config.segment_length):
        x = inner.embed_tokens.weight[ids[start : start + config.segment_length]]
        slots = memory / (memory.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()  # torch's own term
        for layer in inner.layers:
            own, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (projection(y).view(-1, heads, width) for projection in (own.q_proj, own.k_proj, own.v_proj))
            slot_k, slot_v = (projection(slots).view(-1, heads, width) for projection in (own.k_proj, own.v_proj))
            mixed = torch.zeros(len(x), heads, width)
            for i in range(len(x)):
                for head in range(heads):
                    read = [q[i, head] @ key for key in slot_k[:, head]]
                    near = [turned(q[i, head], i) @ turned(k[j, head], j) for j in range(i + 1)]
                    weights = (torch.stack(read + near) / width**0.5).softmax(0)
                    mixed[i, head] = weights @ torch.cat((slot_v[:, head], v[: i + 1, head]))
            x = x + own.o_proj(mixed.flatten(1))
            y = layer.post_attention_layernorm(x)
            x = x + layer.down_proj(torch.nn.functional.silu(layer.gate_proj(y)) * layer.up_proj(y))
        x = inner.norm(x)
        rows.append(x)
        if len(x) == config.segment_length:
            writer, written = inner.writer, torch.zeros_like(memory)
            query, own_key = (projection(slots).view(-1, heads, width) for projection in (writer.q_proj, writer.k_proj))
            key, value = (projection(x).view(-1, heads, width) for projection in (writer.k_proj, writer.v_proj))
            kept = memory.view(-1, heads, width)
            for slot in range(len(memory)):
                parts = []
                for head in range(heads):
                    keys = torch.cat((own_key[slot : slot + 1, head], key[:, head]))
                    weights = (keys @ query[slot, head] / width**0.5).softmax(0)
                    parts.append(weights @ torch.cat((kept[slot : slot + 1, head], value[:, head])))
                written[slot] = torch.cat(parts)
            memory = unit(written + writer.embed_slots.weight)
    logits: torch.Tensor = torch.cat(rows) @ inner.embed_tokens.weight.T
    return logits


def test_memformer_reads_and_writes_its_memory_as_the_paper_says() -> None:
    model = random_model("memformer", segment_length=8, memory_slots=5)
    ids = torch.randint(0, 1024, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], memformer_twin(model, ids), rtol=0, atol=5e-5)


def test_the_body_is_llamas() -> None:
    """Without its positions the modelling file computes what SmolLM3 without positions computes, from the same weights."""
    model = random_model("learned")
    torch.nn.init.zeros_(model.model.embed_positions.weight)
    config = SmolLM3Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        no_rope_layers=[0, 0],
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    theirs = SmolLM3ForCausalLM(config).eval()
    own = {re.sub(r"(gate|up|down)_proj", r"mlp.\1_proj", key): value for key, value in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(own, strict=False)
    assert (missing, unexpected) == ([], ["model.embed_positions.weight"])
    ids = torch.randint(0, 1024, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=5e-5)
