"""Train the reference models: `python training/train.py` for all, `python training/train.py rope alibi` for some.

Each is a decoder of under half a million parameters with a trained length of 256, for the question "what happens past it", not for
language. They differ in their position scheme alone: same text in the same order, same tokenizer, body, steps and seed. Two
things make so small a model learn retrieval in minutes: dense supervision (`data.py`), and Muon on the weight matrices (Jordan
et al. 2024; `torch.optim.Muon`) with AdamW on the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from data import FAMILIES, Encoder, as_evaluated, examples, load_spec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from harness_ext.models.reference.modeling import ATTENTION, ReferenceConfig, ReferenceForCausalLM

OUT = Path(__file__).parent.parent / "harness_ext" / "models" / "reference"
TRAINED_LENGTH = 256
VOCABULARY = 1024
SCHEMES = ("rope", "nope", *ATTENTION)
STAGES = ((96, 0.2), (160, 0.2), (256, 0.6))
"""(window, share of the steps): short windows first."""
BATCH_TOKENS = 8192
TEXT_SHARE = 0.1
"""Of the tokens that are no answer, how many are learned from: enough to make it a language model of these texts."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the tasks' own text, digits one by one; falls back to bytes, so it takes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)

    class Letters:
        """Counts characters: stands in for the tokenizer that does not exist yet."""

        bos_token_id = eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [0] * len(text)

    def texts() -> Any:
        encode = Encoder(Letters())
        specs = [load_spec(name) for name in FAMILIES]
        while True:
            pieces = as_evaluated(rng.choice(specs), rng, encode, 3000)
            yield "".join(text for text, _ in pieces or [])

    source = texts()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(source) for _ in range(2000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=TRAINED_LENGTH
    )


def make_model(scheme: str) -> PreTrainedModel:
    """An untrained model: transformers' own class where it has the body and the scheme, else `modeling.py`'s."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TRAINED_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if scheme == "rope":
        return LlamaForCausalLM(LlamaConfig(**common, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    if scheme == "nope":
        return SmolLM3ForCausalLM(SmolLM3Config(**common, num_key_value_heads=4, no_rope_layers=[0, 0]))
    if scheme == "memformer":  # narrower, so that with the memory's writer it is no larger than the others
        common |= {"intermediate_size": 192, "segment_length": 128, "memory_slots": 64}
    return ReferenceForCausalLM(ReferenceConfig(**common, position_scheme=scheme))


def batches(encode: Encoder, rng: random.Random, length: int) -> Any:
    """(token ids, which of them are answers, which are learned from), (batch, tokens) each, without end."""
    source, generator = examples(rng, encode, length), torch.Generator().manual_seed(length)
    while True:
        rows = [next(source) for _ in range(BATCH_TOKENS // length)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), 2)
        answers, text = torch.zeros(2, len(rows), width, dtype=torch.bool)
        for i, (row, answer) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            answers[i, : len(row)] = torch.tensor(answer)
            text[i, : len(row)] = True
        yield ids, answers, answers | (text & (torch.rand(text.shape, generator=generator) < TEXT_SHARE))


def step_loss(model: PreTrainedModel, ids: torch.Tensor, answers: torch.Tensor, chosen: torch.Tensor) -> tuple[Any, float, float]:
    """Mean loss over the chosen tokens; mean loss and accuracy over the answers' tokens. All (batch, tokens)."""
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][chosen[:, 1:]],))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hook.remove()
    target, answer = ids[:, 1:][chosen[:, 1:]], answers[:, 1:][chosen[:, 1:]]
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    right = (logits.argmax(-1) == target)[answer].float().mean().item()
    return losses.mean(), losses[answer].mean().item(), right


def evaluate(model: PreTrainedModel, encode: Encoder, length: int, count: int = 60) -> dict[str, float]:
    """Share of prompts of about `length` tokens whose whole answer is the argmax, for each family."""
    rng, scores = random.Random(1), {}
    model.eval()
    for name in FAMILIES:
        hits = total = 0
        spec = load_spec(name)
        for _ in range(count):
            pieces = as_evaluated(spec, rng, encode, length)
            if pieces is None:
                continue
            prompt, answer = [0, *encode(pieces[0][0])], encode(pieces[1][0])[:-1]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
            hits += int((logits.argmax(-1) == torch.tensor(answer)).all())
            total += 1
        scores[name] = hits / total if total else math.nan
    model.train()
    return scores


def train(scheme: str, steps: int, seed: int) -> None:
    out = OUT / scheme
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(seed)
    encode = Encoder(tokenizer)
    torch.manual_seed(seed)
    model = make_model(scheme)
    inner = {id(m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    matrices = [p for p in model.parameters() if id(p) in inner]
    rest = [p for p in model.parameters() if id(p) not in inner]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peak = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    log = (Path(__file__).parent / "logs" / f"{scheme}.jsonl").open("w", buffering=1)
    log.write(
        json.dumps(
            {"scheme": scheme, "steps": steps, "seed": seed, "parameters": model.num_parameters(), "torch": torch.__version__}
        )
        + "\n"
    )
    started, step = time.time(), 0
    for length, share in STAGES:
        source = batches(encode, random.Random(seed + length), length)
        for _ in range(round(steps * share)):
            factor = min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (steps - step) / (0.6 * steps)))
            for group, lr in zip((g for o in optimizers for g in o.param_groups), peak, strict=True):
                group["lr"] = lr * factor
            loss, answer_loss, right = step_loss(model, *next(source))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                log.write(
                    json.dumps(
                        {
                            "step": step,
                            "length": length,
                            "loss": round(loss.item(), 4),
                            "answer_loss": round(answer_loss, 4),
                            "answer_accuracy": round(right, 4),
                            "seconds": round(time.time() - started),
                        }
                    )
                    + "\n"
                )
            if step % 500 == 0:
                log.write(json.dumps({"step": step, "exact": evaluate(model, encode, length), "at": length}) + "\n")
                save(model, tokenizer, out)
    log.write(json.dumps({"step": step, "exact": evaluate(model, encode, TRAINED_LENGTH, 200), "at": TRAINED_LENGTH}) + "\n")
    save(model, tokenizer, out)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="*", choices=[*SCHEMES, []], default=SCHEMES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.schemes:
        train(name, arguments.steps, arguments.seed)
