"""The router: learns which sublayers of the frozen verifier make q', then distils an adapter on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from viasd_calib.choices import SMOLLM2, SearchMethod
from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.replay.student import run_starts, student_states
from viasd_calib.replay.teacher import KnownCaches, refuse_foreign_traces
from viasd_calib.slim.cost import TOLERANCE, SublayerCosts, sublayer_costs
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.parts.adapter import DEFAULT_TARGETS, adapted_layers, of_adapter
from viasd_calib.slim.parts.base import options_of
from viasd_calib.slim.parts.bridges import new_bridges, token_shift_ends
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, narrow_layers
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import AdapterKind, Route
from viasd_calib.traces.data import TraceBatch, TraceDataModule
from viasd_calib.training.bridge_fit import fit_bridges
from viasd_calib.training.hard_concrete import HardConcrete
from viasd_calib.training.head_vocabulary import check_size, choose_tokens
from viasd_calib.training.neuron_ranking import rank_neurons
from viasd_calib.training.objectives import OBJECTIVES, Objective
from viasd_calib.training.search.record import load_search
from viasd_calib.training.spans import choose_span, span_routes

Stage = Literal["route", "adapter"]
RouteChoice = Literal["span", "gates", "given"]


def check_trainer(trainer: Trainer) -> None:
    """Refuse what the router cannot be trained with.

    Raises:
        CalibrationError: several processes with another strategy than ``ddp``, or a search for one learning rate.
    """
    strategy = trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise CalibrationError(
            f"{type(strategy).__name__} cannot train the router: it would shard what is trained, which is small, "
            "and not the frozen verifier; set trainer.strategy to ddp"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        raise CalibrationError(
            "LearningRateFinder sets one rate for all, and gates, bridges and adapter have each their own; leave it "
            "out, and try a few of --model.adapter_learning_rate and --model.bridge_learning_rate"
        )


class RouterModule(LightningModule):
    """Learns a route and an adapter from traces; the verifier stays as it is.

    The route comes first. ``span`` takes the one run of layers whose bridge, fitted in closed form, leaves the least
    KL(q || q') (:mod:`viasd_calib.training.spans`), whatever the objective. ``gates`` trains, for ``route_steps``, one
    hard-concrete gate for each attention and MLP sublayer on the objective, with a multiplier that holds the expected
    relative cost at its target (a Lagrangian, ascended), makes the gates discrete, cheapest sufficient set first, and
    then fits the bridges. ``given`` takes a route that ``viasd search`` found, and fits its bridges.
    For the remaining steps bridges and LoRA weights on the kept sublayers are distilled on the same objective, each
    batch with a longest run of pending places of its own, so that q' is at home directly after q and further on.
    What is logged bears stage and objective in its name: ``route_kl``, ``adapter_kl``.

    A step learns from ``accumulate`` batches of each process, all of like weight, which may lie in two epochs. So n
    processes (strategy ``ddp``) do what one process does with ``accumulate`` n times as large, up to rounding and to
    the fewer than n batches that they leave out of an epoch.

    Narrow MLPs (``mlp_keep``) come before all that: neurons are ranked on the texts that bridges are fitted on
    (:mod:`viasd_calib.training.neuron_ranking`), and costs, route, bridges and adapter are those of a q' that has them.

    Checkpoints hold gates, multiplier, route, orders of neurons, bridges and adapter, and between two steps the
    gradients gathered so far; never the verifier.

    Args:
        verifier: name or path of the verifier.
        target_cost: measured cost of a slim pass over that of a full one.
        objective: what both stages minimise (:mod:`viasd_calib.training.objectives`).
        accumulate: batches that each process learns from in a step.
        route_choice: how the route is found.
        route_file: what ``viasd search`` wrote, for a given route; target cost and kept layers are then the search's.
        route_method: the search's method whose route is taken.
        route_steps: optimiser steps for the gates; none are taken otherwise.
        route_learning_rate: of the gates.
        cost_learning_rate: of the multiplier.
        bridges: whether skipped runs are bridged.
        bridge_rank: of the bridges; None for full ones.
        bridge_carry: whether a bridge also reads the stream after its run at the place before
            (:mod:`viasd_calib.slim.token_shift`).
        bridge_texts: texts that bridges are fitted on in closed form; a fifth of them judges spans.
        bridge_learning_rate: of the bridges, after their closed form.
        adapter_kind: products of low rank, LoRA's or DoRA's, or other weights of norms, which cost a pass nothing.
        adapter_rank: of LoRA and DoRA; 0 for no adapter.
        adapter_targets: module names the adapter sits on; None for those usual with its kind.
        adapter_learning_rate: of the adapter.
        fold_adapter: whether the decoder adds the adapter into copies of the weights it sits on: faster where a
            pass is many small products, as of a small verifier on a CPU, for the copies' memory.
        max_run: longest run of pending places that q' is trained for.
        cache_gib: host memory, in GiB, for q's keys and values along texts that were read: later epochs then read them
            no more. 0 keeps none.
        keep_layers: layers whose sublayers are never skipped nor narrowed; negative ones count from the end.
        mlp_keep: share of its neurons that each other MLP sublayer of q' has; 1 for whole ones.
        head_vocab: output tokens of q', the most frequent ones of the traces with those that end a text; 0 for all.
            They are chosen once q' is trained, on its whole output, and their head is what the target cost counts.
        parts: further parts of the route, by name, each with its options; they are fitted once q' is trained, on the
            texts that bridges are fitted on.
    """

    multiplier: Tensor
    kept: Tensor
    steps_done: Tensor
    costs: Tensor
    rest_cost: Tensor
    neuron_orders: Tensor

    def __init__(
        self,
        verifier: str = SMOLLM2,
        target_cost: float = 0.5,
        objective: Objective = "kl",
        accumulate: int = 1,
        route_choice: RouteChoice = "span",
        route_file: str | None = None,
        route_method: SearchMethod | None = None,
        route_steps: int = 60,
        route_learning_rate: float = 0.15,
        cost_learning_rate: float = 0.5,
        bridges: bool = True,
        bridge_rank: int | None = None,
        bridge_carry: bool = True,
        bridge_texts: int = 200,
        bridge_learning_rate: float = 1e-4,
        adapter_kind: AdapterKind = "lora",
        adapter_rank: int = 32,
        adapter_targets: Sequence[str] | None = None,
        adapter_learning_rate: float = 1e-3,
        fold_adapter: bool = False,
        max_run: int = 8,
        cache_gib: float = 0.0,
        keep_layers: Sequence[int] = (0, -1),
        mlp_keep: float = 1.0,
        head_vocab: int = 0,
        parts: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        options_of(parts or {})
        if not 0 < target_cost <= 1:
            raise CalibrationError(f"target_cost is {target_cost}; give a share of q's cost between 0 and 1")
        if objective not in OBJECTIVES:
            raise CalibrationError(f"objective is {objective!r}; give one of {', '.join(OBJECTIVES)}")
        if not 0 < mlp_keep <= 1:
            raise CalibrationError(f"mlp_keep is {mlp_keep}; give a share of neurons above 0, at most 1")
        if accumulate < 1:
            raise CalibrationError(f"accumulate is {accumulate}; give 1 batch a step or more")
        if {route_file is not None, route_method is not None} != {route_choice == "given"}:
            raise CalibrationError(
                "route_file and route_method say which route is taken; give both, with route_choice given, or neither"
            )
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.verifier_name = verifier
        self.target_cost = target_cost
        self.objective: Objective = objective
        self.accumulate = accumulate
        self._gathered = 0  # batches since the last step
        self._gradients_to_restore: dict[str, Tensor] = {}
        self.route_choice = route_choice
        self.route_file = route_file
        self.route_method = route_method
        self.route_steps = route_steps if route_choice == "gates" else 0
        self.bridged = bridges
        self.bridge_rank = bridge_rank
        self.bridge_carry = bridge_carry
        self.bridge_texts = bridge_texts
        self.bridge_learning_rate = bridge_learning_rate
        self.route_learning_rate = route_learning_rate
        self.cost_learning_rate = cost_learning_rate
        self.adapter_kind: AdapterKind = adapter_kind
        self.adapter_rank = None if adapter_kind == "norms" else adapter_rank
        self.adapter_targets = tuple(adapter_targets or DEFAULT_TARGETS[adapter_kind])
        self.adapter_learning_rate = adapter_learning_rate
        self.fold_adapter = fold_adapter
        self.max_run = max_run
        self.cache_gib = cache_gib
        self.keep_layers = tuple(keep_layers)
        self.mlp_keep = mlp_keep
        self.head_vocab = head_vocab
        self.parts = parts or {}
        self._eos_ids: frozenset[int] = frozenset()
        self.agreement = MeanMetric()
        self.load_verifier: Callable[..., Verifier] = load_verifier
        self._frozen: list[RoutedModel] = []  # in a list, so that the verifier is no submodule
        self._caches: list[KnownCaches] = []  # the same
        self.gates: HardConcrete | None = None
        self.slim_layers: nn.ModuleList | None = None
        self.bridges: nn.ModuleDict | None = None
        self.resumes = False
        """Set where a checkpoint will bring the route, so that none is looked for: Lightning restores it later."""

    def configure_model(self) -> None:
        """Load the verifier, measure its sublayers, make gates and adapter; called by Lightning.

        Raises:
            CalibrationError: ``head_vocab`` is not a size that the verifier's output can have, or the trainer is set up
                for what the router cannot do (:func:`check_trainer`).
        """
        if self._frozen:
            return
        check_trainer(self.trainer)
        strategy = self.trainer.strategy
        verifier = self.load_verifier(self.verifier_name, device=str(self.device))
        refuse_foreign_traces(self.trainer, verifier.ref)
        if self.head_vocab:
            check_size(self.head_vocab, verifier.model.config.vocab_size, verifier.eos_ids)
        self._eos_ids = verifier.eos_ids
        self._frozen.append(RoutedModel(verifier.model))
        if self._narrowed:
            self.register_buffer("neuron_orders", self._rank_neurons())
        self._open_slim()
        self._caches[:] = [self._new_caches()]
        count = len(self.model.full_sublayers)
        self.gates = HardConcrete(count)
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("kept", torch.ones(count, dtype=torch.bool))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        any_tokens = torch.arange(self.head_vocab) if self.head_vocab else None  # as many of others cost the same
        timed = RoutedModel(verifier.model, held={"mlp_keep": self._narrow_layers, "head_vocab": any_tokens})
        costs = strategy.broadcast(sublayer_costs(timed))  # times differ, and the route hangs on them
        self.register_buffer("costs", costs.shares)  # [sublayers], shares of a full pass
        self.register_buffer("rest_cost", torch.tensor(costs.rest))
        if self.resumes:
            return
        if self.route_choice == "span":
            self._choose_span()
        elif self.route_choice == "given":
            self._take_given(verifier)

    @property
    def _staying(self) -> list[int]:
        """Layers that always stay as they are, rising."""
        return sorted({index % len(self.model.layers) for index in self.keep_layers})

    @property
    def _narrowed(self) -> list[int]:
        """Layers whose MLPs are narrow where the route keeps them."""
        narrow = self._kept_neurons < self.model.config.intermediate_size
        return [layer for layer in range(len(self.model.layers)) if narrow and layer not in self._staying]

    @property
    def _kept_neurons(self) -> int:
        """Neurons that a narrow MLP has."""
        neurons: int = self.model.config.intermediate_size
        return max(1, round(self.mlp_keep * neurons))

    @property
    def widths(self) -> dict[int, KeptNeurons]:
        """The narrow MLPs of q', by layer; those that the route skips are among them."""
        return {
            layer: KeptNeurons(order, self._kept_neurons)
            for layer, order in zip(self._narrowed, self.neuron_orders if self._narrowed else (), strict=True)
        }

    def _rank_neurons(self) -> Tensor:
        """Neurons of the MLPs that are to be narrow, most important first: [narrow layers, intermediate], long."""
        if self.resumes:  # the checkpoint brings them
            return torch.arange(self.model.config.intermediate_size).repeat(len(self._narrowed), 1)
        ranked = rank_neurons(self.model, self._narrowed, self._data.drawn_texts(self.bridge_texts))
        orders = torch.stack([ranked[layer] for layer in self._narrowed])
        return self.trainer.strategy.broadcast(orders)  # rounding must not part the processes

    def _open_slim(self) -> None:
        """Open the verifier with the narrow MLPs of q', and begin an adapter on its layers."""
        layers = narrow_layers(self.model.layers, self.widths) if self._narrowed else None
        self._frozen[:] = [RoutedModel(self.model.model, held={"mlp_keep": layers})]
        if self.adapter_rank != 0:
            adapted = adapted_layers(
                self.model.slim_layers, self.adapter_rank, self.adapter_alpha, self.adapter_targets, self.adapter_kind
            )
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_(of_adapter(name))
            self.slim_layers = adapted.train()  # copied from a verifier that is in eval mode

    @property
    def _narrow_layers(self) -> nn.ModuleList | None:
        """The layers of q' without its adapter, where some are narrow."""
        return self.model.slim_layers if self._narrowed else None

    def _choose_span(self) -> None:
        """Take the run of layers that is replaced best."""
        layers = len(self.model.layers)
        costs = SublayerCosts(self.costs.cpu(), float(self.rest_cost))
        routes = span_routes(costs, self.target_cost, self._staying, layers)
        texts = self._data.drawn_texts(self.bridge_texts)
        judges = max(1, len(texts) // 5)
        chosen = choose_span(self.model, routes, texts[judges:], texts[:judges], self.bridge_rank, self.bridge_carry)
        route, bridges = self.trainer.strategy.broadcast(chosen)  # rounding must not part the processes
        self._keep(route)
        if self.bridged:
            self._take_bridges(bridges)

    def _take_given(self, verifier: Verifier) -> None:
        """Take the route that a search found."""
        assert self.route_file is not None, "refused when the module was made"
        assert self.route_method is not None, "refused when the module was made"
        self._keep(load_search(Path(self.route_file)).route_of(self.route_method, verifier.ref))
        if self.bridged:
            self._fit_bridges()

    def _fit_bridges(self) -> nn.ModuleDict:
        """Fit bridges for the discrete route and train them from here on."""
        texts = self._data.drawn_texts(self.bridge_texts)
        fitted = fit_bridges(self.model, [self.route], texts, self.bridge_rank, self.bridge_carry)
        (bridges,) = self.trainer.strategy.broadcast(fitted)  # rounding must not part the processes
        self._take_bridges(bridges)
        return bridges

    def _keep(self, route: Route) -> None:
        """Make ``route`` the discrete route."""
        skipped = {"attention": route.attention_skip, "mlp": route.mlp_skip}
        kept = [sublayer.index not in skipped[sublayer.kind] for sublayer in self.model.full_sublayers]
        self.kept.copy_(torch.tensor(kept))

    def _take_bridges(self, bridges: nn.ModuleDict) -> None:
        """Train these bridges from here on."""
        self.bridges = bridges.to(device=self.device, dtype=self.model.dtype).requires_grad_(True)
        self.model.token_shift_ends = token_shift_ends(self.route, bridges)
        self._caches[:] = [self._new_caches()]  # those so far hold nothing of what the bridges read

    def _new_caches(self) -> KnownCaches:
        return KnownCaches(self.model, self.cache_gib * 2**30)

    @property
    def adapter_alpha(self) -> int | None:
        """Twice the rank: products of low rank begin with a weight of 2; None where there are none."""
        return None if self.adapter_rank is None else 2 * self.adapter_rank

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
        flags = [sublayer.index in self._staying for sublayer in self.model.full_sublayers]
        return torch.tensor(flags, device=self.kept.device)

    @property
    def _batch_number(self) -> int:
        """Batches that all processes learned from before this one; what is drawn for a batch depends on it alone."""
        own = int(self.steps_done) * self.accumulate + self._gathered
        return own * self.trainer.world_size + self.trainer.global_rank

    def _student(self, batch: TraceBatch, sublayers: Sequence[Sublayer], gates: Tensor | None, seed: int) -> Tensor:
        """Logits of q' at the places that predict: [places, vocabulary]."""
        cache = self._caches[0].of(batch.indices, batch.ids)
        generator = torch.Generator().manual_seed(seed)
        longest = int(torch.randint(1, self.max_run + 1, (), generator=generator))
        starts = run_starts(batch.ids.shape[1], longest, generator).to(batch.ids.device)
        states = student_states(self.model, sublayers, batch.ids, cache, starts, gates, batch.begin)
        return self.model.logits(states[batch.predicts[:, batch.begin :]])

    def _kept_sublayers(self) -> list[Sublayer]:
        layers = self.model.slim_layers if self.slim_layers is None else self.slim_layers
        return sublayers_of(layers, self.model.layer_types, self.route, self.bridges)

    def slim_parts(self, head_ids: Tensor | None = None) -> dict[str, object]:
        """What the parts of the route hold, ready to decode with; ``head_ids`` as :meth:`head_ids` gives them."""
        return {
            "mlp_keep": self._narrow_layers,
            "bridges": None if self.bridges is None else self.bridges.eval(),
            "head_vocab": head_ids,
            "adapter": None if self.slim_layers is None else self.slim_layers.eval(),
        }

    def training_step(self, batch: TraceBatch, _batch_idx: int) -> None:
        """Gather the gradients of the stage that is due; with the last batch of a step, make it."""
        optimizer: Any = self.optimizers()
        if self._learns:
            # Gradients are averaged over processes in the step: DDP knows no bridges that came after it, and would wait
            # for those of the other stage.
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self._route_loss(batch) if self.stage == "route" else self._adapter_loss(batch))
        self._gathered += 1
        if self._gathered == self.accumulate:
            self._step(optimizer)

    @property
    def _learns(self) -> bool:
        """Whether the stage has anything to train."""
        return self.stage == "route" or self.slim_layers is not None or self.bridges is not None

    def _objective(self, batch: TraceBatch, logits: Tensor) -> Tensor:
        """Mean of the objective over the places of a batch, logged under its name."""
        value = OBJECTIVES[self.objective](batch.q_ids, batch.q_log_probs, logits).mean()
        name = f"{self.stage}_{self.objective}"
        self.log(name, value, prog_bar=True, batch_size=len(batch.q_ids), sync_dist=True)
        return value

    def _route_loss(self, batch: TraceBatch) -> Tensor:
        assert self.gates is not None, "made by configure_model"
        noise = torch.Generator(self.device).manual_seed(self._batch_number)  # the same after a resume
        drawn = torch.where(self._always(), 1.0, self.gates.sample(noise))
        logits = self._student(batch, self.model.slim_sublayers, drawn, self._batch_number)
        cost = self._expected_cost()
        self.log("expected_cost", cost, prog_bar=True, batch_size=len(batch.q_ids))
        return self._objective(batch, logits) + self.multiplier * (cost - self._target_now())

    def _adapter_loss(self, batch: TraceBatch) -> Tensor:
        return self._objective(batch, self._student(batch, self._kept_sublayers(), None, self._batch_number))

    def _expected_cost(self) -> Tensor:
        """Cost of a slim pass by the gates' chances to be open, over that of a full one: []."""
        assert self.gates is not None, "made by configure_model"
        chance = torch.where(self._always(), 1.0, self.gates.chance_open())
        return (chance * self.costs).sum() + self.rest_cost

    def _step(self, optimizer: Any) -> None:
        """One step of the stage that is due, on the gradients gathered."""
        if self._learns:
            self._average_gradients()
            if self.stage == "route":
                self._route_step(optimizer)
            else:
                self._adapter_step(optimizer)
            optimizer.zero_grad()
        self._gathered = 0
        self.steps_done += 1
        if int(self.steps_done) == self.route_steps:
            self.discretize()

    def _gradients(self) -> dict[str, Tensor]:
        """What was gathered since the last step, by parameter."""
        return {name: one.grad for name, one in self.named_parameters() if one.grad is not None}

    def _mean_over_processes(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each gradient over processes, exchanged as one tensor."""
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        mean = self.trainer.strategy.reduce(flat, reduce_op="mean")
        assert isinstance(mean, Tensor), "a reduced tensor is one"
        parts = mean.split([gradient.numel() for gradient in gradients.values()])
        return {name: part.view_as(gradients[name]) for name, part in zip(gradients, parts, strict=True)}

    def _average_gradients(self) -> None:
        """Make the gradients those of the mean over all batches of the step."""
        gradients = self._gradients()
        for name, mean in self._mean_over_processes(gradients).items():
            gradients[name].copy_(mean / self.accumulate)

    def _route_step(self, optimizer: Any) -> None:
        excess = self._expected_cost().detach() - self._target_now()
        self._set_learning_rate(optimizer, self.route_learning_rate)
        optimizer.step()
        mean = self.trainer.strategy.reduce(excess, reduce_op="mean")  # one multiplier, whatever rounding does
        self.multiplier.add_(self.cost_learning_rate * mean * 10).clamp_(min=0)

    def _adapter_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        share = self._adapter_schedule()
        self._set_learning_rate(optimizer, self.adapter_learning_rate * share, self.bridge_learning_rate * share)
        optimizer.step()

    def _target_now(self) -> float:
        """The cost target, let down from 1 over the first half of the route's steps."""
        share = min(1.0, 2 * int(self.steps_done) / max(self.route_steps, 1))
        return 1 - share * (1 - self.target_cost)

    def discretize(self) -> None:
        """Keep the likeliest sublayers, most open first, as long as their cost stays within the target."""
        assert self.gates is not None, "made by configure_model"
        chance = torch.where(self._always(), 2.0, self.gates.chance_open())
        order = chance.argsort(descending=True)
        within = self.costs[order].cumsum(0) + self.rest_cost <= self.target_cost + TOLERANCE
        self.kept.zero_()
        self.kept[order[within]] = True
        self.kept |= self._always()
        if self.bridged:
            bridges = self._fit_bridges()
            optimizer: Any = self.optimizers()
            optimizer.add_param_group({"params": [*bridges.parameters()]})

    def _adapter_schedule(self) -> float:
        """Warm-up over 20 steps, then linear decay to a tenth at the end of training.

        A training that goes on from another's state decays over the steps of both: its rate begins higher than the
        other's ended.
        """
        step = int(self.steps_done) - self.route_steps
        total = max(self._all_steps() - self.route_steps, 1)
        return min(1.0, (step + 1) / 20) * max(0.1, 1 - step / total)

    def _all_steps(self) -> int:
        """Steps of the whole training, and of those it goes on from; Lightning's own estimate takes a batch for one."""
        trainer = self.trainer
        earlier = int(self.steps_done) - trainer.global_step  # which a resumed training counts as its own
        estimate = int(trainer.estimated_stepping_batches)
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return earlier + estimate  # bounded by max_steps alone, which counts steps
        return earlier + min(estimate, int(trainer.num_training_batches) * trainer.max_epochs // self.accumulate)

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

    def on_validation_model_zero_grad(self) -> None:
        """Leave the gradients: validation may come between two batches of a step."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Between two steps, keep what was gathered, as the mean over processes: that is what the step makes of it."""
        if self._gathered:
            gradients = self._gradients()
            mean = self._mean_over_processes(gradients) if gradients else {}
            checkpoint["gathered"] = {"batches": self._gathered, "gradients": mean}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what was gathered; the parameters it belongs to are yet to come."""
        gathered = checkpoint.get("gathered", {"batches": 0, "gradients": {}})
        self._gathered, self._gradients_to_restore = gathered["batches"], gathered["gradients"]

    def on_train_start(self) -> None:
        """Go on between two steps where a checkpoint was made there."""
        for name, parameter in self.named_parameters():
            if name in self._gradients_to_restore:
                parameter.grad = self._gradients_to_restore[name].to(parameter)
        self._gradients_to_restore = {}

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
        return "slim_layers." in name and not of_adapter(name)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` holds; the frozen weights are the verifier's and stay."""
        if self._narrowed and "neuron_orders" in state_dict:
            self.neuron_orders.copy_(state_dict["neuron_orders"])
            self._open_slim()
        if any(name.startswith("bridges.") for name in state_dict):
            self.kept.copy_(state_dict["kept"])
            hidden = self.model.config.hidden_size
            self._take_bridges(new_bridges(self.route, hidden, self.bridge_rank, self.bridge_carry))
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        lacking = [name for name in missing if not self._is_frozen(name)]
        if strict and (lacking or unexpected):
            raise RuntimeError(f"the checkpoint does not fit this module: missing {lacking}, unknown {unexpected}")
        return missing, unexpected
