"""What ``make gpu`` was given, as the processes of its steps find it in their environment."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict

SETTINGS_VARIABLE = "VIASD_GPU_SETTINGS"


class Settings(BaseModel):
    """Device and models.

    Attributes:
        models: paths; see :func:`tests.gpu.targets.find_targets`.
        small: whether to leave out SmolLM2 and to measure little: a run of seconds, on a tiny model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "cuda"
    models: list[str] = []
    small: bool = False


def read_settings() -> Settings:
    """The settings of this process; those of a GPU without models where none were given."""
    given = os.environ.get(SETTINGS_VARIABLE)
    return Settings() if given is None else Settings.model_validate_json(given)
