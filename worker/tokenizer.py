"""A model's tokenizer without transformers: text to ids as `AutoTokenizer` would, single ids to text, detokenizers.

Read `ModelTokenizer.load` first. Calls into it are blocking; long prompts belong in a thread (the library releases the
GIL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from worker.detokenizer import Detokenizer
from worker.model_files import ModelFilesError, read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_TEXTS_CACHED = 16_384


class ModelTokenizer:
    """Tokenizer and chat template of one model folder.

    As in transformers 5, tokenizer.json decides alone which special tokens a plain prompt gets (its post-processor);
    `add_bos_token` in tokenizer_config.json has no say. A rendered chat gets none: the template wrote them.
    """

    def __init__(self, tokenizer: Tokenizer, named: Mapping[str, str], chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self.named_tokens = dict(named)
        """`bos_token`, `eos_token`, ...: the variables that chat templates use."""
        self.chat_template = chat_template
        """Jinja source; None where the model has none."""
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.token_text = lru_cache(TOKEN_TEXTS_CACHED)(self._token_text)
        """Text of a single id, special tokens by their names; a part of a character is U+FFFD."""

    @classmethod
    def load(cls, folder: Path) -> ModelTokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

        Raises ModelFilesError naming the file that is wrong.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelFilesError(f"{path} can't be read as a tokenizer: download or copy the file again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config = {**config, **read_json(folder / "special_tokens_map.json")}
        tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        _add_configured_tokens(tokenizer, config)
        named = {name: text for name in NAMED_TOKENS if (text := _content(config.get(name))) is not None}
        return cls(tokenizer, named, _chat_template(folder, config))

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's own vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the special tokens that the tokenizer adds to one (a BOS, mostly)."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a chat that the template rendered."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for one answer to this prompt."""
        return Detokenizer(self._tokenizer, self.special_ids, prompt_token_ids)

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _add_configured_tokens(tokenizer: Tokenizer, config: Mapping[str, object]) -> None:
    """Tokens that tokenizer_config.json names: transformers adds the missing ones and marks the named ones special."""
    declared = config.get("added_tokens_decoder")
    entries: list[tuple[int, dict[str, object]]] = []
    if isinstance(declared, dict):
        entries = sorted((int(index), entry) for index, entry in declared.items() if isinstance(entry, dict))
    known = tokenizer.get_added_tokens_decoder()
    for index, entry in entries:
        content = entry.get("content")
        if index not in known and isinstance(content, str):
            flags = {flag: entry.get(flag) is True for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            special = entry.get("special") is True
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(content, special=special, **flags)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [*extra.values()] if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    already = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for value in [*(config.get(name) for name in NAMED_TOKENS), *listed]:
        content = _content(value)
        if content is not None and content not in already:
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _content(value: object) -> str | None:
    """A token in tokenizer_config.json is a string or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The default template: chat_template.jinja before tokenizer_config.json, as transformers prefers them."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"can't read {path}: copy the file again") from error
    template = config.get("chat_template")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None
