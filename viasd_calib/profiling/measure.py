"""Measuring a latency profile: passes come as callables, so that every backend is timed by the same code."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from viasd_calib.decoding.engine import Engine
from viasd_calib.draft.base import GreedyPick, Proposal, never_stop
from viasd_calib.errors import PlanningError
from viasd_calib.hardware import hardware
from viasd_calib.models import DTYPE_NAMES, context_length
from viasd_calib.passes.requests import finish
from viasd_calib.passes.scheduling import run_together
from viasd_calib.profiling.context_scaling import ROUND_TOKENS, measure_rounds
from viasd_calib.profiling.noise import disturbed_share, undisturbed
from viasd_calib.profiling.profile import LatencyProfile, LayersRead, Measured, PassShape, ProfileSettings
from viasd_calib.progress import steps
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.cost import WARM_UP, interleaved_seconds
from viasd_calib.slim.forward import RoutedModel, States

Pass = Callable[[], object]
"""One call runs one pass, and can be made again and again with the same effect."""


@torch.inference_mode()
def time_rounds(passes: Mapping[PassShape, Pass], repeats: int, device: torch.device) -> list[list[float]]:
    """What each pass took in each of ``repeats`` interleaved rounds; warm-up is not counted.

    Args:
        repeats: at least 2.
        device: waited for after each pass.
    """
    with steps("profile", len(passes) * (WARM_UP + repeats), "passes", timed=True) as running:
        return interleaved_seconds(list(passes.values()), repeats, device, running.advance)


def summaries(passes: Iterable[PassShape], seconds: Sequence[Sequence[float]]) -> list[Measured]:
    """Median and quartiles of each pass over the rounds that no other work has disturbed.

    Args:
        seconds: of each pass in each round.
    """
    rounds = undisturbed(seconds)
    return [_summary(shape, [taken[one] for one in rounds]) for shape, taken in zip(passes, seconds, strict=True)]


def _summary(shape: PassShape, taken: list[float]) -> Measured:
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    median = statistics.median(taken)  # rounding may put a quartile of equal times beyond it
    return Measured(**shape._asdict(), seconds=median, low=min(low, median), high=max(high, median))


def _text_lengths(settings: ProfileSettings) -> list[int]:
    """Positions of the texts that are timed: those of rounds, of draft steps, and the one that all passes share."""
    after = (1, ROUND_TOKENS)
    return [context + more for context in settings.contexts for more in after] + [
        settings.contexts[-1] + settings.widths[-1]
    ]


@torch.inference_mode()
def decoder_passes(engine: Engine, settings: ProfileSettings) -> dict[PassShape, Pass]:
    """The passes as the decoder makes them: same layers, same cache, same taps.

    Each batch size has one cache with room for the longest context, as a text being decoded has room for
    what may still come.

    Raises:
        PlanningError: a context is longer than a model's.
    """
    _refuse_long_contexts(engine.routed, settings)
    longest = settings.contexts[-1] + settings.widths[-1]
    caches = {batch: engine.routed.new_cache(longest, batch) for batch in settings.batches}
    passes: dict[PassShape, Pass] = {}
    for shape in settings.shapes():
        if shape.tier == "draft":
            passes[shape] = _draft_step(engine, shape)
        elif shape.tier == "head":
            passes[shape] = _head_pass(engine.routed, shape)
        else:
            passes[shape] = _verifier_pass(engine, shape, caches[shape.batch])
    return passes


def _refuse_long_contexts(model: RoutedModel, settings: ProfileSettings) -> None:
    room = context_length(model.config)
    context, width = settings.contexts[-1], settings.widths[-1]
    if context + width > room:
        mend = f"give --contexts up to {room - width}" if width < room else f"give --widths below {room}"
        raise PlanningError(
            f"context {context} and width {width} are {context + width} positions, "
            f"the verifier's context holds {room}; {mend}"
        )


def _verifier_pass(engine: Engine, shape: PassShape, cache: SharedCache) -> Pass:
    assert shape.context is not None, "only the head has no context"
    model, taps = engine.routed, engine.drafter.taps
    ids = _some_ids((shape.batch, shape.width), model)
    start: int | Tensor = shape.context
    if shape.batch > 1:  # texts of a batch differ in length, so each row has a place of its own
        start = torch.full((shape.batch,), shape.context, device=model.device)
    window = CacheWindow(cache, start, shape.width, shape.context + shape.width)
    forward: Callable[..., States] = model.full
    head = model.logits
    if shape.tier == "slim":
        forward, head = model.slim, model.slim_logits
    return lambda: head(forward(ids, window, taps).last)


def _head_pass(model: RoutedModel, shape: PassShape) -> Pass:
    states = model.final_norm(model.embed(_some_ids((shape.batch, shape.width), model)))  # [batch, width, hidden]
    return lambda: model.logits(states)


def _draft_step(engine: Engine, shape: PassShape) -> Pass:
    """One step after ``shape.context`` tokens that the drafter has seen, and one that it has not."""
    assert shape.context is not None, "only the head has no context"
    length, most = shape.context + 1, engine.drafter.context
    if most is not None and length > most:
        raise PlanningError(
            f"context {shape.context} is longer than the draft model's, which holds {most} tokens; "
            f"give --contexts up to {most - 1}"
        )
    drafter, text = engine.drafter.start(length), _some_ids((length,), engine.routed)  # each context has its own

    def step() -> Proposal:
        return finish(drafter.propose(text, 1, never_stop, GreedyPick()))

    taps = torch.zeros(shape.context, len(drafter.taps), engine.routed.config.hidden_size)
    drafter.observe(0, taps.to(text.device, engine.routed.dtype))  # the verifier has read all of it but the last token
    step()  # the first proposal reads the whole text
    return step


def _draft_steps_together(engine: Engine, context: int, batch: int) -> Pass:
    """The same for several texts, which share passes of the draft model."""
    drafters = engine.drafter.start_rows(context + 1, batch)
    texts = _some_ids((batch, context + 1), engine.routed)
    taps = torch.zeros(context, len(engine.drafter.taps), engine.routed.config.hidden_size)
    for drafter in drafters:
        drafter.observe(0, taps.to(texts.device, engine.routed.dtype))

    def step() -> object:
        asked = [
            drafter.propose(text, 1, never_stop, GreedyPick()) for drafter, text in zip(drafters, texts, strict=True)
        ]
        return deque(run_together(asked), maxlen=0)

    step()  # the first proposals read the whole texts
    return step


@torch.inference_mode()
def time_draft_steps(
    engine: Engine, contexts: Sequence[int], batches: Sequence[int], repeats: int
) -> dict[tuple[int, int], float]:
    """Median seconds of a draft step of several texts together, by context and batch; those of a profile are of one.

    Args:
        contexts: cached tokens before it, each of which the draft model holds.
        batches: texts at once.
        repeats: at least 2.
    """
    shapes = [PassShape("draft", 1, context, batch) for batch in batches for context in contexts]
    passes = {shape: _draft_steps_together(engine, shape.context or 0, shape.batch) for shape in shapes}
    found = summaries(passes, time_rounds(passes, repeats, engine.routed.device)) if passes else []
    return {(one.context or 0, one.batch): one.seconds for one in found}


def _some_ids(shape: tuple[int, ...], model: RoutedModel) -> Tensor:
    """Random tokens, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


PassMaker = Callable[[Engine, ProfileSettings], Mapping[PassShape, Pass]]
"""A backend, seen from here: the passes that settings name, for one engine."""


def measure_profile(
    engine: Engine,
    settings: ProfileSettings,
    make_passes: PassMaker = decoder_passes,
    backend: str | None = None,
    *,
    with_rounds: bool = True,
) -> LatencyProfile:
    """Time everything that ``settings`` name, and rounds of the decoder at the same contexts.

    Args:
        engine: a loaded spec.
        make_passes: gives a pass for each of ``settings.shapes()``.
        backend: the name of what ``make_passes`` runs on; the engine's own where it is left out.
        with_rounds: whether rounds are timed too.

    Raises:
        PlanningError: a context is longer than a model's.
    """
    engine.prepare_passes(_text_lengths(settings))
    passes = make_passes(engine, settings)
    device = engine.routed.device
    seconds = time_rounds(passes, settings.repeats, device)
    return LatencyProfile(
        verifier=engine.spec.verifier,
        draft=engine.spec.draft,
        route=engine.spec.route.unmeasured(),
        backend=backend or engine.backend,
        dtype=DTYPE_NAMES[engine.routed.dtype],
        device=str(device),
        hardware=hardware(device),
        settings=settings,
        measured=tuple(summaries(passes, seconds)),
        disturbed=disturbed_share(seconds),
        rounds=measure_rounds(engine, settings.contexts, settings.repeats) if with_rounds else (),
        offload=_layers_read(engine),
    )


def _layers_read(engine: Engine) -> LayersRead | None:
    cold = engine.routed.cold
    if cold is None:
        return None
    offload = cold.offload
    return LayersRead(kind=offload.kind, memory=offload.memory, bandwidth=offload.bytes_per_second)
