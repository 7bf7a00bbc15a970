"""Learning with gates which sublayers of the frozen verifier make q', at a measured cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import sublayers_of
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import Route
from viasd_calib.traces.texts import TraceBatch
from viasd_calib.training.find_route import most_probable_within
from viasd_calib.training.hard_concrete import HardConcrete
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.student_module import StudentModule


class GateModule(StudentModule):
    """Learns one hard-concrete gate for each attention and MLP sublayer.

    Minimises L(z) + m (c(z) - t), with L the objective of q' whose sublayers are multiplied with drawn gates z, c the
    expected relative cost, t its target and m >= 0 a Lagrange multiplier that is ascended, m <- m + rate (c - t), as
    Louizos et al. (arXiv 1712.01312) with the constraint of Wang et al. (arXiv 1910.04732, section 3.3). t falls from 1
    to ``target_cost`` over the first half of ``route_steps``. Logs ``route_OBJECTIVE``, ``expected_cost`` and, on
    texts that are held back, ``agreement``.

    Args:
        options: of the fit.
        load: where the verifier comes from.
    """

    STAGE = "route"
    multiplier: Tensor
    shares: Tensor
    rest: Tensor
    always: Tensor

    def __init__(self, options: SlimVerifierOptions, load: LoadVerifier = load_verifier) -> None:
        super().__init__(options, load)
        self.gates: HardConcrete | None = None

    def begin(self, resumes: bool) -> None:
        """Measure what sublayers cost, and make a gate for each."""
        count = len(self.student.model.full_sublayers)
        costs = SublayerCosts(torch.ones(count), 0.0)
        if not resumes:
            self.narrow(None)
            costs = self.trainer.strategy.broadcast(self.student.measured_costs())  # times differ by process
        self.gates = HardConcrete(count)
        self.register_buffer("shares", costs.shares)  # [sublayers], of a full pass
        self.register_buffer("rest", torch.tensor(costs.rest))
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("always", self.student.always_kept, persistent=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the neurons' order that the checkpoint holds."""
        self.narrow(checkpoint["state_dict"].get("neuron_orders"))
        self.check_state(checkpoint["state_dict"])

    def training_step(self, batch: TraceBatch, batch_idx: int) -> Tensor:
        """The objective of q' with drawn gates, and the multiplier times what it costs beyond the target."""
        assert self.gates is not None, "made by configure_model"
        seed = self.draw_seed(batch_idx)
        noise = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.where(self.always, 1.0, self.gates.sample(noise))
        logits = self.student.logits(batch, self.student.model.slim_sublayers, seed, drawn)
        cost = self.expected_cost()
        self.log("expected_cost", cost, prog_bar=True, batch_size=len(batch.q_ids))
        return self.loss(batch, logits) + self.multiplier * (cost - self.target_now())

    def expected_cost(self) -> Tensor:
        """Cost of a slim pass by the gates' chances to be open, over that of a full one: []."""
        return (self.chances() * self.shares).sum() + self.rest

    def chances(self) -> Tensor:
        """Chance of each sublayer to be kept: [sublayers], 0 to 1."""
        assert self.gates is not None, "made by configure_model"
        return torch.where(self.always, 1.0, self.gates.chance_open())

    def target_now(self) -> float:
        """The cost target of this step, 1 at first and ``target_cost`` from half of the steps on."""
        share = min(1.0, 2 * self.global_step / max(self.options.route_steps, 1))
        return 1 - share * (1 - self.options.target_cost)

    def configure_optimizers(self) -> Optimizer:
        """Adam over the gates."""
        return Adam(self.parameters(), lr=self.options.route_learning_rate)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Descend with the gates, and ascend with the multiplier."""
        excess = self.expected_cost().detach() - self.target_now()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.multiplier.add_(10 * self.options.cost_learning_rate * excess).clamp_(min=0)

    @property
    def route(self) -> Route:
        """The discrete route: the most probable sublayers, as long as their cost is within the target."""
        costs = SublayerCosts(self.shares, float(self.rest))
        return self.student.route(
            most_probable_within(self.chances().detach(), self.always, costs, self.options.target_cost)
        )

    def sublayers(self) -> Sequence[Sublayer]:
        """What q' runs under the route as the gates are now, without bridges."""
        model = self.student.model
        return sublayers_of(model.slim_layers, model.layer_types, self.route)
