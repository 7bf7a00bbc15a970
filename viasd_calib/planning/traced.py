"""What a replay reads: at every place of traced texts, what p and q' would have said, and whether q agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftedPlaces:
    """What a drafter would have proposed at n places of a text, after 0, 1, ... drafted tokens that q agrees with.

    Attributes:
        proposed: whether there is a proposal, [depths, n], bool; a block ends before the first place without one.
        agrees: whether it is q's choice, [depths, n], bool.
        score: the draft gate's, [depths, n], float32; 0 where there is none.
        free: whether a block that begins at a place takes no step of a model, and is not stopped, [n], bool.
    """

    proposed: Tensor
    agrees: Tensor
    score: Tensor
    free: Tensor


@dataclass(frozen=True)
class SlimPlaces:
    """What q' would have said at n places of a text, by its age there: how many tokens before it q had not seen.

    Attributes:
        accept: the slim gate's score of the drafted token, [ages, depths, n], float32; depth is the place in the block.
        own: of q's slim choice beside it, [ages, depths, n].
        alone: of q's slim choice after a block of as many tokens, [ages, depths + 1, n].
        agrees: whether q's slim choice is q's, [ages, n], bool.
    """

    accept: Tensor
    own: Tensor
    alone: Tensor
    agrees: Tensor


Places = TypeVar("Places", DraftedPlaces, SlimPlaces)


def _joined(parts: Sequence[Places]) -> Places:
    """Those of several texts, one at least, as those of one; the last dimension of all their tensors is the place."""
    columns = {field.name: torch.cat([getattr(one, field.name) for one in parts], -1) for field in fields(parts[0])}
    return type(parts[0])(**columns)


@dataclass(frozen=True)
class ReplayText:
    """One traced text.

    Attributes:
        limit: most tokens that it might have had.
        slim: None where no policy will ask q'.
    """

    limit: int
    drafted: DraftedPlaces
    slim: SlimPlaces | None


@dataclass(frozen=True)
class ReplayTable:
    """Traced texts one after the other, N places in all, so that a place of any text is one number.

    Attributes:
        begin: the first place of each text, [texts], long.
        length: its tokens, [texts], long.
        limit: most tokens that it might have had, [texts], long.
        drafted: [..., N].
        slim: [..., N]; None where no policy will ask q'.
    """

    begin: Tensor
    length: Tensor
    limit: Tensor
    drafted: DraftedPlaces
    slim: SlimPlaces | None

    @classmethod
    def of(cls, texts: Sequence[ReplayText]) -> ReplayTable:
        """A table of texts, one at least, all with what q' said or all without."""
        drafted = [one.drafted for one in texts]
        slim = [one.slim for one in texts if one.slim is not None]
        length = torch.tensor([one.agrees.shape[-1] for one in drafted])
        return cls(
            begin=length.cumsum(0) - length,
            length=length,
            limit=torch.tensor([one.limit for one in texts]),
            drafted=_joined(drafted),
            slim=_joined(slim) if slim else None,
        )

    @property
    def places(self) -> int:
        """Of all texts together."""
        return int(self.length.sum())
