"""What a benchmark was made of: which policy, on which prompts, with which versions, when and how."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from viasd_calib import __version__
from viasd_calib.digest import policy_digest
from viasd_calib.errors import BenchError
from viasd_calib.prompts import Split
from viasd_calib.spec import RoutingSpec, Sha256, VerifierRef

if TYPE_CHECKING:
    from viasd_calib.evaluation.bench import BenchResult


GIT_SECONDS = 10
"""A repository that does not answer for as long is taken for none: what is measured does not hang on it."""


class PromptsMeasured(BaseModel):
    """The prompts of a benchmark.

    Attributes:
        file: name of the file, without its folder.
        sha256: of the set of prompts that were decoded.
        split: that was taken; None for all.
        limit: that was asked for; None for none.
        left_out: prompts that the spec was fitted or calibrated on, and that were not decoded for that.
        fitted_included: whether such prompts were decoded all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: Sha256
    split: Split | None
    limit: int | None
    left_out: int = Field(ge=0)
    fitted_included: bool


class Provenance(BaseModel):
    """What was measured.

    Attributes:
        policy_sha256: :func:`~viasd_calib.digest.policy_digest` of the spec.
        verifier: that was loaded.
        versions: of the libraries that numbers depend on.
        date: when the benchmark was finished.
        command: that was given.
        commit: of the program's repository, see :func:`source_commit`; None where not known, and in what earlier
            releases wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_sha256: Sha256
    verifier: VerifierRef
    prompts: PromptsMeasured
    versions: dict[str, str]
    date: AwareDatetime
    command: str
    commit: str | None = None


def note_provenance(spec: RoutingSpec, verifier: VerifierRef, prompts: PromptsMeasured, command: str) -> Provenance:
    """The provenance of what is measured now.

    Args:
        spec: as it lies on the disk.
        verifier: that was loaded.
    """
    versions = {
        "viasd_calib": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    now = datetime.now(UTC).replace(microsecond=0)
    return Provenance(
        policy_sha256=policy_digest(spec),
        verifier=verifier,
        prompts=prompts,
        versions=versions,
        date=now,
        command=command,
        commit=source_commit(Path(__file__).parent),
    )


def source_commit(folder: Path) -> str | None:
    """The commit of the git repository that tracks a file in ``folder``, with ``-dirty`` after it where tracked files
    were changed; None where there is no git, no repository, or one that tracks other files, as around an environment.
    """

    def said(*words: str) -> str:
        asked = ["git", "-C", str(folder), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()

    try:
        if not said("ls-files"):
            return None
        changed = said("status", "--porcelain", "--untracked-files=no")
        return said("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_document(path: str | Path) -> tuple[dict[str, Any], Provenance | None]:
    """A benchmark's JSON, of which the provenance alone is checked: that takes no decoder.

    Raises:
        BenchError: missing, damaged, or of an earlier release, which did not note what was measured.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not {"settings", "methods"} <= document.keys():
            raise ValueError("no benchmark")
        if "provenance" not in document:
            raise BenchError(
                f"{path} was made by an older version of viasd_calib, which did not note which policy it measured; "
                "run viasd bench again"
            )
        noted = document["provenance"]
        return document, None if noted is None else Provenance.model_validate(noted)
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{path} is missing or not a benchmark's JSON; run viasd bench first") from error


def check_policy(measured: Provenance | None, spec: RoutingSpec, path: str) -> None:
    """Refuse the benchmark at ``path`` where it measured another policy than that of ``spec``, or other weights.

    Raises:
        BenchError: saying what differs.
    """
    again = "run viasd bench with this spec"
    if measured is None:
        raise BenchError(f"{path} does not say which policy it measured; {again}")
    digest = policy_digest(spec)
    if measured.policy_sha256 != digest:
        raise BenchError(
            f"{path} measured another policy ({measured.policy_sha256[:12]}) than that of this spec ({digest[:12]}); "
            f"{again}"
        )
    weights = spec.verifier.weights, measured.verifier.weights
    if None not in weights and weights[0] != weights[1]:
        raise BenchError(f"{path} measured other weights than those this spec was made for; {again} and its verifier")


def check_evidence(bench: BenchResult, spec: RoutingSpec, path: str) -> None:
    """Refuse the benchmark at ``path`` as evidence of ``spec``: that is of the spec as it decodes by itself.

    Raises:
        BenchError: saying what differs.
    """
    check_policy(bench.provenance, spec, path)
    settings = bench.settings
    for what, own, measured in (
        ("audit", spec.decoding.audit, settings.audit),
        ("number format", spec.verifier.dtype, settings.dtype),
    ):
        if own != measured:
            raise BenchError(f"{path} measured {what} {measured}, this spec has {own}; run viasd bench without it")
    check_single_texts(bench, path)
    if "three_tier" not in bench.methods:
        raise BenchError(f"{path} did not measure three_tier; run viasd bench with that method")


def check_single_texts(bench: BenchResult, path: str) -> None:
    """Refuse the benchmark at ``path`` where it measured batches alone.

    Raises:
        BenchError: it did.
    """
    if not bench.methods:
        raise BenchError(f"{path} measured batches alone; run viasd bench with --batch 1 among its batches")
