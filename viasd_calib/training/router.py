"""The router: learns which sublayers of the frozen verifier make q', then distils an adapter on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from viasd_calib.errors import CalibrationError
from viasd_calib.models import SMOLLM2, Verifier, load_verifier
from viasd_calib.slim.adapter import adapted_layers
from viasd_calib.slim.bridges import new_bridges
from viasd_calib.slim.cost import SublayerCosts, sublayer_costs
from viasd_calib.slim.forward import RoutedModel, SlimParts, Sublayer, sublayers_of
from viasd_calib.spec import Route
from viasd_calib.traces.data import TraceBatch, TraceDataModule
from viasd_calib.training.bridge_fit import fit_bridges
from viasd_calib.training.hard_concrete import HardConcrete
from viasd_calib.training.head_vocabulary import check_size, choose_tokens
from viasd_calib.training.objectives import top_k_tail_kl
from viasd_calib.training.spans import choose_span, span_routes
from viasd_calib.training.student import run_starts, student_states
from viasd_calib.training.teacher import read_text

Stage = Literal["route", "adapter"]
RouteChoice = Literal["span", "gates"]

ADAPTER_TARGETS = (
    *("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),  # the same ones where a family has fused them, as Phi-3 has
)
"""Modules an adapter sits on by default; a family has some of them."""


class RouterModule(LightningModule):
    """Learns a route and an adapter from traces; the verifier stays as it is.

    The route comes first. ``span`` takes the one run of layers whose bridge, fitted in closed form, leaves the least
    KL(q || q') (:mod:`viasd_calib.training.spans`). ``gates`` trains, for ``route_steps``, one hard-concrete gate for
    each attention and MLP sublayer on that divergence, with a multiplier that holds the expected relative cost at its
    target (a Lagrangian, ascended), makes the gates discrete, cheapest sufficient set first, and then fits the bridges.
    For the remaining steps bridges and LoRA weights on the kept sublayers are distilled on the same loss, each batch
    with a longest run of pending places of its own, so that q' is at home directly behind q and further on.

    Checkpoints hold gates, multiplier, route, bridges and adapter; never the verifier.

    Args:
        verifier: name or path of the verifier.
        target_cost: measured cost of a slim pass over that of a full one.
        route_choice: how the route is found.
        route_steps: optimiser steps for the gates; none are taken for a span.
        route_learning_rate: of the gates.
        cost_learning_rate: of the multiplier.
        bridges: whether skipped runs are bridged.
        bridge_rank: of the bridges; None for full ones.
        bridge_texts: texts that bridges are fitted on in closed form; a fifth of them judges spans.
        bridge_learning_rate: of the bridges, behind their closed form.
        adapter_rank: LoRA rank; 0 for no adapter.
        adapter_targets: module names the adapter sits on.
        adapter_learning_rate: of the adapter.
        fold_adapter: whether the decoder adds the adapter into copies of the weights it sits on: faster where a
            pass is many small products, as of a small verifier on a CPU, for the copies' memory.
        max_run: longest run of pending places that q' is trained for.
        keep_layers: layers whose sublayers are never skipped; negative ones count from the end.
        head_vocab: output tokens of q', the most frequent ones of the traces with those that end a text; 0 for all.
            They are chosen once q' is trained, on its whole output, and their head is what the target cost counts.
    """

    multiplier: Tensor
    kept: Tensor
    steps_done: Tensor
    costs: Tensor
    rest_cost: Tensor

    def __init__(
        self,
        verifier: str = SMOLLM2,
        target_cost: float = 0.5,
        route_choice: RouteChoice = "span",
        route_steps: int = 60,
        route_learning_rate: float = 0.15,
        cost_learning_rate: float = 0.5,
        bridges: bool = True,
        bridge_rank: int | None = None,
        bridge_texts: int = 200,
        bridge_learning_rate: float = 1e-4,
        adapter_rank: int = 32,
        adapter_targets: Sequence[str] = ADAPTER_TARGETS,
        adapter_learning_rate: float = 1e-3,
        fold_adapter: bool = False,
        max_run: int = 8,
        keep_layers: Sequence[int] = (0, -1),
        head_vocab: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < target_cost <= 1:
            raise CalibrationError(f"target_cost is {target_cost}; give a share of q's cost between 0 and 1")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.verifier_name = verifier
        self.target_cost = target_cost
        self.route_choice = route_choice
        self.route_steps = route_steps if route_choice == "gates" else 0
        self.bridged = bridges
        self.bridge_rank = bridge_rank
        self.bridge_texts = bridge_texts
        self.bridge_learning_rate = bridge_learning_rate
        self.route_learning_rate = route_learning_rate
        self.cost_learning_rate = cost_learning_rate
        self.adapter_rank = adapter_rank
        self.adapter_targets = tuple(adapter_targets)
        self.adapter_learning_rate = adapter_learning_rate
        self.fold_adapter = fold_adapter
        self.max_run = max_run
        self.keep_layers = tuple(keep_layers)
        self.head_vocab = head_vocab
        self._eos_ids: frozenset[int] = frozenset()
        self.agreement = MeanMetric()
        self.load_verifier: Callable[..., Verifier] = load_verifier
        self._frozen: list[RoutedModel] = []  # in a list, so that the verifier is no submodule
        self.gates: HardConcrete | None = None
        self.slim_layers: nn.ModuleList | None = None
        self.bridges: nn.ModuleDict | None = None
        self.resumes = False
        """Set where a checkpoint will bring the route, so that none is looked for: Lightning restores it later."""

    def configure_model(self) -> None:
        """Load the verifier, measure its sublayers, make gates and adapter; called by Lightning.

        Raises:
            CalibrationError: ``head_vocab`` is not a size that the verifier's output can have.
        """
        if self._frozen:
            return
        verifier = self.load_verifier(self.verifier_name, device=str(self.device))
        model = timed = RoutedModel(verifier.model)
        if self.head_vocab:
            check_size(self.head_vocab, model.config.vocab_size, verifier.eos_ids)
            any_tokens = torch.arange(self.head_vocab)  # as many of others cost the same
            timed = RoutedModel(verifier.model, slim=SlimParts(head_ids=any_tokens))
        self._eos_ids = verifier.eos_ids
        self._frozen.append(model)
        count = len(model.full_sublayers)
        self.gates = HardConcrete(count)
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("kept", torch.ones(count, dtype=torch.bool))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        costs = sublayer_costs(timed)
        self.register_buffer("costs", costs.shares)  # [sublayers], shares of a full pass
        self.register_buffer("rest_cost", torch.tensor(costs.rest))
        if self.adapter_rank:
            layers = adapted_layers(model.layers, self.adapter_rank, 2 * self.adapter_rank, self.adapter_targets)
            for name, parameter in layers.named_parameters():
                parameter.requires_grad_("lora_" in name)
            self.slim_layers = layers.train()  # copied from a verifier that is in eval mode
        if self.route_choice == "span" and not self.resumes:
            self._choose_span()

    def _choose_span(self) -> None:
        """Take the run of layers that is replaced best."""
        layers = len(self.model.layers)
        always = sorted({index % layers for index in self.keep_layers})
        costs = SublayerCosts(self.costs.cpu(), float(self.rest_cost))
        routes = span_routes(costs, self.target_cost, always, layers)
        texts = self._data.drawn_texts(self.bridge_texts)
        judges = max(1, len(texts) // 5)
        route, bridges = choose_span(self.model, routes, texts[judges:], texts[:judges], self.bridge_rank)
        self._keep(route)
        if self.bridged:
            self._take_bridges(bridges)

    def _keep(self, route: Route) -> None:
        """Make ``route`` the discrete route."""
        skipped = {"attention": route.attention_skip, "mlp": route.mlp_skip}
        kept = [sublayer.index not in skipped[sublayer.kind] for sublayer in self.model.full_sublayers]
        self.kept.copy_(torch.tensor(kept))

    def _take_bridges(self, bridges: nn.ModuleDict) -> None:
        """Train these bridges from here on."""
        self.bridges = bridges.to(device=self.device, dtype=self.model.dtype).requires_grad_(True)

    @property
    def _data(self) -> TraceDataModule:
        data: TraceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @property
    def model(self) -> RoutedModel:
        """The opened verifier."""
        if not self._frozen:
            raise RuntimeError("the verifier is loaded by configure_model, which the trainer calls")
        return self._frozen[0]

    @property
    def stage(self) -> Stage:
        """What the next step trains."""
        return "route" if int(self.steps_done) < self.route_steps else "adapter"

    @property
    def route(self) -> Route:
        """The discrete route as it stands."""
        skipped = [
            sublayer for sublayer, kept in zip(self.model.full_sublayers, self.kept.tolist(), strict=True) if not kept
        ]
        return Route(
            attention_skip=[sublayer.index for sublayer in skipped if sublayer.kind == "attention"],
            mlp_skip=[sublayer.index for sublayer in skipped if sublayer.kind == "mlp"],
        )

    def head_ids(self, counts: Counter[int]) -> Tensor | None:
        """The output tokens of q' by how often q chose each ([head vocabulary], long, rising); None for all."""
        if not self.head_vocab:
            return None
        return choose_tokens(counts, self.head_vocab, self.model.config.vocab_size, self._eos_ids)

    def _always(self) -> Tensor:
        """Sublayers that no route may skip: [sublayers], bool."""
        layers = {index % len(self.model.layers) for index in self.keep_layers}
        flags = [sublayer.index in layers for sublayer in self.model.full_sublayers]
        return torch.tensor(flags, device=self.kept.device)

    def _student(self, batch: TraceBatch, sublayers: Sequence[Sublayer], gates: Tensor | None, seed: int) -> Tensor:
        """Logits of q' at the places that predict: [places, vocabulary]."""
        _, cache = read_text(self.model, batch.ids)
        generator = torch.Generator().manual_seed(seed)
        longest = int(torch.randint(1, self.max_run + 1, (), generator=generator))
        starts = run_starts(batch.ids.shape[1], longest, generator).to(batch.ids.device)
        states = student_states(self.model, sublayers, batch.ids, cache, starts, gates, batch.begin)
        return self.model.logits(states[batch.predicts[:, batch.begin :]])

    def _kept_sublayers(self) -> list[Sublayer]:
        layers = self.model.layers if self.slim_layers is None else self.slim_layers
        return sublayers_of(layers, self.model.layer_types, self.route, self.bridges)

    def slim_parts(self, head_ids: Tensor | None = None) -> SlimParts:
        """What q' runs beside q's own modules, ready to decode with; ``head_ids`` as :meth:`head_ids` gives them."""
        layers = None if self.slim_layers is None else self.slim_layers.eval()
        bridges = nn.ModuleDict() if self.bridges is None else self.bridges.eval()
        return SlimParts(layers, bridges, head_ids)

    def training_step(self, batch: TraceBatch, _batch_idx: int) -> None:
        """One step of the stage that is due."""
        if self.stage == "route":
            self._route_step(batch)
        else:
            self._adapter_step(batch)
        self.steps_done += 1
        if int(self.steps_done) == self.route_steps:
            self.discretize()

    def _route_step(self, batch: TraceBatch) -> None:
        assert self.gates is not None, "made by configure_model"
        optimizer: Any = self.optimizers()
        always = self._always()
        noise = torch.Generator(self.device).manual_seed(int(self.steps_done))  # the same after a resume
        drawn = torch.where(always, 1.0, self.gates.sample(noise))
        logits = self._student(batch, self.model.full_sublayers, drawn, int(self.steps_done))
        divergence = top_k_tail_kl(batch.q_ids, batch.q_log_probs, logits).mean()
        chance = torch.where(always, 1.0, self.gates.chance_open())
        cost = (chance * self.costs).sum() + self.rest_cost
        excess = cost - self._target_now()
        loss = divergence + self.multiplier * excess
        optimizer.zero_grad()
        self.manual_backward(loss)
        self._set_learning_rate(optimizer, self.route_learning_rate)
        optimizer.step()
        self.multiplier.add_(self.cost_learning_rate * excess.detach() * 10).clamp_(min=0)
        self.log_dict({"route_kl": divergence, "expected_cost": cost}, prog_bar=True, batch_size=len(batch.q_ids))

    def _target_now(self) -> float:
        """The cost target, let down from 1 over the first half of the route's steps."""
        share = min(1.0, 2 * int(self.steps_done) / max(self.route_steps, 1))
        return 1 - share * (1 - self.target_cost)

    def discretize(self) -> None:
        """Keep the likeliest sublayers, most open first, as long as their cost stays within the target."""
        assert self.gates is not None, "made by configure_model"
        chance = torch.where(self._always(), 2.0, self.gates.chance_open())
        order = chance.argsort(descending=True)
        within = self.costs[order].cumsum(0) + self.rest_cost <= self.target_cost + 1e-6
        self.kept.zero_()
        self.kept[order[within]] = True
        self.kept |= self._always()
        if self.bridged:
            texts = self._data.drawn_texts(self.bridge_texts)
            (bridges,) = fit_bridges(self.model, [self.route], texts, self.bridge_rank)
            self._take_bridges(bridges)
            optimizer: Any = self.optimizers()
            optimizer.add_param_group({"params": [*bridges.parameters()]})

    def _adapter_step(self, batch: TraceBatch) -> None:
        if self.slim_layers is None and self.bridges is None:
            return
        optimizer: Any = self.optimizers()
        logits = self._student(batch, self._kept_sublayers(), None, int(self.steps_done))
        loss = top_k_tail_kl(batch.q_ids, batch.q_log_probs, logits).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        share = self._adapter_schedule()
        self._set_learning_rate(optimizer, self.adapter_learning_rate * share, self.bridge_learning_rate * share)
        optimizer.step()
        self.log("adapter_kl", loss, prog_bar=True, batch_size=len(batch.q_ids))

    def _adapter_schedule(self) -> float:
        """Warm-up over 20 steps, then linear decay to a tenth at the end of training."""
        step = int(self.steps_done) - self.route_steps
        total = max(int(self.trainer.estimated_stepping_batches) - self.route_steps, 1)
        return min(1.0, (step + 1) / 20) * max(0.1, 1 - step / total)

    @staticmethod
    def _set_learning_rate(optimizer: Any, *rates: float) -> None:
        """Of gates and adapter, and of the bridges where there are any."""
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    def validation_step(self, batch: TraceBatch, _batch_idx: int) -> None:
        """Agreement of the discrete route, with its adapter, at generated places."""
        logits = self._student(batch, self._kept_sublayers(), None, seed=0)
        self.agreement.update((logits.argmax(-1) == batch.q_ids[:, 0]).float())
        self.log("agreement", self.agreement, prog_bar=True, on_epoch=True, batch_size=len(batch.q_ids))

    def configure_optimizers(self) -> Any:
        """Adam over gates and adapter, and the bridges as a group of their own; each step sets the learning rates."""
        bridges = [] if self.bridges is None else [*self.bridges.parameters()]
        own = {id(parameter) for parameter in bridges}
        others = [one for one in self.parameters() if one.requires_grad and id(one) not in own]
        groups = [group for group in (others, bridges) if group]
        return torch.optim.Adam([{"params": group} for group in groups], lr=1e-3)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainable state alone: gates, multiplier, route, costs, adapter."""
        whole = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if not self._is_frozen(name)}

    @staticmethod
    def _is_frozen(name: str) -> bool:
        return "slim_layers." in name and "lora_" not in name

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` holds; the frozen weights are the verifier's and stay."""
        if any(name.startswith("bridges.") for name in state_dict):
            self.kept.copy_(state_dict["kept"])
            self._take_bridges(new_bridges(self.route, self.model.config.hidden_size, self.bridge_rank))
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        lacking = [name for name in missing if not self._is_frozen(name)]
        if strict and (lacking or unexpected):
            raise RuntimeError(f"the checkpoint does not fit this module: missing {lacking}, unknown {unexpected}")
        return missing, unexpected
