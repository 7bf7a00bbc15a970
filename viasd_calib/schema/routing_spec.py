"""The form of a whole routing spec, and what its parts may not say against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from viasd_calib import __version__
from viasd_calib.schema.base import SpecModel, TensorFile, refuse
from viasd_calib.schema.certificate import Certificate, Evidence, PromptHashes
from viasd_calib.schema.decoding import Decoding
from viasd_calib.schema.drafts import CombinedDraft, DraftSpec, ShallowDraft
from viasd_calib.schema.gates import Gates
from viasd_calib.schema.offload import OffloadRef
from viasd_calib.schema.plan import PlanEntry, plan_problems
from viasd_calib.schema.route import Route
from viasd_calib.schema.verifier import VerifierRef

SCHEMA_VERSION = "1.9"


class Producer(SpecModel):
    """What wrote the spec."""

    name: str = Field("viasd_calib", min_length=1, description="program")
    version: str = Field(__version__, min_length=1, description="of the program")
    commit: str | None = Field(None, description="of the program's repository; null where not known")


class RoutingSpec(SpecModel):
    """The whole routing spec."""

    schema_version: str = Field(
        SCHEMA_VERSION, description="MAJOR.MINOR; within a major version a release reads what earlier ones wrote"
    )
    producer: Producer = Field(default_factory=Producer, description="what wrote the spec")
    verifier: VerifierRef = Field(description="the full verifier that the spec belongs to")
    draft: DraftSpec = Field(description="what proposes tokens")
    route: Route = Field(description="what the slim verifier runs of the full one")
    gates: Gates = Field(description="which tier decides a token")
    decoding: Decoding = Field(default_factory=Decoding, description="settings of the decoder")
    offload: OffloadRef | None = Field(
        None, description="which of the verifier's layers are read for each of its passes; null for all in memory"
    )
    certificate: Certificate | None = Field(
        None, description="which loss bound was shown, how and on what; null for none"
    )
    evidence: Evidence | None = Field(None, description="what was measured with this spec; null for nothing")
    prompts: PromptHashes | None = Field(
        None, description="hashes of the prompts that it was made from; null where not known"
    )
    plan: list[PlanEntry] | None = Field(
        None,
        min_length=1,
        description="policies of exact decoding by batch and context length, in place of the bounds in gates and the "
        "settings in decoding; null for one policy everywhere",
    )

    @property
    def certified_bound(self) -> float | None:
        """The loss bound that was certified; None without one."""
        return None if self.certificate is None else self.certificate.bound

    @model_validator(mode="after")
    def _can_be(self) -> RoutingSpec:
        refuse(conflicts({name: getattr(self, name) for name in type(self).model_fields}))
        return self


def conflicts(parts: Mapping[str, Any]) -> Iterator[str]:
    """What parts of a spec say against each other, a line each; each part for itself is right.

    Args:
        parts: those that are known, by their names in the spec.
    """
    match parts:
        case {"decoding": Decoding() as decoding, "certificate": certificate}:
            if decoding.audit != "strict" and (certificate is None or certificate.bound is None):
                yield (
                    f"nothing certifies decoding.audit {decoding.audit!r}: "
                    "calibrate it, or set decoding.audit to strict"
                )
    match parts:
        case {"decoding": Decoding(drafter="slim"), "gates": Gates(slim_tier=False)}:
            yield "decoding.drafter 'slim' needs a slim verifier that may decide; lower gates.regenerate_at"
        case {"decoding": Decoding(drafter="none"), "gates": Gates(slim_tier=True)}:
            yield "decoding.drafter 'none' needs a slim verifier that never decides; raise accept_at and regenerate_at"
    match parts:
        case {"plan": list() as plan}:
            yield from plan_problems(plan, parts.get("gates"), parts.get("decoding"))
    match parts:
        case {"plan": list(), "certificate": Certificate(bound=float() as bound)}:
            yield (
                f"a plan is of exact decoding, and the certificate bounds a loss ({bound:g}) of another policy; leave "
                "the plan out, or the certificate's bound"
            )
    match parts:
        case {"certificate": Certificate() as certificate, "prompts": PromptHashes(calibrate=list() as calibrate)}:
            if certificate.n_prompts != len(calibrate):
                yield f"the certificate is of {certificate.n_prompts} prompts, prompts.calibrate names {len(calibrate)}"
    match parts:
        case {"verifier": VerifierRef() as verifier, "route": Route() as route}:
            yield from route.misfits(verifier.num_layers, verifier.vocab_size)
    match parts:
        case {
            "verifier": VerifierRef() as verifier,
            "draft": (ShallowDraft() as shallow) | CombinedDraft(model=ShallowDraft() as shallow),
        }:
            yield from shallow.misfits(verifier.num_layers, verifier.vocab_size)
    match parts:
        case {"draft": draft, "route": Route() as route}:
            yield from _one_path_two_hashes(tensors_of(draft, route))


def _one_path_two_hashes(files: Sequence[TensorFile]) -> Iterator[str]:
    known: dict[str, str] = {}
    for file in files:
        if known.setdefault(file.path, file.sha256) != file.sha256:
            yield f"two parts name {file.path} with different hashes; export the spec again"


def tensor_files(spec: RoutingSpec) -> list[TensorFile]:
    """Every tensor file that a spec refers to."""
    return tensors_of(spec.draft, spec.route)


def tensors_of(draft: DraftSpec, route: Route) -> list[TensorFile]:
    """Every tensor file that these parts of a spec refer to."""
    files: list[TensorFile] = []
    match draft:
        case ShallowDraft(tensors=tensors) | CombinedDraft(model=ShallowDraft(tensors=tensors)):
            files.append(tensors)
    return [*files, *route.files]
