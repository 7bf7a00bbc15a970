"""Distilling the slim verifier on what the frozen verifier wrote: the parts of a route that is fixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from viasd_calib.errors import CalibrationError
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.slim.parts.adapter import adapted_layers
from viasd_calib.slim.parts.base import fit_parts, memory_words, part_named
from viasd_calib.slim.parts.bridges import new_bridges
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import AddedMemory, Route
from viasd_calib.traces.texts import TraceBatch
from viasd_calib.training.find_route import find_route
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.student_module import StudentModule

LARGEST_SHARE = 16
"""A bound on memory above it is in bytes."""
WARM_UP_STEPS = 20
LAST_SHARE = 0.1
"""Learning rates rise over the first steps, and end at this share of their peaks."""


def rate_share(step: int, steps: float) -> float:
    """Share of its peak that a learning rate has: a linear warm-up, then linearly down to ``LAST_SHARE``.

    Args:
        step: from 0.
        steps: of the whole training; infinite where it has no end.

    Example:
        >>> [round(rate_share(step, 100), 2) for step in (0, 19, 50, 99)]
        [0.05, 0.81, 0.5, 0.1]
    """
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(LAST_SHARE, 1 - step / max(steps, 1))


def check_memory(taken: AddedMemory, most: float | None) -> None:
    """Refuse a slim verifier that takes more memory than is allowed.

    Args:
        taken: beside q.
        most: a share of q's weights up to ``LARGEST_SHARE``, above that bytes; None for any.

    Raises:
        CalibrationError: it takes more.
    """
    if most is None or (taken.share if most <= LARGEST_SHARE else taken.bytes) <= most:
        return
    raise CalibrationError(
        f"the slim verifier would take {memory_words(taken)}, and memory allows {most:g}; raise --model.memory, or "
        "give fewer sublayers low bits, or 4 in place of 8"
    )


class DistillationModule(StudentModule):
    """Distils bridges, an adapter and further parts on the sublayers that a route keeps.

    The route and its bridges in closed form are found when Lightning configures the module
    (:mod:`viasd_calib.training.find_route`); a checkpoint brings them with it. Adam minimises the objective, with a
    learning rate each for adapter and the rest, which warm up and fall (:func:`rate_share`). Clip gradients with
    ``Trainer(gradient_clip_val=1.0)``, as ``viasd fit`` does. Logs ``adapter_OBJECTIVE`` and, on texts that are held
    back, ``agreement``.

    Args:
        options: of the fit.
        load: where the verifier comes from.
        learned: the route that gates learned; None for the options' choice.
        neuron_orders: of narrow MLPs, [narrow layers, intermediate], long; None ranks them.
        folder: of the fit, where parts leave what they have measured; None for nowhere.
    """

    STAGE = "adapter"
    kept: Tensor
    earlier_steps: Tensor

    def __init__(
        self,
        options: SlimVerifierOptions,
        load: LoadVerifier = load_verifier,
        learned: Route | None = None,
        neuron_orders: Tensor | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(options, load)
        self.strict_loading = False  # the frozen layers that the adapter sits on are no part of a checkpoint
        self._learned = learned
        self._neuron_orders = neuron_orders
        self._folder = folder
        self.slim_layers: nn.ModuleList | None = None
        self.bridges: nn.ModuleDict | None = None
        self._further: dict[str, Any] = {}
        self.register_buffer("earlier_steps", torch.zeros((), dtype=torch.long))

    def begin(self, resumes: bool) -> None:
        """Find the route and its bridges, fit further parts, and make the adapter."""
        if resumes:
            return
        self.narrow(self._neuron_orders)
        found = find_route(self.student, self.options, self.texts, self._learned)
        self._take(*self.trainer.strategy.broadcast(found))  # rounding must not part the processes

    def _take(self, route: Route, bridges: nn.ModuleDict | None) -> None:
        """Train these bridges, further parts, and an adapter on what the route keeps."""
        options, student = self.options, self.student
        self.register_buffer("kept", student.kept(route).to(self.device))
        if options.parts:
            folder = self._folder if self.trainer.is_global_zero else None  # whose parts all processes take
            fitted = fit_parts(student.fit_inputs(route, self.texts, folder), options.further_options)
            self._further = self.trainer.strategy.broadcast(fitted)
        self.further = nn.ModuleDict({name: one for name, one in self._further.items() if isinstance(one, nn.Module)})
        self.bridges = bridges
        if options.rank != 0:
            layers = student.model.slim_layers
            adapted = adapted_layers(layers, options.rank, options.adapter_alpha, options.targets, options.adapter_kind)
            self.slim_layers = adapted.train().requires_grad_(False)  # copied from a verifier that is in eval mode
        held = {"bridges": bridges, "adapter": self.slim_layers, **self._further}
        student.install(route, held)
        check_memory(student.model.memory, options.memory)
        for name, one in held.items():
            for parameter in part_named(name).parameters(one, route) if one is not None else ():
                parameter.requires_grad_(True)

    @property
    def route(self) -> Route:
        """The route, without its tensors."""
        return self.student.route(self.kept)

    def sublayers(self) -> Sequence[Sublayer]:
        """What q' runs: the kept sublayers with their adapters, the bridges, and what further parts made of them."""
        return self.student.model.slim_sublayers

    def slim_parts(self, head_ids: Tensor | None = None) -> dict[str, object]:
        """What the parts of the route hold, ready to decode with.

        Args:
            head_ids: as :meth:`~viasd_calib.training.student.Student.head_ids` gives them.
        """
        skipped = self.route.mlp_skip
        widths = {layer: kept for layer, kept in self.student.widths.items() if layer not in skipped}
        return {
            "mlp_keep": widths or None,
            "bridges": None if self.bridges is None else self.bridges.eval(),
            "head_vocab": head_ids,
            "adapter": None if self.slim_layers is None else self.slim_layers.eval(),
            **{name: one.eval() if isinstance(one, nn.Module) else one for name, one in self._further.items()},
        }

    def training_step(self, batch: TraceBatch, batch_idx: int) -> Tensor | None:
        """The objective of q'; None where nothing is trained."""
        if not self.trained():
            return None
        return self.loss(batch, self.student.logits(batch, self.sublayers(), self.draw_seed(batch_idx)))

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: one for name, one in self.named_parameters() if one.requires_grad}

    def configure_optimizers(self) -> Any:
        """Adam over adapter, bridges and further parts, whose rates a schedule over all steps scales."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, one in self.trained().items():
            of_adapter = name.startswith("slim_layers.")
            rate = self.options.adapter_learning_rate if of_adapter else self.options.bridge_learning_rate
            groups.setdefault(rate, []).append(one)
        if not groups:
            return None
        optimizer = Adam([{"params": one, "lr": rate} for rate, one in groups.items()])
        earlier = int(self.earlier_steps)
        steps = earlier + self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: rate_share(earlier + step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Begin at the schedule's rates: an optimizer that goes on from another training's has those of its end."""
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainable state alone, with what it belongs to: route, order of neurons, bridges, adapter, further parts."""
        whole, trained = super().state_dict(*args, **kwargs), self.trained()
        frozen = ("slim_layers.", "further.")
        return {name: one for name, one in whole.items() if name in trained or not name.startswith(frozen)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the route that the checkpoint holds, and make its bridges and adapter for their tensors.

        Further parts are fitted again, and then given what was trained of them.
        """
        state = checkpoint["state_dict"]
        self.narrow(state.get("neuron_orders"))
        route, options = self.student.route(state["kept"]), self.options
        hidden = self.student.model.config.hidden_size
        self._take(
            route, new_bridges(route, hidden, options.bridge_rank, options.bridge_carry) if options.bridged else None
        )
        self.check_state(state)
