"""Why a plan is as it is, in words: what a slim pass and a drafted token must save, and what they do."""

from __future__ import annotations

from viasd_calib.planning.search import Predicted, Predictions


def plan_words(found: Predictions) -> list[str]:
    """Whether drafting pays at one context and whether the slim tier does, a sentence each; all *simulated*."""
    words = [_fastest_words(found)]
    if found.drafted is not None:
        words.append(_drafting_words(found, found.drafted))
    if found.with_slim is not None:
        words.append(_slim_words(found, found.with_slim))
    return words


def _fastest_words(found: Predictions) -> str:
    fastest = found.fastest
    return (
        f"At context {found.costs.context}{_together(found.costs.batch)}: {fastest.policy.kind}, "
        f"{1000 * fastest.seconds:.2f} ms a token (simulated), {found.speedup(fastest):.2f} times the speed of no "
        "drafting."
    )


def _together(batch: int) -> str:
    return "" if batch == 1 else f", {batch} texts together"


def _drafting_words(found: Predictions, best: Predicted) -> str:
    """Drafting pays where passes and draft steps of a token, in passes of q over one token, come to less than 1."""
    costs, one = found.costs, found.by_kind["no drafting"]
    single = costs.pass_seconds("full", 1)
    passes = best.full * costs.pass_seconds("full", best.full_width) / single
    steps = best.draft * costs.draft_step / single
    pays = best.seconds < one.seconds
    return (
        f"{'Drafting pays' if pays else 'No drafting'} by the replay: a token takes {best.full:.2f} full passes that "
        f"cost {passes:.2f} of one over a single token, and {best.draft:.2f} draft steps that cost {steps:.2f}; "
        f"together {passes + steps:.2f}, which must be below 1{_others(pays, passes + steps)}."
    )


def _slim_words(found: Predictions, best: Predicted) -> str:
    """The slim tier pays where q'/q + P(escalate) < 1, as a block otherwise takes one full pass."""
    costs, without = found.costs, found.without_slim
    if not best.slim:
        return "No slim tier: no policy asks it."
    share = costs.pass_seconds("slim", best.slim_width) / costs.pass_seconds("full", best.slim_width)
    escalated = best.full / best.slim
    pays = best.seconds < without.seconds
    return (
        f"{'The slim tier pays' if pays else 'No slim tier'} by the replay: a slim pass costs {share:.2f} of a full "
        f"one and {escalated:.2f} full passes follow it, together {share + escalated:.2f}, which must be below 1"
        f"{_others(pays, share + escalated)}; {best.policy.kind} {1000 * best.seconds:.2f} ms a token, "
        f"{without.policy.kind} {1000 * without.seconds:.2f} (simulated)."
    )


def _others(pays: bool, sum_of_shares: float) -> str:
    """What else decides where the break-even alone says something else."""
    if pays == (sum_of_shares < 1):
        return ""
    return "; here widths of passes, draft steps and the host's share of rounds decide against that"
