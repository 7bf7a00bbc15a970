"""``viasd export``, ``viasd validate`` and ``viasd schema``."""

from __future__ import annotations

import json

from rich.console import Console

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import export as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline import validate as validation
from viasd_calib.pipeline.options import ExportOptions
from viasd_calib.shipped import shipped
from viasd_calib.spec import json_schema


def export(options: ExportOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Export, and print what a slim pass costs."""
    spec = job.export(options, load)
    cost = spec.route.relative_cost
    shares = "not measured"
    if cost is not None:
        shares = ", ".join(f"{share:.2f} at width {width}" for width, share in cost.measured.items())
    say_written(options.out, f"audit {spec.decoding.audit}, relative cost {shares}")


def record_evidence(spec: str, evidence: str) -> None:
    """Write the evidence of a benchmark into a spec, and say where it is."""
    job.record_evidence(spec, evidence)
    say_written(spec, f"with the evidence of {evidence}")


def validate(spec: str, verifier: str | None = None) -> None:
    """Check a routing spec: its schema, its version, its tensors, its certificate, and the verifier if one is named.

    Args:
        spec: path of the spec.
        verifier: load this verifier too, and check that the spec was made for it.
    """
    checked = validation.validate(spec, verifier)

    from viasd_calib.slim.parts.base import memory_words  # loads PyTorch, which what is refused needs not

    certificate = checked.certificate
    bound = "no certificate" if certificate is None or certificate.bound is None else f"loss <= {certificate.bound}"
    listed = [] if certificate is None else certificate.candidates or []
    bound += f" ({len(listed)} certified candidate{'s' if len(listed) > 1 else ''})" if listed else ""
    memory = checked.route.memory
    taken = "" if memory is None else f"; slim verifier: {memory_words(memory)}"
    places = {"disk": "disk", "cpu": "the host's memory"}
    read = "" if checked.offload is None else f"; the verifier's layers are read from {places[checked.offload.kind]}"
    left_out = ", which three tiers leave out"
    instead = {"slim": left_out, "lookup": f"{left_out} for lookup", "none": f"{left_out}: nothing is drafted"}
    rows = len(checked.plan or ())
    planned = f"; a plan of {rows} row{'s' if rows > 1 else ''} by batch and context" if rows else ""
    draft = checked.draft.kind + ("" if checked.decoding.drafter is None else instead[checked.decoding.drafter])
    Console().print(
        f"{shipped(spec)}: valid; {checked.verifier.name_or_path}, draft {draft}, "
        f"audit {checked.decoding.audit}, {bound}{taken}{read}{planned}"
    )


def schema() -> None:
    """Print the JSON Schema of a routing spec."""
    print(json.dumps(json_schema(), indent=2))
