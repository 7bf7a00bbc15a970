"""One text being decoded: its tokens, what q has decided of them, and what was spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import Tier, token_deficits
from viasd_calib.decoding.ending import Ending
from viasd_calib.decoding.rolling_acceptance import RollingAcceptance
from viasd_calib.decoding.verification import TokenSampler
from viasd_calib.draft.base import Drafter, TextDrafter
from viasd_calib.passes.model_passes import FullPass, PassResult
from viasd_calib.passes.requests import Passes, finish
from viasd_calib.slim.cache import CacheRow, keep_rows
from viasd_calib.slim.forward import RoutedModel


@dataclass
class Counts:
    """What decoding a text took.

    Attributes:
        full_passes: passes of q, the prompt's own not counted.
        slim_passes: passes of q'.
        draft_steps: forward passes of the draft model.
        rejected: drafted tokens that q, q' or the audit refused; a tail that was not verified is not counted.
    """

    full_passes: int = 0
    slim_passes: int = 0
    draft_steps: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Generation:
    """A decoded text.

    Attributes:
        tokens: the new tokens, up to and including the first that ends the text.
        tiers: which tier decided each.
        drafted: whether each was proposed by the draft model.
        prompt_seconds: what q's pass over the prompt took, by the host's clock; in a batch over all prompts of it. None
            where it is not known.
        deficits: of a text that was judged, how far each token lies below q's choice at its place, in nats: 0 where q
            decided it, else what the catch-up found that audited it. None without judging, and for a text that was
            given up while tokens were pending.
    """

    tokens: list[int]
    tiers: list[Tier]
    drafted: list[bool]
    counts: Counts
    prompt_seconds: float | None = field(default=None, compare=False)
    deficits: list[float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class DecidedDrafts:
    """What became of the tokens that were drafted between two passes of q, once the second one has decided.

    Attributes:
        drafted: all of them.
        kept: those that are in the text.
        refused: by q, by q' before it, or by the audit.
    """

    drafted: int
    kept: int
    refused: int


@dataclass
class Session:
    """State of one text.

    ``row.exact + 1`` leading tokens are decided: the prompt, and what q has chosen or the audit has
    kept. Tokens after them are pending.

    Attributes:
        proposal_probs: what each pending token was drawn from, [vocabulary] each; empty when greedy.
        deficits: where the text is judged, how far each token that an audit kept lies below q's choice, at its place
            in the text, 0 elsewhere: [limit], float32, in nats. It stays on the device until the text has ended.
        drafts: tokens drafted since q's last pass.
        refused_before: ``counts.rejected`` at that pass.
        decided_drafts: of the last pass of q, until the rule that watches drafting has seen it.
        acceptance: what that rule knows of the text; None while it has not been asked.
    """

    verifier: RoutedModel
    drafter: TextDrafter | None
    sampler: TokenSampler
    text: Tensor  # [limit], long
    prompt_length: int
    limit: int
    ending: Ending
    row: CacheRow  # its row of the cache that q and q' share
    length: int
    tiers: list[Tier] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    proposal_probs: list[Tensor] = field(default_factory=list)
    prompt_seconds: float | None = None
    ended: bool = False  # the last token ends the text
    deficits: Tensor | None = None
    drafts: int = 0
    refused_before: int = 0
    decided_drafts: DecidedDrafts | None = None
    acceptance: RollingAcceptance[float] | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        """Where the drafter reads the verifiers' residual stream."""
        return () if self.drafter is None else self.drafter.taps

    @property
    def together(self) -> int:
        """How many texts are decoded together now, this one among them; those that have ended are not."""
        return self.row.shared.batch

    @property
    def decided(self) -> int:
        """Leading tokens that are settled as far as q is concerned."""
        return min(self.row.exact + 1, self.length)

    @property
    def pending(self) -> int:
        """Emitted tokens that q has not seen yet."""
        return self.length - self.decided

    @property
    def closed(self) -> bool:
        """Whether no token may follow: the text has ended or the limit is met."""
        return self.ended or self.length == self.limit

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return 0 if self.closed else self.limit - self.length

    def emit(
        self, tokens: Tensor, values: Sequence[int], tier: Tier, *, drafted: bool, proposal_probs: Tensor | None = None
    ) -> None:
        """Append tokens; stop after the one that ends the text, and at the limit.

        Args:
            tokens: [n] or more, on the device.
            values: the same n on the host.
            tier: which tier decided them.
            drafted: whether the draft model proposed them.
            proposal_probs: what they were drawn from, [n, vocabulary] or more; None when greedy, or where q decided.
        """
        count = min(len(values), self.room)
        if count == 0:
            return
        self.text[self.length : self.length + count] = tokens[:count]
        end = self.ending.within(self.text[: self.length + count], values[:count])
        count = count if end is None else end
        self.length += count
        self.tiers += [tier] * count
        self.drafted += [drafted] * count
        if proposal_probs is not None:
            self.proposal_probs += proposal_probs[:count].unbind()
        self.ended = end is not None

    def cut(self, length: int) -> None:
        """Take back every token from position ``length`` on."""
        self.length = length
        kept = length - self.prompt_length
        del self.tiers[kept:]
        del self.drafted[kept:]
        self.ended = False

    def settle(self) -> None:
        """Note that q has seen every token but the last, and decided that one."""
        self.row.mark_exact(self.length - 1)
        self.proposal_probs.clear()

    def drafts_among(self, pending: int) -> int:
        """How many of the first ``pending`` pending tokens were drafted."""
        first = self.decided - self.prompt_length
        return sum(self.drafted[first : first + pending])

    def note_decided(self, kept: int) -> None:
        """Note that a pass of q has kept so many drafted tokens, and refused what ``counts`` says."""
        refused = self.counts.rejected - self.refused_before
        self.decided_drafts = DecidedDrafts(self.drafts, kept, refused)
        self.drafts, self.refused_before = 0, self.counts.rejected

    def judge(self) -> None:
        """From now on, note what audits find of the tokens that they keep."""
        self.deficits = torch.zeros(self.limit, dtype=torch.float32, device=self.text.device)

    def note_audited(self, logits: Tensor, kept: int) -> None:
        """Note how far the first ``kept`` pending tokens lie below q's choices; the host does not wait for it.

        Args:
            logits: q's at the places of the pending tokens and after them, [kept or more, vocabulary].
        """
        if self.deficits is not None:
            audited = slice(self.decided, self.decided + kept)
            self.deficits[audited] = token_deficits(logits[:kept], self.text[audited])

    def result(self) -> Generation:
        """The text so far."""
        if self.drafter is not None:
            self.counts.draft_steps = self.drafter.steps
        new = slice(self.prompt_length, self.length)
        deficits = None if self.deficits is None or self.pending else self.deficits[new].tolist()
        return Generation(
            self.text[new].tolist(),
            list(self.tiers),
            list(self.drafted),
            self.counts,
            self.prompt_seconds,
            deficits,
        )


def open_session(
    verifier: RoutedModel,
    drafter: Drafter | None,
    prompt: Sequence[int],
    max_new_tokens: int,
    ending: Ending,
    sampler: TokenSampler,
) -> Session:
    """Run q over a prompt, all but its last token.

    Args:
        prompt: at least one token, as :func:`~viasd_calib.token_ids.read_token_ids` gives them.

    Raises:
        PromptError: the prompt does not fit the context with the new tokens.
    """
    limit = len(prompt) + max_new_tokens
    row = CacheRow(verifier.new_cache(limit))
    own = None if drafter is None else drafter.start(limit)
    session = new_session(verifier, own, prompt, limit, ending, sampler, row)
    finish(read_prompt(session))
    return session


def new_session(
    verifier: RoutedModel,
    drafter: TextDrafter | None,
    prompt: Sequence[int],
    limit: int,
    ending: Ending,
    sampler: TokenSampler,
    row: CacheRow,
) -> Session:
    """A text whose prompt has not been read yet.

    Args:
        drafter: of this text.
        limit: most tokens of the text, its prompt included.
        row: empty, with room for so many.
    """
    text = torch.zeros(limit, dtype=torch.long, device=verifier.device)
    text[: len(prompt)] = torch.tensor(list(prompt), device=verifier.device)
    return Session(verifier, drafter, sampler, text, len(prompt), limit, ending, row, len(prompt))


def read_prompt(session: Session) -> Passes[None]:
    """Run q over the prompt, all but its last token."""
    begin = time.perf_counter()
    seen = session.length - 1
    if seen == 0:
        session.prompt_seconds = 0.0
        return
    result: PassResult = yield FullPass(
        session.verifier, session.row, 0, session.text[:seen], wanted=0, taps=session.taps
    )
    session.row.mark_exact(seen)
    if session.drafter is not None:
        session.drafter.observe(0, result.tapped)
    session.prompt_seconds = time.perf_counter() - begin


def keep_sessions(sessions: Sequence[Session]) -> None:
    """Drop all texts but these from a batch, in their order; does nothing where none is left."""
    if not sessions:
        return
    keep_rows([session.row for session in sessions])
    drafters = [session.drafter for session in sessions if session.drafter is not None]
    if drafters:
        drafters[0].keep_rows(drafters)
