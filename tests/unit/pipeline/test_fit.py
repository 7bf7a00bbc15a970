"""What ``viasd fit`` fits gates on."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import TinyFolder, tiny_prompts, tiny_traces
from viasd_calib.pipeline.fit_once import gate_texts


def test_texts_for_gates_are_of_every_split_and_a_third_is_held_back(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    tiny_traces(tiny_folder, tmp_path, 48, max_new_tokens=4, batch_size=24)
    data = gate_texts([str(tmp_path)], seed=0)
    fitted = {text.prompt_sha256 for text in data.training_texts()}
    held_back = {text.prompt_sha256 for text in data.validation_texts()}
    assert fitted | held_back == {prompt.sha256 for prompt in tiny_prompts(48)}
    assert not fitted & held_back
    assert 0.15 < len(held_back) / 48 < 0.5
