"""The engines that `llorch-worker bench` compares, all in this process, on the same weights and the same threads.

Each contender takes a list of jobs and returns how long it took; greedy, end-of-sequence ignored, so that everybody
computes the same tokens. Read `Contender` first.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from worker.engine.assemble import EngineOptions, build_engine
from worker.engine.newcomer import NewcomerRun, Stepper, measure_newcomers
from worker.engine.protocol import AddSequence, CancelSequence, FromEngine, SamplingSpec, StepOutput


@dataclass(frozen=True, slots=True)
class Job:
    """One request: a prompt and how many tokens to generate."""

    prompt: list[int]
    answer_tokens: int


@dataclass(slots=True)
class Run:
    """What a contender did with a list of jobs. Times are seconds from the start of the run."""

    seconds: float
    tokens: int
    cpu_seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list[float])
    between_tokens_s: list[float] = field(default_factory=list[float])


class Contender(Protocol):
    """Something that generates."""

    name: str

    def run(self, jobs: list[Job]) -> Run:
        """Generate for all jobs together."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


class LlorchEngine:
    """The engine of this package, loop and all, without the process boundary."""

    name = "llorch"

    def __init__(self, options: EngineOptions) -> None:
        self._channel = _TimedChannel()
        engine = build_engine(options, self._channel)
        self._loop = engine.loop
        self._loop.touch_cache()
        self.ready = engine.ready
        self._runs = 0

    def run(self, jobs: list[Job]) -> Run:
        """Generate for all jobs together. The salt is new each time: nothing comes from an earlier run's cache."""
        self._runs += 1
        self._channel.times = {}
        for index, job in enumerate(jobs):
            spec = SamplingSpec(max_tokens=job.answer_tokens, temperature=0.0, ignore_eos=True)
            self._channel.inbox.append(
                AddSequence(
                    sequence_id=str(index), prompt_token_ids=job.prompt, sampling=spec, cache_salt=str(self._runs)
                )
            )
        started = time.perf_counter()
        self._loop.run()
        seconds = time.perf_counter() - started
        times = list(self._channel.times.values())
        return Run(
            seconds=seconds,
            tokens=sum(map(len, times)),
            first_token_s=[line[0] - started for line in times],
            between_tokens_s=[b - a for line in times for a, b in pairwise(line)],
        )

    def newcomers(self, running: list[list[int]], prompts: list[list[int]]) -> list[NewcomerRun]:
        """How long each of `prompts` waits for its first token beside `running`, which are cancelled afterwards."""
        self._runs += 1
        runs = measure_newcomers(self._loop.step, self._channel, running, prompts, salt=str(self._runs))
        self._channel.inbox.extend(CancelSequence(sequence_id=name) for name in self._channel.tokens)
        self._loop.run()
        return runs

    def close(self) -> None:
        """Nothing runs between runs."""


class _TimedChannel(Stepper):
    """Stands where the socket would, and remembers when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {}

    def send(self, message: FromEngine) -> None:
        super().send(message)
        if isinstance(message, StepOutput):
            now = time.perf_counter()
            for token in message.tokens:
                self.times.setdefault(token.sequence_id, []).append(now)


class PaddedGenerate:
    """`model.generate` over one batch, padded on the left to the longest prompt and run to the longest answer."""

    name = "generate"

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, jobs: list[Job]) -> Run:
        """Generate for all jobs together; only the tokens that were asked for count."""
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        answer = max(job.answer_tokens for job in jobs)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, generation_config=_greedy(answer))
        seconds = time.perf_counter() - started
        if out.shape[1] != longest + answer:
            raise RuntimeError("generate stopped early; the comparison would be unfair")
        return Run(seconds=seconds, tokens=sum(job.answer_tokens for job in jobs))

    def close(self) -> None:
        """Nothing runs between runs."""


class TransformersContinuousBatching:
    """transformers' own continuous batching, with a manager that lives for all runs."""

    name = "transformers-cb"

    def __init__(self, model: Any, *, context_tokens: int, slots: int) -> None:
        from transformers import ContinuousBatchingConfig

        page = 64
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=2 * slots * -(-context_tokens // page),
            max_batch_tokens=max(512, slots),
            allow_block_sharing=False,
            use_cuda_graph=False,
        )
        self._manager = model.init_continuous_batching(_greedy(1), continuous_batching_config=config)
        self._manager.start()

    def run(self, jobs: list[Job]) -> Run:
        """Generate for all jobs together."""
        started = time.perf_counter()
        for job in jobs:
            self._manager.add_request(job.prompt, max_new_tokens=job.answer_tokens, eos_token_id=-1)
        tokens = 0
        deadline = started + 600
        for _ in jobs:
            result = None
            while result is None or not result.is_finished():
                if time.perf_counter() > deadline or not self._manager.is_running():
                    raise RuntimeError("transformers' continuous batching gave no answer")
                result = self._manager.get_result(timeout=1)
            tokens += len(result.generated_tokens)
        return Run(seconds=time.perf_counter() - started, tokens=tokens)

    def close(self) -> None:
        """Stop its thread."""
        self._manager.stop(block=True)


class Vllm:
    """vLLM's offline engine, where it is installed."""

    name = "vllm"

    def __init__(self, folder: Path, *, context_tokens: int, slots: int) -> None:
        import vllm  # pyright: ignore[reportMissingImports] (an optional peer to measure against)

        self._vllm: Any = vllm
        self._engine: Any = vllm.LLM(
            str(folder), dtype="float32", max_model_len=context_tokens, max_num_seqs=slots, skip_tokenizer_init=True
        )

    def run(self, jobs: list[Job]) -> Run:
        """Generate for all jobs together."""
        specs = [
            self._vllm.SamplingParams(temperature=0, max_tokens=job.answer_tokens, ignore_eos=True, detokenize=False)
            for job in jobs
        ]
        prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
        started = time.perf_counter()
        outputs = self._engine.generate(prompts, specs, use_tqdm=False)
        return Run(seconds=time.perf_counter() - started, tokens=sum(len(o.outputs[0].token_ids) for o in outputs))

    def close(self) -> None:
        """vLLM ends its processes when the object goes."""
        with suppress(AttributeError):
            del self._engine


def reference_model(folder: Path, attention: str = "sdpa") -> Any:
    """The model as transformers loads it by itself, float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    # generate fills what a request leaves open from the model's defaults, and would stop at its end-of-sequence.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.eval()


def write_random_model(folder: Path, *, seed: int = 0) -> None:
    """A Llama of 33 million random float32 weights: enough to measure speed, which doesn't depend on their values."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _greedy(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=None, do_sample=False, eos_token_id=None, pad_token_id=0
    )
