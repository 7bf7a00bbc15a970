"""Options of ``viasd fit`` for slim verifiers in low bits, to be compared with those that leave sublayers out."""

from __future__ import annotations

from collections.abc import Mapping

_CHOICE = ("--model.route_file", "null", "--model.route_method", "null", "--model.route_choice")
_WHOLE = (*_CHOICE, "whole", "--model.bridges", "false", "--model.adapter_kind", "lora", "--model.adapter_rank", "0")
"""No sublayer left out, and nothing trained."""

LOW_BIT_FITS: Mapping[str, tuple[str, ...]] = {
    "8": (*_WHOLE, "--model.parts", "{low_bit: {bits: 8}}"),
    "4_mlp": (*_WHOLE, "--model.parts", "{low_bit: {bits: 8, mlp: 4}}"),
    "4_mlp_gptq": (*_WHOLE, "--model.parts", "{low_bit: {bits: 8, mlp: 4, rounding: gptq}}"),
    "8_span": (*_CHOICE, "span", "--model.parts", "{low_bit: {bits: 8}}"),
    "auto": (*_WHOLE, "--model.parts", "{low_bit: {bits: auto}}"),
}
"""By name: all in 8 bits; MLPs in 4 bits and the rest in 8; the same, rounded by GPTQ; a run of layers left out and the
rest in 8 bits, trained as the configuration has it; bits chosen for each sublayer."""

OF_A_TARGET = ("8_span", "auto")
"""Those that look at a target cost: of the sublayers that are kept, and of the products in low bits."""
