"""Tokenizers of as many tokens as a tiny model has."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny.models import VOCAB

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
EOS = 2
CHAT_TEMPLATE = (
    "<s>{% for turn in messages %} <{{ turn['role'] }}> {{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token a word: a few special ones, then ``w0``, ``w1``, …"""
    words = {word: place for place, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(vocab - len(SPECIAL)))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, ``VOCAB`` tokens: a few letters, the space, the two bytes of é, and pieces of more than one."""
    letters = ["a", "b", "c", "d", "Ġ", "Ã", "©"]
    pairs = "a b|b c|c d|a a|Ġ a|Ġ b|ab c|Ã ©|d a|Ġa b|b b|d d|b a|c a|aa b|c c|Ġ d"
    merges = [(first, second) for first, second in (pair.split() for pair in pairs.split("|"))]
    words = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(BPE({word: place for place, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
