"""Errors a user can meet; each message names the thing and the mend."""


class ViasdError(Exception):
    """Base of every error this package raises on purpose."""


class UsageError(ViasdError):
    """A command was called with words that make no sense."""


class SpecError(ViasdError):
    """A routing spec is corrupt, truncated, of an unknown version or made for another verifier."""


class ModelError(ViasdError):
    """A model is missing, damaged or not of a supported family."""


class PromptError(ViasdError):
    """A prompt file is empty or malformed, or a prompt does not fit the model."""


class TraceError(ViasdError):
    """A trace folder is damaged or was captured with other settings."""


class StorageError(ViasdError):
    """A file could not be written."""


class NumericsError(ViasdError):
    """A model gave numbers that are not finite, or that cannot be calculated with."""


class CalibrationError(ViasdError):
    """A calibration request cannot be met as stated."""


class PlanningError(ViasdError):
    """A latency profile cannot be measured or read, or does not hold what it is asked for."""


class BenchError(ViasdError):
    """A benchmark cannot be run or read."""


class MethodError(ViasdError):
    """There is no decoding method or audit of that name."""


class SamplingError(ViasdError):
    """Sampling settings are out of range, or a rule cannot sample as it is asked to."""


class ViasdWarning(UserWarning):
    """Base of every warning this package gives; commands print it as a notice."""


class CertificateWarning(ViasdWarning):
    """A text may be decoded otherwise than the spec's certificate was made for."""


class DraftWarning(ViasdWarning):
    """Something of a draft model was taken for granted, or left out."""


class JobWarning(ViasdWarning):
    """Something about the input of a job, or about how it goes on, that a user should know."""


class MachineWarning(ViasdWarning):
    """Something runs more slowly than it could on another machine."""


class TemplateWarning(ViasdWarning):
    """A tokenizer's chat template writes what its model was hardly trained on."""


class WeightsWarning(ViasdWarning):
    """A model's weights are not those that a routing spec was made for, or nobody can say whether they are."""
