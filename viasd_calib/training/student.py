"""The student of a fit: q' as it is trained, on the frozen verifier's own layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier
from viasd_calib.replay.agreement import compare_places, directly_after, text_cache
from viasd_calib.replay.student import run_starts, student_states
from viasd_calib.replay.teacher import KnownCaches, read_residuals
from viasd_calib.slim.cache import SharedCache
from viasd_calib.slim.cost import SublayerCosts, sublayer_costs
from viasd_calib.slim.decoding_copy import decoding_copy
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.base import FitInputs, part_named
from viasd_calib.slim.parts.head_vocab import check_size, choose_tokens
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, MlpKeepOptions, narrow_layers
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import Route
from viasd_calib.traces.texts import TraceBatch, TraceText
from viasd_calib.training.options import SlimVerifierOptions


class Student:
    """q' on the layers of the frozen verifier q, with the narrow MLPs that the options ask for.

    Args:
        verifier: q.
        options: of the fit.

    Raises:
        CalibrationError: ``head_vocab``, ``bridge_rank`` or ``keep_layers`` are none that the verifier can have.
    """

    def __init__(self, verifier: Verifier, options: SlimVerifierOptions) -> None:
        if options.head_vocab:
            check_size(options.head_vocab, verifier.model.config.vocab_size, verifier.eos_ids)
        _check_sizes(options, verifier.model.config)
        self.verifier = verifier
        self.model = RoutedModel(verifier.model)
        self.neuron_orders: Tensor | None = None
        self._options = options
        self._caches = self._no_caches()

    @property
    def staying(self) -> list[int]:
        """Layers that always stay as they are, rising."""
        return sorted({index % len(self.model.layers) for index in self._options.keep_layers})

    @property
    def always_kept(self) -> Tensor:
        """Sublayers that no route may skip: [sublayers], bool."""
        return torch.tensor([sublayer.index in self.staying for sublayer in self.model.full_sublayers])

    @property
    def narrowed(self) -> list[int]:
        """Layers whose MLPs are narrow where the route keeps them."""
        narrow = self._kept_neurons < self.model.config.intermediate_size
        return [layer for layer in range(len(self.model.layers)) if narrow and layer not in self.staying]

    @property
    def _kept_neurons(self) -> int:
        """Neurons that a narrow MLP has."""
        neurons: int = self.model.config.intermediate_size
        return max(1, round(self._options.mlp_keep * neurons))

    @property
    def widths(self) -> dict[int, KeptNeurons]:
        """The narrow MLPs of q', by layer; those that the route skips are among them."""
        orders = () if self.neuron_orders is None else self.neuron_orders
        return {
            layer: KeptNeurons(order, self._kept_neurons) for layer, order in zip(self.narrowed, orders, strict=True)
        }

    def fit_inputs(self, route: Route, texts: Sequence[TraceText], folder: Path | None = None) -> FitInputs:
        """What parts of a route are fitted on; ``folder`` is the fit's."""
        caches: dict[int, SharedCache] = {}

        def divergence(model: RoutedModel, number: int) -> float:
            text = texts[number]
            if number not in caches:
                caches[number] = text_cache(self.model, text)
            places = compare_places(model, model.slim_sublayers, text, caches[number], directly_after(text))
            return float(places.kl.mean())

        return FitInputs(self.model, route, texts, read_residuals, divergence, self._options.target_cost, folder)

    def rank_neurons(self, texts: Sequence[TraceText]) -> Tensor:
        """Neurons of the MLPs that are to be narrow, most important first: [narrow layers, intermediate], long."""
        options = MlpKeepOptions(layers=tuple(self.narrowed), keep=self._kept_neurons)
        kept = part_named("mlp_keep").fit(self.fit_inputs(Route(), texts), options)
        assert kept is not None, "neurons can always be ranked"
        return torch.stack([neurons.order for neurons in kept.values()])

    def narrow(self, neuron_orders: Tensor) -> None:
        """Take the orders of neurons that :meth:`rank_neurons` found: narrow MLPs have the first ones."""
        self.neuron_orders = neuron_orders
        layers = narrow_layers(self.model.layers, self.widths)
        self.model = RoutedModel(self.model.model, held={"mlp_keep": layers})

    def measured_costs(self) -> SublayerCosts:
        """What sublayers of q' cost on this machine, with its narrow MLPs and a head of its size.

        Beside low bits they are timed as they will decode, as the products of low bits are.
        """
        size = self._options.head_vocab
        any_tokens = torch.arange(size) if size else None  # as many of others cost the same
        if "low_bit" in self._options.parts:
            copied = {"mlp_keep": self.widths or None, "head_vocab": any_tokens}
            return sublayer_costs(decoding_copy(self.model.model, Route(), copied))
        held = {"mlp_keep": self.narrow_layers, "head_vocab": any_tokens}
        return sublayer_costs(RoutedModel(self.model.model, held=held))

    @property
    def narrow_layers(self) -> nn.ModuleList | None:
        """The layers of q' where some are narrow; with its adapter once that is installed."""
        return None if self.neuron_orders is None else self.model.slim_layers

    def install(self, route: Route, held: Mapping[str, object]) -> None:
        """Let q' have a route, with what its parts hold, by name."""
        self.model = RoutedModel(self.model.model, route, {"mlp_keep": self.narrow_layers, **held})
        self._caches = self._no_caches()  # q's passes may have streams to keep now

    def release(self) -> None:
        """Hold nothing of a route any longer but q itself, once all that was learned has been taken: copies in low bits
        take half of q's bytes in bfloat16."""
        self.model = RoutedModel(self.model.model)
        self._caches = self._no_caches()

    def _no_caches(self) -> KnownCaches:
        return KnownCaches(self.model, self._options.cache_gib * 2**30)

    def logits(
        self, batch: TraceBatch, sublayers: Sequence[Sublayer], seed: int, gates: Tensor | None = None
    ) -> Tensor:
        """Logits of q' at the places of a batch that predict: [places, vocabulary].

        The longest run of pending places is drawn for the batch, from 1 to ``max_run``, so that q' is trained for
        places directly after q and for later ones.

        Args:
            batch: texts that q wrote.
            sublayers: what q' runs.
            seed: of what is drawn.
            gates: a factor for each sublayer's update, [sublayers]; None for 1.
        """
        cache = self._caches.of(batch.indices, batch.ids)
        generator = torch.Generator().manual_seed(seed)
        longest = int(torch.randint(1, self._options.max_run + 1, (), generator=generator))
        starts = run_starts(batch.ids.shape[1], longest, generator).to(batch.ids.device)
        states = student_states(self.model, sublayers, batch.ids, cache, starts, gates, batch.begin)
        return self.model.slim_logits(states[batch.predicts[:, batch.begin :]])

    def head_ids(self, counts: Counter[int]) -> Tensor | None:
        """The output tokens of q' by how often q chose each ([head vocabulary], long, rising); None for all."""
        size = self._options.head_vocab
        return choose_tokens(counts, size, self.model.config.vocab_size, self.verifier.eos_ids) if size else None

    def route(self, kept: Tensor) -> Route:
        """The route that keeps these sublayers ([sublayers], bool)."""
        skipped = [one for one, stays in zip(self.model.full_sublayers, kept.tolist(), strict=True) if not stays]
        return Route(
            attention_skip=[one.index for one in skipped if one.kind == "attention"],
            mlp_skip=[one.index for one in skipped if one.kind == "mlp"],
        )

    def kept(self, route: Route) -> Tensor:
        """The sublayers that a route keeps: [sublayers], bool."""
        skipped = {"attention": route.attention_skip, "mlp": route.mlp_skip}
        return torch.tensor([one.index not in skipped[one.kind] for one in self.model.full_sublayers])


def _check_sizes(options: SlimVerifierOptions, config: PreTrainedConfig) -> None:
    """Refuse options that this verifier is too small for."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if options.bridged and options.bridge_rank is not None and options.bridge_rank > hidden:
        raise CalibrationError(
            f"bridge_rank is {options.bridge_rank}; give at most {hidden}, the verifier's hidden size, or leave it out "
            "for full bridges"
        )
    beyond = [layer for layer in options.keep_layers if not -layers <= layer < layers]
    if beyond:
        raise CalibrationError(
            f"keep_layers names layer {beyond[0]}; the verifier has layers 0 to {layers - 1}, or -1 for the last"
        )
