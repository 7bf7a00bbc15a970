"""Texts to decode, with all that decoding depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from tests.strategies import families, gate_sets, routes, token_lists
from tests.tiny import (
    DRAFTERS,
    VOCAB,
    constant_gate,
    letter_tokenizer,
    make_drafter,
    random_bridges,
    transformers_text,
    wide_model,
)
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import Drafter
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Audit, Decoding, Gates, Route

TOKENIZER = letter_tokenizer()
METHODS = ("autoregressive", "speculative", "strict", "tolerant", "off")
"""What :meth:`Case.named` knows: two methods, and three-tier decoding by its audit."""


@dataclass
class Case:
    """All that decoding one text depends on."""

    seed: int
    route: Route
    drafter_kind: str
    gates: Gates
    draft_length: int
    max_pending: int
    prompt: list[int]
    count: int
    eos: frozenset[int] = frozenset()
    family: str = "llama"
    head_ids: list[int] | None = None
    """Output tokens of q'; None for all."""
    carry: bool = False
    """Whether q' has bridges, which carry the stream from place to place."""

    @property
    def model(self) -> PreTrainedModel:
        return wide_model(self.seed, self.family)

    @property
    def verifier(self) -> RoutedModel:
        return RoutedModel(self.model, self.route, self.slim_parts)

    @property
    def slim_parts(self) -> dict[str, object]:
        """What q' has of its own."""
        head_ids = None if self.head_ids is None else torch.tensor(self.head_ids)
        bridges = random_bridges(self.route, carry=True) if self.carry else nn.ModuleDict()
        return {"bridges": bridges.to(self.model.dtype), "head_vocab": head_ids}

    @property
    def drafter(self) -> Drafter:
        return make_drafter(self.drafter_kind, self.verifier, self.seed, self.family)

    @property
    def expected(self) -> list[int]:
        """The verifier's own text, by transformers."""
        return transformers_text(self.model, self.prompt, self.count, self.eos)

    def method(self, audit: Audit = "strict", tolerance: float = 0.5) -> ThreeTier:
        settings = Decoding(
            draft_length=self.draft_length, max_pending=self.max_pending, audit=audit, tolerance=tolerance
        )
        return ThreeTier.from_spec(self.gates, settings)

    def named(self, name: str) -> Strategy:
        """One of ``METHODS``."""
        if name == "autoregressive":
            return Autoregressive()
        if name == "speculative":
            return Speculative(self.draft_length)
        audit: Audit = "strict" if name == "strict" else "off" if name == "off" else "tolerant"
        return self.method(audit)

    def decoder(self, method: Strategy | str, sampling: Sampling | None = None) -> Decoder:
        chosen = self.named(method) if isinstance(method, str) else method
        return Decoder(self.verifier, self.drafter, chosen, self.eos, sampling, tokenizer=TOKENIZER)

    def generate(self, method: Strategy) -> Generation:
        return self.decoder(method).generate(self.prompt, self.count)


def cases(**changes: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    """Any case; ``changes`` stand in place of the strategies for some of its parts."""
    parts: dict[str, st.SearchStrategy[Any]] = {
        "family": families(),
        "seed": st.integers(0, 3),
        "route": routes(),
        "drafter_kind": st.sampled_from(DRAFTERS),
        "gates": gate_sets(),
        "draft_length": st.integers(0, 7),
        "max_pending": st.integers(0, 14),
        "prompt": token_lists(1, 8),
        "count": st.integers(1, 16),
        "eos": st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        "carry": st.booleans(),
        "head_ids": st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=2).map(sorted),
    }
    return st.builds(Case, **{**parts, **changes})


def lively_case(seed: int, eos: frozenset[int] = frozenset()) -> Case:
    """A case in which every tier has something to do: a good drafter, a light route, trusting gates."""
    return Case(
        seed=seed % 4,
        route=Route(attention_skip=[2]),
        drafter_kind="near",
        gates=Gates(
            draft=constant_gate("draft_margin", 0.0).model_copy(update={"weight": [1.0]}),
            slim=constant_gate("slim_margin", 0.0).model_copy(update={"weight": [1.0]}),
            draft_accept_at=0.65,
            accept_at=0.55,
            regenerate_at=0.55,
        ),
        draft_length=4,
        max_pending=12,
        prompt=[seed % VOCAB, 3, 5 * seed % VOCAB],
        count=32,
        eos=eos,
    )
