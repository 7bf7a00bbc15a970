"""What ``viasd generate`` prints is the decoded text, byte for byte; or its tiers, in colour or in lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, SPECIAL, VOCAB, save_tiny, tiny_spec
from viasd_calib.cli import main
from viasd_calib.cli.printing import print_answer, print_tiers
from viasd_calib.decoding.engine import load_engine

NASTY = [
    "[bold]", "[/]", "\r", "\n", "\x1b[31m", "\t", "\x07", "�", "🙂", "中" * 90, "é", " ", "\\[", ":smile:", "\x00",
    "\x85", "https://example.org", "w" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec for a verifier whose every word is one that consoles make something else of."""
    folder = tmp_path_factory.mktemp("nasty")
    words = [*SPECIAL, *NASTY]
    assert len(words) == VOCAB
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    save_tiny(folder / "verifier", eos=None)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder / "verifier")
    return tiny_spec(folder / "verifier", folder)


def words(spec: Path, prompt: str, *options: str) -> list[str]:
    return ["generate", "--spec", str(spec), "--prompt", prompt, "--max-new-tokens", "24", *options]


PROMPTS = ["[/]", "é 🙂 [bold]", "� \\[", ":smile:"]


def test_a_pipe_gets_the_decoded_text(spec: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    engine = load_engine(spec)
    said: set[int] = set()
    for prompt in PROMPTS:
        ids = engine.verifier.encode_chat([{"role": "user", "content": prompt}])
        tokens = engine.decoder("autoregressive").generate(ids, 24).tokens
        expected = str(engine.verifier.tokenizer.decode(tokens, skip_special_tokens=True))
        capfdbinary.readouterr()
        assert main(words(spec, prompt, "--audit", "strict")) == 0
        assert capfdbinary.readouterr().out == expected.encode() + b"\n"
        said.update(tokens)
    assert len(said) > 12  # most of the words are tried


def test_tiers_in_a_pipe_are_lines(spec: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(words(spec, PROMPTS[1], "--audit", "strict")) == 0
    text = capfdbinary.readouterr().out.decode()
    assert main(words(spec, PROMPTS[1], "--audit", "strict", "--show-tiers", "true")) == 0
    told = capfdbinary.readouterr()
    lines = [line.split("\t") for line in told.out.decode().removesuffix("\n").split("\n")]
    assert len(lines) in (24, 25)
    assert {tier for tier, _ in lines} <= {"accept", "regenerate", "escalate", "-"}
    assert "".join(json.loads(piece) for _, piece in lines) + "\n" == text
    assert b"24 tokens, " in told.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_spared_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print_answer([("[bold]a\x07b", "accept"), ("\r", None)])
    assert screen.getvalue() == "[bold]ab\n"


@pytest.mark.parametrize(("plain", "coloured"), [(False, True), (True, False)])
def test_tiers_in_a_terminal_are_colours_where_there_are_any(
    plain: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert print_tiers([("one", "accept"), ("two", "escalate"), ("", None)]) == 2
    assert ("\x1b[32mone" in screen.getvalue()) == coloured
    assert (screen.getvalue() == 'accept\t"one"\nescalate\t"two"\n') == plain


def test_half_of_a_surrogate_pair_is_printed(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    print_answer([("a\ud83d", "accept")])
    assert capfdbinary.readouterr().out == b"a\xed\xa0\xbd\n"


def test_a_temperature_that_overflows_is_refused(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(spec, "w1"), "--temperature", "1e-38"]) == 1
    assert "--temperature is 1e-38; give 0, which takes the most probable" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    program = (
        "import sys; from viasd_calib.cli import guarded; from viasd_calib.cli.printing import write_text; "
        "sys.exit(guarded(lambda: [write_text('x' * 70_000) for _ in range(99)] and None, debug=False))"
    )
    done = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None
    assert done.stderr is not None
    done.stdout.close()
    assert (done.stderr.read(), done.wait()) == (b"", 141)
    done.stderr.close()
