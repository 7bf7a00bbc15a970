"""What a lossy spec's certificate holds for: how texts were chosen, and how long they were."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformers import LogitsProcessor

from viasd_calib.decoding.sampling import Sampling
from viasd_calib.errors import CertificateWarning, SamplingError
from viasd_calib.spec import Audit, RoutingSpec


def check_certified(spec: RoutingSpec, sampling: Sampling, processors: Sequence[LogitsProcessor]) -> None:
    """Refuse settings that a lossy spec's certificate was not made for; it was made without processors.

    Raises:
        SamplingError: naming the temperatures it was made for.
    """
    if spec.decoding.audit == "strict":
        return
    plain = Sampling(temperature=sampling.temperature, seed=sampling.seed)
    if sampling.temperature not in spec.decoding.temperature_scope or sampling != plain or processors:
        raise SamplingError(
            f"the spec's certificate holds at temperature {spec.decoding.temperature_scope} without other settings; "
            "decode with audit strict, or calibrate for these settings"
        )


def certified_tokens(spec: RoutingSpec, audit: Audit | None = None) -> int | None:
    """Most new tokens that a lossy spec's certificate holds for; None where texts are exact, or nothing is certified.

    Args:
        audit: in place of the spec's own.
    """
    certificate = spec.certificate
    if (audit or spec.decoding.audit) == "strict" or certificate is None or certificate.bound is None:
        return None
    return certificate.max_new_tokens


class CertifiedLength:
    """Warns once that a text may become longer than those that a certificate was made from.

    Args:
        tokens: the certificate holds for; None where it holds for any length.
    """

    def __init__(self, tokens: int | None) -> None:
        self._tokens = tokens

    def notice(self, max_new_tokens: int) -> None:
        """Give a :class:`~viasd_calib.errors.CertificateWarning` where more are asked for, the first time."""
        tokens = self._tokens
        if tokens is not None and max_new_tokens > tokens:
            self._tokens = None
            warnings.warn(
                f"the spec's certificate holds for texts of at most {tokens} new tokens, and {max_new_tokens} are "
                "asked for: nothing is certified beyond; ask for fewer, or calibrate with more --max-new-tokens",
                CertificateWarning,
                stacklevel=3,
            )
