"""Text from tokens one by one is the text of decoding them at once, for every kind of tokenizer, cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny import letter_tokenizer, tiny_tokenizer
from viasd_calib.decoding.text_stream import CONFIRMED, TextStream, decodes_in_order

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in sorted({*"\nAé中🙂�".encode(), 0x80})]
PIECES = ["▁", "▁▁", "▁Hi", "a", "▁n't", "�", "中", " ", ".", "▁.", "[b]", "\r", "\x1b[0m"]


def wrapped(backend: Tokenizer, **changes: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **changes
    )


def pieces_of(*decoder: Any) -> Tokenizer:
    """SentencePiece's kind, with byte tokens."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *BYTES, *PIECES])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(list(decoder))
    return backend


def llama2() -> PreTrainedTokenizerBase:
    parts = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    return wrapped(pieces_of(*parts))


def gemma() -> PreTrainedTokenizerBase:
    tokenizer = wrapped(pieces_of(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()))
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<image>", special=False)])
    return tokenizer


def metaspace() -> PreTrainedTokenizerBase:
    backend = Tokenizer(Unigram([(word, -1.0) for word in [*SPECIAL, *PIECES]], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return wrapped(backend)


def metaspace_cleaned() -> PreTrainedTokenizerBase:
    words = ["▁'", "'s", "▁", "s", "▁?", "n't", "▁n't", "t", "'", "▁'m", "ve", "▁'ve"]
    backend = Tokenizer(Unigram([(word, -1.0) for word in [*SPECIAL, *PIECES, *words]], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return wrapped(backend, clean_up_tokenization_spaces=True)


def bert() -> PreTrainedTokenizerBase:
    words = [*SPECIAL, "do", "##n", "n't", "'", "s", "t", ".", ",", "?", "##.", "�", "中", "##文"]
    backend = Tokenizer(WordPiece({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return wrapped(backend, clean_up_tokenization_spaces=True)


def words_joined_and_cleaned() -> PreTrainedTokenizerBase:
    words = [*SPECIAL, "do", "n't", "'", "'s", "'ve", ".", ",", "?", "!", "s", "ve", "n", "t", "m", "'re"]
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    return wrapped(backend, clean_up_tokenization_spaces=True)


def suffixed() -> PreTrainedTokenizerBase:
    words = [*SPECIAL, "a", "a</w>", "bc</w>", "</w>", ".</w>"]
    backend = Tokenizer(BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    return wrapped(backend)


def byte_level() -> PreTrainedTokenizerBase:
    """Every byte, as Qwen and Llama 3 have them, and a token that is the replacement character itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = [known.pre_tokenize_str(text)[0][0] for text in ("�", "中", " the", "é")]
    backend = Tokenizer(BPE({word: place for place, word in enumerate([*SPECIAL, *alphabet, *whole])}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = wrapped(backend)
    tokenizer.add_tokens([AddedToken("<|é|>", special=True), AddedToken("<tool>", special=False)])
    return tokenizer


KNOWN: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama2": llama2,
    "gemma": gemma,
    "metaspace": metaspace,
    "metaspace cleaned": metaspace_cleaned,
    "bert": bert,
    "words joined and cleaned": words_joined_and_cleaned,
    "suffixed": suffixed,
    "byte level": byte_level,
    "words": tiny_tokenizer,
    "letters": letter_tokenizer,
}
TOKENIZERS = {name: make() for name, make in KNOWN.items()}


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool = True) -> list[str]:
    stream = TextStream(tokenizer, skip)
    return [*(stream.push(token) for token in ids), stream.finish()]


def ids_of(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[list[int]]:
    """Any tokens, and a few ids that the tokenizer does not have, as in padded vocabularies."""
    return st.lists(st.integers(0, len(tokenizer) + 2), max_size=24)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_are_the_whole_text(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    assert decodes_in_order(tokenizer)

    @settings(max_examples=60)
    @given(ids=ids_of(tokenizer))
    @example(ids=[])
    def check(ids: list[int]) -> None:
        for end in range(len(ids) + 1):  # cut anywhere
            expected = tokenizer.decode(ids[:end], skip_special_tokens=skip)
            assert "".join(streamed(tokenizer, ids[:end], skip)) == expected

    check()


def test_words_come_when_they_are_there() -> None:
    """What is held back is no more than it must be."""
    tokenizer = TOKENIZERS["byte level"]
    known = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [int(tokenizer.convert_tokens_to_ids(letter)) for letter in known.pre_tokenize_str("a é🙂b")[0][0]]
    assert streamed(tokenizer, ids) == ["a", " ", "", "é", "", "", "", "🙂", "b", ""]
    llama = TOKENIZERS["llama2"]
    hi, letter = (int(llama.convert_tokens_to_ids(word)) for word in ("▁Hi", "a"))
    eight = [int(llama.convert_tokens_to_ids(f"<0x{byte:02X}>")) for byte in "中".encode()]
    assert streamed(llama, [hi, *eight, letter, *eight]) == ["Hi", "", "", "", "中a", "", "", "", "中"]


def test_a_byte_run_that_breaks_is_not_told_before() -> None:
    """What ``DecodeStream`` gives out too early: é, and then a byte that makes the whole run invalid."""
    llama = TOKENIZERS["llama2"]
    ids = [int(llama.convert_tokens_to_ids(f"<0x{byte:02X}>")) for byte in (0xC3, 0xA9, 0xF0)]
    assert llama.decode(ids) == "���"
    assert "".join(streamed(llama, ids)) == "���"
    end = int(llama.convert_tokens_to_ids("</s>"))
    assert "".join(streamed(llama, [*ids[:2], end, ids[2]])) == llama.decode([*ids[:2], ids[2]])


class Joining:
    """A decoder in Python; nobody can tell what it does."""

    def decode(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("ab", "X")

    def decode_chain(self, tokens: list[str]) -> list[str]:
        return [self.decode(tokens)]


@pytest.mark.parametrize(
    "decoder",
    [
        lambda: decoders.Decoder.custom(Joining()),
        lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]),
        lambda: decoders.CTC(pad_token="a"),
    ],
    ids=["in Python", "across tokens", "CTC"],
)
@given(ids=st.lists(st.integers(0, 6), max_size=30))
def test_an_unknown_decoder_waits_until_the_text_stands(decoder: Callable[[], Any], ids: list[int]) -> None:
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate([*SPECIAL, "a", "b", "c", "d"])}, "<unk>"))
    tokenizer = wrapped(backend)
    tokenizer.backend_tokenizer.decoder = decoder()  # after wrapping, which copies: one in Python cannot be
    assert not decodes_in_order(tokenizer)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(pieces[: min(CONFIRMED, len(ids))])


def test_a_normalizer_changes_nothing() -> None:
    backend = pieces_of(decoders.ByteFallback(), decoders.Fuse())
    backend.normalizer = normalizers.NFC()
    assert decodes_in_order(wrapped(backend))
