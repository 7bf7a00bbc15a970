"""Let the verifier write user turns of its own, to widen the fit split of a recipe.

An instruction-tuned model that is shown only the opening of a user's turn goes on with a
plausible request (Xu et al. 2024, "Magpie", arXiv 2406.08464). Some turns here start from
nothing, the others from a few words of a task, so that every task of the recipe is met.
The result is a prompt file like any other; its prompts may feed a fit split, never a
calibrate or test split.

    python train/self_prompts.py --out runs/self_prompts.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from viasd_calib.choices import SMOLLM2
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.files import write_text
from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_ready
from viasd_calib.spec import Route
from viasd_calib.traces.generation import answer_batch

OPENINGS: dict[str, tuple[str, ...]] = {
    "chat": ("", "", "", "", "I want to", "Can you help me"),
    "summarization": (
        "Summarize the following text:\n\n",
        "Give the main points of this article.\n\n",
        "Please sum up this message in one sentence:\n\n",
    ),
    "translation": (
        "Translate the following German text to English: ",
        "Translate into French: ",
        'What does this mean in English? "El',
        "Translate this Italian sentence into English:\n\n",
        "How do I say this in Spanish: ",
    ),
    "math_reasoning": (
        "A farmer",
        "Solve this problem step by step: If a",
        "Maria buys",
        "A train",
        "How much does",
        "There are",
    ),
    "qa": ("What is", "Who", "Why do", "Context: ", "Which", "How does", "Where"),
    "coding": (
        "Write a Python function that",
        "Explain what this code does:\n\n```python\n",
        "Write an SQL query that",
        "What is wrong with this code?\n\n",
        "Write a shell command that",
    ),
}
"""First words of a user's turn, by task; an empty opening leaves the whole turn to the model."""

MIN_CHARACTERS = 12
SENTENCE_ENDS = (".", "?", "!", "`", "\n")


def user_turn_prefix(verifier: Verifier, opening: str) -> list[int]:
    """Ids of the chat template up to and including ``opening``, inside the user's turn."""
    marker = "\u2402"
    text = str(verifier.tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False))
    head = text[: text.index(marker)]
    return list(verifier.tokenizer(head + opening, add_special_tokens=False).input_ids)


def trim_to_sentence(text: str) -> str:
    """Cut a turn that met the length limit back to its last full sentence."""
    end = max(text.rfind(mark) for mark in SENTENCE_ENDS)
    return text[: end + 1].strip()


def sample_turns(
    verifier: Verifier, model: RoutedModel, opening: str, count: int, max_tokens: int, seed: int
) -> Iterator[str]:
    """Sample ``count`` user turns that begin with ``opening``.

    Args:
        model: the verifier as a backend runs it.
    """
    rows = answer_batch(
        model,
        [user_turn_prefix(verifier, opening)] * count,
        max_new_tokens=max_tokens,
        eos_ids=verifier.eos_ids,
        sampling=Sampling(temperature=1.0, top_k=40, seed=seed),
    )
    for tokens in (row.tokens for row in rows):
        turn = opening + str(verifier.tokenizer.decode(tokens, skip_special_tokens=True))
        yield turn.strip() if tokens[-1] in verifier.eos_ids else trim_to_sentence(turn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", default=SMOLLM2)
    parser.add_argument("--per-opening", type=int, default=96, help="turns to sample for each opening")
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    keep_freed_memory()
    verifier = load_verifier(args.verifier, dtype=fastest_dtype(torch.device("cpu")))
    model = load_ready(verifier.model, Route(), args.out.parent)
    openings = [(task, opening) for task, group in OPENINGS.items() for opening in group]
    records: dict[str, str] = {}
    for number, (task, opening) in enumerate(track(openings, description="sampling user turns")):
        for turn in sample_turns(verifier, model, opening, args.per_opening, args.max_tokens, args.seed + number):
            key = hashlib.sha256(turn.encode()).hexdigest()[:12]
            if len(turn) >= MIN_CHARACTERS:
                record = {"id": f"self/{key}", "task": task, "turns": [turn], "reference": None}
                records[key] = json.dumps(record, ensure_ascii=False)
    write_text(args.out, "\n".join(records.values()) + "\n")


if __name__ == "__main__":
    main()
