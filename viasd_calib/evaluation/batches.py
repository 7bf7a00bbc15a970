"""Batches of a benchmark: which prompts are decoded together, and what a batch size comes to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from viasd_calib.choices import BenchMethod
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.metrics import MethodResult
from viasd_calib.prompts import Prompt, step_names


class Batch(NamedTuple):
    """Prompts that are decoded together.

    Attributes:
        step: its name in a ledger, unique in a benchmark: what it came to hangs on nothing else.
    """

    step: str
    prompts: list[Prompt]


class BatchResult(BaseModel):
    """The methods at one batch size.

    Attributes:
        texts: of each batch; the last one may have fewer than the others.
        methods: as of single texts, with tokens and seconds of all texts of a batch together, and intervals over
            batches.
        peak_memory_bytes: of the process, by method, where layers are read for each pass; else empty.
    """

    model_config = ConfigDict(extra="forbid")

    texts: list[int]
    methods: dict[str, MethodResult]
    peak_memory_bytes: dict[str, int]

    @property
    def words(self) -> str:
        """How many texts there were in how many batches.

        Example:
            >>> BatchResult(texts=[4, 4, 2], methods={}, peak_memory_bytes={}).words
            '10 prompts in 3 batches'
        """
        count = len(self.texts)
        return f"{sum(self.texts)} prompts in {count} batch{'' if count == 1 else 'es'}"


def draw_batches(prompts: Sequence[Prompt], size: int, seed: int) -> list[Batch]:
    """All prompts in batches of ``size``; the last batch has the rest.

    Single texts stay in their order. Otherwise the order is drawn once for a seed, prompt by prompt, so that it is the
    same for every size and does not hang on the order of the file.
    """
    names = step_names(prompts)
    named = dict(zip(names, prompts, strict=True))
    if size == 1:
        return [Batch(name, [prompt]) for name, prompt in named.items()]
    order = sorted(names, key=lambda name: (random.Random(f"{seed}/{name}").random(), name))
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [Batch(f"{size} texts, {_hash(group)}", [named[name] for name in group]) for group in groups]


def _hash(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def check_batch_sizes(sizes: Collection[int], n_prompts: int, methods: Collection[BenchMethod]) -> None:
    """Refuse batches that the prompts do not fill once, and a method that decodes none.

    transformers' ``generate`` pads short prompts, and what it makes of the padding is not the text of each prompt alone
    in every family of models: it would be no yardstick.

    Raises:
        BenchError: naming the largest batch, or the method.
    """
    largest = max(sizes)
    if largest > 1 and "transformers" in methods:
        raise BenchError(
            f"--batch {largest}: transformers is measured with one text at a time; leave it out of --methods, or give "
            "--batch 1"
        )
    if largest > n_prompts:
        raise BenchError(
            f"--batch {largest} takes as many prompts at least, and there are {n_prompts}; give more, raise --limit, "
            "or decode smaller batches"
        )
