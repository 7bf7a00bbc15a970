"""What a model's name means, and whether there is such a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError
from viasd_calib.model_names import GIVE, model_path
from viasd_calib.models.gguf import SMOLLM2_SHA256, converted, smollm2_file
from viasd_calib.models.hashes import cached_sha256
from viasd_calib.models.loading import CONFIG_FILES, local_file

REACHED_WITHIN = 10.0
"""Seconds until the hub must have answered."""
LOG_IN = "log in with hf auth login or HF_TOKEN"


def resolve_model(name_or_path: str) -> tuple[str, str | None]:
    """What transformers can load for a name, and the hash that identifies it if it came from a GGUF file.

    Raises:
        ModelError: a path at which there is no model, refused at once.
        StorageError: the converted GGUF file cannot be written.
    """
    if name_or_path == SMOLLM2:
        path = smollm2_file()
        return str(converted(path, SMOLLM2_SHA256)), f"sha256:{SMOLLM2_SHA256}"
    found = model_path(name_or_path)
    if found is None:
        return name_or_path, None
    if found.is_dir():
        return str(found), None
    digest = cached_sha256(found)
    return str(converted(found, digest)), f"sha256:{digest}"


def check_model(name_or_path: str, revision: str | None = None) -> Path | None:
    """Refuse a name that no model can be loaded for, before anything is loaded.

    The hub is asked once, while transformers tries for a minute where there is no network, and for each of a model's
    files anew. It is not asked for a folder.

    Args:
        name_or_path: as for :func:`~viasd_calib.models.load_verifier`.
        revision: of a hub id.

    Returns:
        The folder of what has been downloaded, where the hub gives no more than that now; else None.

    Raises:
        ModelError: there is no such path; or it has not been downloaded, and the hub does not know the name, does not
            give the model to this user, cannot be reached, or is not to be asked (``HF_HUB_OFFLINE``).
    """
    if name_or_path == SMOLLM2 or model_path(name_or_path) is not None:
        return None
    problem = _hub_problem(name_or_path, revision)
    if problem is None:
        return None
    downloaded = next(filter(None, (local_file(name_or_path, name, revision) for name in CONFIG_FILES)), None)
    if downloaded is not None:
        return None if problem.reached else downloaded.parent
    raise ModelError(
        f"cannot load the model {name_or_path!r}: there is no such folder, and {problem.reason}"
    ) from problem.cause


@dataclass(frozen=True)
class _Problem:
    """Why a model cannot be had from the hub.

    Attributes:
        reason: with the mend.
        cause: the error that says so.
        reached: whether the hub has answered.
    """

    reason: str
    cause: Exception | None
    reached: bool = True


def _hub_problem(name: str, revision: str | None) -> _Problem | None:
    """Why a model cannot be had from the hub; None where it can."""
    if constants.HF_HUB_OFFLINE:
        forbidden = f"it has not been downloaded, while HF_HUB_OFFLINE forbids to: unset it, or {GIVE}"
        return _Problem(forbidden, None, reached=False)
    try:
        hub = HfApi()
        if hub.model_info(name, revision=revision, timeout=REACHED_WITHIN).gated:
            hub.auth_check(name)
    except HFValidationError as error:
        return _Problem(f"the hub has no such names; {GIVE}", error)
    except GatedRepoError as error:  # it is a RepositoryNotFoundError
        page = f"{constants.ENDPOINT}/{name}"
        terms = f"the hub gives it to those alone who have agreed to its terms: do so at {page}, and {LOG_IN}"
        return _Problem(terms, error)
    except RevisionNotFoundError as error:
        return _Problem(f"the hub has no revision {revision!r} of it; give another, or leave it out", error)
    except RepositoryNotFoundError as error:
        return _Problem(f"the hub has no model of that name, or a private one (then {LOG_IN}); {GIVE}", error)
    except HfHubHTTPError:
        return None  # it was reached, and may be busy: the download tries again, and says what it is told
    except Exception as error:  # of the network: the HTTP library, and so its errors, change with the hub's release
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = f"the hub cannot be reached ({said}); go online once to download it, or {GIVE}"
        return _Problem(offline, error, reached=False)
    return None
