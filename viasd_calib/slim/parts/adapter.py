"""The adapter of the slim path: weights of its own on copies of q's layers that share q's parameters.

q's own modules are never touched, so that q costs and computes what it did without an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from viasd_calib.errors import SpecError
from viasd_calib.slim.linears import LinearPlace, linear_of, plain_linears
from viasd_calib.slim.lora_linear import LoRALinear
from viasd_calib.slim.onednn_linear import refuse_packed
from viasd_calib.slim.parts.base import PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.plan import SlimPlan, share_parameters
from viasd_calib.slim.tensors import read_tensors, write_bfloat16
from viasd_calib.spec import AdapterKind, AdapterRef, Route, TensorFile, tensor_file

_LINEARS = (
    *("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),  # the same ones where a family has fused them, as Phi-3 has
)
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("q_norm", "k_norm"),
)
_PARTS: Mapping[AdapterKind, frozenset[str]] = {
    "lora": frozenset({"lora_A", "lora_B"}),
    "dora": frozenset({"lora_A", "lora_B", "lora_magnitude_vector"}),
    "norms": frozenset({"ln_tuning_layers"}),
}
_WORDS: Mapping[AdapterKind, str] = {
    "lora": "with a LoRA adapter of rank {}",
    "dora": "with a DoRA adapter of rank {}",
    "norms": "with norms of their own",
}
_TENSOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|ln_tuning_layers)\.default\.weight")
_BESIDE = {
    **{name: {"q_proj", "k_proj", "v_proj"} for name in ("q_proj", "k_proj", "v_proj")},
    **{name: {"gate_proj", "up_proj"} for name in ("gate_proj", "up_proj")},
    "o_proj": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    "down_proj": {"gate_proj", "up_proj", "gate_up_proj"},
}
"""Modules with one of which a layer has the named one too; a family has those of its own, fused or not."""
DEFAULT_TARGETS: Mapping[AdapterKind, tuple[str, ...]] = {"lora": _LINEARS, "dora": _LINEARS, "norms": _NORMS}
"""Modules that an adapter sits on by default, by its kind; a family has some of them."""


def adapted_layers(
    layers: Iterable[nn.Module],
    rank: int | None,
    alpha: int | None,
    targets: Sequence[str],
    kind: AdapterKind = "lora",
) -> nn.ModuleList:
    """Copies of decoder layers with an adapter on their ``targets``.

    The copies share the originals' parameters; only the adapter's are new. It begins as what changes nothing.

    Args:
        rank: of ``lora`` and ``dora``; None for ``norms``.
        alpha: the same.

    Raises:
        SpecError: no module of a layer bears one of the target names.
    """
    from peft import inject_adapter_in_model  # peft is needed where there is an adapter, not before

    shared = nn.ModuleList(share_parameters(layer) for layer in layers)
    try:
        inject_adapter_in_model(_peft_config(rank, alpha, targets, kind), shared)
    except ValueError as error:
        raise SpecError(f"the adapter's targets {list(targets)} name no module of the verifier's layers") from error
    return shared


def _peft_config(rank: int | None, alpha: int | None, targets: Sequence[str], kind: AdapterKind) -> Any:
    from peft import LNTuningConfig, LoraConfig

    if rank is None or alpha is None:
        return LNTuningConfig(target_modules=list(targets))
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), use_dora=kind == "dora")


def of_adapter(name: str) -> bool:
    """Whether the tensor of this name is an adapter's own.

    Example:
        >>> of_adapter("0.mlp.up_proj.lora_A.default.weight"), of_adapter("0.mlp.up_proj.base_layer.weight")
        (True, False)
    """
    return "lora_" in name or ".ln_tuning_layers." in name


def verifier_linears(module: nn.Module) -> Iterator[LinearPlace[nn.Linear]]:
    """Where a module's linear layers are, but for those of an adapter beside them.

    Example:
        >>> adapted = LoRALinear(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 4))
        >>> [place.path for place in verifier_linears(nn.ModuleDict({"q_proj": adapted, "k_proj": nn.Linear(4, 2)}))]
        ['k_proj', 'q_proj.base']
    """
    for place in plain_linears([module]):
        beside = isinstance(place.holder, LoRALinear) and place.name != "base"
        if not beside and not of_adapter(place.path):
            yield place


def without_adapter(path: str) -> str:
    """The name that a linear layer has where no adapter is on it.

    Example:
        >>> without_adapter("q_proj.base_layer"), without_adapter("q_proj.base"), without_adapter("q_proj")
        ('q_proj', 'q_proj', 'q_proj')
    """
    return path.removesuffix(".base_layer").removesuffix(".base")


def adapter_tensors(layers: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors, by their names within the layers."""
    # Not by state_dict: a layer beside it may have no weights in memory, and refuses to give them.
    return {name: tensor.detach() for name, tensor in layers.named_parameters() if of_adapter(name)}


def save_adapter(layers: nn.Module, skip: Route, path: Path) -> None:
    """Write the adapter of the sublayers that a route keeps, in bfloat16, atomically."""
    kept = {name: tensor for name, tensor in adapter_tensors(layers).items() if not is_skipped(name, skip)}
    write_bfloat16(kept, path)


def is_skipped(name: str, route: Route) -> bool:
    """Whether no sublayer that the route keeps runs the module of this name; a layer's norms stay with either."""
    index, module = name.split(".")[:2]
    without = {"self_attn": [route.attention_skip], "mlp": [route.mlp_skip]}
    return all(int(index) in skipped for skipped in without.get(module, [route.attention_skip, route.mlp_skip]))


def adapter_ref(
    path: Path,
    folder: Path,
    rank: int | None,
    alpha: int | None,
    targets: Sequence[str],
    *,
    kind: AdapterKind = "lora",
    folded: bool = False,
) -> AdapterRef:
    """How a spec in ``folder`` names the adapter at ``path``."""
    tensors: TensorFile = tensor_file(path, folder)
    return AdapterRef(kind=kind, rank=rank, alpha=alpha, targets=list(targets), folded=folded, tensors=tensors)


def _other_modules(adapter: AdapterRef, names: Iterable[str]) -> str | None:
    """How the tensors' names differ from the kind and the targets of a spec; None where they do not."""
    parts: dict[str, set[str]] = {}
    for name in names:
        found = _TENSOR.fullmatch(name)
        if found is None:
            return f"{name} is no tensor of an adapter"
        parts.setdefault(found[1], set()).add(found[2])
    for module, has in sorted(parts.items()):
        if has != _PARTS[adapter.kind]:
            return f"{module} has {', '.join(sorted(has))}, which is no adapter of kind {adapter.kind}"
        if not any(module == target or module.endswith(f".{target}") for target in adapter.targets):
            return f"{module} is none of the targets that the spec names: {', '.join(adapter.targets)}"
    there = {module.rpartition(".")[2] for module in parts}
    for target in adapter.targets:
        last = target.rpartition(".")[2]
        if last not in there and there & _BESIDE.get(last, set()):
            return f"holds nothing for the target {target} that the spec names"
    return None


@torch.no_grad()
def _to_run(layers: nn.ModuleList, route: Route, folded: bool) -> nn.ModuleList:
    """Exchange peft's layers, in place, for ones without what they ask at each call: a good part of a narrow pass.

    Where the route skips a sublayer, q's own layer comes back.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora import Linear as LoraLinear

    for path, parent in list(layers.named_modules()):
        for name, child in parent.named_children():
            if not isinstance(child, LoraLinear | LNTuningLayer):
                continue
            if is_skipped(f"{path}.{name}", route):
                setattr(parent, name, child.base_layer)
            elif isinstance(child, LoraLinear):
                setattr(parent, name, _adapted(child, folded))
            else:
                (adapter,) = child.active_adapters
                setattr(parent, name, child.ln_tuning_layers[adapter])
    return layers


def _adapted(lora: Any, folded: bool) -> nn.Module:
    """A peft layer with a single adapter, as it is run."""
    (adapter,) = lora.active_adapters
    base, down, up = lora.base_layer, lora.lora_A[adapter], lora.lora_B[adapter]
    up.weight.mul_(lora.scaling[adapter])
    if not folded:
        return LoRALinear(base, down, up)
    whole = base.weight.float() + up.weight.float() @ down.weight.float()  # [out, in]
    if adapter in lora.lora_magnitude_vector:  # DoRA (arXiv 2402.09353), equation 5: rows of a length of their own
        length = lora.lora_magnitude_vector[adapter].weight.float()  # [out]
        whole = whole * (length / whole.norm(dim=1))[:, None]
    return linear_of(whole.to(base.weight.dtype), base.bias)


class StoredAdapter(NamedTuple):
    """An adapter's tensors by their names within the layers, and the file they are of."""

    path: Path
    tensors: dict[str, Tensor]


class AdapterOptions(PartOptions):
    """Shape of the adapter, as :class:`~viasd_calib.spec.AdapterRef` has it."""

    kind: AdapterKind = "lora"
    rank: int | None = None
    alpha: int | None = None
    targets: tuple[str, ...]
    folded: bool = False


@register
class AdapterPart(RoutePart[StoredAdapter | nn.ModuleList]):
    """The adapter: its tensors, or layers that have it already."""

    name = "adapter"
    title = "an adapter"
    contents = "its tensors"
    fit_has_options = True
    options = AdapterOptions

    def parameters(self, held: StoredAdapter | nn.ModuleList, route: Route) -> list[nn.Parameter]:
        assert isinstance(held, nn.ModuleList), "an adapter is trained on the layers it sits on"
        return [
            parameter for name, parameter in held.named_parameters() if of_adapter(name) and not is_skipped(name, route)
        ]

    def save(self, held: StoredAdapter | nn.ModuleList, route: Route, folder: Path, options: PartOptions) -> AdapterRef:
        """Write the adapter of the sublayers that the route keeps."""
        assert isinstance(held, nn.ModuleList), "an adapter is saved from the layers it sits on"
        assert isinstance(options, AdapterOptions)
        path = self.tensors_path(folder)
        save_adapter(held, route, path)
        shape = options.model_dump(exclude={"kind", "folded"})
        return adapter_ref(path, folder, **shape, kind=options.kind, folded=options.folded)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> StoredAdapter:
        assert route.adapter is not None, "asked of a route with an adapter"
        path = folder / route.adapter.tensors.path
        return StoredAdapter(path, read_tensors(path, "adapter tensors"))

    def misfits(self, route: Route, folder: Path, sizes: Sizes) -> Iterator[str]:
        """What is wrong with it for its route.

        Layers of a verifier are alike, so what the adapter has for one that is kept it has for all.
        """
        assert route.adapter is not None, "asked of a route with an adapter"
        try:
            path, tensors = self.load(route, folder, sizes)
        except SpecError as error:
            yield str(error)
            return
        wrong = _misfit(route, route.adapter, tensors, sizes.layers)
        if wrong is not None:
            yield f"{path}: {wrong}; export the spec again"

    def install(self, plan: SlimPlan, held: StoredAdapter | nn.ModuleList) -> None:
        """Put the adapter on copies of the layers that q' runs."""
        if not isinstance(held, nn.ModuleList):
            adapter = plan.route.adapter
            assert adapter is not None, "its shape is the route's"
            refuse_packed(plan.full.model)
            layers = _load_adapted(plan.layers, plan.route, adapter, held)
            plan.place(layers)
            held = _to_run(layers, plan.route, adapter.folded).eval().requires_grad_(False)
        plan.layers = held

    def line(self, route: Route, layers: int) -> str:
        assert route.adapter is not None, "asked of a route with an adapter"
        return _WORDS[route.adapter.kind].format(route.adapter.rank)


def _load_adapted(
    layers: Iterable[nn.Module], route: Route, adapter: AdapterRef, stored: StoredAdapter
) -> nn.ModuleList:
    """Layers with a stored adapter, as peft runs it."""
    path, tensors = stored
    adapted = adapted_layers(layers, adapter.rank, adapter.alpha, adapter.targets, adapter.kind)
    own = adapter_tensors(adapted)
    missing = sorted(name for name in own.keys() - tensors.keys() if not is_skipped(name, route))
    if missing:
        raise SpecError(f"{path}: {missing[0]} is missing; export the spec again")
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise SpecError(f"{path}: {name} does not fit the verifier; export the spec again")
        own[name].copy_(tensor)
    return adapted


def _misfit(route: Route, adapter: AdapterRef, tensors: Mapping[str, Tensor], num_layers: int) -> str | None:
    """How tensors differ from what a spec says of them; None where they do not."""
    parts = sorted({name.partition(".")[2] for name in tensors})
    every = (f"{layer}.{part}" for layer in range(num_layers) for part in parts)
    wanted = {name for name in every if not is_skipped(name, route)}
    for name in sorted(wanted ^ tensors.keys()):
        return f"{name} {'is missing' if name in wanted else 'is of no sublayer that the route keeps'}"
    wrong = _other_modules(adapter, tensors)
    if wrong is not None:
        return wrong
    for name, tensor in tensors.items():
        ranks = (len(tensor),) if "lora_A" in name else tensor.shape[-1:] if "lora_B" in name else (adapter.rank,)
        if ranks != (adapter.rank,):
            return f"{name} is of shape {list(tensor.shape)}, the spec names rank {adapter.rank}"
    return None
