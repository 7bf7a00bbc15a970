"""Replay of traced texts: how many passes each of many policies would have taken. All of it is *simulated*.

The rounds are those of :class:`~viasd_calib.decoding.strategies.three_tier.ThreeTier` with audit ``strict``, greedily,
for all policies and texts at once: a lane is one policy on one text. What is accepted, and where drafting stops, is
decided by the functions that decide it when a text is decoded (:mod:`~viasd_calib.decoding.acceptance`).

A trace knows what p and q' say after q's own tokens alone. What they would have said after a wrong one is unknown, and
is taken to be what they said at the same place of q's text. So two things are approximate:

- A wrong token that waits for q is taken back at catch-up, with all after it, as when it is decoded; the passes spent
  in between are those of the places of q's text that it stood in for.
- Drafted tokens after the first wrong one of a block never count as right; where the draft gate stops a block, the
  scores that it has for them are those of these places.

Where no wrong token ever waits for q, the passes of q and q' are exact, and with a stop bound of 0 draft steps too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import (
    accept_by_draft_gate,
    accept_by_score,
    accept_by_slim,
    drafted_until_stop,
    leading_true,
    must_catch_up,
)
from viasd_calib.decoding.policies import Policy
from viasd_calib.decoding.rolling_acceptance import RollingAcceptance, after_catch_up, length_now
from viasd_calib.planning.policy_table import PolicyTable
from viasd_calib.planning.traced import ReplayTable

LANES = 65536
"""Lanes that are replayed together: as many as a processor's caches hold."""

NOWHERE = 1 << 40
"""The place of a wrong token where there is none."""


@dataclass(frozen=True)
class ReplayCounts:
    """*Simulated* passes of policies over all texts.

    Attributes:
        tokens: of all texts.
        full: passes of q by width, [policies, widths], long; the first column is of width 0.
        slim: passes of q' by width, [policies, widths].
        draft_steps: [policies].
        rounds: [policies].
        wrong: tokens that waited for q in vain, the first of each catch-up, [policies].
    """

    tokens: int
    full: Tensor
    slim: Tensor
    draft_steps: Tensor
    rounds: Tensor
    wrong: Tensor

    @property
    def full_per_token(self) -> Tensor:
        """Passes of q a token, [policies]."""
        return self.full.sum(-1) / self.tokens

    @property
    def slim_per_token(self) -> Tensor:
        """Passes of q' a token, [policies]."""
        return self.slim.sum(-1) / self.tokens

    @property
    def draft_per_token(self) -> Tensor:
        """Draft steps a token, [policies]."""
        return self.draft_steps / self.tokens

    @staticmethod
    def mean_width(passes: Tensor) -> Tensor:
        """Of passes by width ([policies, widths]), [policies]; 0 where there are none."""
        widths = torch.arange(passes.shape[1])
        return (passes * widths).sum(-1) / passes.sum(-1).clamp(min=1)


@dataclass
class _Lanes:
    """What goes on: one policy on one text each, [lanes].

    Attributes:
        policy: its number.
        begin: where its text begins in the table.
        length: of the text.
        limit: most tokens that it might have had.
        at: tokens emitted.
        decided: leading ones that q has decided.
        seen: leading ones whose predecessors q' or q has seen.
        wrong_at: the first emitted token that q would not have chosen.
        drafts: tokens drafted since q's last pass.
        kept: those of them that are emitted and that q keeps.
        refused: those that q' has refused, or q will.
        acceptance: what the rule that watches drafting knows.
    """

    policy: Tensor
    begin: Tensor
    length: Tensor
    limit: Tensor
    at: Tensor
    decided: Tensor
    seen: Tensor
    wrong_at: Tensor
    drafts: Tensor
    kept: Tensor
    refused: Tensor
    acceptance: RollingAcceptance[Tensor]

    def only(self, chosen: Tensor) -> _Lanes:
        """Those of a mask."""
        own = {one.name: getattr(self, one.name)[chosen] for one in fields(self) if one.name != "acceptance"}
        return _Lanes(**own, acceptance=self.acceptance.only(chosen))


@dataclass(frozen=True)
class _Block:
    """A drafted block in each lane.

    Attributes:
        places: of its tokens in the table, [lanes, longest].
        size: tokens, [lanes].
        inside: which places are of the block, [lanes, longest], bool.
        agrees: which tokens are q's choice, [lanes, longest], bool.
        score: the draft gate's, [lanes, longest]; -1 outside the block.
    """

    places: Tensor
    size: Tensor
    inside: Tensor
    agrees: Tensor
    score: Tensor


def replay(policies: Sequence[Policy], texts: ReplayTable) -> ReplayCounts:
    """*Simulated* passes of each policy over all texts.

    Args:
        policies: one at least; of one drafter, that of ``texts``.
    """
    table = PolicyTable.of(policies)
    longest = max(1, max(one.draft_length for one in policies))
    widths = max(one.max_pending for one in policies) + 2 * longest + 3
    kinds = torch.tensor([one.slim_tier for one in policies])
    found = _Counting(len(policies), widths, int(texts.length.sum()))
    for slim_tier in (False, True):
        rows = (kinds == slim_tier).nonzero()[:, 0]
        for lanes in _batches(rows, table, texts):
            _Replay(table, texts, longest, slim_tier, found).run(lanes)
    return found.counts()


def _batches(rows: Tensor, policies: PolicyTable, texts: ReplayTable) -> Iterator[_Lanes]:
    """Lanes of some policies on all texts, ``LANES`` of them at a time."""
    count = len(texts.length)
    size = max(1, LANES // max(count, 1))
    for begin in range(0, len(rows), size):
        own = rows[begin : begin + size]
        policy = own.repeat_interleave(count)
        first, length, limit = (one.repeat(len(own)) for one in (texts.begin, texts.length, texts.limit))
        zero = torch.zeros_like(policy)
        acceptance = RollingAcceptance.begin(policies.draft_length[policy])
        nowhere = torch.full_like(policy, NOWHERE)
        yield _Lanes(policy, first, length, limit, zero, zero, zero, nowhere, zero, zero, zero, acceptance)


class _Counting:
    """Counts by policy, and of passes by width."""

    def __init__(self, policies: int, widths: int, tokens: int) -> None:
        self._policies, self._widths, self._tokens = policies, widths, tokens
        self._full, self._slim = (torch.zeros(policies * widths, dtype=torch.long) for _ in range(2))
        self._steps, self._rounds, self._wrong = (torch.zeros(policies, dtype=torch.long) for _ in range(3))

    def full(self, policy: Tensor, width: Tensor) -> None:
        """Passes of q."""
        self._full += torch.bincount(policy * self._widths + width, minlength=len(self._full))

    def slim(self, policy: Tensor, width: Tensor) -> None:
        """Passes of q'."""
        self._slim += torch.bincount(policy * self._widths + width, minlength=len(self._slim))

    def steps(self, policy: Tensor, steps: Tensor) -> None:
        """Draft steps."""
        self._steps.index_add_(0, policy, steps)

    def rounds(self, policy: Tensor) -> None:
        """A round each."""
        self._rounds += torch.bincount(policy, minlength=self._policies)

    def wrong(self, policy: Tensor) -> None:
        """A token each that waited in vain."""
        self._wrong += torch.bincount(policy, minlength=self._policies)

    def counts(self) -> ReplayCounts:
        """All that was counted."""
        shape = (self._policies, self._widths)
        return ReplayCounts(
            self._tokens, self._full.view(shape), self._slim.view(shape), self._steps, self._rounds, self._wrong
        )


class _Replay:
    """Rounds of lanes whose policies all ask q', or all do not."""

    def __init__(
        self, policies: PolicyTable, texts: ReplayTable, longest: int, slim_tier: bool, counting: _Counting
    ) -> None:
        self._policies, self._texts, self._counting = policies, texts, counting
        self._slim_tier = slim_tier
        self._watching = bool((policies.drafting_pays_at > 0).any())
        self._places = torch.arange(longest)

    def run(self, lanes: _Lanes) -> None:
        """All rounds of all lanes."""
        while True:
            lanes = lanes.only((lanes.at < lanes.length) | (lanes.decided < lanes.at))
            if len(lanes.at) == 0:
                return
            self._round(lanes)

    def _round(self, lanes: _Lanes) -> None:
        policies = self._policies.at(lanes.policy)
        if self._watching:
            policies = replace(policies, draft_length=length_now(lanes.acceptance, policies.draft_length))
        self._counting.rounds(lanes.policy)
        closed = lanes.at == lanes.length
        limit = torch.where(closed, 0, _draft_limit(lanes, policies))
        full = closed | must_catch_up(lanes.at - lanes.decided, limit, policies.max_pending)
        block = self._draft(lanes, policies, limit)
        gated = torch.where(full, 0, accept_by_draft_gate(block.score, policies.draft_accept_at[:, None]))
        whole = (gated > 0) & (gated == block.size)
        if self._slim_tier:
            asked = ~full & ~whole
            kept, regenerated = self._slim(lanes, policies, block, gated, asked)
            self._emit(lanes, block, kept)
            self._emit_own(lanes, block, kept, regenerated)
            lanes.seen = torch.where(asked, lanes.at, lanes.seen)
            rest = ~full & ~whole & ~regenerated & (lanes.at < lanes.length)
            used_up = rest & (kept == block.size)
            fresh = self._draft(lanes, policies, torch.where(used_up, _draft_limit(lanes, policies), 0))
        else:
            kept = gated
            self._emit(lanes, block, kept)
            rest = ~full & ~whole & (lanes.at < lanes.length)
            used_up, fresh = torch.zeros_like(rest), None
        accepted = accept_by_slim(block.agrees, kept[:, None]) - kept
        size = block.size - kept
        if fresh is not None:
            accepted = torch.where(used_up, leading_true(fresh.agrees), accepted)
            size = torch.where(used_up, fresh.size, size)
        self._catch_up(lanes, full | rest, size, accepted)

    def _draft(self, lanes: _Lanes, policies: PolicyTable, limit: Tensor) -> _Block:
        """A block of up to ``limit`` tokens in each lane, [lanes]; its steps are counted."""
        drafted = self._texts.drafted
        unverified = lanes.at - lanes.seen
        after = lanes.at[:, None] + self._places  # [lanes, longest]
        known = after < lanes.length[:, None]
        begins = lanes.begin + torch.minimum(lanes.at, lanes.length - 1)
        places = lanes.begin[:, None] + torch.minimum(after, lanes.length[:, None] - 1)
        depth = (unverified[:, None] + self._places).clamp(max=len(drafted.agrees) - 1)
        flat = depth * drafted.agrees.shape[1] + places
        score = drafted.score.view(-1)[flat]
        offered = leading_true(drafted.proposed.view(-1)[flat])  # where a text has ended its last place goes on
        most = torch.minimum(limit, offered)
        free = drafted.free[begins]
        stopped = torch.minimum(most, drafted_until_stop(score, policies.stop_below[:, None]))
        size = torch.where(free, most, stopped)
        inside = self._places < size[:, None]
        agrees = drafted.agrees.view(-1)[flat] & known & inside
        self._counting.steps(lanes.policy, torch.where(free, 0, size))
        lanes.drafts = lanes.drafts + size
        return _Block(places, size, inside, agrees, torch.where(inside, score, -1.0))

    def _slim(
        self, lanes: _Lanes, policies: PolicyTable, block: _Block, gated: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leading tokens that are kept, and whether q' puts its own after them; each [lanes]."""
        slim = self._texts.slim
        assert slim is not None, "a policy asks q'"
        ages, depths, total = slim.accept.shape
        pending = lanes.at - lanes.decided
        age = (pending[:, None] + self._places).clamp(max=ages - 1)  # [lanes, longest]
        place = self._places.clamp(max=depths - 1)
        accept = slim.accept.view(-1)[(age * depths + place) * total + block.places]
        kept_scores = torch.where(block.inside, accept, -1.0)

        def own_at(kept: Tensor) -> Tensor:
            """Score of q's slim choice after the tokens that are kept, [lanes]."""
            aged = (pending + kept).clamp(max=ages - 1)
            here = lanes.begin + torch.minimum(lanes.at + kept, lanes.length - 1)
            inside = slim.own.view(-1)[(aged * depths + kept.clamp(max=depths - 1)) * total + here]
            after = slim.alone.view(-1)[(aged * (depths + 1) + kept.clamp(max=depths)) * total + here]
            return torch.where(kept < block.size, inside, after)

        bounds = policies.accept_at[:, None]
        masks = accept_by_score(kept_scores, kept_scores, bounds, bounds)
        kept = torch.where(asked, accept_by_slim(masks.accept, gated[:, None]), gated)
        own = own_at(kept)[:, None]
        regenerate = accept_by_score(own, own, bounds, bounds).regenerate[:, 0] & asked
        width = lanes.at - lanes.seen + 1 + block.size
        self._counting.slim(lanes.policy[asked], width[asked])
        return kept, regenerate

    def _emit(self, lanes: _Lanes, block: _Block, count: Tensor) -> None:
        """Append leading tokens of a block, up to the end of the text."""
        right = leading_true(block.agrees)
        room = lanes.length - lanes.at
        clean = lanes.wrong_at == NOWHERE
        wrong = (right < torch.minimum(count, room)) & clean
        lanes.kept = lanes.kept + torch.where(clean, torch.minimum(right, torch.minimum(count, room)), 0)
        lanes.refused = lanes.refused + wrong.long()
        lanes.wrong_at = torch.where(wrong, lanes.at + right, lanes.wrong_at)
        lanes.at = lanes.at + torch.minimum(count, room)

    def _emit_own(self, lanes: _Lanes, block: _Block, kept: Tensor, regenerated: Tensor) -> None:
        """Append the token of q' where it puts one and the text has not ended."""
        slim = self._texts.slim
        assert slim is not None, "a policy asks q'"
        emits = regenerated & (lanes.at < lanes.length)
        age = (lanes.at - lanes.decided).clamp(max=len(slim.agrees) - 1)
        here = lanes.begin + torch.minimum(lanes.at, lanes.length - 1)
        agrees = slim.agrees.view(-1)[age * slim.agrees.shape[1] + here]
        clean = lanes.wrong_at == NOWHERE
        wrong = emits & ~agrees & clean
        drafted = emits & (kept < block.size)
        proposed = block.agrees.gather(1, kept.clamp(max=len(self._places) - 1)[:, None])[:, 0]
        same = drafted & agrees & proposed  # where both are wrong they are taken to differ
        lanes.kept = lanes.kept + (same & clean).long()
        lanes.refused = lanes.refused + (drafted & ~same).long()
        lanes.wrong_at = torch.where(wrong, lanes.at, lanes.wrong_at)
        lanes.at = lanes.at + emits.long()

    def _catch_up(self, lanes: _Lanes, asked: Tensor, size: Tensor, accepted: Tensor) -> None:
        """A pass of q in some lanes, over what is pending and a block of ``size`` tokens, and what it decides."""
        width = lanes.at - lanes.decided + 1 + size
        self._counting.full(lanes.policy[asked], width[asked])
        refused = asked & (lanes.wrong_at < lanes.at)
        self._counting.wrong(lanes.policy[refused])
        on = torch.minimum(lanes.at + accepted + 1, lanes.length)
        settled = torch.where(refused, lanes.wrong_at + 1, on)
        lanes.at = torch.where(asked, settled, lanes.at)
        for name in ("decided", "seen"):
            setattr(lanes, name, torch.where(asked, lanes.at, getattr(lanes, name)))
        lanes.wrong_at = torch.where(asked, NOWHERE, lanes.wrong_at)
        if self._watching:
            self._watch(lanes, asked, torch.where(refused, 0, accepted), ~refused & (accepted < size))

    def _watch(self, lanes: _Lanes, asked: Tensor, accepted: Tensor, rejected: Tensor) -> None:
        """Let the rule see what a pass of q has decided in some lanes."""
        policies, kept, refused = (
            self._policies.at(lanes.policy),
            lanes.kept + accepted,
            lanes.refused + rejected.long(),
        )
        found = after_catch_up(
            lanes.acceptance, lanes.drafts, kept, refused, policies.draft_length, policies.drafting_pays_at
        )
        lanes.acceptance = RollingAcceptance.choose(asked, found, lanes.acceptance)
        for name in ("drafts", "kept", "refused"):
            setattr(lanes, name, torch.where(asked, 0, getattr(lanes, name)))


def _draft_limit(lanes: _Lanes, policies: PolicyTable) -> Tensor:
    """Most tokens to draft, so that the text keeps room for q's own after them, [lanes]."""
    return torch.minimum(policies.draft_length, lanes.limit - lanes.at - 1).clamp(min=0)
