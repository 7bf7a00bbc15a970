"""From a routing spec to what decodes by it: every model it names, loaded once, and a decoder for each strategy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from transformers import LogitsProcessor

from viasd_calib.binding import check_certificate
from viasd_calib.choices import STRATEGIES, Backend, StrategyName
from viasd_calib.decoding.certified import certified_tokens, check_certified
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.planned import three_tier
from viasd_calib.decoding.sampling import Sampling, read_sampling
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.devices import check_device
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.build import build_drafter, draft_weights, policy_drafter
from viasd_calib.draft.places import confident_lookup, named_model, relocated
from viasd_calib.errors import MethodError, ModelError
from viasd_calib.models import DTYPE_NAMES, LoadVerifier, Verifier, beside, check_model, load_verifier
from viasd_calib.option_types import check_option
from viasd_calib.shipped import shipped
from viasd_calib.slim.backends import choose_backend, kernel_family
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.in_process import InProcess
from viasd_calib.slim.loading import load_routed, make_ready
from viasd_calib.slim.offload.settings import Offload, check_offload
from viasd_calib.slim.resident import holder_of, slim_bytes
from viasd_calib.spec import (
    Audit,
    DType,
    RoutingSpec,
    check_draft_weights,
    check_verifier,
    check_weights,
    load_spec,
)


@dataclass(frozen=True)
class Engine(InProcess):
    """Everything a spec names, loaded once; makes a decoder for each strategy.

    Attributes:
        methods: strategies that it was loaded for; None for all.
        drafter_bytes: of the drafter's weights that are not q's own, as they are held.
    """

    spec: RoutingSpec
    verifier: Verifier
    routed: RoutedModel
    drafter: Drafter
    backend: Backend = "eager"
    methods: Collection[StrategyName] | None = None
    drafter_bytes: int = 0

    def decoder(
        self,
        name: StrategyName = "three_tier",
        audit: Audit | None = None,
        sampling: Sampling | None = None,
        processors: Sequence[LogitsProcessor] = (),
        assume_stateless: bool = False,
        judge: bool = False,
        drafting_pays_at: float | None = None,
    ) -> Decoder:
        """A decoder over the shared weights.

        Args:
            name: the strategy.
            audit: in place of the spec's own, on the caller's responsibility; ``three_tier`` alone takes one.
            sampling: how tokens are chosen; greedily where it is left out.
            processors: a user's own logits processors.
            assume_stateless: accept these, and stopping criteria, without proof that they are functions of what they
                are given (:mod:`~viasd_calib.decoding.stateless`).
            judge: keep what catch-up finds of pending tokens, for a monitor; of greedy ``three_tier`` alone.
            drafting_pays_at: in place of the spec's own, and of that of each row of its plan: the least share of a
                text's drafted tokens that must be kept for drafting to go on unreduced; 0 for always.

        Raises:
            MethodError: there is no such strategy or audit, the engine was loaded for others, the strategy cannot be
                judged, or ``drafting_pays_at`` is no share, or not what the certificate of a lossy spec holds for.
            SamplingError: the spec's audit is lossy, and its certificate does not hold for these settings; a
                processor may remember earlier calls; or texts are to be judged that are not greedy.
            SpecError: the strategy needs a gate that the spec lacks.
        """
        _check_choice("method", name, STRATEGIES)
        if audit is not None:
            _check_choice("audit", audit, get_args(Audit))
        if self.methods is not None and name not in self.methods:
            raise MethodError(f"the engine was loaded for {', '.join(self.methods)}; load one for {name} too")
        kind = load_strategy(name)
        lossy = kind.takes_audit and audit is None and self.spec.decoding.audit != "strict"
        spec = watched_spec(self.spec, drafting_pays_at, lossy)
        decoding = spec.decoding
        if kind.takes_audit and audit is None:
            check_certified(self.spec, read_sampling(sampling), processors)
        if audit is not None:
            decoding = decoding.model_copy(update={"audit": audit})
        return Decoder(
            self.routed,
            policy_drafter(self.spec.draft, decoding, self.drafter) if kind.takes_audit else self.drafter,
            three_tier(spec, decoding, self.routed.device)
            if kind.takes_audit
            else kind.from_spec(self.spec.gates, decoding, self.routed.device),
            self.verifier.eos_ids,
            sampling,
            processors,
            self.verifier.tokenizer,
            certified_tokens=certified_tokens(self.spec, audit) if kind.takes_audit else None,
            assume_stateless=assume_stateless,
            judge=judge,
        )

    @property
    def same_in_batches(self) -> bool:
        """Whether each text of a batch is, bit for bit, the one that it is alone."""
        return self.routed.same_in_batches and self.drafter.same_in_batches

    def __repr__(self) -> str:
        """In one line."""
        weights = f"{self.verifier.ref.name_or_path!r}, {self.verifier.ref.dtype} on {self.routed.device}"
        audit = self.spec.decoding.audit
        return f"Engine({weights}, {type(self.drafter).__name__}, audit={audit!r}, backend={self.backend!r})"

    def prepare_passes(self, lengths: Iterable[int], slim: bool = True) -> None:
        """Do, before decoding or timing it, what the backend does once for each shape of a pass.

        Without it ``compiled`` compiles passes as texts come to need them; other backends have nothing to do.

        Args:
            lengths: positions of the texts to come, prompt and new tokens.
            slim: whether the strategies to come ask the slim verifier (:attr:`Strategy.asks_slim`).

        Raises:
            ModelError: the backend cannot run these models here.
        """
        known, decoding = tuple(lengths), self.spec.decoding
        planned = [row.policy for row in self.spec.plan or ()]
        widest = max(
            [decoding.max_pending + decoding.draft_length, *(one.max_pending + one.draft_length for one in planned)]
        )
        for model in (self.routed, *self.drafter.models):
            model.prepare_passes(known, widest + 1, slim)


def watched_spec(spec: RoutingSpec, pays_at: float | None, certified: bool = False) -> RoutingSpec:
    """The spec with another ``drafting_pays_at``, in its plan too; the same where none is given.

    Args:
        certified: whether texts are to be those that a certificate holds for.

    Raises:
        MethodError: it is no share, or the certificate holds for another one.
    """
    if pays_at is None:
        return spec
    if not 0 <= pays_at <= 1:
        raise MethodError(f"drafting_pays_at is {pays_at}; give a share from 0 (drafting is never reduced) to 1")
    update = {"drafting_pays_at": pays_at or None}
    if certified and spec.decoding.drafting_pays_at != update["drafting_pays_at"]:
        raise MethodError(
            f"the spec's certificate holds with drafting_pays_at {spec.decoding.drafting_pays_at}; leave it as it is, "
            "or decode with audit strict"
        )
    plan = spec.plan and [row.model_copy(update={"policy": row.policy.model_copy(update=update)}) for row in spec.plan]
    return spec.model_copy(update={"decoding": spec.decoding.model_copy(update=update), "plan": plan})


def _check_choice(what: str, name: object, names: Sequence[str]) -> None:
    """Refuse what is none of ``names``.

    Raises:
        MethodError: listing them.
    """
    if name not in names:
        raise MethodError(f"there is no {what} {name!r}; choose one of {', '.join(names)}")


def load_engine(
    spec_path: str | Path,
    *,
    spec: RoutingSpec | None = None,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    load: LoadVerifier = load_verifier,
    offload: Offload | Literal["none"] | None = None,
    methods: Collection[StrategyName] | None = None,
) -> Engine:
    """Load a routing spec and every model it names.

    With other weights than the spec was made for, its certificate is void: the engine's spec then has audit
    ``strict``, and a :class:`~viasd_calib.errors.WeightsWarning` gives the reason. The same with a
    :class:`~viasd_calib.errors.CertificateWarning` where it holds for another policy, number format or family of
    kernels (:mod:`viasd_calib.binding`).

    Args:
        spec_path: of the spec; what it names lies relative to it.
        spec: what :func:`~viasd_calib.spec.load_spec` has read from there already, so that it is not read again.
        verifier: where to find the verifier, in place of the name in the spec. A relative path in the spec is looked
            for beside the spec, then in the working directory.
        draft_model: the same for the draft model; what it is besides (integer weights, lookup) stays as in the spec.
        dtype: in place of the spec's.
        backend: what runs the models; the fastest for the device where it is left out. The verifier that ``load``
            gives then serves this engine alone, unless it is ``eager``.
        load: what loads the verifier.
        offload: where q's layers stay that q' does not run, and how much memory weights may take; "none" for all in
            memory, and what the spec says where it is left out.
        methods: the strategies that decoders will be asked for: a draft model that none of them drafts with is not
            loaded. None for any.

    Raises:
        MethodError: there is no strategy of one of these names.
        SpecError: the spec is damaged, or was made for another verifier or tokenizer.
        ModelError: a model is missing or damaged.
    """
    check_option("dtype", dtype, DType | None, ModelError)
    check_option("backend", backend, Backend | None, ModelError)
    check_device(device)
    path = Path(shipped(str(spec_path)))
    spec, folder = load_spec(path) if spec is None else spec, path.parent
    if draft_model is not None:
        spec = spec.model_copy(update={"draft": relocated(spec.draft, draft_model)})
    if methods is not None and not any(_drafts_with_model(name, spec) for name in methods):
        spec = spec.model_copy(update={"draft": confident_lookup(spec.draft)})
    drafting = named_model(spec.draft)
    if drafting is not None:  # refused before the verifier is loaded, which may take long
        check_model(beside(drafting.name_or_path, folder), drafting.revision)
    reading = _offload_of(offload, spec)
    if reading is not None:
        check_offload(reading, device, backend)
    name = beside(spec.verifier.name_or_path, folder) if verifier is None else verifier
    loaded = load(name, dtype=dtype or spec.verifier.dtype, device=device, layers=reading is None)
    chosen = backend or choose_backend(loaded.model)
    engine = assemble(spec, folder, loaded, backend=chosen, offload=reading)
    return engine if methods is None else replace(engine, methods=tuple(methods))


def _drafts_with_model(name: StrategyName, spec: RoutingSpec) -> bool:
    """Whether a strategy drafts with what a spec names as its draft."""
    _check_choice("method", name, STRATEGIES)
    kind = load_strategy(name)
    return kind.needs_drafter and not (kind.takes_audit and spec.decoding.drafter is not None)


def _offload_of(asked: Offload | Literal["none"] | None, spec: RoutingSpec) -> Offload | None:
    """Where q's layers stay: as asked, or as a spec says."""
    if asked is not None:
        return None if asked == "none" else asked
    return Offload.of_spec(spec.offload)


def assemble(
    spec: RoutingSpec,
    folder: Path,
    verifier: Verifier,
    draft_folder: Path | None = None,
    backend: Backend = "eager",
    offload: Offload | None = None,
) -> Engine:
    """Put a spec that lies in ``folder`` together with a loaded verifier.

    Args:
        draft_folder: where the drafter's tensors are, if not beside the spec.
        backend: what runs the models; all but ``eager`` change the loaded verifier in place.
        offload: for a verifier that was loaded without its layers: how they are read.

    Raises:
        SpecError: the spec was made for another verifier or tokenizer.
    """
    check_verifier(spec, verifier.ref)
    spec = check_weights(spec, verifier.ref)
    spec = check_draft_weights(spec, draft_weights(spec.draft, draft_folder or folder))
    here = verifier.model
    spec = check_certificate(spec, folder, DTYPE_NAMES[here.dtype], kernel_family(backend, here.device))
    routed = load_routed(verifier.model, spec.route, folder, backend)
    drafter = build_drafter(spec.draft, draft_folder or folder, routed, verifier.tokenizer)
    holder = holder_of(backend, routed.device, routed.dtype)
    drafter_bytes = slim_bytes(verifier.model, drafter.networks, backend, holder)
    routed.expect_taps(drafter.taps)
    make_ready(routed, spec.route, backend, offload, drafter.networks)
    return Engine(spec, verifier, routed, drafter, backend, drafter_bytes=drafter_bytes)
