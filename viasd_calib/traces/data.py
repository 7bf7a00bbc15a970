"""The Lightning data module of traced texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from viasd_calib.errors import TraceError
from viasd_calib.option_types import Count, Seed, ShareBelowOne, check_option
from viasd_calib.prompts import Split, SplitShares, split_of
from viasd_calib.spec import VerifierRef
from viasd_calib.traces.batches import LengthBatches, TraceLoader
from viasd_calib.traces.folder import read_manifest
from viasd_calib.traces.texts import TraceText, read_texts


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
