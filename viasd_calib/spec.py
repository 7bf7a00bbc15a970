"""The routing spec: the one file in which a trained and calibrated three-tier decoder is shipped.

It is JSON beside its tensors (safetensors). Reading it never runs code. A spec of an unknown major
version is refused, and so is one made for another verifier or tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from viasd_calib import __version__
from viasd_calib.errors import SpecError, ViasdError
from viasd_calib.files import write_json

SCHEMA_VERSION = "1.0"

Audit = Literal["strict", "tolerant", "off"]
DType = Literal["float32", "bfloat16", "float16"]
WeightFormat = Literal["int8", "int4"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]

IGNORED_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "use_cache",
        "architectures",
    }
)
"""Entries of a model's configuration that say nothing of what it computes."""


class SpecModel(BaseModel):
    """Base of every part of a spec: unknown entries and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Producer(SpecModel):
    """What wrote the spec."""

    name: str = "viasd_calib"
    version: str = __version__
    commit: str | None = None


class VerifierRef(SpecModel):
    """The full verifier a spec belongs to."""

    name_or_path: str
    revision: str | None = None
    architecture: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    config_sha256: Sha256
    tokenizer_sha256: Sha256
    dtype: DType


class TensorFile(SpecModel):
    """A safetensors file, by a path relative to the spec's folder, and its hash."""

    path: str
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path:
            raise ValueError("must be a path inside the spec's folder")
        return path


class QuantisableDraft(SpecModel):
    """A draft model whose linear layers may have integer weights; null leaves them in the verifier's number format."""

    quantize: WeightFormat | None = None


class CausalLMDraft(QuantisableDraft):
    """Any transformers model with the verifier's vocabulary."""

    kind: Literal["causal_lm"] = "causal_lm"
    name_or_path: str
    revision: str | None = None


class PromptLookupDraft(SpecModel):
    """Proposes what followed the same n-gram earlier in the text."""

    kind: Literal["prompt_lookup"] = "prompt_lookup"
    max_ngram: int = Field(3, ge=1)
    min_ngram: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> PromptLookupDraft:
        if self.min_ngram > self.max_ngram:
            raise ValueError("min_ngram must not exceed max_ngram")
        return self


class ShallowShape(SpecModel):
    """Sizes of a shallow drafter: layers of its own, output tokens, and where it reads the verifier.

    A tap is a number of the verifier's layers, after which the residual stream is read.
    """

    num_layers: int = Field(ge=1)
    head_vocab: int = Field(ge=2)
    taps: tuple[int, ...] = Field(min_length=1)

    @field_validator("taps")
    @classmethod
    def _rising(cls, taps: tuple[int, ...]) -> tuple[int, ...]:
        if list(taps) != sorted(set(taps)) or taps[0] < 0:
            raise ValueError("taps must be given once each, in rising order, counted from 0")
        return taps


class ShallowDraft(ShallowShape, QuantisableDraft):
    """A few decoder layers of the verifier's shape, conditioned on the verifier's residual stream."""

    kind: Literal["shallow"] = "shallow"
    tensors: TensorFile


ModelDraft = Annotated[CausalLMDraft | ShallowDraft, Field(discriminator="kind")]


class CombinedDraft(SpecModel):
    """Prompt lookup where a match is confident, a draft model elsewhere.

    ``lookup.min_ngram`` is the shortest match that is confident.
    """

    kind: Literal["combined"] = "combined"
    lookup: PromptLookupDraft = PromptLookupDraft(max_ngram=5, min_ngram=3)
    model: ModelDraft


DraftSpec = Annotated[CausalLMDraft | PromptLookupDraft | ShallowDraft | CombinedDraft, Field(discriminator="kind")]


class RelativeCost(SpecModel):
    """Measured time of a slim pass over that of a full pass of the same width (tokens)."""

    measured: dict[int, float]
    device: str
    dtype: DType


AdapterKind = Literal["lora", "dora", "norms"]
"""``lora`` (Hu et al. 2021, arXiv 2106.09685) and ``dora`` (Liu et al. 2024, arXiv 2402.09353) add products of low rank
to linear layers; ``norms`` are other weights of norms (Zhao et al. 2023, arXiv 2312.11420) and cost a pass nothing."""


class AdapterRef(SpecModel):
    """An adapter in peft's format, active on the slim path alone.

    A ``folded`` one is added, when it is loaded, into copies of the weights that it sits on: a pass then has no
    products of its own for it, and the copies take memory. ``dora`` is always folded; ``norms`` have neither rank nor
    alpha, and nothing to fold.
    """

    kind: AdapterKind = "lora"
    rank: int | None = Field(None, ge=1)
    alpha: int | None = Field(None, gt=0)
    targets: list[str] = Field(min_length=1)
    folded: bool = False
    tensors: TensorFile

    @model_validator(mode="after")
    def _fits_its_kind(self) -> AdapterRef:
        ranked = self.rank is not None and self.alpha is not None
        if self.kind == "norms" and (self.rank is not None or self.alpha is not None or self.folded):
            raise ValueError("an adapter of kind norms has no rank and no alpha, and is not folded; leave them out")
        if self.kind != "norms" and not ranked:
            raise ValueError(f"an adapter of kind {self.kind} needs rank and alpha")
        if self.kind == "dora" and not self.folded:
            raise ValueError("an adapter of kind dora is folded when it is loaded; set folded to true")
        return self


class BridgesRef(SpecModel):
    """Linear maps of the residual stream, one in place of each run of skipped sublayers.

    ``rank`` is that of the maps; null for full ones. With ``carry`` each has a second map, of the stream behind its run
    at the place before (:mod:`viasd_calib.slim.carry`).
    """

    rank: int | None = Field(None, ge=1)
    carry: bool = False
    tensors: TensorFile


class HeadVocab(SpecModel):
    """The output tokens of the slim verifier: their number, and a file with their ids.

    Tokens that are not among them it leaves to the full verifier.
    """

    size: int = Field(ge=2)
    tensors: TensorFile


class MlpWidths(SpecModel):
    """MLP sublayers that the slim verifier runs with some of their neurons alone.

    ``keep`` says how many, by layer. The file holds each of these layers' order of neurons, kept ones first, as the
    verifier's own file counts them (:mod:`viasd_calib.slim.widths`).
    """

    keep: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = Field(min_length=1)
    tensors: TensorFile


class Route(SpecModel):
    """Which sublayers the slim verifier leaves out; decoder layers are counted from 0.

    Without ``mlp_keep`` its MLP sublayers are whole, without ``head_vocab`` it has the whole output vocabulary.
    """

    attention_skip: list[int] = Field(default_factory=list)
    mlp_skip: list[int] = Field(default_factory=list)
    mlp_keep: MlpWidths | None = None
    bridges: BridgesRef | None = None
    head_vocab: HeadVocab | None = None
    adapter: AdapterRef | None = None
    relative_cost: RelativeCost | None = None

    @field_validator("attention_skip", "mlp_skip")
    @classmethod
    def _sorted_and_unique(cls, layers: list[int]) -> list[int]:
        if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
            raise ValueError("layers must be given once each, in rising order, counted from 0")
        return layers

    @model_validator(mode="after")
    def _narrows_what_runs(self) -> Route:
        both = sorted(self.narrowed.intersection(self.mlp_skip))
        if both:
            raise ValueError(
                f"mlp_keep and mlp_skip both name layer {both[0]}; an MLP is narrowed or skipped, take it out of one"
            )
        return self

    @property
    def narrowed(self) -> frozenset[int]:
        """Layers whose MLP sublayer runs with some of its neurons."""
        return frozenset() if self.mlp_keep is None else frozenset(self.mlp_keep.keep)

    def check_layers(self, num_layers: int) -> None:
        """Refuse a layer that the verifier does not have.

        Raises:
            SpecError: naming the layer.
        """
        named = {"attention_skip": self.attention_skip, "mlp_skip": self.mlp_skip, "mlp_keep": sorted(self.narrowed)}
        for name, layers in named.items():
            beyond = [layer for layer in layers if layer >= num_layers]
            if beyond:
                raise SpecError(f"route.{name} names layer {beyond[0]}, the verifier has layers 0 to {num_layers - 1}")


class LogisticGate(SpecModel):
    """P(q's choice = this token) = sigmoid(weight . (x - mean) / scale + bias) over named features."""

    features: list[str] = Field(min_length=1)
    mean: list[float]
    scale: list[float]
    weight: list[float]
    bias: float
    expected_calibration_error: Share | None = None

    @model_validator(mode="after")
    def _same_length(self) -> LogisticGate:
        if not len(self.features) == len(self.mean) == len(self.scale) == len(self.weight):
            raise ValueError("features, mean, scale and weight must be of one length")
        if any(value <= 0 for value in self.scale):
            raise ValueError("scale must be positive")
        return self


class Gates(SpecModel):
    """Gates and the bounds their scores are held against.

    Under ``calibrated`` a score is the gate's probability. Under ``ratio`` it is the published
    r = q'(v) / max q' (arXiv 2606.12243): accept at r >= ``accept_at``, escalate at r < ``escalate_below``,
    regenerate between. A bound above 1 is never met; where both bounds of the slim tier are, q' is not run.
    Drafting stops behind the token up to which the chance that the block stands, the product of the draft gate's
    scores, falls below ``draft_stop_below``.
    """

    convention: Literal["calibrated", "ratio"] = "calibrated"
    draft: LogisticGate | None = None
    slim: LogisticGate | None = None
    draft_stop_below: float = Field(0.0, ge=0, le=1)
    draft_accept_at: float = Field(1.01, gt=0)
    accept_at: float = Field(gt=0)
    regenerate_at: float | None = None
    escalate_below: float | None = None

    @model_validator(mode="after")
    def _fits_convention(self) -> Gates:
        if self.convention == "calibrated":
            if self.slim is None or self.regenerate_at is None or self.escalate_below is not None:
                raise ValueError("the calibrated convention needs a slim gate and regenerate_at, and no escalate_below")
        elif self.escalate_below is None or self.regenerate_at is not None:
            raise ValueError("the ratio convention needs escalate_below, and no regenerate_at")
        elif self.accept_at <= self.escalate_below:
            raise ValueError("accept_at must exceed escalate_below, or the regenerate band is empty")
        if self.draft is None and (self.draft_stop_below > 0 or self.draft_accept_at <= 1):
            raise ValueError("draft_stop_below and draft_accept_at need a draft gate")
        return self

    @property
    def slim_tier(self) -> bool:
        """Whether q' may decide anything.

        Example:
            >>> Gates(convention="ratio", accept_at=1.01, escalate_below=0.5).slim_tier  # it may regenerate
            True
        """
        own = self.escalate_below if self.regenerate_at is None else self.regenerate_at
        return self.accept_at <= 1 or (own is not None and own <= 1)


class Decoding(SpecModel):
    """Settings of the decoder."""

    audit: Audit = "strict"
    tolerance: float = Field(0.5, gt=0, le=1)
    draft_length: int = Field(6, ge=0, le=64)
    max_pending: int = Field(12, ge=0, le=256)
    temperature_scope: list[float] = Field(default_factory=lambda: [0.0])


class Certificate(SpecModel):
    """Which loss bound holds, how sure, and on what data it was shown.

    ``bound`` is null where nothing could be certified, or exact decoding was faster; the audit is then ``strict``.
    """

    loss: Literal["divergence"] = "divergence"
    bound: Share | None
    confidence: float = Field(gt=0, lt=1)
    procedure: str
    candidates_tested: int = Field(ge=0)
    n_prompts: int = Field(ge=0)
    max_new_tokens: int = Field(gt=0)
    split_sha256: dict[Literal["fit", "calibrate", "test"], Sha256]
    observed: float | None
    p_value: float | None
    note: str = ""


class Evidence(SpecModel):
    """What was measured with this spec, and where."""

    acceptance_length: float
    rejection_rate: Share
    full_passes_per_token: float
    tier_shares: dict[Literal["accept", "regenerate", "escalate"], Share]
    speedup_vs: dict[Literal["autoregressive", "speculative"], float]
    hardware: dict[str, Any]


class RoutingSpec(SpecModel):
    """The whole routing spec."""

    schema_version: str = SCHEMA_VERSION
    producer: Producer = Field(default_factory=Producer)
    verifier: VerifierRef
    draft: DraftSpec
    route: Route
    gates: Gates
    decoding: Decoding = Field(default_factory=Decoding)
    certificate: Certificate | None = None
    evidence: Evidence | None = None

    @property
    def certified_bound(self) -> float | None:
        """The loss bound that was certified; None without one."""
        return None if self.certificate is None else self.certificate.bound

    @model_validator(mode="after")
    def _lossy_needs_certificate(self) -> RoutingSpec:
        if self.certified_bound is None and self.decoding.audit != "strict":
            raise ValueError(
                f"nothing certifies decoding.audit {self.decoding.audit!r}: "
                "calibrate it, or set decoding.audit to strict"
            )
        self.route.check_layers(self.verifier.num_layers)
        return self


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a model configuration, without the entries that do not change what it computes.

    Example:
        >>> config_sha256({"hidden_size": 8, "dtype": "float32"}) == config_sha256({"hidden_size": 8})
        True
    """
    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_sha256(vocabulary: Mapping[str, int], chat_template: str | None) -> str:
    """Hash of a tokenizer: its vocabulary and its chat template."""
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=False).encode())
    digest.update((chat_template or "").encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def tensor_file(path: Path, folder: Path) -> TensorFile:
    """Reference to the tensor file ``path`` from a spec that lies in ``folder``."""
    return TensorFile(path=path.relative_to(folder).as_posix(), sha256=file_sha256(path))


def tensor_files(spec: RoutingSpec) -> list[TensorFile]:
    """Every tensor file that a spec refers to."""
    files: list[TensorFile] = []
    match spec.draft:
        case ShallowDraft(tensors=tensors) | CombinedDraft(model=ShallowDraft(tensors=tensors)):
            files.append(tensors)
    parts = (spec.route.mlp_keep, spec.route.bridges, spec.route.head_vocab, spec.route.adapter)
    files += [part.tensors for part in parts if part is not None]
    return files


def load_spec(path: str | Path) -> RoutingSpec:
    """Read and check a spec; the tensors it refers to must be there, with the bytes it names.

    Raises:
        SpecError: missing, truncated, malformed, of an unknown major version, or with foreign tensors.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the routing spec {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid JSON ({error}); it may be truncated: export it again") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is not a routing spec: its top level must be a JSON object")
    refuse_unknown_version(path, document.get("schema_version"), SCHEMA_VERSION, "export it again", SpecError)
    try:
        spec = RoutingSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(f"{path}: {first_problem(error)}; export it again or mend that entry") from error
    for reference in tensor_files(spec):
        _check_tensors(path.parent, reference)
    return spec


def refuse_unknown_version(path: Path, version: object, known: str, again: str, error: type[ViasdError]) -> None:
    """Refuse a file of another major version than ``known``.

    Args:
        again: how the file is made anew.
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``.
    """
    if str(version).split(".", 1)[0] != known.split(".", 1)[0]:
        raise error(
            f"{path}: schema_version {version!r} is not one this release reads ({known}); "
            f"use the release that wrote it, or {again}"
        )


def first_problem(error: ValidationError, whole: str = "spec") -> str:
    """The first thing a validation found wrong: where, and what; ``whole`` names the place of what has none."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or whole}: {first['msg']}"


def _check_tensors(folder: Path, reference: TensorFile) -> None:
    path = folder / reference.path
    if not path.is_file():
        raise SpecError(f"the spec's tensor file {path} is missing; copy it beside the spec")
    if file_sha256(path) != reference.sha256:
        raise SpecError(f"{path} is not the tensor file the spec was written with (SHA-256 differs); copy it again")


def save_spec(spec: RoutingSpec, path: str | Path) -> None:
    """Write a spec as JSON, atomically."""
    write_json(Path(path), spec)


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


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a routing spec."""
    schema = RoutingSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
