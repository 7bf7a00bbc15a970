"""The routing spec: the one file in which a trained and calibrated three-tier decoder is shipped.

It is JSON beside its tensors (safetensors). Reading it never runs code. A spec of an unknown major
version is refused, and so is one made for another verifier or tokenizer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from viasd_calib import __version__
from viasd_calib.errors import SpecError, WeightsWarning
from viasd_calib.files import write_json
from viasd_calib.schema.base import (
    Audit,
    DType,
    HashedFile,
    Revision,
    Sha256,
    Share,
    SpecModel,
    TensorFile,
    WeightFormat,
    refuse,
)
from viasd_calib.schema.certificate import LARGEST_BET, Certificate, Evidence, PromptHashes, level_of, prompts_needed
from viasd_calib.schema.decoding import Decoding, PolicyDrafter
from viasd_calib.schema.drafts import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    ModelDraft,
    PromptLookupDraft,
    QuantisableDraft,
    ShallowDraft,
    ShallowShape,
)
from viasd_calib.schema.gates import DRAFT_FEATURES, SLIM_FEATURES, Gates, LogisticGate
from viasd_calib.schema.hashes import IGNORED_CONFIG_KEYS, config_sha256, file_sha256, tokenizer_sha256
from viasd_calib.schema.offload import OffloadRef
from viasd_calib.schema.plan import PlanEntry, PlannedPolicy, plan_problems
from viasd_calib.schema.problems import WHOLE, first_problem, problems_of, refuse_unknown_version
from viasd_calib.schema.route import (
    AdapterKind,
    AdapterRef,
    AddedMemory,
    BridgesRef,
    HeadVocab,
    LowBits,
    LowBitWeights,
    MlpWidths,
    PartEntry,
    RelativeCost,
    Route,
)

SCHEMA_VERSION = "1.5"

__all__ = [
    "DRAFT_FEATURES",
    "IGNORED_CONFIG_KEYS",
    "LARGEST_BET",
    "SCHEMA_VERSION",
    "SLIM_FEATURES",
    "AdapterKind",
    "AdapterRef",
    "AddedMemory",
    "Audit",
    "BridgesRef",
    "CausalLMDraft",
    "Certificate",
    "CombinedDraft",
    "DType",
    "Decoding",
    "DraftSpec",
    "Evidence",
    "Gates",
    "HashedFile",
    "HeadVocab",
    "LogisticGate",
    "LowBitWeights",
    "LowBits",
    "MlpWidths",
    "ModelDraft",
    "OffloadRef",
    "PartEntry",
    "PlanEntry",
    "PlannedPolicy",
    "PolicyDrafter",
    "Producer",
    "PromptHashes",
    "PromptLookupDraft",
    "QuantisableDraft",
    "RelativeCost",
    "Route",
    "RoutingSpec",
    "Sha256",
    "ShallowDraft",
    "ShallowShape",
    "Share",
    "SpecModel",
    "TensorFile",
    "VerifierRef",
    "WeightFormat",
    "check_draft_weights",
    "check_verifier",
    "check_weights",
    "config_sha256",
    "file_sha256",
    "first_problem",
    "json_schema",
    "level_of",
    "load_spec",
    "problems_of",
    "prompts_needed",
    "refuse_unknown_version",
    "save_spec",
    "spec_problems",
    "tensor_file",
    "tensor_files",
    "tokenizer_sha256",
    "void_certificate",
]
"""The parts of a spec too: this is where they are imported from."""


class Producer(SpecModel):
    """What wrote the spec."""

    name: str = Field("viasd_calib", min_length=1, description="program")
    version: str = Field(__version__, min_length=1, description="of the program")
    commit: str | None = Field(None, description="of the program's repository; null where not known")


class VerifierRef(SpecModel):
    """The full verifier a spec belongs to.

    ``weights_sha256`` is the hash of its weight files; specs of earlier releases have none.
    """

    name_or_path: str = Field(min_length=1, description="hub id, or path from the spec's folder")
    revision: Revision | None = Field(None, description="commit, branch or tag of a hub id, or hash of a GGUF file")
    architecture: str = Field(min_length=1, description="class of the model in transformers")
    num_layers: int = Field(gt=0, description="decoder layers")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    vocab_size: int = Field(gt=0, description="rows of the output head")
    config_sha256: Sha256 = Field(description="of the configuration entries that decide what the model computes")
    tokenizer_sha256: Sha256 = Field(description="of the tokenizer")
    weights_sha256: Sha256 | None = Field(None, description="of its weight files; null in specs of earlier releases")
    dtype: DType = Field(description="number format it runs in unless told otherwise")

    @property
    def weights(self) -> str | None:
        """Hash that says which weights these are; None where it is not known.

        A spec of an earlier release names the hash of a GGUF file, and no other.
        """
        if self.weights_sha256 is None and self.revision is not None and self.revision.startswith("sha256:"):
            return self.revision.removeprefix("sha256:")
        return self.weights_sha256

    def agrees_with(self, other: VerifierRef) -> bool:
        """Whether both are one verifier; a hash of weights that one of them lacks is not compared."""
        return self.says_the_same(other) and (self.model_copy(update={"weights_sha256": other.weights_sha256}) == other)

    def says_the_same(self, other: VerifierRef) -> bool:
        """Whether both compute the same, as far as is known, wherever they lie and whatever their number format."""
        known = None not in (self.weights, other.weights)
        return self.config_sha256 == other.config_sha256 and (not known or self.weights == other.weights)


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
        description="policies of exact decoding by context length, in place of the bounds in gates and the settings in "
        "decoding; null for one policy at every length",
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
            yield from _one_path_two_hashes(_tensors_of(draft, route))


def _one_path_two_hashes(files: Sequence[TensorFile]) -> Iterator[str]:
    known: dict[str, str] = {}
    for file in files:
        if known.setdefault(file.path, file.sha256) != file.sha256:
            yield f"two parts name {file.path} with different hashes; export the spec again"


def tensor_file(path: Path, folder: Path) -> TensorFile:
    """Reference to the tensor file ``path`` from a spec that lies in ``folder``."""
    return TensorFile(path=path.relative_to(folder).as_posix(), sha256=file_sha256(path))


def tensor_files(spec: RoutingSpec) -> list[TensorFile]:
    """Every tensor file that a spec refers to."""
    return _tensors_of(spec.draft, spec.route)


def _tensors_of(draft: DraftSpec, route: Route) -> list[TensorFile]:
    files: list[TensorFile] = []
    match draft:
        case ShallowDraft(tensors=tensors) | CombinedDraft(model=ShallowDraft(tensors=tensors)):
            files.append(tensors)
    return [*files, *route.files]


def load_spec(path: str | Path) -> RoutingSpec:
    """Read and check a spec; the tensors it refers to must be there, with the bytes it names.

    Raises:
        SpecError: missing, truncated, malformed, of an unknown or newer version, with entries that cannot be, or with
            foreign tensors; the first problem is named, :func:`spec_problems` lists all.
    """
    path = Path(path)
    document = _read(path)
    try:
        spec: RoutingSpec = _validated(RoutingSpec, document)
    except ValidationError as error:
        problems = problems_of(error)
        more = f" (and {len(problems) - 1} more, see viasd validate)" if len(problems) > 1 else ""
        raise SpecError(f"{path}: {problems[0]}{more}; export it again or mend that entry") from error
    for problem in _tensor_problems(path.parent, tensor_files(spec)):
        raise SpecError(problem)
    return spec


def spec_problems(path: str | Path) -> list[str]:
    """Everything that :func:`load_spec` would refuse in a spec, a line each; none for a spec that it loads.

    Raises:
        SpecError: the file cannot be read at all, or is of an unknown or newer version.
    """
    path = Path(path)
    document = _read(path)
    try:
        parts = dict(_validated(RoutingSpec, document))
        problems: list[str] = []
    except ValidationError as error:
        parts = _parts_that_are_right(document)
        # Without one of its parts a spec's own checks are not run; what was found of them comes again below.
        problems = [problem for problem in problems_of(error) if not problem.startswith(f"{WHOLE}: ")]
        problems += [f"{WHOLE}: {conflict}" for conflict in conflicts(parts)]
    match parts:
        case {"draft": draft, "route": Route() as route}:
            problems += _tensor_problems(path.parent, _tensors_of(draft, route))
    return problems


def _parts_that_are_right(document: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a spec that are right in themselves, by name."""
    found: dict[str, Any] = {}
    for name, field in RoutingSpec.model_fields.items():
        try:
            annotation: Any = Annotated[field.annotation, field]
            found[name] = _validated(annotation, document[name])
        except KeyError:
            if not field.is_required():
                found[name] = field.get_default(call_default_factory=True)
        except ValidationError:
            continue  # it is among the problems already
    return found


def _validated(kind: Any, entry: object) -> Any:
    """An entry of a document as JSON has it: texts and truth values are no numbers; 1 may stand for 1.0."""
    return TypeAdapter(kind).validate_json(json.dumps(entry), strict=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the routing spec {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid JSON ({error}); it may be truncated: export it again") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is not a routing spec: its top level must be a JSON object")
    refuse_unknown_version(path, document.get("schema_version"), SCHEMA_VERSION, "export it again", SpecError)
    return document


def _tensor_problems(folder: Path, references: Iterable[TensorFile]) -> Iterator[str]:
    for reference in references:
        path = folder / reference.path
        if not path.is_file():
            yield f"the spec's tensor file {path} is missing; copy it beside the spec"
        elif file_sha256(path) != reference.sha256:
            yield f"{path} is not the tensor file the spec was written with (SHA-256 differs); copy it again"


def save_spec(spec: RoutingSpec, path: str | Path) -> None:
    """Write a spec as JSON, atomically, as one of this release's version: entries that are new in it may be there."""
    write_json(Path(path), spec.model_copy(update={"schema_version": SCHEMA_VERSION}))


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
    match spec.draft:
        case (CausalLMDraft() as model) | CombinedDraft(model=CausalLMDraft() as model):
            return _hold_to(spec, model.name_or_path, model.weights_sha256, found)
    return spec


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
    if found == made_for:
        return spec
    differ = (
        f"the weights of {name} cannot be compared with those the spec was made for"
        if found is None
        else f"the weights of {name} (SHA-256 {found[:12]}) are not those the spec was made for ({made_for[:12]})"
    )
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


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a routing spec."""
    schema = RoutingSpec.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:viasd_calib:routing_spec:{SCHEMA_VERSION}",
        **schema,
    }
