"""``viasd calibrate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from viasd_calib.choices import FRACTIONS
from viasd_calib.cli.notices import notice_resumed, say_written
from viasd_calib.devices import check_device
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE, SCORES_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.ledger import ledger_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_fit_folder, check_model, check_out_folder
from viasd_calib.pipeline.numbers import Count, DraftLength, Inside, MaxPending, Share
from viasd_calib.pipeline.prompt_choice import check_limit, check_prompts, load_prompts, of_split
from viasd_calib.profiling.profile import PassShape, ProfileSettings
from viasd_calib.prompt_copies import known_prompts, normalised_sha256, short_hashes
from viasd_calib.prompts import EMBEDDED, Prompt, SplitShares, draw_prompts, select_split, split_sha256
from viasd_calib.spec import Audit, Decoding, DType, Gates, file_sha256, prompts_needed
from viasd_calib.tables import new_table

WORTH_PROMPTS = 8
"""Prompts on which policies are timed."""
WORTH_TOKENS = 32
"""Tokens of their answers at least: fewer say little about the time of one."""
COST_REPEATS = 9
"""Timed rounds over the passes whose costs decide where drafting stops."""


def calibrate(
    fit: str,
    out: str,
    cost: Share | None = None,
    max_loss: Inside = 0.02,
    confidence: Inside = 0.95,
    prompts: str = EMBEDDED,
    shares: SplitShares | None = None,
    limit: Count | None = None,
    max_new_tokens: Count = 64,
    fractions: Sequence[Share] = FRACTIONS,
    allow_uncertified: bool = False,
    draft_length: DraftLength = 6,
    max_pending: MaxPending = 12,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    _load: lazy_types.LoadVerifier | None = None,
) -> lazy_types.CalibrateArtifact:
    """Propose bounds from traces, decode the calibrate split with each, and certify the fastest that holds.

    What is certified is then timed beside exact decoding, with the slim tier and without it: the fastest is exported.
    Where drafting stops is chosen by a replay of the fit's held-back texts at the costs of passes on this machine.
    Prompts that are done are noted in ``out`` until the result is written: run again, a job that was stopped goes on.

    Args:
        fit: folder that ``viasd fit`` wrote; with ``cost``, that ``viasd frontier`` wrote.
        out: folder for the result.
        cost: take the member of the frontier that agrees best among those whose slim pass costs at most this share of
            a full one, measured at width 4.
        max_loss: largest share of emitted tokens that the verifier would not have chosen.
        confidence: that the bound holds on unseen prompts.
        prompts: prompt file (JSONL or another: see README), NAME:SPLIT of a data set of the hub, or "embedded" for the
            package's own.
        shares: shares of the splits; the same as at capture.
        limit: take this many prompts of the calibrate split, drawn by hash.
        max_new_tokens: longest answer.
        fractions: rising; a candidate is proposed at each of these fractions of max_loss.
        allow_uncertified: go on with fewer prompts than can certify max_loss, to a spec that decodes exactly.
        draft_length: most tokens drafted a round.
        max_pending: most tokens that may wait for the full verifier.
        verifier: where to find the verifier, in place of the name in the fit.
        draft_model: the same for the draft model, where the fit names one.
        dtype: number format of the verifier.
        device: where models run.
    """
    if not 0 < max_loss < 1 or not 0 < confidence < 1:
        raise CalibrationError("max_loss and confidence must lie between 0 and 1")
    check_out_folder("--out", out)
    check_device(device)
    check_model(verifier)
    check_model(draft_model)
    check_fit_folder("--fit", fit, of_frontier=cost is not None)
    check_limit(limit)
    every = load_prompts(prompts)
    split = shares or SplitShares()
    chosen = draw_prompts(of_split(every, "calibrate", split), limit)
    refuse_too_few(len(chosen), max_loss, confidence, allow_uncertified)
    decoding = Decoding(draft_length=draft_length, max_pending=max_pending)

    from viasd_calib.calibration.artifacts import (
        CalibrateArtifact,
        FitArtifact,
        fit_beside,
        load_scores,
    )
    from viasd_calib.calibration.candidates import DEFAULT_STOP, propose
    from viasd_calib.calibration.certify import certify
    from viasd_calib.calibration.draft_length import PassCosts, best_stop
    from viasd_calib.calibration.policy_timing import time_policies, with_bound, without_slim
    from viasd_calib.decoding.decoder import Decoder
    from viasd_calib.evaluation.frontier import load_frontier
    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier
    from viasd_calib.pipeline.fitted import decoder_at, open_fit

    folder = Path(fit) if cost is None else Path(fit) / load_frontier(Path(fit)).best(cost).folder
    fitted = read_json(FitArtifact, folder / FIT_FILE, "viasd fit")
    refuse_learned_from(chosen, fitted)
    load = _load or load_verifier
    loaded = load(verifier or fitted.verifier.name_or_path, dtype=dtype, device=device)
    check_prompts(loaded, chosen, max_new_tokens)
    timed = draw_prompts(chosen, WORTH_PROMPTS)
    check_prompts(loaded, timed, max(max_new_tokens, WORTH_TOKENS))
    engine = open_fit(fitted, folder, loaded, draft_model)
    scores = load_scores(folder)
    ledger = ledger_beside(
        Path(out) / CALIBRATE_FILE,
        {
            "fit": [file_sha256(folder / name) for name in (FIT_FILE, SCORES_FILE)],
            "draft": engine.spec.draft.model_dump(mode="json"),
            "bounds": [max_loss, confidence, *fractions],
            "decoding": [max_new_tokens, decoding.model_dump(mode="json"), dtype, verifier, loaded.ref.weights],
            "hardware": hardware(engine.routed.device),
        },
    )
    notice_resumed(ledger, "steps")
    # Timed, so another run may come to another bound, and its candidates would be others.
    costs = ledger.recall("what passes cost", PassCosts, lambda: measure_costs(engine, draft_length))
    stop = best_stop(scores, draft_length, costs, DEFAULT_STOP)
    candidates = propose(fitted.draft_gate, fitted.slim_gate, scores, max_loss, fractions, stop)
    tokens = sum(len(prompt.turns) for prompt in chosen) * max_new_tokens
    longest = len(candidates) * tokens * costs.full[0]
    print(
        f"{len(candidates)} candidates on {len(chosen)} prompts, at most {max_new_tokens} tokens a turn: "
        f"{in_words(longest)} at most as an estimate, at {1000 * costs.full[0]:.0f} ms a full pass; less where "
        "drafting helps, texts end early or a candidate fails"
    )

    def decoder_for(gates: Gates, audit: Audit) -> Decoder:
        return decoder_at(engine, gates, decoding.model_copy(update={"audit": audit}))

    certification = certify(
        candidates, lambda candidate: decoder_for(candidate.gates, "off"), loaded, engine.routed, chosen,
        max_loss=max_loss, confidence=confidence, max_new_tokens=max_new_tokens,
        split_sha256={
            "fit": fitted.fit_sha256,
            "calibrate": split_sha256(chosen),
            "test": split_sha256(select_split(every, "test", split)),
        },
        ledger=ledger,
    )  # fmt: skip
    gates = (certification.chosen or candidates[0]).gates
    # Which prompts decide between an exact policy and a certified one is all the same to the certificate.
    worth = time_policies(
        decoder_for, gates, loaded, timed, max(max_new_tokens, WORTH_TOKENS),
        certified=certification.chosen is not None,
    )  # fmt: skip
    artifact = CalibrateArtifact(
        fit=fit_beside(folder, Path(out)),
        verifier=engine.spec.verifier,
        gates=with_bound(gates, worth.bound) if worth.pays else without_slim(gates),
        certified_gates=gates if certification.chosen else None,
        draft_length=draft_length,
        max_pending=max_pending,
        certificate=certification.certificate,
        slim_worth=worth,
        tested=certification.tested,
        prompts=short_hashes(normalised_sha256(prompt) for prompt in chosen),
    )
    write_json(Path(out) / CALIBRATE_FILE, artifact)
    ledger.close()
    _say(artifact)
    say_written(Path(out) / CALIBRATE_FILE)
    return artifact


def refuse_too_few(n_prompts: int, max_loss: float, confidence: float, allow_uncertified: bool) -> None:
    """Say how many prompts it takes, and stop before hours are spent on what cannot be certified.

    Raises:
        CalibrationError: there are too few, and the user does not want to go on with them.
    """
    needed = prompts_needed(max_loss, confidence)
    takes = (
        f"to certify a loss of {max_loss:g} with confidence {confidence:g} takes {needed} calibrate prompts at least"
    )
    if n_prompts >= needed:
        print(f"{takes}, and more where some tokens diverge; there are {n_prompts}")
    elif allow_uncertified:
        print(
            f"notice: {takes}; with {n_prompts} nothing will be certified, and the spec decodes exactly",
            file=sys.stderr,
        )
    else:
        raise CalibrationError(
            f"{takes}, even where none diverges, and there are {n_prompts}: give more prompts, a larger --max-loss, or "
            "--allow-uncertified true for a spec that decodes exactly"
        )


def refuse_learned_from(chosen: Sequence[Prompt], fitted: lazy_types.FitArtifact) -> None:
    """Refuse to certify on prompts that the fit has learned from: it knows them too well.

    Raises:
        CalibrationError: naming the first of them.
    """
    if fitted.prompts is None:
        print(
            "notice: the fit does not say which prompts it learned from, an older version of viasd_calib made it; "
            "whether these are among them cannot be told",
            file=sys.stderr,
        )
        return
    known = known_prompts(chosen, frozenset(fitted.prompts))
    if known:
        raise CalibrationError(
            f"the fit has learned from {len(known)} of these {len(chosen)} prompts (the first is {known[0].id!r}), so "
            "that nothing can be certified on them; give the --shares that capture and fit had, or other prompts"
        )


def in_words(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> in_words(0.4), in_words(40), in_words(700), in_words(9000)
        ('1 s', '40 s', '12 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def measure_costs(engine: lazy_types.Engine, draft_length: int) -> lazy_types.PassCosts:
    """What a draft step and full passes over 1 to ``draft_length`` + 1 tokens take here."""
    from viasd_calib.calibration.draft_length import PassCosts
    from viasd_calib.models import context_length
    from viasd_calib.profiling.measure import decoder_passes, time_passes
    from viasd_calib.slim.cost import CONTEXT

    widths = tuple(range(1, draft_length + 2))
    context = min(CONTEXT, context_length(engine.routed.config) - widths[-1])
    settings = ProfileSettings(widths=widths, contexts=(context,), batches=(1,), repeats=COST_REPEATS)
    wanted = {shape: run for shape, run in decoder_passes(engine, settings).items() if shape.tier in ("draft", "full")}
    seconds = {one.shape: one.seconds for one in time_passes(wanted, COST_REPEATS, engine.routed.device)}
    full = [seconds[PassShape("full", width, context, 1)] for width in widths]
    return PassCosts(seconds[PassShape("draft", 1, context, 1)], full)


def _say(artifact: lazy_types.CalibrateArtifact) -> None:
    table = new_table(
        "candidates, most careful first",
        ["", "bound", "loss (replayed, simulated)", "loss (observed)", "prompts", "p-value", "full/token"],
    )
    for number, row in enumerate(artifact.tested, start=1):
        table.add_row(
            str(number), f"{row.bound:.4f}", f"{row.replayed_loss:.4f}", f"{row.observed_loss:.4f}",
            str(row.n_prompts), f"{row.p_value:.3g}", f"{row.full_passes_per_token:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    certificate = artifact.certificate
    if certificate.bound is None:
        console.print(certificate.note)
    else:
        console.print(
            f"certified: at most {certificate.bound} of emitted tokens diverge from the full verifier, "
            f"confidence {certificate.confidence}, observed {certificate.observed:.4f} "
            f"on {certificate.n_prompts} prompts"
        )
    worth = artifact.slim_worth
    console.print(
        f"exact decoding takes {1000 * worth.seconds_per_token:.1f} ms a token with the slim tier "
        f"(bound {worth.bound:.2f}), {1000 * worth.seconds_per_token_without:.1f} without "
        f"({worth.n_prompts} prompts): it is {_slim_words(worth)}"
    )
    if worth.seconds_per_token_certified is not None:
        console.print(f"the certified policy takes {1000 * worth.seconds_per_token_certified:.1f} ms a token")
    console.print(f"The spec will be exported with audit {artifact.policy().audit}.")


def _slim_words(worth: lazy_types.PolicyTiming) -> str:
    if not worth.enough:
        return "left out, as so few prompts do not show that it pays"
    return "kept" if worth.pays else "left out"
