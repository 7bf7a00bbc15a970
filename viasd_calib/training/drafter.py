"""Training the shallow drafter on q's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from viasd_calib.choices import SMOLLM2
from viasd_calib.draft.build import SHALLOW_FILE, SHALLOW_TENSORS, describe_shallow, name_draft
from viasd_calib.draft.shallow import ShallowModel, load_shallow, save_shallow, unrolled_states
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier
from viasd_calib.replay.teacher import TappedStates, refuse_foreign_traces
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.head_vocab import choose_tokens
from viasd_calib.spec import ShallowDraft, ShallowShape
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.texts import TraceBatch
from viasd_calib.training.closed_form import fit_stand_in
from viasd_calib.training.losses.restricted_cross_entropy import restricted_cross_entropy


class DrafterModule(LightningModule):
    """Distils a shallow drafter from traces that hold q's top k.

    It begins in closed form (:mod:`viasd_calib.training.closed_form`), or where an earlier drafter ended, and is
    trained as it will run: after 0, 1, ... of its own unverified tokens (EAGLE-3's training-time test, arXiv
    2503.01840).

    Args:
        verifier: name or path of the verifier.
        num_layers: layers of the drafter, begun as the verifier's last ones.
        head_vocab: output tokens, the most frequent ones of the traces.
        taps: after how many of the verifier's layers its residual stream is read.
        closed_form_texts: texts the closed-form start is fitted on; 0 for none.
        start: folder of a drafter of the same shape to go on from, in place of the closed form; so a drafter is
            brought to another domain.
        depths: how many depths to train, by epoch; the last entry holds from there on.
        hard_share: weight of q's choice against its distribution.
        learning_rate: peak of a cosine with warm-up.
        weight_decay: of AdamW.
        out: folder the drafter is written to after each validation; None writes nothing.
    """

    def __init__(
        self,
        verifier: str = SMOLLM2,
        num_layers: int = 3,
        head_vocab: int = 8192,
        taps: Sequence[int] = (10, 20, 30),
        closed_form_texts: int = 400,
        start: str | None = None,
        depths: Sequence[int] = (1, 2, 3),
        hard_share: float = 0.5,
        learning_rate: float = 6e-4,
        weight_decay: float = 0.01,
        out: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.depths = tuple(depths)
        self.hard_share = hard_share
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.out = Path(out) if out else None
        self._verifier_name = verifier
        self.shape = ShallowShape(num_layers=num_layers, head_vocab=head_vocab, taps=tuple(taps))
        self.closed_form_texts = closed_form_texts
        self.start = start
        self._teacher: TappedStates | None = None
        self.drafter: ShallowModel | None = None
        self.agreement = torch.nn.ModuleList(MeanMetric() for _ in range(max(depths)))

    def configure_model(self) -> None:
        """Load the verifier and shape the drafter; called by Lightning."""
        if self.drafter is not None:
            return
        loaded = load_verifier(self._verifier_name, device=str(self.device))
        refuse_foreign_traces(self.trainer, loaded.ref)
        verifier = RoutedModel(loaded.model)
        self._teacher = TappedStates(verifier, self.shape.taps)
        self.drafter = self._begun(verifier)
        self.drafter.requires_grad_(True)
        self.drafter.train()  # its layers begin as copies from a verifier that is in eval mode

    def _begun(self, verifier: RoutedModel) -> ShallowModel:
        """The drafter as training finds it: an earlier one, or the closed form."""
        if self.start is not None:
            return load_shallow(verifier, self._shape_at(Path(self.start)), Path(self.start) / SHALLOW_TENSORS)
        drafter = ShallowModel(verifier, self.shape)
        data: TraceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        drafter.use_vocabulary(choose_tokens(data.token_counts(), self.shape.head_vocab, verifier.config.vocab_size))
        if self.closed_form_texts and self.trainer.ckpt_path is None:  # a resumed run has left its start after
            fit_stand_in(drafter, verifier, (text.ids for text in data.drawn_texts(self.closed_form_texts)))
        return drafter

    def _shape_at(self, folder: Path) -> ShallowShape:
        """The shape of the drafter in ``folder``.

        Raises:
            ModelError: no shallow drafter lies there, or one of another shape.
        """
        spec, _ = name_draft(str(folder))
        if not isinstance(spec, ShallowDraft):
            raise ModelError(f"start: {folder} holds no shallow drafter ({SHALLOW_FILE}); name a folder that does")
        found = ShallowShape(num_layers=spec.num_layers, head_vocab=spec.head_vocab, taps=spec.taps)
        if found != self.shape:
            raise ModelError(
                f"start: the drafter in {folder} is of shape {found!r}; set num_layers, head_vocab and taps so"
            )
        return found

    def _parts(self) -> tuple[ShallowModel, TappedStates]:
        if self.drafter is None or self._teacher is None:
            raise RuntimeError("the drafter is made by configure_model, which the trainer calls")
        return self.drafter, self._teacher

    def _logits(self, batch: TraceBatch, depths: int) -> list[Tensor]:
        """Drafter logits at the places that predict, by depth: [places, head vocabulary] each."""
        drafter, teacher = self._parts()
        tapped = teacher.of(batch.indices, batch.ids)  # [batch, length, taps, hidden]
        unrolled = unrolled_states(drafter, batch.ids, tapped, depths)
        return [drafter.logits(states[batch.predicts]) for states in unrolled]

    def _places(self, ids: Tensor) -> Tensor:
        """Verifier ids as places in the head's vocabulary; -1 for those outside."""
        vocabulary: Tensor = self._parts()[0].vocabulary
        place = torch.searchsorted(vocabulary, ids.contiguous()).clamp(max=len(vocabulary) - 1)
        return torch.where(vocabulary[place] == ids, place, -1)

    def training_step(self, batch: TraceBatch, _batch_idx: int) -> Tensor:
        """Mean cross entropy over depths."""
        depths = self.depths[min(self.current_epoch, len(self.depths) - 1)]
        places = self._places(batch.q_ids)
        losses = [
            restricted_cross_entropy(places, batch.q_log_probs, logits, self.hard_share).mean()
            for logits in self._logits(batch, depths)
        ]
        loss = torch.stack(losses).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(places))
        return loss

    def validation_step(self, batch: TraceBatch, _batch_idx: int) -> None:
        """Share of greedy proposals that are q's choice, by depth; tokens outside the head count as wrong."""
        choices = self._places(batch.q_ids[:, 0])
        for depth, logits in enumerate(self._logits(batch, len(self.agreement))):
            metric: Any = self.agreement[depth]
            metric.update((logits.argmax(-1) == choices).float())
            self.log(
                f"agreement_depth_{depth}",
                metric,
                prog_bar=depth == 0,
                on_epoch=True,
                batch_size=len(choices),
            )

    def on_validation_epoch_end(self) -> None:
        """Write the drafter."""
        if self.out is not None and not self.trainer.sanity_checking:
            save_shallow(self._parts()[0], self.out / SHALLOW_TENSORS)
            describe_shallow(self.out, self.shape)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The verifier is not part of the module's state; assert that it stays so."""
        assert not any("_verifier" in name for name in checkpoint["state_dict"]), "frozen weights in a checkpoint"

    def configure_optimizers(self) -> Any:
        """AdamW under a cosine with 3 % warm-up."""
        optimizer = torch.optim.AdamW(
            self._parts()[0].parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.95),
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.03,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
