"""Train the bundled demo model from nothing: grammar, tokenizer, weights, in one command on one CPU core.

    python tools/train_demo_model.py --steps 1500 --out llorch_demo/model

The text comes from ``demo_stories`` and ``demo_chat``, the tokenizer from ``demo_tokenizer``. With ``--steps`` the seed
fixes the result on one machine; with ``--minutes`` the clock decides how far it gets. Read ``train`` first.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The tokenizer trainer's own thread pool would take every core.
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from demo_chat import make_sample
from demo_lexicon import (
    ANIMALS,
    CREATURES,
    FEMALE_NAMES,
    MACHINE_NAMES,
    MACHINES,
    MALE_NAMES,
    MEN,
    PLAIN_THINGS,
    THINGS,
    WOMEN,
)
from demo_tokenizer import BOS, END, EOS, PAD, build_tokenizer, encode_sample, save_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 4096
VOCAB_SIZE = 2048
TOKENIZER_SAMPLES = 8000
WARMUP_SHARE = 0.03
MENTION_WEIGHT = 3.0
MUON_LR, ADAM_LR = 0.02, 0.004
# Rows × length of a training batch, and how often it is drawn. The long ones are stories packed one after another, so
# that every position up to the context's end has been trained.
BATCHES: tuple[tuple[float, int, int], ...] = ((0.88, 7, 320), (0.08, 3, 704), (0.025, 1, 2048), (0.015, 1, CONTEXT))
SHOWN_PROMPTS = ("Once upon a time", "The little fox")
SHOWN_CHAT = "Tell me a story about a robot and a kite."


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``share`` goes from 0 to 1 by steps or by the clock."""

    steps: int | None
    seconds: float | None
    started: float

    def share(self, step: int) -> float:
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = (time.monotonic() - self.started) / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_clock))


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Grouped-query attention with heads of 64, the size that GPU attention kernels like best."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=[tokenizer.convert_tokens_to_ids(EOS), tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        attention_dropout=0.0,
        dtype="float32",
    )


def batches(core: Tokenizer, rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless batches ``[rows, length]`` of int64 ids; every row begins with BOS and is filled with whole samples.

    Only a row's last sample is cut off.
    """
    weights = [share for share, _, _ in BATCHES]
    while True:
        _, rows, length = rng.choices(BATCHES, weights=weights)[0]
        batch: list[list[int]] = []
        for _ in range(rows):
            ids: list[int] = []
            while len(ids) < length:
                ids += encode_sample(core, make_sample(rng))
            batch.append(ids[:length])
        yield torch.tensor(batch)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms: about twice as quick as AdamW alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(share: float) -> float:
    """Short warm-up, then a straight line down to nothing."""
    return min(1.0, (share + 1e-3) / WARMUP_SHARE) * max(0.0, 1.0 - share)


def mention_tokens(core: Tokenizer) -> torch.Tensor:
    """Which tokens begin a name, a kind of character, a thing or a pronoun: bool ``[vocabulary]``."""
    words = {*MALE_NAMES, *FEMALE_NAMES, *MACHINE_NAMES, *ANIMALS, *MEN, *WOMEN, *CREATURES, *MACHINES, *PLAIN_THINGS}
    words |= {thing.noun for thing in THINGS} | {"he", "she", "it", "him", "her", "his", "its", "He", "She", "It"}
    mask = torch.zeros(core.get_vocab_size(), dtype=torch.bool)
    for word in words:
        mask[core.encode(f" {word}", add_special_tokens=False).ids[0]] = True
    return mask


def loss_weights(ids: torch.Tensor, mentions: torch.Tensor) -> torch.Tensor:
    """Weights ``[rows, length - 1]`` of the predicted tokens; a name, noun or pronoun that comes again counts more.

    What comes again has to be looked up in the text before it, which is the hardest thing for a small model to learn.
    """
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return 1.0 + (MENTION_WEIGHT - 1.0) * (again & mentions[ids])[:, 1:].float()


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor, mentions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss to minimise over ``ids`` ``[rows, length]``, and the plain mean cross-entropy in nats per token."""
    # On a CPU plain matrix products train short rows faster; on long ones they would need gigabytes.
    model.set_attn_implementation("eager" if ids.shape[1] < 1024 else "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    each = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = loss_weights(ids, mentions).flatten()
    return (each * weights).sum() / weights.sum(), each.detach().mean().item()


def train(model: LlamaForCausalLM, core: Tokenizer, rng: random.Random, progress: Progress) -> tuple[int, int, float]:
    """Train until ``progress`` is complete; returns steps, tokens seen and the mean loss of the last steps."""
    optimizers = make_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    mentions = mention_tokens(core)
    model.train()
    step, tokens, loss_mean = 0, 0, 0.0
    for ids in batches(core, rng):
        share = progress.share(step)
        if share >= 1.0:
            break
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(share)
        loss, value = batch_loss(model, ids, mentions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        loss_mean = value if step == 1 else 0.95 * loss_mean + 0.05 * value
        report(progress, step, tokens, loss_mean)
    print(file=sys.stderr)
    return step, tokens, loss_mean


def report(progress: Progress, step: int, tokens: int, loss: float) -> None:
    """One line that is rewritten on a terminal, and printed every 50 steps elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and step % 50:
        return
    elapsed = time.monotonic() - progress.started
    share = progress.share(step)
    left = elapsed * (1 - share) / share if share else 0.0
    line = f"step {step}  {share:4.0%}  loss {loss:.3f}  {tokens / elapsed:,.0f} tokens/s  {left / 60:.1f} min left"
    print(f"\r{line}   " if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write a Hugging Face model folder: config, generation config, weights, tokenizer, chat template, card."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    (out / "model.safetensors").chmod(0o644)
    (out / "README.md").write_text(card, encoding="utf-8")


def model_card(command: str, parameters: int, steps: int, tokens: int, loss: float, minutes: float) -> str:
    """What the model is and how it came about; nothing that was not measured in this run."""
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The llorch demo model

A Llama-architecture model of {parameters / 1e6:.2f} million parameters that tells little stories. It exists so that every part of
llorch can be tried and tested with a real model and without a download; it knows nothing but its stories.

- Made by: `{command}`
- Text: {tokens:,} tokens of stories and chats written by the grammar in `tools/demo_stories.py`; no other text was used.
- Training: {steps:,} steps from random weights in {minutes:.0f} minutes on a CPU; loss at the end {loss:.3f} nats per token.
- Context: {CONTEXT:,} tokens. Vocabulary: {VOCAB_SIZE:,} tokens, byte-level BPE, so any text can be encoded.
- Weights: float32, safetensors. Roles of the chat template: system, user, assistant.
"""


@torch.inference_mode()
def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Print greedy and sampled output for the fixed prompts, and how many of them ended by themselves."""
    model.eval()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": SHOWN_CHAT}], tokenize=False, add_generation_prompt=True)
    prompts = [tokenizer(text).input_ids for text in SHOWN_PROMPTS]
    prompts.append(tokenizer(chat, add_special_tokens=False).input_ids)
    ended = total = 0
    for prompt in prompts:
        for number in range(count + 1):
            torch.manual_seed(number)
            sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0} if number else {"do_sample": False}
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=400, **sampling)[0].tolist()
            stopped = ids[-1] in model.generation_config.eos_token_id
            ended, total = ended + stopped, total + 1
            title = f"sample {number} at 0.8" if number else "greedy"
            print(f"--- {title}, {len(ids) - len(prompt)} tokens{'' if stopped else ', NOT ENDED'}\n{tokenizer.decode(ids)}\n")
    print(f"{ended} of {total} ended by themselves")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--steps", type=int, help="stop after this many steps (reproducible)")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes of training")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=20, help="fixes text and initial weights (default 20)")
    parser.add_argument("--samples", type=int, default=3, help="sampled outputs to print for each prompt (default 3)")
    arguments = parser.parse_args()
    if not arguments.steps and not arguments.minutes:
        parser.error("say how long to train: --steps N or --minutes M")
    return arguments


def main() -> None:
    """Build the tokenizer, train, save, show."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    print("building the tokenizer", file=sys.stderr, flush=True)
    samples = [make_sample(rng) for _ in range(TOKENIZER_SAMPLES)]
    texts = (text for sample in samples for text in (sample.text, *(content for _, content in sample.turns)) if text)
    tokenizer = build_tokenizer(texts, VOCAB_SIZE, CONTEXT)
    model = LlamaForCausalLM(model_config(tokenizer))
    parameters = model.num_parameters()
    print(f"training {parameters:,} parameters on {arguments.threads} thread(s)", file=sys.stderr, flush=True)
    started = time.monotonic()
    progress = Progress(arguments.steps, arguments.minutes and arguments.minutes * 60, started)
    steps, tokens, loss = train(model, tokenizer.backend_tokenizer, rng, progress)
    command = " ".join(["python", "tools/train_demo_model.py", *sys.argv[1:]])
    save(model, tokenizer, arguments.out, model_card(command, parameters, steps, tokens, loss, (time.monotonic() - started) / 60))
    show_samples(model, tokenizer, arguments.samples)


if __name__ == "__main__":
    main()
