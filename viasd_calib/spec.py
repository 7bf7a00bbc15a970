"""The routing spec: the one file in which a trained and calibrated three-tier decoder is shipped.

It is JSON beside its tensors (safetensors). Reading it never runs code. A spec of an unknown major
version is refused, and so is one made for another verifier or tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from viasd_calib.errors import SpecError
from viasd_calib.files import write_json
from viasd_calib.schema.base import (
    Audit,
    DType,
    HashedFile,
    Sha256,
    Share,
    SpecModel,
    TensorFile,
    WeightFormat,
)
from viasd_calib.schema.certificate import LARGEST_BET, Certificate, Evidence, PromptHashes, level_of, prompts_needed
from viasd_calib.schema.certified_candidates import CertifiedCandidate, CertifiedPolicy, GateBounds
from viasd_calib.schema.decoding import Decoding, PolicyDrafter
from viasd_calib.schema.drafts import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    ModelDraft,
    ModelDraftSettings,
    PromptLookupDraft,
    ShallowDraft,
    ShallowShape,
)
from viasd_calib.schema.gates import DRAFT_FEATURES, SLIM_FEATURES, Gates, LogisticGate
from viasd_calib.schema.hashes import IGNORED_CONFIG_KEYS, config_sha256, file_sha256, tokenizer_sha256
from viasd_calib.schema.made_for import (
    check_draft_weights,
    check_verifier,
    check_weights,
    other_weights,
    void_certificate,
)
from viasd_calib.schema.offload import OffloadRef
from viasd_calib.schema.plan import PlanEntry, PlannedPolicy
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
    Rounding,
    Route,
)
from viasd_calib.schema.routing_spec import SCHEMA_VERSION, Producer, RoutingSpec, conflicts, tensor_files, tensors_of
from viasd_calib.schema.verifier import VerifierRef

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
    "CertifiedCandidate",
    "CertifiedPolicy",
    "CombinedDraft",
    "DType",
    "Decoding",
    "DraftSpec",
    "Evidence",
    "GateBounds",
    "Gates",
    "HashedFile",
    "HeadVocab",
    "LogisticGate",
    "LowBitWeights",
    "LowBits",
    "MlpWidths",
    "ModelDraft",
    "ModelDraftSettings",
    "OffloadRef",
    "PartEntry",
    "PlanEntry",
    "PlannedPolicy",
    "PolicyDrafter",
    "Producer",
    "PromptHashes",
    "PromptLookupDraft",
    "RelativeCost",
    "Rounding",
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
    "other_weights",
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


def tensor_file(path: Path, folder: Path) -> TensorFile:
    """Reference to the tensor file ``path`` from a spec that lies in ``folder``."""
    return TensorFile(path=path.relative_to(folder).as_posix(), sha256=file_sha256(path))


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
            problems += _tensor_problems(path.parent, tensors_of(draft, route))
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


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a routing spec."""
    schema = RoutingSpec.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:viasd_calib:routing_spec:{SCHEMA_VERSION}",
        **schema,
    }
