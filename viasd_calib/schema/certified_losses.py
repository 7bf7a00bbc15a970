"""The losses that a certificate was made from, in a file of their own beside the spec."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from viasd_calib.schema.base import DType, Sha256, Share, ShortHash, SpecModel

PolicyPart = Literal["verifier", "draft", "route", "gates", "decoding"]
POLICY_PARTS: tuple[PolicyPart, ...] = get_args(PolicyPart)


class CertifiedLosses(SpecModel):
    """What was decoded with, and the loss of each prompt that was decoded, in the order in which they were tested.

    The p-value of a certificate can be computed from it anew. It shows edits and mix-ups; it is no signature: whoever
    writes both files anew can write what they like.

    Attributes:
        policy: the hash of each part of the policy (:func:`viasd_calib.digest.policy_parts`).
        dtype: number format that was decoded in.
        backend: family of the kernels that decoded.
        loss: name of what was measured.
        max_new_tokens: longest answer, in tokens a turn.
        rounding_gap: as in the certificate.
        prompts: short hashes of their texts, rising: the order of the procedure.
        losses: of these prompts.
        tokens: that were decoded for each.
    """

    policy: dict[PolicyPart, Sha256]
    dtype: DType
    backend: str = Field(min_length=1)
    loss: str = Field(min_length=1)
    max_new_tokens: int = Field(gt=0)
    rounding_gap: Annotated[float, Field(ge=0)] | None
    prompts: list[ShortHash] = Field(min_length=1)
    losses: list[Share]
    tokens: list[Annotated[int, Field(gt=0)]]

    @model_validator(mode="after")
    def _of_the_same_prompts(self) -> CertifiedLosses:
        if not len(self.prompts) == len(self.losses) == len(self.tokens):
            raise ValueError(
                f"{len(self.prompts)} prompts, {len(self.losses)} losses and {len(self.tokens)} counts of tokens"
            )
        if self.prompts != sorted(set(self.prompts)):
            raise ValueError("the prompts are not in the order of their hashes, each once")
        return self

    @property
    def observed(self) -> float:
        """Mean of the prompts' losses, each counting the same."""
        return sum(self.losses) / len(self.losses)

    @property
    def observed_by_token(self) -> float:
        """Mean in which each prompt counts by its tokens."""
        return sum(loss * tokens for loss, tokens in zip(self.losses, self.tokens, strict=True)) / sum(self.tokens)
