"""The bundled demo model: loaded as any Hugging Face folder is, small, and able to tell a story to its end."""

import json
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llorch_demo import MODEL_DIR

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def generate(model: Any, ids: list[int]) -> list[int]:
    """The new tokens of a greedy run."""
    with torch.inference_mode():
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=400)
    return output[0].tolist()[len(ids) :]


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert needed <= files.keys()
    assert sum(files.values()) < 10_000_000
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in MODEL_DIR.iterdir()), "readable by everyone"


def test_the_shape_is_what_the_engine_is_tested_with() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    assert config["tie_word_embeddings"] is True
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


@given(st.text())
@example("café, naïve, Straße")
@example("🦊🪁 👩‍👩‍👧 🇪🇺")
@example("漢字かな交じり文 한국어 العربية")
@example("\x00\t\r\n  \u200b\ufeff")
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_single_ids(tokenizer: Any) -> None:
    for token in SPECIAL_TOKENS:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_the_chat_template_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a storyteller."},
        {"role": "user", "content": " Hello \n"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": [{"type": "text", "text": "A story, please."}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>You are a storyteller.<|end|><|user|>Hello<|end|>"
        "<|assistant|>Hi!<|end|><|user|>A story, please.<|end|><|assistant|>"
    )
    assert not tokenizer.apply_chat_template(messages, tokenize=False).endswith("<|assistant|>")


def test_the_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("prompt", ["Once upon a time", "The little fox"])
def test_a_greedy_story_ends_by_itself(model: Any, tokenizer: Any, prompt: str) -> None:
    new = generate(model, tokenizer(prompt).input_ids)
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert new[-1] == tokenizer.eos_token_id
    assert text.count(". ") + text.count(".\n") >= 4, text


def test_an_answer_is_about_what_was_asked_for(model: Any, tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me a story about a robot and a kite."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    new = generate(model, tokenizer(text, add_special_tokens=False).input_ids)
    answer = tokenizer.decode(new, skip_special_tokens=True)
    assert new[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert "robot" in answer and "kite" in answer, answer


def test_the_whole_context_is_usable(model: Any, tokenizer: Any) -> None:
    """Text late in the context is predicted about as well as text early in it: every position has been trained."""
    story = generate(model, tokenizer("Once upon a time").input_ids)
    context = model.config.max_position_embeddings
    ids = torch.tensor([(([tokenizer.bos_token_id, *story]) * (context // len(story) + 1))[:context]])
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[-500:].mean() < losses[:500].mean() + 0.5
