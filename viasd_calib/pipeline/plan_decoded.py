"""What a plan decodes: at each context the policies predicted there, on prompts about as long; and what that shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, get_args

from viasd_calib.calibration.paired import FEWEST_PROMPTS
from viasd_calib.calibration.policy_search import decide
from viasd_calib.calibration.policy_timing import Decision
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.policies import WITHOUT_SLIM, Policy, PolicyKind
from viasd_calib.models import Verifier, encode_prompt
from viasd_calib.pipeline.fitted import policy_decoder
from viasd_calib.planning.search import Predictions
from viasd_calib.planning.table import half_ways, nearest
from viasd_calib.prompts import Prompt, draw_prompts
from viasd_calib.spec import PolicyDrafter


class Decoded(NamedTuple):
    """What decoding has shown at one context and batch size.

    Attributes:
        measured: seconds a token of the policies that were decoded, by kind.
    """

    decision: Decision
    measured: dict[PolicyKind, float]


@dataclass(frozen=True)
class PlacedPrompts:
    """The prompts that may be decoded, each at the context that its texts come nearest to.

    Attributes:
        by_context: at every context, rising; none at some.
        max_new_tokens: longest answer.
    """

    by_context: Mapping[int, Sequence[Prompt]]
    max_new_tokens: int

    @classmethod
    def of(
        cls, verifier: Verifier, prompts: Sequence[Prompt], contexts: Sequence[int], max_new_tokens: int
    ) -> PlacedPrompts:
        """Encode each prompt: a text is as long as its first turn and half of the longest answer.

        Args:
            contexts: rising, one at least.

        Raises:
            PromptError: one does not fit the verifier's context.
        """
        found: dict[int, list[Prompt]] = {context: [] for context in contexts}
        for prompt in prompts:
            length = len(encode_prompt(verifier, prompt, [], max_new_tokens)) + max_new_tokens // 2
            found[nearest(contexts, length)].append(prompt)
        return cls(found, max_new_tokens)

    def lengths_at(self, context: int) -> str:
        """How long prompts are that are placed at a context, in words; empty where even an empty one is too long.

        Example:
            >>> placed = PlacedPrompts({100: [], 400: [], 1600: []}, max_new_tokens=60)
            >>> [placed.lengths_at(context) for context in (100, 400, 1600)]
            ['at most 170 tokens', '171 to 770 tokens', '771 tokens or more']
        """
        contexts = [*self.by_context]
        bounds = [bound - self.max_new_tokens // 2 for bound in half_ways(contexts)]
        number = contexts.index(context)
        least = 1 if number == 0 else max(bounds[number - 1] + 1, 1)
        if number == len(bounds):
            return f"{least} tokens or more"
        most = bounds[number]
        if most < least:
            return ""
        return f"at most {most} tokens" if number == 0 else f"{least} to {most} tokens"


class Grouping(NamedTuple):
    """Prompts to decode at one batch size.

    Attributes:
        by_context: at each context that is decoded, one at least, rising.
        words: why others are not, and what mends that.
    """

    by_context: dict[int, list[Prompt]]
    words: list[str]


def together(placed: PlacedPrompts, limit: int | None) -> Grouping:
    """All prompts as one group, at the context that most of them are placed at; of several the shortest.

    Args:
        limit: most prompts, drawn by hash.
    """
    prompts = draw_prompts([*chain.from_iterable(placed.by_context.values())], limit)
    hashes = {prompt.sha256 for prompt in prompts}
    counts = {context: sum(one.sha256 in hashes for one in own) for context, own in placed.by_context.items()}
    return Grouping({max(counts, key=counts.__getitem__): prompts}, [])


def group_prompts(placed: PlacedPrompts, limit: int | None, batch: int) -> Grouping:
    """A group at each context that has prompts enough for an interval; all of them together where none has.

    Args:
        limit: most prompts at a context, drawn by hash.
        batch: texts that are decoded together; an interval takes ``FEWEST_PROMPTS`` times as many prompts.
    """
    needed = FEWEST_PROMPTS * batch
    drawn = {context: draw_prompts(own, limit) for context, own in placed.by_context.items()}
    groups = {context: own for context, own in drawn.items() if len(own) >= needed}
    if groups:
        others = {context: len(own) for context, own in drawn.items() if context not in groups}
        return Grouping(groups, [_few_words(placed, [*groups], *one, batch) for one in others.items()])
    found = together(placed, limit)
    ((context, prompts),) = found.by_context.items()
    mends = []
    if max(map(len, placed.by_context.values())) < needed:
        mends.append("give more prompts with --prompts")
    if limit is not None and limit < needed:
        mends.append(f"raise --limit to {needed} at least")
    counts = ", ".join(f"{len(own)} at {place}" for place, own in drawn.items())
    return found._replace(
        words=[
            f"No context has the {needed} prompts that an interval takes{_in_batches(batch)} ({counts}): "
            f"{len(prompts)} are decoded together, as at context {context}; {' and '.join(mends)}."
        ]
    )


def _few_words(placed: PlacedPrompts, decoded: Sequence[int], context: int, count: int, batch: int) -> str:
    """Why a context with so many prompts is not decoded, and what mends that."""
    near, lengths = nearest(decoded, context), placed.lengths_at(context)
    mend = f"give some of {lengths} with --prompts" if lengths else "ask for fewer tokens with --max-new-tokens"
    return (
        f"At context {context} too few prompts are as {'long' if context > near else 'short'} ({count} of the "
        f"{FEWEST_PROMPTS * batch} that an interval takes{_in_batches(batch)}): decided as at {near}; {mend}."
    )


def _in_batches(batch: int) -> str:
    return "" if batch == 1 else f" in batches of {batch}"


def decode_groups(
    engine: Engine,
    predictions: Sequence[Predictions],
    certified: Sequence[Decoder],
    groups: Mapping[int, Sequence[Prompt]],
    max_new_tokens: int,
    batch: int,
) -> dict[int, Decoded]:
    """Decode at each context with prompts: the fastest policy with the slim tier that is predicted there, the fastest
    of each kind without it, and certified ones, in turns.

    Args:
        predictions: at every context, at this batch size.
        certified: they decode without a plan, so that what they take is of no context.
        groups: prompts by context.
        max_new_tokens: longest answer.
        batch: texts that are decoded together.
    """
    predicted = {found.costs.context: found for found in predictions}
    shown: dict[int, Decoded] = {}
    for context, prompts in groups.items():
        slim = predicted[context].with_slim
        assert slim is not None, "the grid has policies that ask q'"
        without: dict[PolicyDrafter | None, Policy] = {
            one.policy.drafter: one.policy for one in predicted[context].by_kind.values() if not one.policy.slim_tier
        }
        decision = decide(
            policy_decoder(engine, slim.policy), {name: policy_decoder(engine, one) for name, one in without.items()},
            certified, engine.verifier, sorted(prompts, key=lambda prompt: prompt.sha256), max_new_tokens, batch,
        )  # fmt: skip
        shown[context] = Decoded(decision, {slim.policy.kind: decision.with_slim, **decision.baselines})
    return shown


def allowed_kinds(
    predictions: Sequence[Predictions], decoded: Mapping[int, Decoded], batch: int
) -> tuple[list[set[PolicyKind]], list[str]]:
    """Kinds of policies that may be planned at each context of one batch size, and why others may not.

    A context that was not decoded takes what was shown at the nearest one that was, by ratio.

    Args:
        predictions: at each context.
        decoded: by context, rising.
    """
    ruled_out: dict[int, set[PolicyKind]] = {}
    words: list[str] = []
    for context, one in decoded.items():
        ruled_out[context], own = _ruled_out(one, batch, f" at context {context}" if len(decoded) > 1 else "")
        words += own
    places = [nearest([*decoded], found.costs.context) for found in predictions]
    return [{*found.by_kind} - ruled_out[place] for found, place in zip(predictions, places, strict=True)], words


def _ruled_out(shown: Decoded, batch: int, place: str) -> tuple[set[PolicyKind], list[str]]:
    """Kinds that were not shown to be faster than what is simpler, and what was shown, in words.

    Args:
        place: where that was, in words, with a space before.
    """
    decision, measured = shown
    slim = {*get_args(PolicyKind)} - {*WITHOUT_SLIM.values()}
    speed = decision.slim_speed
    decoded = f"on {speed.n} prompts" if batch == 1 else f"in batches of {batch} texts ({speed.n} of them)"
    if speed.above_one:
        ruled_out = set()
        words = [f"Decoded{place} {decoded}, the slim tier is faster: {speed.words} times."]
    else:
        ruled_out = slim
        words = [
            f"No slim tier{place}: decoded {decoded} it is not shown to be faster than what is without it, "
            f"{speed.words} times."
        ]
    slower = {kind for kind in measured if kind not in slim and measured[kind] > measured["no drafting"]}
    words += [
        f"Left out{place}{_in_batches(batch)}: {kind} took {1000 * measured[kind]:.2f} ms a token where it was "
        f"decoded, and no drafting {1000 * measured['no drafting']:.2f}."
        for kind in sorted(slower)
    ]
    return ruled_out | slower, words
