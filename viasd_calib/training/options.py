"""Options of ``viasd fit``: how the route of the slim verifier is found, and how the slim verifier is trained.

Annotations are evaluated here, not postponed, since the parser reads the ranges of numbers off them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from viasd_calib.choices import SMOLLM2, SearchMethod
from viasd_calib.errors import CalibrationError
from viasd_calib.option_types import Count, Nonnegative, OptionalCount, check_options
from viasd_calib.slim.parts.adapter import DEFAULT_TARGETS, AdapterOptions
from viasd_calib.slim.parts.base import PartOptions, options_of, part_named
from viasd_calib.slim.parts.bridges import BridgeOptions
from viasd_calib.spec import AdapterKind
from viasd_calib.training.losses import LOSSES

RouteChoice = Literal["span", "gates", "given", "whole"]


@dataclass(frozen=True)
class SlimVerifierOptions:
    """How a slim verifier is found and trained.

    The route comes first. ``span`` takes the one run of layers whose bridge, fitted in closed form, leaves the least
    KL(q || q') (:mod:`viasd_calib.training.spans`), whatever the objective. ``gates`` learns for ``route_steps`` which
    sublayers are kept (:mod:`viasd_calib.training.gate_learning`). ``given`` takes a route that ``viasd search`` found,
    ``whole`` leaves out no sublayer: for a q' whose low bits alone make it cheap (``parts`` with ``low_bit``).
    Bridges are fitted in closed form, and then they and the adapter are distilled
    (:mod:`viasd_calib.training.distillation`).

    Narrow MLPs (``mlp_keep``) come before all that: neurons are ranked on the texts that bridges are fitted on
    (:func:`~viasd_calib.slim.parts.mlp_keep.rank_neurons`); costs, route, bridges and adapter are those of a q'
    that has them.

    Args:
        verifier: name or path of the verifier.
        target_cost: measured cost of a slim pass over that of a full one.
        objective: loss of gates and distillation, one of :data:`~viasd_calib.training.losses.LOSSES`.
        accumulate: batches that each process learns from in a step; the trainer's accumulate_grad_batches.
        route_choice: how the route is found.
        route_file: what ``viasd search`` wrote, for a given route; target cost and kept layers are then the search's.
        route_method: the search's method whose route is taken.
        route_steps: optimiser steps for the gates, out of the trainer's max_steps; none are taken otherwise.
        route_learning_rate: of the gates.
        cost_learning_rate: of the multiplier.
        bridges: whether skipped runs are bridged.
        bridge_rank: of the bridges; None for full ones.
        bridge_carry: whether a bridge also reads the stream after its run at the place before
            (:mod:`viasd_calib.slim.token_shift`).
        bridge_texts: texts that bridges are fitted on in closed form; spans are compared on a fifth of them.
        bridge_learning_rate: of the bridges, after their closed form, and of further parts.
        adapter_kind: products of low rank, LoRA's or DoRA's, or other weights of norms, which cost a pass nothing.
        adapter_rank: of LoRA and DoRA; 0 for no adapter.
        adapter_targets: module names the adapter sits on; None for those usual with its kind.
        adapter_learning_rate: of the adapter.
        fold_adapter: whether the decoder adds the adapter into copies of the weights it sits on: faster where a
            pass is many small products, as of a small verifier on a CPU, for the copies' memory.
        max_run: longest run of pending places that q' is trained for.
        cache_gib: host memory, in GiB, for q's keys and values on texts that were read: later epochs then read them
            no more. 0 keeps none.
        keep_layers: layers whose sublayers are never skipped nor narrowed; negative ones count from the end.
        mlp_keep: share of its neurons that each other MLP sublayer of q' has; 1 for whole ones.
        head_vocab: output tokens of q', the most frequent ones of the traces with those that end a text; 0 for all.
            They are chosen once q' is trained, on its whole output, and their head is what the target cost counts.
        parts: further parts of the route, by name, each with its options; they are fitted with the bridges, on the same
            texts, and what they have to train is distilled with the rest.
        memory: most memory that q' may take beside q: up to 16 a share of q's weights (0.5), above that bytes; None for
            no bound. Low bits, adapters and a head vocabulary take some.

    Raises:
        CalibrationError: an option is out of its range, or options contradict each other.

    Example:
        >>> options = SlimVerifierOptions(target_cost=0.7, adapter_rank=8)
        >>> options.adapter_alpha
        16
    """

    verifier: str = SMOLLM2
    target_cost: float = 0.5
    objective: str = "kl"
    accumulate: int = 1
    route_choice: RouteChoice = "span"
    route_file: str | None = None
    route_method: SearchMethod | None = None
    route_steps: Count = 60
    route_learning_rate: Nonnegative = 0.15
    cost_learning_rate: Nonnegative = 0.5
    bridges: bool = True
    bridge_rank: Count | None = None
    bridge_carry: bool = True
    bridge_texts: Count = 200
    bridge_learning_rate: Nonnegative = 1e-4
    adapter_kind: AdapterKind = "lora"
    adapter_rank: OptionalCount = 32
    adapter_targets: Sequence[str] | None = None
    adapter_learning_rate: Nonnegative = 1e-3
    fold_adapter: bool = False
    max_run: Count = 8
    cache_gib: Nonnegative = 0.0
    keep_layers: Sequence[int] = (0, -1)
    mlp_keep: float = 1.0
    head_vocab: OptionalCount = 0
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: float | None = None

    def __post_init__(self) -> None:
        check_options(self, CalibrationError)
        options_of(self.parts)  # refuses what is no part
        replacing = [*(["bridges"] if self.bridged else []), *filter(_replaces_runs, self.parts)]
        if len(replacing) > 1:
            mend = "add --model.bridges false" if self.bridged else "leave one of them out of --model.parts"
            raise CalibrationError(f"{' and '.join(replacing[:2])} both run in place of skipped sublayers; {mend}")
        if "low_bit" in self.parts and self.adapter_kind == "dora" and self.rank != 0:
            raise CalibrationError(
                "low_bit cannot be fitted with adapter_kind dora, which reads whole weights; give lora or norms, or "
                "adapter_rank 0"
            )
        rounding = self.parts.get("low_bit", {}).get("rounding")
        if rounding == "gptq" and self.fold_adapter and self.adapter_kind == "lora" and self.rank != 0:
            raise CalibrationError(
                "rounding gptq cannot be fitted with fold_adapter, which changes the weights that it has rounded; "
                "leave out fold_adapter, or give rounding nearest"
            )
        if self.memory is not None and self.memory < 0:
            raise CalibrationError(f"memory is {self.memory}; give a share of q's weights, or bytes")
        if not 0 < self.target_cost <= 1:
            raise CalibrationError(f"target_cost is {self.target_cost}; give a share of q's cost between 0 and 1")
        if self.objective not in LOSSES:
            raise CalibrationError(f"objective is {self.objective!r}; give one of {', '.join(LOSSES)}")
        if not 0 < self.mlp_keep <= 1:
            raise CalibrationError(f"mlp_keep is {self.mlp_keep}; give a share of neurons above 0, at most 1")
        if self.accumulate < 1:
            raise CalibrationError(f"accumulate is {self.accumulate}; give 1 batch a step or more")
        if {self.route_file is not None, self.route_method is not None} != {self.route_choice == "given"}:
            raise CalibrationError(
                "route_file and route_method say which route is taken; give both, with route_choice given, or neither"
            )

    @property
    def rank(self) -> int | None:
        """Rank of the adapter; 0 for no adapter, None for a kind that has no rank."""
        return None if self.adapter_kind == "norms" else self.adapter_rank

    @property
    def bridged(self) -> bool:
        """Whether there are bridges: a whole route has nothing to bridge."""
        return self.bridges and self.route_choice != "whole"

    @property
    def adapter_alpha(self) -> int | None:
        """Twice the rank: products of low rank begin with a weight of 2; None for a kind that has no rank."""
        return None if self.rank is None else 2 * self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """Module names the adapter sits on."""
        return tuple(self.adapter_targets or DEFAULT_TARGETS[self.adapter_kind])

    @property
    def bridge_options(self) -> BridgeOptions:
        """Shape of the bridges."""
        return BridgeOptions(rank=self.bridge_rank, carry=self.bridge_carry)

    @property
    def part_options(self) -> dict[str, PartOptions]:
        """Options of the parts that have some, by name."""
        kind = self.adapter_kind
        folded = kind == "dora" or (kind == "lora" and self.fold_adapter)
        return {
            "bridges": self.bridge_options,
            "adapter": AdapterOptions(
                kind=kind, rank=self.rank, alpha=self.adapter_alpha, targets=self.targets, folded=folded
            ),
            **self.further_options,
        }

    @property
    def further_options(self) -> dict[str, PartOptions]:
        """Options of the further parts, by name."""
        return options_of(self.parts)


def _replaces_runs(name: str) -> bool:
    return part_named(name).replaces_runs
