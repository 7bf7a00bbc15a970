"""Whether a verifier, and the weights of the models, are those that a spec was made for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from viasd_calib.errors import SpecError, WeightsWarning
from viasd_calib.schema.drafts import CausalLMDraft, CombinedDraft
from viasd_calib.schema.routing_spec import RoutingSpec
from viasd_calib.schema.verifier import VerifierRef


def check_verifier(spec: RoutingSpec, verifier: VerifierRef) -> None:
    """Refuse a verifier that the spec was not made for.

    Raises:
        SpecError: naming the first entry that differs.
    """
    compared: Sequence[str] = (
        "architecture", "num_layers", "hidden_size", "vocab_size", "config_sha256", "tokenizer_sha256"
    )  # fmt: skip
    for name in compared:
        wanted, found = getattr(spec.verifier, name), getattr(verifier, name)
        if wanted != found:
            raise SpecError(
                f"the spec was made for {spec.verifier.name_or_path} ({name} {wanted}), "
                f"this verifier is {verifier.name_or_path} ({name} {found}); load the verifier it was made for"
            )


def check_weights(spec: RoutingSpec, verifier: VerifierRef) -> RoutingSpec:
    """The spec as it may decode with the weights of ``verifier``; warns where they are not those it was made for.

    Exact decoding stays exact with other weights. A certificate does not hold for them: it is void, and the spec
    decodes exactly (:func:`void_certificate`).
    """
    return _hold_to(spec, verifier.name_or_path, spec.verifier.weights, verifier.weights)


def check_draft_weights(spec: RoutingSpec, found: str | None) -> RoutingSpec:
    """The same for the draft model, where the spec names one by its place.

    Args:
        found: hash of the draft model's weights; None where nobody can say.
    """
    model = _named_model(spec)
    return spec if model is None else _hold_to(spec, model.name_or_path, model.weights_sha256, found)


def other_weights(spec: RoutingSpec, verifier: VerifierRef, draft: str | None) -> list[str]:
    """In which weights the models differ from those that the spec was made for, in words; it may not say which ones.

    Args:
        draft: hash of the draft model's weights; None where nobody can say.
    """
    found = [_difference(verifier.name_or_path, spec.verifier.weights, verifier.weights)]
    model = _named_model(spec)
    if model is not None:
        found.append(_difference(model.name_or_path, model.weights_sha256, draft))
    return [one for one in found if one is not None]


def _named_model(spec: RoutingSpec) -> CausalLMDraft | None:
    """The draft model that the spec names by its place, if it does."""
    match spec.draft:
        case (CausalLMDraft() as model) | CombinedDraft(model=CausalLMDraft() as model):
            return model
    return None


def _difference(name: str, made_for: str | None, found: str | None) -> str | None:
    """How the weights of the model ``name`` differ from those that a spec was made for; None where they do not."""
    if made_for is None or found == made_for:
        return None
    if found is None:
        return f"the weights of {name} cannot be compared with those the spec was made for"
    return f"the weights of {name} (SHA-256 {found[:12]}) are not those the spec was made for ({made_for[:12]})"


def _hold_to(spec: RoutingSpec, name: str, made_for: str | None, found: str | None) -> RoutingSpec:
    """The spec, without its certificate where the model ``name`` has not the weights that it was made for."""
    lossy = spec.decoding.audit != "strict"
    if made_for is None:
        if lossy:
            _warn(
                f"the spec does not say which weights of {name} its certificate holds for; "
                "calibrate and export it again to have that checked"
            )
        return spec
    differ = _difference(name, made_for, found)
    if differ is None:
        return spec
    if lossy:
        _warn(
            f"{differ}: its certificate is void, and audit {spec.decoding.audit} becomes strict; "
            "load those weights, or calibrate with these"
        )
    else:
        _warn(f"{differ}: texts stay exact, but gates fitted on other weights cost time; calibrate with these")
    return void_certificate(spec, differ)


def void_certificate(spec: RoutingSpec, why: str) -> RoutingSpec:
    """The spec decoding exactly, and certifying nothing.

    Args:
        why: noted in the certificate.
    """
    certificate = spec.certificate
    if certificate is not None:
        certificate = certificate.without_bound(why)
    decoding = spec.decoding.model_copy(update={"audit": "strict"})
    return spec.model_copy(update={"certificate": certificate, "decoding": decoding})


def _warn(message: str) -> None:
    warnings.warn(message, WeightsWarning, stacklevel=4)
