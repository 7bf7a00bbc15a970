"""Factories of tiny models, tokenizers, drafters, traces and specs: small enough for a test of milliseconds.

Each name has its home in one module; tests import it from here.
"""

from tests.tiny.disks import small_disk
from tests.tiny.drafters import (
    DRAFTERS,
    RandomDrafter,
    make_drafter,
    propose,
    tiny_shallow,
    tiny_shape,
)
from tests.tiny.fits import tiny_fit, tiny_fit_options
from tests.tiny.folders import TinyFolder, save_tiny, write_gguf
from tests.tiny.gates import constant_gate, random_gate, trusting_gates
from tests.tiny.models import (
    LAYERS,
    SLIDING,
    TINY_FAMILIES,
    VOCAB,
    longrope_config,
    make_model,
    noisy_copy,
    spoil,
    tiny_config,
    tiny_model,
    wide_model,
)
from tests.tiny.references import transformers_logits, transformers_text
from tests.tiny.routes import even_costs, random_bridges
from tests.tiny.specs import (
    drafted_spec,
    full_spec,
    small_document,
    small_gates,
    small_spec,
    tiny_profile,
    tiny_spec,
    verifier_ref,
    write_document,
)
from tests.tiny.tokenizers import CHAT_TEMPLATE, EOS, SPECIAL, letter_tokenizer, tiny_tokenizer
from tests.tiny.traces import tiny_prompts, tiny_texts, tiny_traces

__all__ = [
    "CHAT_TEMPLATE",
    "DRAFTERS",
    "EOS",
    "LAYERS",
    "SLIDING",
    "SPECIAL",
    "TINY_FAMILIES",
    "VOCAB",
    "RandomDrafter",
    "TinyFolder",
    "constant_gate",
    "drafted_spec",
    "even_costs",
    "full_spec",
    "letter_tokenizer",
    "longrope_config",
    "make_drafter",
    "make_model",
    "noisy_copy",
    "propose",
    "random_bridges",
    "random_gate",
    "save_tiny",
    "small_disk",
    "small_document",
    "small_gates",
    "small_spec",
    "spoil",
    "tiny_config",
    "tiny_fit",
    "tiny_fit_options",
    "tiny_model",
    "tiny_profile",
    "tiny_prompts",
    "tiny_shallow",
    "tiny_shape",
    "tiny_spec",
    "tiny_texts",
    "tiny_tokenizer",
    "tiny_traces",
    "transformers_logits",
    "transformers_text",
    "trusting_gates",
    "verifier_ref",
    "wide_model",
    "write_document",
    "write_gguf",
]
