"""Ids and special tokens equal to transformers' AutoTokenizer, for the ways in which model folders declare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from llorch_demo import MODEL_DIR
from tests.support import tokenizers as small
from worker.model_files import ModelFilesError
from worker.tokenizer import ModelTokenizer

PROMPTS = ["", "hello world", "Once upon a time", " <s> and </s> inside", "é😀 \n\t x", "<|im_start|>user", "a" * 3000]


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def folder(path: Path, tokenizer: Tokenizer, config: dict[str, Any], map_: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if map_ is not None:
        (path / "special_tokens_map.json").write_text(json.dumps(map_))
    return path


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CASES: dict[str, tuple[Tokenizer, dict[str, Any], dict[str, Any] | None]] = {
    "plain": (small.byte_level(), NAMED, None),
    "bos": (with_bos(small.byte_level()), NAMED, None),
    "add_bos_in_config_has_no_say": (small.byte_level(), {**NAMED, "add_bos_token": True}, None),
    "bos_though_config_says_no": (with_bos(small.byte_level()), {**NAMED, "add_bos_token": False}, None),
    "objects": (
        with_bos(small.byte_level()),
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}},
        None,
    ),
    "new_special_tokens": (
        small.byte_level(),
        {**NAMED, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        None,
    ),
    "map_file": (small.byte_level(), {}, {**NAMED, "additional_special_tokens": ["<|im_start|>"]}),
    "added_tokens_decoder": (
        small.byte_level(),
        {
            **NAMED,
            "added_tokens_decoder": {
                "267": {
                    "content": "<|im_start|>",
                    "special": True,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                }
            },
        },
        None,
    ),
    "llama2": (with_bos(small.byte_fallback(strip=True)), NAMED, None),
    "gemma": (with_bos(small.byte_fallback(strip=False)), NAMED, None),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_equal_to_transformers(tmp_path: Path, case: str) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path / "m", *CASES[case])
    theirs = AutoTokenizer.from_pretrained(path)
    ours = ModelTokenizer.load(path)
    for prompt in PROMPTS:
        assert ours.encode_prompt(prompt) == theirs(prompt)["input_ids"], prompt
        assert ours.encode_rendered(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"], prompt
    assert ours.named_tokens == theirs.special_tokens_map
    assert set(theirs.all_special_ids) <= ours.special_ids
    ids = list(range(len(theirs)))
    detokenizer = ours.detokenizer([])
    text = "".join(detokenizer.step(token) for token in ids[:12])
    assert text + detokenizer.flush() == theirs.decode(ids[:12], skip_special_tokens=True)


def test_the_demo_model_equals_transformers() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(MODEL_DIR)
    ours = ModelTokenizer.load(MODEL_DIR)
    for prompt in PROMPTS:
        assert ours.encode_prompt(prompt) == theirs(prompt)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.token_text(theirs.eos_token_id) == theirs.eos_token


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = small.byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    ours = ModelTokenizer.load(folder(tmp_path, tokenizer, NAMED))
    assert len(ours.encode_prompt("abcdefgh")) == 8


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({}, None, None),
        ({"chat_template": "in config"}, None, "in config"),
        ({"chat_template": "in config"}, "in a file", "in a file"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None, None),
    ],
)
def test_where_the_chat_template_comes_from(
    tmp_path: Path, config: dict[str, Any], file: str | None, expected: str | None
) -> None:
    path = folder(tmp_path, small.byte_level(), config)
    if file is not None:
        (path / "chat_template.jinja").write_text(file)
    assert ModelTokenizer.load(path).chat_template == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff"])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = folder(tmp_path, small.byte_level(), {})
    (path / name).write_bytes(content)
    with pytest.raises(ModelFilesError, match=name.replace(".", r"\.")):
        ModelTokenizer.load(path)
