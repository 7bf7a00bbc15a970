"""What a replay needs of the machine at hand: costs of passes, and of what surrounds them on real prompts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.models import context_length
from viasd_calib.pipeline.fitted import policy_decoder, with_policy
from viasd_calib.pipeline.notices import notice
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.host import HostTime, host_time
from viasd_calib.planning.reading import replay_tables
from viasd_calib.planning.search import PolicyGrid, Predictions, search
from viasd_calib.profiling.measure import measure_profile, time_draft_steps
from viasd_calib.profiling.noise import noise_words
from viasd_calib.profiling.profile import LatencyProfile, ProfileSettings
from viasd_calib.profiling.recording import RecordedRound, RecordedText
from viasd_calib.prompts import Prompt
from viasd_calib.slim.cost import CONTEXT
from viasd_calib.traces.texts import TraceText

RECORDED_PROMPTS = 3
"""Prompts of which the rounds of three policies are recorded."""
RECORDED_TOKENS = 32
"""Tokens of their answers at most."""
NARROW = (1, 2, 4, 8, 16)
"""Widths of the passes that are timed, below the widest that a policy makes."""
COST_REPEATS = 9
"""Timed rounds over these passes."""
DECODED: dict[PolicyKind, int] = {"three tiers": 3, "three tiers without a draft model": 2, "speculative": 2}
"""How many policies of a kind and drafter are decoded, where not one: they differ most in what a replay leaves out."""
STOPS = tuple(step / 10 for step in range(10))
"""Stop bounds that are replayed."""
PENDING_SHARES = (0.5, 0.7, 1.0)
"""Parts of the most tokens that may wait: a catch-up of many tokens is a wide pass, which is dear where computing
limits it, and all after a wrong token is lost."""


def recorded_policies(draft_length: int) -> list[Policy]:
    """Policies whose rounds are made of all that a round may be made of."""
    drafted = Policy(draft_length=draft_length, stop_below=0.4)
    return [Policy("none", 0), drafted, replace(drafted, accept_at=0.5, max_pending=draft_length + 6)]


def measure_host(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, tokens: float, costs: ReplayCosts, draft_length: int
) -> HostTime:
    """Record a short decode, and say what it took beyond passes at these costs.

    Args:
        prompts: of which q reads all, and rounds are recorded of the first ``RECORDED_PROMPTS``.
        max_new_tokens: longest answer.
        tokens: of an answer to a turn, as a replay has them.
        costs: of passes alone.
    """
    plain = policy_decoder(engine, Policy("none", 0))
    turns = [list(converse(plain, engine.verifier, prompt, 1)) for prompt in prompts]
    read = [sum(turn.generation.prompt_seconds or 0.0 for turn in one) for one in turns]
    texts: list[list[RecordedRound]] = []
    for policy in recorded_policies(draft_length):
        watched = with_policy(engine, policy)
        for one in turns[:RECORDED_PROMPTS]:
            text = RecordedText(watched, "three_tier", one[0].prompt_ids, min(max_new_tokens, RECORDED_TOKENS))
            texts.append(text.finish().rounds)
    return host_time(costs, texts, read, tokens * statistics.mean(len(one) for one in turns))


def tokens_of(texts: Sequence[tuple[TraceText, int]], max_new_tokens: int) -> float:
    """Mean tokens of answers to the prompts of traced texts, were they of so many at most."""
    return statistics.mean(min(len(text.generated), max_new_tokens) for text, _ in texts)


def say_noise(profile: LatencyProfile) -> None:
    """Warn where other work slowed the passes that were timed."""
    noise = noise_words(profile.disturbed or 0.0)
    if noise is not None:
        notice(noise)


def calibrate_grid(draft_length: int, max_pending: int) -> PolicyGrid:
    """What calibrate replays: one draft length, which is the spec's, and up to so many pending tokens.

    Example:
        >>> calibrate_grid(8, 24).pending
        (12, 17, 24)
    """
    pending = sorted({round(share * max_pending) for share in PENDING_SHARES} | {max_pending})
    return PolicyGrid((draft_length,), STOPS, pending=tuple(bound for bound in pending if bound > draft_length))


def predictions_at(
    engine: Engine,
    profile: LatencyProfile,
    contexts: Sequence[int],
    texts: Sequence[tuple[TraceText, int]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    grid: PolicyGrid,
    *,
    host_draft_length: int,
    each: Mapping[PolicyKind, int] | None = None,
    batches: Sequence[int] = (1,),
) -> dict[int, list[Predictions]]:
    """Replay texts under a grid of policies at the costs of each context, with what the host takes here; *simulated*.

    Args:
        profile: of passes, at these contexts and batches.
        prompts: on which it is measured what rounds take beside their passes.
        max_new_tokens: longest answer.
        host_draft_length: most tokens drafted a round there.
        each: as in :func:`~viasd_calib.planning.search.search`.
        batches: texts that are decoded together; each once.

    Returns:
        By batch: one for each context.
    """
    steps = time_draft_steps(engine, contexts, [batch for batch in batches if batch > 1], COST_REPEATS)
    passes = [
        ReplayCosts.of_profile(profile, context, grid.widest, batch, steps.get((context, batch)))
        for batch in batches
        for context in contexts
    ]
    tokens = tokens_of(texts, max_new_tokens)
    single = ReplayCosts.of_profile(profile, contexts[0], grid.widest)  # rounds are recorded of single texts
    host = measure_host(engine, prompts, max_new_tokens, tokens, single, host_draft_length)
    tables = replay_tables(engine, texts, max(grid.draft_lengths), max(grid.pending) + 1)
    found = iter(search(grid, tables, [host.added_to(one) for one in passes], each))
    return {batch: [*islice(found, len(contexts))] for batch in batches}


def predict_policies(
    engine: Engine,
    texts: Sequence[tuple[TraceText, int]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    grid: PolicyGrid,
) -> Predictions:
    """The policies that are worth decoding, by a replay of a fit's texts at the costs of this machine; *simulated*.

    Args:
        texts: that the fit held back.
        prompts: on which policies will be decoded.
        max_new_tokens: longest answer.
    """
    context = min(CONTEXT, context_length(engine.routed.config) - grid.widest)
    widths = (*(width for width in NARROW if width < grid.widest), grid.widest)
    settings = ProfileSettings(widths=widths, contexts=(context,), batches=(1,), repeats=COST_REPEATS)
    profile = measure_profile(engine, settings, with_rounds=False)
    say_noise(profile)
    found = predictions_at(
        engine, profile, (context,), texts, prompts, max_new_tokens, grid,
        host_draft_length=max(grid.draft_lengths), each=DECODED,
    )  # fmt: skip
    return found[1][0]
