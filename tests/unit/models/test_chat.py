from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CHAT_TEMPLATE, TinyFolder, save_tiny, tiny_spec
from viasd_calib.cli import main
from viasd_calib.errors import ModelError, PromptError, TemplateWarning
from viasd_calib.models import Verifier, encode_prompt, load_verifier
from viasd_calib.prompts import Prompt

TURN = [{"role": "user", "content": "w1"}]
LOOP = "{% for turn in messages %} {{ turn['content'] }}{% endfor %}"


def with_template(folder: Path, template: str) -> TinyFolder:
    save_tiny(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def with_templates(folder: Path, templates: Any) -> TinyFolder:
    """Several templates in the tokenizer's configuration, as Hermes has them."""
    save_tiny(folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    return folder


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def words(verifier: Verifier, turns: list[dict[str, str]]) -> list[str]:
    return list(verifier.tokenizer.convert_ids_to_tokens(verifier.encode_chat(turns)))


@pytest.mark.parametrize(
    "templates",
    [
        named(default=CHAT_TEMPLATE, tool_use="{{ other }}"),
        named(tool_use="{{ other }}", rag="x", default=CHAT_TEMPLATE),
        {"default": CHAT_TEMPLATE, "tool_use": "{{ other }}"},
    ],
)
def test_of_several_templates_the_default_is_taken(tmp_path: Path, templates: Any) -> None:
    one = load_verifier(str(save_tiny(tmp_path / "one")))
    several = load_verifier(str(with_templates(tmp_path / "several", templates)))
    assert words(several, TURN) == words(one, TURN) == ["<s>", "<user>", "w1", "<assistant>"]
    assert several.ref.tokenizer_sha256 == one.ref.tokenizer_sha256, "it is the same tokenizer with the same template"


def test_several_templates_in_files_of_their_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ other }}")
    assert words(load_verifier(str(folder)), TURN) == ["<s>", "<user>", "w1", "<assistant>"]


def test_another_default_is_another_tokenizer(tmp_path: Path) -> None:
    hashes = {
        load_verifier(str(with_templates(tmp_path / name, named(default=template, rag="x")))).ref.tokenizer_sha256
        for name, template in (("a", CHAT_TEMPLATE), ("b", LOOP))
    }
    assert len(hashes) == 2


def test_no_default_among_several_is_refused(tmp_path: Path) -> None:
    folder = with_templates(tmp_path, named(tool_use=CHAT_TEMPLATE, rag="x"))
    with pytest.raises(
        ModelError, match="has chat templates for rag, tool_use, and no default; give one of them the name"
    ):
        load_verifier(str(folder))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for turn in messages %}{{ turn", r"is not valid \(line 1: .*\); mend it in the tokenizer's folder"),
        ("\n{{ messages | nonsense }}", r"is not valid \(line 2: No filter named 'nonsense'\."),
        ("{% nonsense %}", "is not valid .*nonsense"),
    ],
)
def test_what_is_no_template_is_refused_at_once(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_verifier(str(with_template(tmp_path, template)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"refuses the conversation \(roles must alternate\); change"),
        ("{{ messages[7]['content'] }}", r"refuses the conversation \(.*\); change the conversation, or give"),
        ("{{ 1 + messages[0]['content'] }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", r"refuses the conversation \(division by zero\)"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", "refuses the conversation"),
        ("{% if false %}x{% endif %}", "writes nothing for the conversation; mend the template, or remove it"),
    ],
)
def test_a_template_that_fails_is_a_prompt_error(
    tmp_path: Path, template: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_template(tmp_path / "model", template)
    verifier = load_verifier(str(folder))
    with pytest.raises(PromptError, match=f"the verifier's chat template {reason}") as caught:
        verifier.encode_chat(TURN)
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match=f"prompt 'a': the verifier's chat template {reason}"):
        encode_prompt(verifier, Prompt(id="a", task="qa", turns=["w1"]), [], 4)
    spec = tiny_spec(folder, tmp_path)
    capsys.readouterr()
    assert main(["generate", "--spec", str(spec), "--prompt", "w1", "--max-new-tokens", "2"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")]
    assert "Traceback" not in "".join(said)


def test_a_refused_system_prompt_is_named(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
    )
    verifier = load_verifier(str(with_template(tmp_path, template)))
    assert words(verifier, TURN) == ["w1"]
    with pytest.raises(
        PromptError, match=r"\(System role not supported\); leave out the system prompt, put it into the"
    ):
        verifier.encode_chat([{"role": "system", "content": "w2"}, *TURN])


def test_the_beginning_written_twice_is_noticed(tmp_path: Path) -> None:
    twice = with_template(tmp_path / "twice", f"<s>{LOOP}".replace("<s>", "<s> <s>"))
    with pytest.warns(TemplateWarning, match="writes '<s>' twice at the beginning"):
        verifier = load_verifier(str(twice))
    assert words(verifier, TURN) == ["<s>", "<s>", "w1"], "as transformers reads it"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_verifier(str(save_tiny(tmp_path / "once")))


def test_what_the_template_is_told(tmp_path: Path) -> None:
    verifier = load_verifier(str(with_template(tmp_path, "{% if quick %} w3{% endif %}" + LOOP)))
    ids = verifier.encode_chat(TURN, {"quick": True})
    assert verifier.tokenizer.convert_ids_to_tokens(ids) == ["w3", "w1"]
