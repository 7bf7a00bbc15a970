"""The prompts of a command: read, chosen and checked before anything else is done, and what a user is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from viasd_calib.errors import PromptError
from viasd_calib.evaluation.provenance import PromptsMeasured
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.shared_options import UnseenPrompts
from viasd_calib.progress import say as report
from viasd_calib.prompt_copies import known_prompts, without_copies
from viasd_calib.prompts import Prompt, Split, SplitShares, read_prompt_file, split_of, split_sha256
from viasd_calib.spec import RoutingSpec

SHOWN = 5
"""Prompts that a notice names."""


@dataclass(frozen=True)
class Unseen:
    """Prompts that a spec is measured on.

    Attributes:
        distinct: all prompts of the source, copies left out.
        left_out: prompts of the same split that were left out, as the spec was fitted or calibrated on them.
    """

    prompts: list[Prompt]
    left_out: int
    distinct: list[Prompt]


def load_prompts(source: str) -> list[Prompt]:
    """Read prompts, say what was read, and leave out copies of one text.

    Raises:
        PromptError: they cannot be read, or are no prompts.
    """
    found = read_prompt_file(source)
    read, *more = found.describe()
    report(read)
    for line in more:
        notice(line)
    distinct = without_copies(found.prompts)
    copies = len(found.prompts) - len(distinct)
    if copies:
        notice(
            f"{copies} of {len(found.prompts)} prompts are left out: copies of others, but for id, case and "
            f"white space; {len(distinct)} distinct ones are left"
        )
    return distinct


def of_split(
    prompts: Sequence[Prompt], split: Split | None, shares: SplitShares | None, *, say: bool = True
) -> list[Prompt]:
    """The prompts of one split, or all.

    Args:
        say: whether to say how many there are in each split.

    Raises:
        PromptError: there are none in that split.
    """
    by_hash = [split_of(prompt.sha256, shares or SplitShares()) for prompt in prompts]
    counts = Counter(by_hash)
    sizes = ", ".join(f"{name} {counts[name]}" for name in get_args(Split))
    chosen = [prompt for prompt, own in zip(prompts, by_hash, strict=True) if split in (None, own)]
    if not chosen:
        raise PromptError(
            f"none of {len(prompts)} prompts is of the split {split!r} (by their hashes: {sizes}); "
            "give more prompts, or other shares of the splits"
        )
    if say:
        report(f"prompts by split: {sizes}; {'all' if split is None else f'those of {split!r}'} are taken")
    return chosen


def choose_unseen(options: UnseenPrompts, spec: RoutingSpec) -> Unseen:
    """Prompts of a file, by split, cut to ``limit`` with the tasks taking turns, for a spec to be measured on.

    Those that it was fitted or calibrated on are left out, unless the options take them in: what it is like on those
    is no measure.

    Raises:
        PromptError: they cannot be read, or none is left.
    """
    check_limit(options.limit)
    distinct = load_prompts(options.prompts)
    prompts = of_split(distinct, options.split, options.shares)
    if spec.prompts is None or spec.prompts.fit is None:
        notice(
            "the spec does not say which prompts it was fitted on, an older version of viasd_calib wrote it or "
            "its fit; whether these are among them cannot be told"
        )
    known = known_prompts(prompts, frozenset() if spec.prompts is None else spec.prompts.all)
    if known and options.include_fitted:
        notice(
            f"{len(prompts)} prompts, {len(known)} of which the spec was fitted or calibrated on; "
            "what is measured on them flatters it"
        )
    elif known:
        fitted = {prompt.id for prompt in known}
        notice(
            f"{len(prompts)} prompts, {len(known)} left out: the spec was fitted or calibrated on them "
            "(--include-fitted true takes them in)"
        )
        prompts = [prompt for prompt in prompts if prompt.id not in fitted]
        if not prompts:
            raise PromptError(
                f"the spec was fitted or calibrated on all {len(known)} prompts; give others, or --include-fitted true "
                "to measure on them all the same"
            )
    return Unseen(take_turns(prompts, options.limit), 0 if options.include_fitted else len(known), distinct)


def notice_other_prompts(
    unseen: Unseen, measured: PromptsMeasured, spec: RoutingSpec, shares: SplitShares | None, names: tuple[str, str]
) -> None:
    """Warn that a benchmark measured other prompts than those chosen here, if it did.

    A benchmark notes the hash of its set of prompts: it is of this source where the same choice from it has that hash.

    Args:
        names: of the benchmark and of the source, as the user gave them.
    """
    benchmark, source = names
    known = frozenset() if spec.prompts is None or measured.fitted_included else spec.prompts.all
    by_split = [
        prompt
        for prompt in unseen.distinct
        if measured.split in (None, split_of(prompt.sha256, shares or SplitShares()))
    ]
    fitted = {prompt.id for prompt in known_prompts(by_split, known)}
    split = [prompt for prompt in by_split if prompt.id not in fitted]
    of_source = split_sha256(take_turns(split, measured.limit)) == measured.sha256
    if of_source and {prompt.sha256 for prompt in unseen.prompts} <= {prompt.sha256 for prompt in split}:
        return
    chosen = f"split {measured.split!r}" if measured.split else "all splits"
    notice(
        f"the speeds are those of {benchmark}, measured on {measured.file} ({chosen}); the tier shares, the "
        f"text and the rounds are of other prompts, {len(unseen.prompts)} of {source}"
    )


def take_turns(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` prompts, the tasks taking turns; all in their order where it is None."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    longest = max(len(group) for group in by_task.values())
    turns = [group[place] for place in range(longest) for group in by_task.values() if place < len(group)]
    return turns[:limit]


def check_limit(limit: int | None) -> None:
    """Refuse to take no prompts.

    Raises:
        PromptError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"--limit is {limit}; take one prompt at least, or leave it out for all")


def check_prompts(verifier: lazy_types.Verifier, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Refuse prompts that do not fit the verifier's context, all of them at once, and say what else is odd.

    Raises:
        PromptError: naming the first few.
    """
    from viasd_calib.prompt_lengths import check_lengths, unused_template_arguments

    found = check_lengths(verifier, prompts, max_new_tokens)
    if found.may_end_early:
        named = ", ".join(map(repr, found.may_end_early[:SHOWN]))
        more = f" and {len(found.may_end_early) - SHOWN} others" if len(found.may_end_early) > SHOWN else ""
        notice(
            f"where answers are long, the context has no room for the later turns of {named}{more}; "
            "such a conversation ends before the turn that does not fit"
        )
    unused = unused_template_arguments(verifier, prompts)
    if unused:
        notice(
            f"the verifier's chat template does not hold {', '.join(unused)}; "
            "as chat_template_kwargs of the prompts that changes nothing"
        )
