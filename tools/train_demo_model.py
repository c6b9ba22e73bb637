"""Train the demo model from nothing: grammar, tokenizer and weights by one script on one CPU core.

    python tools/train_demo_model.py --minutes 15 --out build/demo

The text comes from ``demo_stories`` and ``demo_chat``, the tokenizer from ``demo_tokenizer``. With ``--steps`` the seed
fixes text, initial weights and schedule; with ``--minutes`` the clock decides how far it gets. ``--start-from`` goes on
from an earlier result: the bundled model's own commands stand in its README. Read ``train`` first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy in nats per token: over all tokens, and over names, nouns and pronouns that come again."""

    all: float
    mentions: float

    def averaged_into(self, mean: Losses | None) -> Losses:
        """The running mean over about the last 20 steps."""
        if mean is None:
            return self
        return Losses(0.95 * mean.all + 0.05 * self.all, 0.95 * mean.mentions + 0.05 * self.mentions)


def mention_tokens(core: Tokenizer) -> torch.Tensor:
    """Which tokens begin a name, a kind of character, a thing or a pronoun: bool ``[vocabulary]``."""
    words = {*MALE_NAMES, *FEMALE_NAMES, *MACHINE_NAMES, *ANIMALS, *MEN, *WOMEN, *CREATURES, *MACHINES, *PLAIN_THINGS}
    words |= {thing.noun for thing in THINGS} | {"he", "she", "it", "him", "her", "his", "its", "He", "She", "It"}
    mask = torch.zeros(core.get_vocab_size(), dtype=torch.bool)
    for word in words:
        mask[core.encode(f" {word}", add_special_tokens=False).ids[0]] = True
    return mask


def mentioned_again(ids: torch.Tensor, mentions: torch.Tensor) -> torch.Tensor:
    """Which of the predicted tokens are mentions that came before in their row: bool ``[rows, length - 1]``."""
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return (again & mentions[ids])[:, 1:]


def batch_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, mentions: torch.Tensor, weight: float
) -> tuple[torch.Tensor, Losses]:
    """The loss to minimise over ``ids`` ``[rows, length]``, and the plain losses to report.

    A name, noun or pronoun that comes again counts ``weight`` times: it has to be looked up in the text before it,
    which is the hardest thing for a small model to learn.
    """
    # On a CPU plain matrix products train short rows faster; on long ones they would need gigabytes.
    model.set_attn_implementation("eager" if ids.shape[1] < 1024 else "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    each = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    again = mentioned_again(ids, mentions).flatten()
    weights = torch.where(again, weight, 1.0)
    plain = each.detach()
    return (each * weights).sum() / weights.sum(), Losses(plain.mean().item(), plain[again].mean().item())


def train(
    model: LlamaForCausalLM, core: Tokenizer, rng: random.Random, progress: Progress, arguments: argparse.Namespace
) -> tuple[int, int, float]:
    """Train until ``progress`` is complete; returns steps, tokens seen and the mean loss of the last steps."""
    optimizers = make_optimizers(model)
    base_rates = [arguments.rate * optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    mentions = mention_tokens(core)
    model.train()
    step, tokens, mean = 0, 0, None
    for ids in batches(core, rng):
        share = progress.share(step)
        if share >= 1.0:
            break
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(share)
        loss, losses = batch_loss(model, ids, mentions, arguments.mention_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        mean = losses.averaged_into(mean)
        report(progress, step, tokens, mean)
    print(file=sys.stderr)
    return step, tokens, mean.all if mean else float("nan")


def report(progress: Progress, step: int, tokens: int, loss: Losses) -> None:
    """One line that is rewritten on a terminal, and printed every 50 steps elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and step % 50:
        return
    elapsed = time.monotonic() - progress.started
    share = progress.share(step)
    left = elapsed * (1 - share) / share if share else 0.0
    losses = f"loss {loss.all:.3f}  mentions {loss.mentions:.3f}"
    line = f"step {step}  {share:4.0%}  {losses}  {tokens / elapsed:,.0f} tokens/s  {left / 60:.1f} min left"
    print(f"\r{line}   " if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, history: History) -> None:
    """Write a Hugging Face model folder: config, generation config, weights, tokenizer, chat template, card."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(asdict(history), indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(model.num_parameters(), history), encoding="utf-8")


@dataclass(frozen=True)
class History:
    """How a model came about: kept as ``training.json`` beside it, so that later runs can go on from it."""

    commands: tuple[str, ...] = ()
    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0
    loss: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> History:
        values = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return cls(**{**values, "commands": tuple(values["commands"])})

    def extended(self, command: str, steps: int, tokens: int, minutes: float, loss: float) -> History:
        minutes = round(self.minutes + minutes, 1)
        return History((*self.commands, command), self.steps + steps, self.tokens + tokens, minutes, round(loss, 3))


def model_card(parameters: int, history: History) -> str:
    """What the model is and how it came about; nothing that was not measured in its runs."""
    commands = "\n".join(history.commands)
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The llorch demo model

A Llama-architecture model of {parameters / 1e6:.2f} million parameters that tells little stories. It exists
so that every part of llorch can be tried and tested with a real model and without a download; it knows nothing but its
stories.

Made by:

```
{commands}
```

- Text: {history.tokens:,} tokens of stories and chats written by the grammar in `tools/demo_stories.py`, nothing else.
- Training: {history.steps:,} steps from random weights in {history.minutes:.0f} minutes on a CPU.
- Loss at the end: {history.loss:.3f} nats per token.
- Context: {CONTEXT:,} tokens. Vocabulary: {VOCAB_SIZE:,} tokens, byte-level BPE, so any text can be encoded.
- Weights: float32, safetensors. Roles of the chat template: system, user, assistant.
"""


@torch.inference_mode()
def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Print greedy and sampled output for the fixed prompts, and how many of them ended by themselves."""
    model.eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": SHOWN_CHAT}], tokenize=False, add_generation_prompt=True
    )
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
            length = f"{len(ids) - len(prompt)} tokens{'' if stopped else ', NOT ENDED'}"
            print(f"--- {title}, {length}\n{tokenizer.decode(ids)}\n")
    print(f"{ended} of {total} ended by themselves")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--steps", type=int, help="stop after this many steps (reproducible)")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes of training")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--start-from", type=Path, help="go on from a folder that an earlier run wrote")
    parser.add_argument("--mention-weight", type=float, default=3.0, help="weight of words that come again (default 3)")
    parser.add_argument("--rate", type=float, default=1.0, help="scale of the learning rates (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=20, help="fixes text and initial weights (default 20)")
    parser.add_argument("--samples", type=int, default=3, help="sampled outputs to print for each prompt (default 3)")
    arguments = parser.parse_args()
    if not arguments.steps and not arguments.minutes:
        parser.error("say how long to train: --steps N or --minutes M")
    return arguments


def new_model(rng: random.Random) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model, and a tokenizer learnt from fresh samples."""
    print("building the tokenizer", file=sys.stderr, flush=True)
    samples = [make_sample(rng) for _ in range(TOKENIZER_SAMPLES)]
    texts = (text for sample in samples for text in (sample.text, *(content for _, content in sample.turns)) if text)
    tokenizer = build_tokenizer(texts, VOCAB_SIZE, CONTEXT)
    return LlamaForCausalLM(model_config(tokenizer)), tokenizer


def main() -> None:
    """Build or load, train, save, show."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    history = History()
    if arguments.start_from:
        history = History.load(arguments.start_from)
        model = LlamaForCausalLM.from_pretrained(arguments.start_from)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start_from)
    else:
        model, tokenizer = new_model(rng)
    print(f"training {model.num_parameters():,} parameters, {arguments.threads} thread(s)", file=sys.stderr, flush=True)
    started = time.monotonic()
    progress = Progress(arguments.steps, arguments.minutes and arguments.minutes * 60, started)
    steps, tokens, loss = train(model, tokenizer.backend_tokenizer, rng, progress, arguments)
    command = " ".join(["python", "tools/train_demo_model.py", *sys.argv[1:]])
    history = history.extended(command, steps, tokens, (time.monotonic() - started) / 60, loss)
    save(model, tokenizer, arguments.out, history)
    show_samples(model, tokenizer, arguments.samples)


if __name__ == "__main__":
    main()
