"""Thresholds for the gates, certified on prompts that nothing was learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from viasd_calib.devices import check_device
from viasd_calib.digest import policy_digest, policy_parts
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE, HELD_BACK_FILE, SCORES_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.ledger import ledger_beside, steps_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_fit_folder, check_model, check_out_folder
from viasd_calib.pipeline.notices import notice, notice_resumed
from viasd_calib.pipeline.opening import offload_of
from viasd_calib.pipeline.options import CalibrateOptions
from viasd_calib.pipeline.prompt_choice import check_limit, check_prompts, load_prompts, of_split
from viasd_calib.progress import say
from viasd_calib.prompt_copies import known_prompts, normalised_sha256, short_hashes
from viasd_calib.prompts import Prompt, SplitShares, draw_prompts, select_split, split_sha256
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import Certificate, Decoding, GateBounds, RoutingSpec, file_sha256, level_of, prompts_needed

TIMED_PROMPTS = 8
"""Prompts on which policies are timed."""
DECIDING_PROMPTS = 24
"""Others, at most, on which the fastest of them are compared."""
TIMED_TOKENS = 32
"""Tokens of their answers at least: of fewer the time of one varies much."""
TOGETHER = 8
"""Prompts that are decoded together for the floor and the certificate, where each text is then what it is alone."""
FLOOR_PROMPTS = 24
"""Prompts that are decoded exactly to see what rounding comes to."""


def calibrate(options: CalibrateOptions, load: lazy_types.LoadVerifier | None = None) -> lazy_types.CalibrateArtifact:
    """Propose thresholds from traces, decode the calibrate split with each, and certify the fastest that holds.

    What is certified is then timed beside exact decoding, with the slim tier and without it: the fastest is exported.
    Which policies of exact decoding are timed, a replay of the fit's held-back texts at the costs of this machine
    proposes: a few of each kind, with a draft model, with lookup, by the slim verifier alone and with nothing drafted.
    Where drafting stops for what is certified is found by the same replay.
    Prompts that are done are noted in ``out`` until the result is written: run again, a job that was stopped goes on.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    if not 0 < options.max_loss < 1 or not 0 < options.confidence < 1:
        raise CalibrationError("max_loss and confidence must lie between 0 and 1")
    if options.max_pending <= options.draft_length:
        raise CalibrationError(
            f"--max-pending {options.max_pending} leaves no room for a block of --draft-length {options.draft_length} "
            "tokens and one after it, so that the slim verifier would never be asked; give more than the draft length"
        )
    check_out_folder("--out", options.out)
    check_device(options.device)
    check_model(options.verifier)
    check_model(options.draft_model)
    check_fit_folder("--fit", options.fit, of_frontier=options.cost is not None)
    check_limit(options.limit)
    every = load_prompts(options.prompts)
    split = options.shares or SplitShares()
    chosen = draw_prompts(of_split(every, "calibrate", split), options.limit)
    hashes = short_hashes(normalised_sha256(prompt) for prompt in chosen)
    steps = Path(options.out) / CALIBRATE_FILE
    number = attempt_number(Path(options.fit), hashes, options.attempt, resumed=steps_beside(steps).is_file())
    refuse_too_few(len(chosen), options.max_loss, options.confidence, options.allow_uncertified, number)
    decoding = Decoding(draft_length=options.draft_length, max_pending=options.max_pending)

    from viasd_calib.calibration.artifacts import (
        CalibrateArtifact,
        FitArtifact,
        fit_beside,
        load_scores,
    )
    from viasd_calib.calibration.attempts import Attempt, note_attempt
    from viasd_calib.calibration.candidates import propose
    from viasd_calib.calibration.certify import certify
    from viasd_calib.calibration.floor import Floor, measure_floor
    from viasd_calib.calibration.policy_search import time_policies
    from viasd_calib.evaluation.frontier import load_frontier
    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier
    from viasd_calib.pipeline.fitted import decoder_at, dtype_of_fit, open_fit, policy_decoder, policy_of
    from viasd_calib.pipeline.replayed import calibrate_grid, predict_policies
    from viasd_calib.planning.held_back import load_held_back
    from viasd_calib.planning.search import Predictions
    from viasd_calib.slim.backends import kernel_family

    folder = Path(options.fit)
    if options.cost is not None:
        folder /= load_frontier(folder).best(options.cost).folder
    fitted = read_json(FitArtifact, folder / FIT_FILE, "viasd fit")
    refuse_learned_from(chosen, fitted)
    texts = load_held_back(folder)
    offload = offload_of(options, fitted.offload)
    name = options.verifier or fitted.verifier.name_or_path
    bounded = fitted.offload is not None and offload is not None
    dtype = options.dtype or dtype_of_fit(fitted.route, options.device, bounded)
    loaded = (load or load_verifier)(name, dtype=dtype, device=options.device, layers=offload is None)
    check_prompts(loaded, chosen, options.max_new_tokens)
    timed, deciding = timing_prompts(chosen)
    check_prompts(loaded, [*timed, *deciding], max(options.max_new_tokens, TIMED_TOKENS))
    engine = open_fit(fitted, folder, loaded, options.draft_model, offload)
    scores = load_scores(folder)
    ledger = ledger_beside(
        Path(options.out) / CALIBRATE_FILE,
        {
            "fit": [file_sha256(folder / name) for name in (FIT_FILE, SCORES_FILE, HELD_BACK_FILE)],
            "draft": engine.spec.draft.model_dump(mode="json"),
            "bounds": [options.loss, options.max_loss, options.confidence, *options.fractions],
            "decoding": [
                options.max_new_tokens,
                decoding.model_dump(mode="json"),
                dtype,
                options.verifier,
                loaded.ref.weights,
                offload,
            ],
            "hardware": hardware(engine.routed.device),
        },
    )
    notice_resumed(ledger, "steps")
    # Timed, so another run may come to another threshold, and its candidates would be others.
    timed_tokens = max(options.max_new_tokens, TIMED_TOKENS)
    found = ledger.recall(
        "what a replay predicts", Predictions, lambda: predict_policies(
            engine, texts, timed, timed_tokens, calibrate_grid(options.draft_length, options.max_pending)
        ),
    )  # fmt: skip
    costs, stop = found.costs, found.by_kind["three tiers"].policy.stop_below
    candidates = propose(fitted.draft_gate, fitted.slim_gate, scores, options.max_loss, options.fractions, stop)
    tokens = sum(len(prompt.turns) for prompt in chosen) * options.max_new_tokens
    longest = len(candidates) * tokens * costs.full[0]
    say(
        f"{len(candidates)} candidates on {len(chosen)} prompts, at most {options.max_new_tokens} tokens a turn: "
        f"{in_words(longest)} at most as an estimate, at {1000 * costs.full[0]:.0f} ms a full pass; less where "
        "drafting helps, texts end early or a candidate fails"
    )

    batch = TOGETHER if engine.same_in_batches else 1
    floor = ledger.recall(
        "floor", Floor, lambda: measure_floor(
            decoder_at(engine, candidates[0].gates, decoding), loaded, engine.routed,
            floor_prompts(loaded, select_split(every, "fit", split), chosen, options.max_new_tokens),
            loss=options.loss, max_new_tokens=options.max_new_tokens, widths=(1, options.draft_length + 1), batch=batch,
        ),
    )  # fmt: skip
    if len(chosen) >= prompts_needed(options.max_loss, level_of(options.confidence, number)):
        attempt = Attempt(loss=options.loss, max_loss=options.max_loss, prompts=hashes)
        number = ledger.recall("attempt", int, lambda: note_attempt(Path(options.fit), attempt, options.attempt))
    lossy = decoding.model_copy(update={"audit": "off"})
    certification = certify(
        candidates, lambda candidate: decoder_at(engine, candidate.gates, lossy), loaded, engine.routed, chosen,
        max_loss=options.max_loss, confidence=options.confidence, max_new_tokens=options.max_new_tokens,
        split_sha256={
            "fit": fitted.fit_sha256,
            "calibrate": split_sha256(chosen),
            "test": split_sha256(select_split(every, "test", split)),
        },
        loss=options.loss, floor=floor, attempt=number, ledger=ledger, batch=batch,
    )  # fmt: skip
    gates = (certification.chosen or candidates[0]).gates
    # Which prompts decide between an exact policy and a certified one is all the same to the certificate.
    timing = time_policies(
        lambda policy: policy_decoder(engine, policy), {one.policy: one.seconds for one in found.every}, loaded, timed,
        timed_tokens, deciding=deciding,
        certified=decoder_at(engine, gates, lossy) if certification.chosen else None,
    )  # fmt: skip
    tuned = {"speculative_stop_below": timing.speculative_stop}
    certificate = certification.certificate
    certified = [
        certified_candidate(
            policy_of(engine, one.candidate.gates.model_copy(update=tuned), lossy, dtype), one, certificate,
            backend=kernel_family(engine.backend, engine.routed.device),
        )
        for one in certification.passed
    ]  # fmt: skip
    if certified:
        last = certified[-1]
        certificate = certificate.model_copy(
            update={"digest": last.digest, "dtype": last.dtype, "backend": last.backend}
        )
    artifact = CalibrateArtifact(
        fit=fit_beside(folder, Path(options.out)),
        verifier=engine.spec.verifier,
        dtype=dtype,
        gates=timing.exact_policy.policy.planned().applied_to(gates, decoding)[0].model_copy(update=tuned),
        certified_gates=gates.model_copy(update=tuned) if certified else None,
        draft_length=options.draft_length,
        max_pending=options.max_pending,
        certificate=certificate,
        slim_worth=timing,
        offload=None if offload is None else offload.entry(),
        losses=certified[-1].losses if certified else None,
        candidates=certified or None,
        floor=floor,
        tested=certification.tested,
        prompts=hashes,
    )
    write_json(Path(options.out) / CALIBRATE_FILE, artifact)
    ledger.close()
    return artifact


def certified_candidate(
    policy: RoutingSpec, found: lazy_types.CertifiedResult, certificate: Certificate, backend: str
) -> lazy_types.CalibratedCandidate:
    """A candidate that passed, bound to the policy that was decoded with.

    Args:
        policy: the spec that decodes by it.
        certificate: with a bound; names the loss, and how long texts were.
        backend: family of the kernels that decoded.
    """
    from viasd_calib.calibration.artifacts import CalibratedCandidate

    assert certificate.bound is not None, "a candidate passed"
    losses = CertifiedLosses(
        **asdict(found.losses),
        policy=policy_parts(policy),
        dtype=policy.verifier.dtype,
        backend=backend,
        loss=certificate.loss,
        max_new_tokens=certificate.max_new_tokens,
        rounding_gap=certificate.rounding_gap,
    )
    return CalibratedCandidate(
        bounds=GateBounds.of(policy.gates),
        decoding=policy.decoding,
        digest=policy_digest(policy),
        bound=certificate.bound,
        observed=found.tested.observed_loss,
        observed_by_token=losses.observed_by_token,
        p_value=found.tested.p_value,
        dtype=losses.dtype,
        backend=backend,
        losses=losses,
    )


def floor_prompts(
    verifier: lazy_types.Verifier, fit: Sequence[Prompt], calibrate: Sequence[Prompt], max_new_tokens: int
) -> list[Prompt]:
    """Prompts for the floor: of the fit split, so that no tested loss hangs on a gap that its text helped to set.

    Where the prompts have none of that split, or none that the verifier can answer, those that are tested serve: the
    gap is a percentile over the places of all of them, on which each has next to no influence.
    """
    from viasd_calib.prompt_lengths import look_at_lengths

    drawn = draw_prompts(fit, FLOOR_PROMPTS)
    refused = {name for name, _ in look_at_lengths(verifier, drawn, max_new_tokens).refused}
    kept = [prompt for prompt in drawn if prompt.id not in refused]
    return kept or draw_prompts(calibrate, FLOOR_PROMPTS)


def timing_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to search the fastest policies on, and those on which these are compared.

    They are others, as long as there are enough of them for an interval; else the same ones decide.
    """
    from viasd_calib.calibration.paired import FEWEST_PROMPTS

    ordered = sorted(prompts, key=lambda prompt: prompt.sha256)  # a file is often sorted by task
    timed = ordered[:TIMED_PROMPTS]
    others = ordered[TIMED_PROMPTS : TIMED_PROMPTS + DECIDING_PROMPTS]
    return timed, others if len(others) >= FEWEST_PROMPTS else timed


def attempt_number(fit: Path, prompts: Sequence[str], least: int, *, resumed: bool) -> int:
    """The number that an attempt on these prompts will have, before anything is loaded.

    Args:
        prompts: short hashes of their texts.
        least: as the user says.
        resumed: whether a job that was stopped may go on, which is noted already.
    """
    from viasd_calib.calibration.attempts import earlier_attempts

    earlier = earlier_attempts(fit, prompts)
    number = max(least, earlier if resumed and earlier else earlier + 1)
    if number > 1:
        notice(
            f"this is attempt {number} on these calibrate prompts, or some of them: it is tested at a level of "
            f"(1 - confidence) / {2**number}; prompts that no attempt has looked at have all of it"
        )
    return number


def refuse_too_few(n_prompts: int, max_loss: float, confidence: float, allow_uncertified: bool, attempt: int) -> None:
    """Say how many prompts it takes, and stop before hours are spent on what cannot be certified.

    Raises:
        CalibrationError: there are too few, and the user does not want to go on with them.
    """
    needed = prompts_needed(max_loss, level_of(confidence, attempt))
    takes = (
        f"to certify a loss of {max_loss:g} with confidence {confidence:g} takes {needed} calibrate prompts at least"
    )
    if n_prompts >= needed:
        say(f"{takes}, and more where some tokens diverge; there are {n_prompts}")
    elif allow_uncertified:
        notice(f"{takes}; with {n_prompts} nothing will be certified, and the spec decodes exactly")
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
        notice(
            "the fit does not list which prompts it learned from, an older version of viasd_calib made it; "
            "whether these are among them cannot be told"
        )
        return
    known = known_prompts(chosen, frozenset(fitted.prompts))
    if known:
        raise CalibrationError(
            f"the fit has learned from {len(known)} of these {len(chosen)} prompts (the first is {known[0].id!r}), so "
            "that nothing can be certified on them; give the --shares that capture and fit had, or other prompts"
        )


def in_words(seconds: float) -> str:
    """A time in a unit that suits it.

    Example:
        >>> in_words(0.4), in_words(40), in_words(700), in_words(9000)
        ('1 s', '40 s', '12 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
