"""How a model takes positions: its scheme, its trained length, and where it ends.

From the config alone, so that it is known before any weights load; and from the modules where there are any, since flags lie
(MPT builds its ALiBi bias whatever `attn_config.alibi` says) and tables can be resized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from harness_ext.cells import Limit, TrainedLength

LENGTH_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "context_length",
    "max_encoder_position_embeddings",
)
"""In this order; the first that holds a positive number is the advertised length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way of taking positions."""

    title: str
    """As the field calls it."""
    source: str
    """The paper."""
    past: str
    """What happens past the trained length."""
    families: tuple[str, ...]
    """transformers' model types that take positions so, each measured one token past its limit."""


def _types(names: str) -> tuple[str, ...]:
    return tuple(names.split())


SCHEMES: dict[str, Scheme] = {
    "learned": Scheme(
        title="learned absolute positions",
        source="Radford et al. 2019 (GPT-2)",
        past="the table ends: a position after it has no embedding",
        families=_types(
            "gpt2 gpt_bigcode openai-gpt opt gpt_neo biogpt xlm bert reformer bart mbart blenderbot bigbird_pegasus led prophetnet "
            "harness_ext_reference:learned"
        ),
    ),
    "sinusoidal": Scheme(
        title="sinusoidal absolute positions",
        source="Vaswani et al., arXiv 1706.03762",
        past="defined for any position, but the weights never saw it; a family that keeps a fixed table ends with it",
        families=_types("ctrl xglm pegasus marian nllb-moe m2m_100 fsmt pegasus_x harness_ext_reference:sinusoidal"),
    ),
    "rotary": Scheme(
        title="rotary angles, computed",
        source="Su et al., arXiv 2104.09864",
        past="goes on without a word; the angles of far tokens are new to the weights",
        families=_types(
            "llama mistral ministral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text gemma3n_text gemma4_text "
            "mimo_v2_flash phi phi3 phimoe gpt_neox gpt_neox_japanese persimmon stablelm starcoder2 olmo olmo2 olmo3 olmoe cohere glm "
            "glm4 granite nemotron helium ernie4_5 arcee apertus diffllama nanochat bitnet seed_oss modernbert-decoder dbrx "
            "deepseek_v2 deepseek_v3 hunyuan_v1_dense gpt_oss falcon smollm3 cohere2 exaone4 llama4_text recurrent_gemma lfm2 "
            "falcon_h1 bamba qwen3_next qwen3_5_text olmo_hybrid minimax t5gemma"
        ),
    ),
    "rotary_table": Scheme(
        title="rotary angles from a fixed table",
        source="Su et al., arXiv 2104.09864",
        past="the table ends, although the angles could be computed",
        families=_types("gptj codegen roformer"),
    ),
    "alibi": Scheme(
        title="a bias linear in the distance (ALiBi)",
        source="Press et al., arXiv 2108.12409",
        past="goes on; far tokens fade. MPT builds the bias once, and ends with it",
        families=_types("bloom mpt harness_ext_reference:alibi"),
    ),
    "bucketed": Scheme(
        title="a bias by distance, in buckets",
        source="Raffel et al., arXiv 1910.10683 (T5)",
        past="goes on; all distances past the last bucket look alike",
        families=_types("t5 mt5 umt5 longt5 switch_transformers cpmant prophetnet"),
    ),
    "clipped": Scheme(
        title="relative positions, clipped",
        source="Shaw et al., arXiv 1803.02155",
        past="goes on; all distances past the clip look alike",
        families=_types("harness_ext_reference:relative"),
    ),
    "relative": Scheme(
        title="relative sinusoids, with or without segment recurrence",
        source="Dai et al., arXiv 1901.02860 (Transformer-XL)",
        past="goes on; with recurrence it streams, and sees as far as its memory",
        families=_types("xlnet harness_ext_reference:transformer-xl"),
    ),
    "memory": Scheme(
        title="segments with a recurrent external memory",
        source="Wu et al., arXiv 2010.06891 (Memformer)",
        past="streams; what the memory's slots do not hold is lost",
        families=_types("harness_ext_reference:memformer"),
    ),
    "none": Scheme(
        title="no positions (NoPE)",
        source="Kazemnejad et al., arXiv 2305.19466",
        past="goes on; attention is spread over more tokens than it ever was",
        families=_types("smollm3 cohere2 exaone4 llama4_text zamba2 jamba granitemoehybrid kimi_linear nemotron_h"),
    ),
    "recurrent": Scheme(
        title="a recurrent state (state space, linear attention, convolution)",
        source="Gu and Dao, arXiv 2312.00752 (Mamba); Peng et al., arXiv 2305.13048 (RWKV)",
        past="streams; what the state does not hold is lost",
        families=_types(
            "mamba mamba2 falcon_mamba rwkv recurrent_gemma lfm2 falcon_h1 bamba qwen3_next qwen3_5_text olmo_hybrid minimax zamba2 "
            "jamba granitemoehybrid kimi_linear nemotron_h"
        ),
    ),
}

TABLES: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt", "ctrl", "gptj", "codegen"), "n_positions"),
    **dict.fromkeys(
        ("opt", "gpt_neo", "biogpt", "xlm", "bert", "reformer", "roformer", "bart", "mbart", "blenderbot", "bigbird_pegasus"),
        "max_position_embeddings",
    ),
    **dict.fromkeys(("pegasus", "marian", "harness_ext_reference:learned"), "max_position_embeddings"),
    "led": "max_encoder_position_embeddings",
    "mpt": "max_seq_len",
}
"""Model type → the field that sizes its position table, where a longer input is an error and not merely unfamiliar."""

ROUNDED_DOWN: dict[str, tuple[str, ...]] = {
    "led": ("attention_window",),
    "reformer": ("local_attn_chunk_length", "lsh_attn_chunk_length"),
}
"""Model type → fields of which the padded input has to be a multiple, so that the table ends at the last multiple in it."""

POSITION_TABLE = re.compile(
    r"(^|\.)(wpe|w_pe|(embed_)?positions?_embed\w*|embed_positions|pos_embed\w*|pos_encoding|positional_encoding)$"
)
"""What a position table is called, in transformers and out of it."""

ROUNDED_ALIBI: dict[str, str] = {
    "bloom": "in the model's dtype",
    "falcon": "in bfloat16, whatever the model's dtype",
}
"""Model type → how transformers computes slope × absolute key index. Its rounding grows with the position: among the last 256
keys at position 8,192, bfloat16 tells 7 to 9 apart. MPT counts from the end, in float32, and is free of it."""


def read_trained_length(config: Any) -> TrainedLength | None:
    """The trained length by `config` (a transformers config), or None where it names none.

    The length before a rope extension comes first, since the advertised one is the extension's; then the advertised one.
    """
    text = text_config(config)
    for source, value in (
        *_rope_originals(getattr(text, "rope_parameters", None)),
        ("original_max_position_embeddings", getattr(text, "original_max_position_embeddings", None)),
    ):
        if _is_length(value):
            return TrainedLength(tokens=value, source=f"config.{source}")
    return read_advertised_length(config)


def read_advertised_length(config: Any) -> TrainedLength | None:
    """The length that the config claims, a rope extension included; None where it names none."""
    text = text_config(config)
    for field in LENGTH_FIELDS:
        value = getattr(text, field, None)
        if _is_length(value):
            return TrainedLength(tokens=value, source=f"config.{field}")
    return None


def find_type(config: Any) -> str:
    """The model type, as `SCHEMES` and `TABLES` list it."""
    outer, inner = (str(getattr(part, "model_type", "")) for part in (config, text_config(config)))
    kind = outer if _has_row(outer) else inner
    scheme = getattr(config, "position_scheme", None)
    return f"{kind}:{scheme}" if scheme else kind


def is_listed(config: Any) -> bool:
    """Whether what this family does past its limit was measured beforehand."""
    return _has_row(find_type(config))


def read_schemes(config: Any, model: Any = None) -> tuple[str, ...]:
    """Names of the schemes in `SCHEMES` that a model uses, by its family and flags; for other families, by its modules."""
    text, kind = text_config(config), find_type(config)
    found = [name for name, scheme in SCHEMES.items() if kind in scheme.families]
    if kind == "falcon" and getattr(text, "alibi", False):
        found = ["alibi"]
    if kind == "zamba2" and getattr(text, "use_mem_rope", False):
        found = ["rotary", "recurrent"]
    if kind == "smollm3":
        layers = getattr(text, "no_rope_layers", None) or [1]  # 1 is a layer with rotary angles, whatever the name says
        found = [name for name, used in (("rotary", any(layers)), ("none", not all(layers))) if used]
    return tuple(found or (_guess_schemes(text, model) if model is not None else ()))


def read_hard_limit(config: Any, model: Any = None) -> Limit | None:
    """The length past which the model cannot run at all, or None where it can go on (or nobody knows: `is_listed`).

    With the `model` (any object with transformers' module tree; tensors may be on the meta device) the tables' own sizes count.
    """
    text, kind = text_config(config), find_type(config)
    field = TABLES.get(kind)
    tokens = getattr(text, field, None) if field else None
    sizes = table_sizes(model) if model is not None and (field or not is_listed(config)) else {}
    name = min(sizes, key=lambda table: sizes[table], default="")
    if name and kind != "mpt":
        tokens, where = sizes[name], name
    else:
        where = f"config.{field}"
    if not _is_length(tokens):
        return None
    for multiple_of in ROUNDED_DOWN.get(kind, ()):
        given = getattr(text, multiple_of, None) or 1
        step = max(given) if isinstance(given, (list, tuple)) else given
        tokens -= tokens % step
    return Limit(
        tokens=tokens,
        outcome="hard_limit",
        reason=f"the position table of {text.model_type} ends at {tokens} ({where}); no position after it exists",
    )


def read_answer_limit(config: Any, model: Any) -> Limit | None:
    """The length past which an encoder-decoder's answer cannot go: its decoder's table is another one than the prompt's. None where it goes on, or nobody knows."""
    if not getattr(config, "is_encoder_decoder", False) or find_type(config) not in TABLES:
        return None
    sizes = {name: size for name, size in _find_tables(model) if _is_decoders(name)}
    name = min(sizes, key=lambda table: sizes[table], default="")
    if not name:
        return None
    return Limit(
        tokens=sizes[name],
        outcome="hard_limit",
        reason=f"the decoder of {config.model_type} ends at {sizes[name]} ({name}); no position after it exists",
    )


def read_window(config: Any) -> int | None:
    """Tokens that an attention layer with a sliding window sees, where the model has such layers."""
    text = text_config(config)
    if getattr(text, "use_sliding_window", None) is False:
        return None
    known = (getattr(text, field, None) for field in ("sliding_window", "attention_window_size", "local_attention", "window_size"))
    return next((value for value in known if _is_length(value)), None)


def read_selection(config: Any) -> int | None:
    """Tokens that a query of sparse attention picks: where there are no more, it attends to all. None where nothing is picked."""
    text = text_config(config)
    blocks = getattr(text, "index_topk_blocks", None)
    picked = blocks * getattr(text, "index_block_size", 1) if _is_length(blocks) else getattr(text, "index_topk", None)
    return picked if _is_length(picked) else None


def find_rounding(config: Any, dtype: str) -> str:
    """A warning where low precision alone would look like degradation with length; empty otherwise.

    `dtype` is the model's, such as `bfloat16` or `torch.bfloat16`.
    """
    text = text_config(config)
    kind = getattr(text, "model_type", "")
    low = "float16" in dtype  # bfloat16 too
    if kind not in ROUNDED_ALIBI or (kind == "falcon" and not getattr(text, "alibi", False)) or (kind == "bloom" and not low):
        return ""
    return (
        f"ALiBi biases of {kind} are computed {ROUNDED_ALIBI[kind]}: rounding grows with the position and looks like "
        "degradation with length" + ("; run in float32 (dtype=float32) to tell them apart" if kind == "bloom" else "")
    )


def table_sizes(model: Any) -> dict[str, int]:
    """Name → positions it holds, of each table that a module tree looks a prompt's positions up in; those that grow by themselves are none.

    An encoder-decoder reads the prompt with its encoder, whose table may be another one than the answer's (LED: 16,384 and 1,024).
    """
    found = dict(_find_tables(model))
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return found
    return {name: size for name, size in found.items() if not _is_decoders(name)} or found


def tables(model: Any) -> list[Any]:
    """The embedding modules of `model` that are looked up by position."""
    return [module for name, module in model.named_modules() if _is_table(name, module)]


def table_offset(module: Any) -> int:
    """Rows of a position table before that of position 0: OPT and Bart name them, RoBERTa counts on from its padding."""
    offset = int(getattr(module, "offset", 0))
    if not offset and type(module).__name__ == "Embedding" and module.padding_idx is not None:
        return int(module.padding_idx) + 1
    return offset


def text_config(config: Any) -> Any:
    """The part of a config that is about text, where it has parts."""
    for part in ("text_config", "encoder", "decoder"):
        inner = getattr(config, part, None)
        if hasattr(inner, "model_type"):
            return inner
    return config


def _has_row(kind: str) -> bool:
    return any(kind in scheme.families for scheme in SCHEMES.values())


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rope_originals(parameters: Any) -> list[tuple[str, Any]]:
    if not isinstance(parameters, Mapping):
        return []
    field = "original_max_position_embeddings"
    nested = [
        (f"rope_parameters.{name}.{field}", value.get(field)) for name, value in parameters.items() if isinstance(value, Mapping)
    ]
    return [(f"rope_parameters.{field}", parameters.get(field)), *nested]


def _find_tables(model: Any) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if _is_table(name, module):
            yield name, module.num_embeddings - table_offset(module)
        for field in ("embed_positions", "pos_encoding"):
            table = vars(module).get(field, module._buffers.get(field))
            if hasattr(table, "shape") and len(table.shape) == 2:
                yield f"{name}.{field}", int(table.shape[0])


def _is_decoders(name: str) -> bool:
    return "decoder" in name.split(".")


def _is_table(name: str, module: Any) -> bool:
    return POSITION_TABLE.search(name) is not None and hasattr(module, "num_embeddings")


def _guess_schemes(config: Any, model: Any) -> list[str]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    classes = " ".join({type(module).__name__ for module in model.modules()}).lower()
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    found = []
    if table_sizes(model):
        found.append("sinusoidal" if "sinusoid" in classes else "learned")
    elif "sinusoid" in classes:
        found.append("sinusoidal")
    if any(name.endswith("inv_freq") for name in buffers):
        found.append("rotary")
    if getattr(config, "alibi", False) or "alibi" in classes:
        found.append("alibi")
    if "relative_attention_bias" in names:
        found.append("bucketed")
    if re.search(r"mamba|mixer|rwkv|rglru|deltanet|linearattention|shortconv|lightningattention|mlstm|slstm", classes):
        found.append("recurrent")
    if "attention" in classes and not set(found) - {"recurrent"}:
        found.append("none")
    return found
