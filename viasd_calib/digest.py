"""The digest of a policy: which texts a spec decodes, and at what cost, in one hash.

What was measured with one policy holds for no other. So a benchmark names the digest of the policy it measured,
and is refused where a spec has another one.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from viasd_calib.schema.certified_losses import POLICY_PARTS, PolicyPart
from viasd_calib.spec import RoutingSpec


def policy_digest(spec: RoutingSpec) -> str:
    """SHA-256 of everything in a spec that decides how it decodes.

    That is: what the verifier computes (architecture and sizes, hashes of configuration, tokenizer and weights, number
    format), the draft model, the route with the hashes of its tensors, gates and bounds, and the settings of decoding.
    It is not: where models and tensors lie, who wrote the spec, what was measured (relative cost, memory, calibration
    error of the gates, evidence), the certificate, or its prompts.

    A verifier whose weights the spec has no hash of is told apart by its revision, such a draft model by name and
    revision.
    Entries that are null are left out, so that an entry which a later release adds changes no digest.

    Example:
        >>> from viasd_calib.spec import Gates, PromptLookupDraft, Route, VerifierRef
        >>> verifier = VerifierRef(
        ...     name_or_path="a", architecture="LlamaForCausalLM", num_layers=2, hidden_size=8, vocab_size=16,
        ...     config_sha256="0" * 64, tokenizer_sha256="1" * 64, dtype="float32",
        ... )
        >>> gates = Gates(convention="ratio", accept_at=0.9, escalate_below=0.5)
        >>> spec = RoutingSpec(verifier=verifier, draft=PromptLookupDraft(), route=Route(), gates=gates)
        >>> moved = spec.model_copy(update={"verifier": verifier.model_copy(update={"name_or_path": "/b"})})
        >>> policy_digest(spec) == policy_digest(moved)
        True
    """  # fmt: skip
    return _sha256(_policy(spec))


def policy_parts(spec: RoutingSpec) -> dict[PolicyPart, str]:
    """The SHA-256 of each part of what :func:`policy_digest` covers, so that it can be said which one differs."""
    policy = _policy(spec)
    return {part: _sha256(policy[part]) for part in POLICY_PARTS}


def _policy(spec: RoutingSpec) -> dict[PolicyPart, Any]:
    """Everything in a spec that decides how it decodes, by its parts."""
    verifier = spec.verifier.model_dump(
        mode="json", exclude={"name_or_path", "revision", "weights_sha256"}, exclude_none=True
    )
    weights = spec.verifier.weights or spec.verifier.revision
    return {
        "verifier": {**verifier, "weights": weights},
        "draft": _draft(_dumped(spec.draft)),
        "route": _dumped(spec.route.unmeasured()),
        "gates": _dumped(spec.gates),
        "decoding": _dumped(spec.decoding),
    }


def _sha256(policy: Any) -> str:
    text = json.dumps(_without_places(policy), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _draft(draft: dict[str, Any]) -> dict[str, Any]:
    """A draft model without its place, where its weights are known."""
    if "model" in draft:
        return {**draft, "model": _draft(draft["model"])}
    places = ("name_or_path", "revision") if "weights_sha256" in draft else ()
    return {name: value for name, value in draft.items() if name not in places}


def _dumped(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = part.model_dump(mode="json", exclude_none=True)
    return found


def _without_places(value: Any) -> Any:
    """The same without where tensor files lie, and without how good a gate was found to be."""
    if not isinstance(value, dict):
        return value
    left_out = {"expected_calibration_error"} | ({"path"} if "sha256" in value else set())
    return {name: _without_places(inner) for name, inner in value.items() if name not in left_out}
