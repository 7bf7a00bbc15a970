"""Names of drafters, in specs and in files that may be moved, and the places that they name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from viasd_calib.errors import ModelError
from viasd_calib.spec import CausalLMDraft, CombinedDraft, DraftSpec, PromptLookupDraft

LOOKUP = "prompt_lookup"
_NAME = re.compile(r"((?:prompt_lookup\+)?(?:int[48]:)?(?:window[0-9]+:)?)(.*)", re.DOTALL)
"""As :func:`~viasd_calib.draft.build.name_draft` reads it."""


def named_model(draft: DraftSpec) -> CausalLMDraft | None:
    """The model that a spec drafts with by its name; None where it names none."""
    match draft:
        case (CausalLMDraft() as model) | CombinedDraft(model=CausalLMDraft() as model):
            return model
    return None


def confident_lookup(draft: DraftSpec) -> PromptLookupDraft:
    """The lookup that stands in for a spec's draft model: what it drafts by n-grams, and where they are long ones.

    Example:
        >>> confident_lookup(CausalLMDraft(name_or_path="a")).min_ngram
        3
    """
    match draft:
        case PromptLookupDraft():
            return draft
        case CombinedDraft(lookup=lookup):
            return lookup
    default: PromptLookupDraft = CombinedDraft.model_fields["lookup"].default
    return default


def relocated(draft: DraftSpec, name: str) -> DraftSpec:
    """A spec's draft model under another name, or in another place; all else of it stays.

    Raises:
        ModelError: the spec names no model.
    """
    match draft:
        case CausalLMDraft():
            place = str(Path(name).absolute()) if Path(name).exists() else name  # relative to the user, not to the spec
            return draft.model_copy(update={"name_or_path": place})
        case CombinedDraft(model=CausalLMDraft() as model):
            return draft.model_copy(update={"model": relocated(model, name)})
    raise ModelError(f"the draft model is of kind {draft.kind}, which names no model; leave out --draft-model")


def draft_from(name: str, folder: Path) -> str:
    """A drafter's name as a file in ``folder`` writes it: a relative path, if it is one, leads there from ``folder``.

    Example:
        >>> draft_from("prompt_lookup", Path("runs")), draft_from("prompt_lookup+int8:viasd_calib", Path("runs/traces"))
        ('prompt_lookup', 'prompt_lookup+int8:../../viasd_calib')
    """
    prefix, model = prefix_and_model(name)
    path = Path(model)
    if not model or path.is_absolute() or not path.exists():
        return name
    return prefix + Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def draft_at(name: str, folder: Path) -> str:
    """A drafter's name as it is read from a file in ``folder``.

    Earlier releases wrote paths relative to the folder that a command was run in: they are taken as they are where
    nothing lies there from ``folder``.
    """
    prefix, model = prefix_and_model(name)
    if not model or Path(model).is_absolute() or not (folder / model).exists():
        return name
    return f"{prefix}{folder / model}"


def same_draft(one: str, other: str, folder: Path) -> bool:
    """Whether two names in a file in ``folder`` are of one drafter."""
    return one == other or _resolved(one, folder) == _resolved(other, folder)


def _resolved(name: str, folder: Path) -> tuple[str, str | Path]:
    prefix, model = prefix_and_model(draft_at(name, folder))
    return prefix, Path(model).resolve() if model and Path(model).exists() else model


def prefix_and_model(name: str) -> tuple[str, str]:
    """What comes before the draft model's own name in a drafter's, and that.

    Example:
        >>> prefix_and_model("prompt_lookup+int8:window128:runs/draft"), prefix_and_model("prompt_lookup")
        (('prompt_lookup+int8:window128:', 'runs/draft'), ('', 'prompt_lookup'))
    """
    found = _NAME.fullmatch(name)
    assert found is not None, "it matches everything"
    return found[1], found[2]
