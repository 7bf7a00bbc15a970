"""Reading traces back: texts, batches of like length, and the Lightning data module."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from viasd_calib.errors import TraceError
from viasd_calib.option_types import Count, Seed, ShareBelowOne, check_option
from viasd_calib.prompts import Split, SplitShares, split_of
from viasd_calib.spec import VerifierRef
from viasd_calib.traces.capture import Asked
from viasd_calib.traces.folder import read_manifest, read_rows


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


class LengthBatches(Sampler[list[int]]):
    """Batches of texts of like length, at most ``max_tokens`` with padding; shuffled anew each epoch.

    It knows how far an epoch has come, so that a run that was stopped goes on with the batches that are left.

    Several processes that train together take turns: of n, process r is given batch r, r + n, r + 2n and so on of the
    one order. All are given equally many; fewer than n batches at the end of an epoch, others in each, are left out.

    Args:
        lengths: of each text, in tokens.
        max_tokens: of a batch, padding included; a longer text is a batch of its own.
        shuffle: give the batches in an order drawn from seed and epoch; otherwise by rising length.
        seed: of the order.
        processes: how many share the batches.
        rank: of this process among them.

    Raises:
        TraceError: there are fewer batches than processes.

    Example:
        >>> whole, second = (
        ...     LengthBatches([4, 2, 3, 5, 6], 6, shuffle=False, seed=0, processes=of, rank=of - 1) for of in (1, 2)
        ... )
        >>> list(whole), list(second)
        ([[1, 2], [0], [3], [4]], [[0], [4]])
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool,
        seed: int,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self.seed = seed
        self.processes = processes
        self.rank = rank
        self.epoch = 0
        self._given = 0  # batches of this epoch
        self._begin = 0  # batches that the next iteration leaves out
        if len(self) == 0:
            raise TraceError(
                f"{len(self._batches())} batches cannot be shared by {processes} processes; "
                "lower max_batch_tokens, capture more prompts, or train with fewer devices"
            )

    @property
    def sampler(self) -> LengthBatches:
        """Itself: Lightning looks for ``set_epoch`` after a batch sampler, not on it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before the first batch of every epoch, and of what is left of one."""
        if epoch != self.epoch:
            self.epoch, self._given, self._begin = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch for this process, also where an iteration begins in its middle."""
        return len(self._batches()) // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        # A generator begins with its first batch: Lightning makes the iterator before it sets the epoch.
        begin, self._begin = self._begin, 0
        mine = self._in_order()[self.rank :: self.processes][: len(self)]
        for given, batch in enumerate(mine[begin:], start=begin + 1):
            self._given = given
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """How far the epoch has come, and in which order of which batches."""
        return {"epoch": self.epoch, "given": self._given, "order_sha256": self._order_sha256()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on after what was given.

        Raises:
            TraceError: the state is of other texts, of another limit, or of another seed.
        """
        self.epoch = state["epoch"]
        if state["order_sha256"] != self._order_sha256():
            raise TraceError(
                "the checkpoint was made in another order of batches; resume with the traces, "
                "max_batch_tokens, validation_share, seed and number of processes it was made with"
            )
        self._given = self._begin = state["given"]

    def _order_sha256(self) -> str:
        return hashlib.sha256(str((self.processes, self._in_order())).encode()).hexdigest()

    def _in_order(self) -> list[list[int]]:
        batches = self._batches()
        if not self.shuffle:
            return batches
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def _batches(self) -> list[list[int]]:
        batches: list[list[int]] = []
        for place in sorted(range(len(self.lengths)), key=lambda place: (self.lengths[place], place)):
            fits = bool(batches) and (len(batches[-1]) + 1) * self.lengths[place] <= self.max_tokens
            if fits:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches


class TraceLoader:
    """Batches of texts, read in this process, whose state is how far the epoch has come.

    It is no :class:`torch.utils.data.DataLoader`: texts lie in memory, nothing is fetched ahead, so that what was given
    is what was trained on, and Lightning does not replace the batches by a distributed sampler's.

    Attributes:
        batch_sampler: the batches; Lightning looks under this name for what to tell the epoch.
    """

    def __init__(self, texts: Sequence[TraceText], batches: LengthBatches) -> None:
        self._texts = texts
        self.batch_sampler = batches

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[TraceBatch]:
        for places in self.batch_sampler:
            yield collate([self._texts[place] for place in places])

    def state_dict(self) -> dict[str, int | str]:
        """How far the epoch has come."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            TraceError: the state is of other batches.
        """
        self.batch_sampler.load_state_dict(state)


class TraceDataModule(LightningDataModule):
    """Texts of one split from trace folders, some held back for validation.

    Its state is that of the batches to learn from, so that a resumed run goes on in the middle of an epoch.

    Args:
        folders: trace folders.
        split: the split of prompts to learn from, by hash.
        shares: shares of the splits.
        validation_share: prompts of the split that are held back, by hash.
        max_batch_tokens: tokens of a batch, padding included.
        limit_tokens: most generated tokens to learn from, of whole texts drawn by hash of their prompts; one text at
            least. None takes all.
        seed: of the order of batches.
    """

    def __init__(
        self,
        folders: list[str],
        split: Split = "fit",
        shares: SplitShares | None = None,
        validation_share: float = 0.1,
        max_batch_tokens: int = 4096,
        limit_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_option("data.folders", folders, Sequence[str], TraceError)
        self.folders = [Path(folder) for folder in folders]
        self.split = split
        self.shares = shares or SplitShares()
        self.validation_share = validation_share
        self.max_batch_tokens = max_batch_tokens
        self.limit_tokens = limit_tokens
        self.seed = seed
        kinds: dict[str, Any] = {"split": Split, "shares": SplitShares, "validation_share": ShareBelowOne, "seed": Seed}
        for name, kind in (kinds | {"max_batch_tokens": Count, "limit_tokens": Count | None}).items():
            check_option(f"data.{name}", getattr(self, name), kind, TraceError)
        self.texts: list[TraceText] = []
        self._training: TraceLoader | None = None
        self._resume_from: Mapping[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the shards; called by Lightning.

        Raises:
            TraceError: the folders hold no text of the split, or traces of several verifiers.
        """
        if self.texts:
            return
        self.verifier_ref()
        texts = [text for folder in self.folders for text in read_texts(folder)]
        chosen = [text for text in texts if split_of(text.prompt_sha256, self.shares) == self.split]
        if not chosen:
            raise TraceError(
                f"no text of the split {self.split!r} in {[str(f) for f in self.folders]}; capture more prompts"
            )
        self.texts = [_renumbered(text, index) for index, text in enumerate(chosen)]

    def with_folders(self, further: Sequence[Path]) -> TraceDataModule:
        """The same of these folders and further ones, whose texts are not read yet."""
        return TraceDataModule(
            [str(folder) for folder in (*self.folders, *further)], self.split, self.shares, self.validation_share,
            self.max_batch_tokens, self.limit_tokens, self.seed,
        )  # fmt: skip

    def verifier_ref(self) -> VerifierRef:
        """The verifier whose traces these are."""
        refs = [read_manifest(folder).verifier for folder in self.folders]
        if not all(ref.says_the_same(other) for ref, other in combinations(refs, 2)):
            raise TraceError("the trace folders come from different verifiers; give folders of one verifier")
        return refs[0]

    def training_texts(self) -> list[TraceText]:
        """Texts to learn from."""
        texts = [text for text in self.texts if not self._held_back(text)]
        if self.limit_tokens is None:
            return texts
        drawn = _by_hash(texts)
        until = accumulate(len(text.generated) for text in drawn)
        within = [text for text, tokens in zip(drawn, until, strict=True) if tokens <= self.limit_tokens]
        return within or drawn[:1]

    def drawn_texts(self, count: int) -> list[TraceText]:
        """At most ``count`` texts to learn from, for what is fitted in closed form: drawn by hash of their prompts."""
        return _by_hash(self.training_texts())[:count]

    def validation_texts(self) -> list[TraceText]:
        """Texts held back; where the hash holds back none, the last text."""
        return [text for text in self.texts if self._held_back(text)] or self.texts[-1:]

    def _held_back(self, text: TraceText) -> bool:
        return int(text.prompt_sha256[-8:], 16) / 16**8 < self.validation_share

    def token_counts(self) -> Counter[int]:
        """How often q would choose each token in the texts to learn from, whoever wrote them."""
        counts: Counter[int] = Counter()
        for text in self.training_texts():
            counts.update(text.q_ids[:, 0].tolist())
        return counts

    def train_dataloader(self) -> TraceLoader:
        """Batches to learn from, in turns where several processes train; after a resume, first those that are left.

        Raises:
            TraceError: the checkpoint that was resumed from is of other batches, or there are fewer than processes.
        """
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        self._training = self._loader(self.training_texts(), shuffle=True, processes=processes, rank=rank)
        if self._resume_from is not None:
            self._training.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """How far the training epoch has come; empty before training."""
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches go on after the state.

        Lightning restores a loader's own state too, but only where no module has asked for the number of
        steps: that makes the loader earlier than the checkpoint's loops are read.
        """
        self._resume_from = state_dict

    def val_dataloader(self) -> TraceLoader:
        """Batches held back: all of them for every process, so that what is measured is what one process measures."""
        return self._loader(self.validation_texts(), shuffle=False)

    def _loader(self, texts: Sequence[TraceText], *, shuffle: bool, processes: int = 1, rank: int = 0) -> TraceLoader:
        batches = LengthBatches(
            [len(text.ids) for text in texts],
            self.max_batch_tokens,
            shuffle=shuffle,
            seed=self.seed,
            processes=processes,
            rank=rank,
        )
        return TraceLoader(texts, batches)


def _by_hash(texts: Iterable[TraceText]) -> list[TraceText]:
    return sorted(texts, key=lambda text: text.prompt_sha256)


def _renumbered(text: TraceText, index: int) -> TraceText:
    return TraceText(**{**text.__dict__, "index": index})
