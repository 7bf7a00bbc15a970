"""Three-tier decoding as a ``custom_generate`` of transformers' own ``generate``."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from viasd_calib.decoding.certified import certified_tokens, check_certified
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.planned import three_tier
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.stateless import read_processors
from viasd_calib.decoding.verification import sampler_of
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.build import build_drafter, draft_weights, policy_drafter
from viasd_calib.draft.places import confident_lookup
from viasd_calib.errors import ModelError, PromptError, SpecError
from viasd_calib.models import fingerprint, identify, tokenizer_of, weights_in_memory
from viasd_calib.shipped import shipped
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_routed
from viasd_calib.spec import RoutingSpec, check_draft_weights, check_verifier, check_weights, load_spec

UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
OUTPUT_SETTINGS = frozenset({"use_cache", "logits_to_keep", "return_dict"})
"""Arguments of a model's forward that select what it returns, not what it computes: the decoder has its own."""


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    viasd_spec: str | Path | Engine | None = None,
    viasd_assume_stateless: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    assistant_model: PreTrainedModel | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode one text with a routing spec; give it to ``model.generate`` as ``custom_generate``.

    transformers prepares the arguments. With audit ``strict`` a greedy text is the one that ``model.generate``
    gives without it (in float32; in bfloat16 up to near ties), and a sampled one has the same distribution;
    :func:`torch.manual_seed` makes it repeat. The audit is the spec's own. The drafter and the route are loaded at
    the first call, and kept with the model.

    ``stop_strings`` does not reach a ``custom_generate``, transformers refuses it; give ``stopping_criteria=
    [StopStringCriteria(tokenizer, strings)]``. Criteria and logits processors must be functions of what they
    are given, or roll back, since tokens can be taken back and asked about again; others are refused.

    Args:
        model: the verifier, in evaluation mode; the spec's fingerprint is compared with it.
        input_ids: the prompt, [1, length], long.
        logits_processor: all processors, in transformers' order.
        stopping_criteria: all criteria, the limit and the end-of-text tokens among them.
        generation_config: greedy or sampling settings.
        viasd_spec: path of the routing spec, or an engine that holds this very model.
        viasd_assume_stateless: accept processors and criteria of one's own without proof that they are functions of
            what they are given (:mod:`~viasd_calib.decoding.stateless`).
        tokenizer: compared with the fingerprint too; without it, the model alone is.
        streamer: given each token once it is final; transformers gives it the prompt.
        assistant_model: refused; the spec names the draft model.
        synced_gpus: refused.
        model_kwargs: what ``generate`` prepares for the model; padding and a filled cache are refused.

    Returns:
        Prompt and new tokens, [1, length], or with ``return_dict_in_generate`` an output that holds them.

    Raises:
        SpecError: no spec is given, or one that is damaged or made for another verifier or tokenizer.
        ModelError: the model, or a setting, is not supported.
        PromptError: more than one text, padding, or a prompt that does not fit the context.
        SamplingError: the spec's rule cannot sample under audit ``strict``, its certificate does not hold for these
            settings, or a processor or criterion may remember earlier calls.
        NumericsError: the verifier's logits are not finite.
    """
    given = {"streamer": streamer, "tokenizer": tokenizer, "assistant_model": assistant_model}
    withheld = _withheld(sys._getframe(1)) | {name: value for name, value in given.items() if value is not None}
    if withheld.get("assistant_model") is not None:
        raise ModelError("assistant_model is not supported: the routing spec names the draft model; leave it out")
    if synced_gpus or withheld.get("synced_gpus"):
        raise ModelError("synced_gpus is not supported; decode on one device")
    arguments = (logits_processor, stopping_criteria, generation_config, model_kwargs)
    extras = (withheld.get("tokenizer"), withheld.get("streamer"), viasd_assume_stateless)
    return _decode(model, input_ids, *arguments, viasd_spec, *extras)


CustomGenerate = Callable[..., Tensor | GenerateDecoderOnlyOutput]
"""What transformers calls in the place of its own decoding."""


def custom_generate(
    spec: str | Path | Engine,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    assume_stateless: bool = False,
) -> CustomGenerate:
    """:func:`generate` with its own arguments bound, for ``model.generate(custom_generate=...)``.

    transformers hands a callable neither ``tokenizer`` nor ``streamer``, ``assistant_model`` or ``synced_gpus``. The
    former two are given here; the latter two do not apply, and are not seen.

    Args:
        spec: path of the routing spec, or an engine that holds the model.
        tokenizer: compared with the spec's fingerprint; without it, the model alone is.
        streamer: given the prompt, and then each token once it is final.
        assume_stateless: accept processors and criteria of one's own without proof that they are functions of what
            they are given (:mod:`~viasd_calib.decoding.stateless`).

    Returns:
        What ``model.generate`` takes as ``custom_generate``; it raises what :func:`generate` raises.

    Raises:
        ModelError: ``tokenizer`` is none of transformers'.

    Example:
        With a model and its tokenizer from transformers::

            decode = viasd_calib.custom_generate("routing.json", tokenizer=tokenizer, streamer=TextStreamer(tokenizer))
            model.generate(**inputs, max_new_tokens=64, custom_generate=decode)
    """

    _check_tokenizer(tokenizer)

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        if not model_kwargs.get("synced_gpus"):  # else it is refused like any other
            model_kwargs.pop("synced_gpus", None)
        arguments = (logits_processor, stopping_criteria, generation_config, model_kwargs)
        return _decode(model, input_ids, *arguments, spec, tokenizer, streamer, assume_stateless, put_prompt=True)

    return decode


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    spec: str | Path | Engine | None,
    tokenizer: PreTrainedTokenizerBase | None,
    streamer: BaseStreamer | None,
    assume_stateless: bool,
    *,
    put_prompt: bool = False,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode one text; arguments as for :func:`generate`.

    Args:
        put_prompt: whether to give the streamer the prompt.
    """
    _check_tokenizer(tokenizer)
    _check_settings(generation_config)
    read_processors(logits_processor, assume_stateless)
    _check_prompt(input_ids, model_kwargs)
    parts = _parts(model, spec, tokenizer)
    if put_prompt and streamer is not None:
        streamer.put(input_ids.cpu())
    sampling = Sampling(temperature=1.0 if generation_config.do_sample else 0.0)  # the rest is among the processors
    check_certified(parts.spec, sampling, logits_processor)
    generator = _seeded(model.device) if generation_config.do_sample else None
    decoder = Decoder(
        parts.routed,
        parts.drafter,
        three_tier(parts.spec, parts.spec.decoding, model.device),
        _eos_ids(stopping_criteria),
        sampler=sampler_of(logits_processor, generator),
        certified_tokens=certified_tokens(parts.spec),
        assume_stateless=assume_stateless,
    )
    rest = [one for one in stopping_criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
    room = _room(input_ids.shape[1], stopping_criteria, generation_config)
    tokens: list[int] = []
    for emitted in decoder.stream(input_ids[0].tolist(), room, criteria=rest):
        tokens.append(emitted.token)
        if streamer is not None:
            streamer.put(torch.tensor([emitted.token]))
    if streamer is not None:
        streamer.end()
    sequences: Any = torch.cat([input_ids, input_ids.new_tensor([tokens])], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


_GENERATE_CODE = inspect.unwrap(GenerationMixin.generate).__code__


def _withheld(caller: FrameType) -> dict[str, Any]:
    """Arguments of ``model.generate`` that transformers (5.16 to 5.24) does not hand on to a callable.

    It drops them silently, whatever the callable's signature names: a streamer would wait for its end for ever, an
    assistant model would be ignored. So :func:`generate`, which is given to ``model.generate`` as it is, reads them off
    the frame of its caller. :func:`custom_generate` does without.
    """
    if caller.f_code is not _GENERATE_CODE:
        return {}
    found = {name: caller.f_locals.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
    outer = caller.f_back.f_locals.get("kwargs") if caller.f_back else None  # torch's wrapper of no_grad
    return {**found, "tokenizer": outer.get("tokenizer") if isinstance(outer, dict) else None}


def _check_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"tokenizer is a {type(tokenizer).__name__}; give the verifier's own, from AutoTokenizer.from_pretrained"
        )


def _check_settings(config: GenerationConfig) -> None:
    """Refuse what three-tier decoding does not do.

    Raises:
        ModelError: naming the first such setting.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name) or 1) > 1:
            raise ModelError(f"{name} is {getattr(config, name)}, only 1 is supported; set it to 1")
    for name in UNSUPPORTED_OUTPUTS:
        if getattr(config, name):
            raise ModelError(f"{name} is not supported: a token may not have been through q alone; leave it out")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ModelError(f"generation mode {mode.value!r} is not supported; decode greedily or with do_sample")


def _check_prompt(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Refuse all but one plain text.

    What ``generate`` prepares for the model's forward is checked by what it means, not by its name alone, which
    changes between releases: a cache is whatever is a ``Cache``.

    Raises:
        PromptError: more than one text, padding, positions of its own, or a cache that was filled before.
        ModelError: an argument of the model that would be ignored.
    """
    if input_ids.shape[0] != 1:
        raise PromptError(f"{input_ids.shape[0]} texts are given, one at a time is supported; call once for each")
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None and not bool((mask == 1).all()):
        raise PromptError("the attention mask hides a part of the prompt; give the prompt without padding")
    plain = torch.arange(input_ids.shape[1])
    if positions is not None and not torch.equal(positions.cpu().reshape(-1), plain):
        raise PromptError("position_ids do not count from 0 on; leave them out")
    for name, value in model_kwargs.items():
        if isinstance(value, Cache):
            if getattr(value, "_is_user_defined", False) or value.get_seq_length():
                raise PromptError(f"{name} is not supported, the decoder has a cache of its own; leave it out")
        elif value is not None and name not in {"attention_mask", "position_ids", *OUTPUT_SETTINGS}:
            raise ModelError(f"the model's argument {name!r} is not supported; leave it out")


def _eos_ids(criteria: StoppingCriteriaList) -> frozenset[int]:
    """End-of-text tokens, from transformers' own criterion."""
    found = [one.eos_token_id.reshape(-1).tolist() for one in criteria if type(one) is EosTokenCriteria]
    return frozenset(token for tokens in found for token in tokens)


def _room(prompt_length: int, criteria: StoppingCriteriaList, config: GenerationConfig) -> int:
    """Most tokens to add; a user's own limit replaces the configuration's, as in transformers."""
    limits = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    limit = min(limits) if limits else config.max_length
    if limit is None:
        raise PromptError("the text has no limit; give max_new_tokens")
    return max(limit - prompt_length, 1)  # transformers checks its limit after the first token


def _seeded(device: torch.device) -> torch.Generator:
    """A generator that goes on from torch's own, as transformers' draws do."""
    seed = int(torch.randint(2**62, ()))
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class _Parts:
    """What a spec adds to a model.

    Attributes:
        drafter: what its policy drafts with.
        tokenizers: those that were compared with the spec.
    """

    spec: RoutingSpec
    routed: RoutedModel
    drafter: Drafter | None
    tokenizers: WeakSet[PreTrainedTokenizerBase] = field(default_factory=WeakSet)


class _Loaded(dict[tuple[object, ...], _Parts]):
    """A model's parts, by spec.

    It is an attribute of the model itself: parts refer to their model, so that a table outside, though its
    keys were weak, would keep every model for ever. A copy of the model begins with none.
    """

    _weights: tuple[str | None] | None = None

    def weights_of(self, model: PreTrainedModel) -> str | None:
        """Hash of the model's weights, computed before the first spec reorders neurons; None where it is unknown."""
        if self._weights is None:
            self._weights = (weights_in_memory(model),)
        return self._weights[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loaded:
        return _Loaded()

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return _Loaded, ()


_ONE_LOAD = threading.Lock()

LOADED = "_viasd_loaded"
"""Name of that attribute."""


def _parts(
    model: PreTrainedModel, spec: str | Path | Engine | None, tokenizer: PreTrainedTokenizerBase | None
) -> _Parts:
    if spec is None:
        raise SpecError("no routing spec is given; add viasd_spec=, the path of one")
    if model.training:
        raise ModelError("the model is in training mode; call model.eval() first")
    if isinstance(spec, Engine):
        if spec.verifier.model is not model:
            raise ModelError("the engine holds another model; generate with its own, or give the path of its spec")
        return _Parts(spec.spec, spec.routed, policy_drafter(spec.spec.draft, spec.spec.decoding, spec.drafter))
    path = Path(shipped(str(spec)))
    loaded: _Loaded = model.__dict__.setdefault(LOADED, _Loaded())
    changed = path.stat().st_mtime_ns if path.exists() else None
    key = (path.resolve(), changed, model.device, model.dtype, model.config._attn_implementation)
    with _ONE_LOAD:  # one thread loads for all: the model's neurons may be put into another order
        if key not in loaded:
            with torch.random.fork_rng(devices=[]):  # the first text is drawn like any other
                loaded[key] = _open(model, path, loaded, tokenizer)
    parts = loaded[key]
    if tokenizer is not None and tokenizer not in parts.tokenizers:
        check_verifier(parts.spec, fingerprint(model, tokenizer, _name(model), None))
        parts.tokenizers.add(tokenizer)
    return parts


def _open(model: PreTrainedModel, path: Path, loaded: _Loaded, tokenizer: PreTrainedTokenizerBase | None) -> _Parts:
    """Load what a spec names; the model stays as it is, but for the order of neurons where q' has narrow MLPs."""
    spec = load_spec(path)
    weights = None if spec.verifier.weights is None else loaded.weights_of(model)
    ref = (
        identify(model, spec.verifier.tokenizer_sha256, _name(model), None, weights)
        if tokenizer is None
        else fingerprint(model, tokenizer, _name(model), None, weights)
    )
    check_verifier(spec, ref)
    spec = check_weights(spec, ref)
    if spec.decoding.drafter is None:
        spec = check_draft_weights(spec, draft_weights(spec.draft, path.parent))
    words = tokenizer or tokenizer_of(_name(model))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    try:
        routed = load_routed(model, spec.route, path.parent)
        draft = spec.draft if spec.decoding.drafter is None else confident_lookup(spec.draft)
        drafter = build_drafter(draft, path.parent, routed, words)
        return _Parts(spec, routed, policy_drafter(spec.draft, spec.decoding, drafter))
    finally:
        for name in trained:  # a slim layer shares the verifier's weights, and is frozen
            model.get_parameter(name).requires_grad_(True)


def _name(model: PreTrainedModel) -> str:
    """What to call a model in a message."""
    return model.name_or_path or type(model).__name__
