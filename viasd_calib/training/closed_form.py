"""A start for the shallow drafter by least squares: no gradient step, and it already predicts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from viasd_calib.draft.shallow import ShallowModel, unit_size
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.least_squares import LeastSquares

RIDGE = 3e-3
"""Weight of the penalty on the maps' size, relative to inputs of root mean square 1."""

OUTLIER = 10.0
"""Places whose residual stream is this many times the text's median are left out: attention sinks."""


@torch.no_grad()
def fit_stand_in(model: ShallowModel, verifier: RoutedModel, texts: Iterable[Tensor]) -> int:
    """Fit the drafter's maps to the verifier's residual stream where the drafter's layers begin.

    The drafter's layers are the verifier's last ones. What enters them in the verifier is predicted
    linearly from the token's embedding and the residual stream of the place before at the taps, in
    closed form: what ReplaceMe (arXiv 2505.02819) does for skipped layers within one place, extended to
    the next place. The drafter's own state takes the taps' part by a fit of its own, on the verifier's
    last state, which it stands in for.

    Args:
        model: the drafter; its three maps are set.
        verifier: whose texts these are.
        texts: token ids, [length] each, at least two long.

    Returns:
        Places that were fitted on.
    """
    hidden, taps = verifier.config.hidden_size, len(model.shape.taps)
    entry = len(verifier.layers) - model.shape.num_layers
    read = (*model.shape.taps, len(verifier.layers), entry)
    token, tap = slice(0, hidden + 1), slice(hidden + 1, hidden + 1 + taps * hidden)
    own = slice(tap.stop, tap.stop + hidden)
    problem = LeastSquares(own.stop, hidden)
    for text in texts:
        ids = text.to(verifier.device)[None]  # [1, length]
        tapped = _tapped(verifier, ids, read)  # [length, taps + 2, hidden]
        before = unit_size(tapped[:-1, : taps + 1].float()).flatten(1)  # [length - 1, (taps + 1) * hidden]
        embedded = model.embed(ids)[0, 1:].float()  # [length - 1, hidden]
        inputs = torch.cat([embedded, torch.ones_like(embedded[:, :1]), before], 1)
        wanted = tapped[1:, -1].float()  # [length - 1, hidden]
        size = wanted.norm(dim=-1)
        usual = size < OUTLIER * size.median()
        problem.add(inputs[usual], wanted[usual])

    maps = torch.zeros_like(problem.cross)
    maps[: tap.stop] = problem.solve(slice(0, tap.stop), RIDGE)
    of_token = torch.zeros_like(maps)
    of_token[token] = maps[token]
    maps[own] = problem.solve(own, RIDGE, known=of_token)
    model.from_token.weight.copy_(maps[:hidden].T)
    model.from_token.bias.copy_(maps[hidden])
    model.from_taps.weight.copy_(maps[tap].T)
    model.from_own.weight.copy_(maps[own].T)
    return problem.count


def _tapped(verifier: RoutedModel, ids: Tensor, taps: tuple[int, ...]) -> Tensor:
    """The residual stream at ``taps`` in any order, [length, taps, hidden]."""
    rising = sorted(set(taps))
    states, _ = read_text(verifier, ids, rising)
    return states.tapped[0][:, [rising.index(tap) for tap in taps]]
