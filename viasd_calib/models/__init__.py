"""Loading verifiers and draft models: a hub id, a local folder, a GGUF file, or the embedded default."""

from viasd_calib.model_names import beside
from viasd_calib.models.chat import template_of
from viasd_calib.models.gguf import SMOLLM2_FILE, SMOLLM2_SHA256, converted, smollm2_file
from viasd_calib.models.hashes import cache_folder, cached_sha256
from viasd_calib.models.names import check_model, resolve_model
from viasd_calib.models.verifier import (
    DTYPE_NAMES,
    DTYPES,
    LoadVerifier,
    Verifier,
    context_length,
    encode_prompt,
    fingerprint,
    identify,
    load_draft_model,
    load_verifier,
    tokenizer_of,
)
from viasd_calib.models.vocabulary import first_difference
from viasd_calib.models.weights import weights_in_memory, weights_sha256

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "SMOLLM2_FILE",
    "SMOLLM2_SHA256",
    "LoadVerifier",
    "Verifier",
    "beside",
    "cache_folder",
    "cached_sha256",
    "check_model",
    "context_length",
    "converted",
    "encode_prompt",
    "fingerprint",
    "first_difference",
    "identify",
    "load_draft_model",
    "load_verifier",
    "resolve_model",
    "smollm2_file",
    "template_of",
    "tokenizer_of",
    "weights_in_memory",
    "weights_sha256",
]
