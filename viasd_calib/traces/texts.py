"""Reading traces back: texts, and texts padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from viasd_calib.traces.capture import Asked
from viasd_calib.traces.folder import read_rows


@dataclass(frozen=True)
class TraceText:
    """One text that q, or a policy in its place, wrote; n is the number of its generated tokens.

    Attributes:
        index: place in the data set, for caches.
        turn: of the prompt, from 0.
        ids: prompt and generated tokens, [length], long.
        prompt_length: tokens of the prompt.
        q_ids: q's most probable tokens at each generated place, the most probable first, [n, k], long.
        q_log_probs: their log-probabilities, [n, k], float32.
        p_token: what the draft model proposed, [n], long; -1 for no proposal, empty without a drafter.
        p_depth: drafted, unverified tokens before each proposal, [n], long.
        p_top_k: top ids [n, k] and log-probabilities [n, k] of p; None without a distribution.
        p_entropy: of p's whole distribution, in nats, [n].
        p_margin: of p's two most probable tokens, in nats, [n].
        normalised_sha256: of the prompt's normalised text; empty in traces of earlier releases.
    """

    index: int
    prompt_id: str
    prompt_sha256: str
    task: str
    turn: int
    ids: Tensor
    prompt_length: int
    q_ids: Tensor
    q_log_probs: Tensor
    p_token: Tensor
    p_depth: Tensor
    p_top_k: tuple[Tensor, Tensor] | None
    p_entropy: Tensor
    p_margin: Tensor
    normalised_sha256: str = ""

    @property
    def prompt_hash(self) -> str:
        """Of the prompt's normalised text, by which copies are one; of the text itself in earlier releases' traces."""
        return self.normalised_sha256 or self.prompt_sha256

    @property
    def generated(self) -> Tensor:
        """The generated tokens, [n]."""
        return self.ids[self.prompt_length :]

    @property
    def asked(self) -> Asked:
        """What it answers."""
        ids = self.ids[: self.prompt_length].tolist()
        return Asked(self.prompt_id, self.prompt_sha256, self.task, self.turn, ids, self.normalised_sha256)


@dataclass(frozen=True)
class TraceBatch:
    """Texts padded to one length.

    Attributes:
        indices: place of each text in the data set.
        ids: [batch, length], long, zeros after the shorter texts.
        predicts: whether the token after a place was generated, [batch, length], bool.
        q_ids: q's top tokens at the places that predict, flattened in row order, [places, k], long.
        q_log_probs: their log-probabilities, [places, k], float32.
    """

    indices: list[int]
    ids: Tensor
    predicts: Tensor
    q_ids: Tensor
    q_log_probs: Tensor

    @property
    def begin(self) -> int:
        """The first place that predicts in any of the texts."""
        return int(self.predicts.any(0).nonzero()[0])

    def to(self, device: torch.device) -> TraceBatch:
        """The same batch on ``device``."""
        tensors = (self.ids, self.predicts, self.q_ids, self.q_log_probs)
        return TraceBatch(self.indices, *(tensor.to(device) for tensor in tensors))


def collate(texts: Sequence[TraceText]) -> TraceBatch:
    """Pad texts to the longest of them."""
    ids = pad_sequence([text.ids for text in texts], batch_first=True)  # [batch, length]
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        predicts[row, text.prompt_length - 1 : len(text.ids) - 1] = True
    return TraceBatch(
        [text.index for text in texts],
        ids,
        predicts,
        torch.cat([text.q_ids for text in texts]),
        torch.cat([text.q_log_probs for text in texts]),
    )


def read_texts(folder: Path) -> list[TraceText]:
    """Every text of a trace folder that is asked, in the order of its manifest.

    Raises:
        TraceError: no shard, or a damaged one.
    """
    return [_text(index, row) for index, row in enumerate(read_rows(Path(folder)))]


def _text(index: int, row: dict[str, Any]) -> TraceText:
    n = len(row["tokens"])
    p_top_k = None
    if row["p_ids"]:
        p_top_k = (
            torch.tensor(row["p_ids"]).view(n, -1),
            torch.tensor(row["p_log_probs"], dtype=torch.float32).view(n, -1),
        )
    return TraceText(
        index=index,
        prompt_id=row["prompt_id"],
        prompt_sha256=row["prompt_sha256"],
        task=row["task"],
        turn=row["turn"],
        ids=torch.tensor(row["prompt_tokens"] + row["tokens"]),
        prompt_length=len(row["prompt_tokens"]),
        q_ids=torch.tensor(row["q_ids"]).view(n, -1),
        q_log_probs=torch.tensor(row["q_log_probs"], dtype=torch.float32).view(n, -1),
        p_token=torch.tensor(row["p_token"], dtype=torch.long),
        p_depth=torch.tensor(row["p_depth"], dtype=torch.long),
        p_top_k=p_top_k,
        p_entropy=torch.tensor(row["p_entropy"], dtype=torch.float32),
        p_margin=torch.tensor(row["p_margin"], dtype=torch.float32),
        normalised_sha256=row.get("normalised_sha256") or "",
    )
