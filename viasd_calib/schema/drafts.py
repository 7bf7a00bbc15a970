"""The draft model of a spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from viasd_calib.schema.base import Revision, Sha256, SpecModel, TensorFile, WeightFormat


class ModelDraftSettings(SpecModel):
    """How a draft model runs, whichever it is.

    Its linear layers may have integer weights; null leaves them in the verifier's number format. And it may read only
    the end of a prompt: its own pass over a long one takes more time than its drafts save in a short answer.
    """

    quantize: WeightFormat | None = Field(
        None, description="integer weights of the draft model's linear layers; null for the verifier's number format"
    )
    prompt_window: int | None = Field(
        None, ge=1, description="how many of a prompt's last tokens the draft model reads, at most; null for all"
    )


class CausalLMDraft(ModelDraftSettings):
    """Any transformers model with the verifier's vocabulary.

    ``weights_sha256`` is the hash of its weight files; specs of earlier releases have none.
    """

    kind: Literal["causal_lm"] = Field("causal_lm", description="a causal language model")
    name_or_path: str = Field(min_length=1, description="hub id, or path from the spec's folder")
    revision: Revision | None = Field(None, description="commit, branch or tag of a hub id, or hash of a GGUF file")
    weights_sha256: Sha256 | None = Field(None, description="of its weight files; null in specs of earlier releases")


class PromptLookupDraft(SpecModel):
    """Proposes what followed the same n-gram earlier in the text."""

    kind: Literal["prompt_lookup"] = Field("prompt_lookup", description="n-grams of the text itself; no weights")
    max_ngram: int = Field(3, ge=1, description="longest n-gram that is looked up, in tokens")
    min_ngram: int = Field(1, ge=1, description="shortest n-gram that is looked up, in tokens")

    @model_validator(mode="after")
    def _ordered(self) -> PromptLookupDraft:
        if self.min_ngram > self.max_ngram:
            raise ValueError("min_ngram must not exceed max_ngram")
        return self


class ShallowShape(SpecModel):
    """Sizes of a shallow drafter: layers of its own, output tokens, and where it reads the verifier.

    A tap is a number of the verifier's layers, after which the residual stream is read.
    """

    num_layers: int = Field(ge=1, description="decoder layers of the drafter's own")
    head_vocab: int = Field(ge=2, description="output tokens of the drafter")
    taps: tuple[int, ...] = Field(
        min_length=1, description="numbers of verifier layers after which the drafter reads the residual stream; rising"
    )

    @field_validator("taps")
    @classmethod
    def _rising(cls, taps: tuple[int, ...]) -> tuple[int, ...]:
        if list(taps) != sorted(set(taps)) or taps[0] < 0:
            raise ValueError("taps must be given once each, in rising order, counted from 0")
        return taps

    def misfits(self, num_layers: int, vocab_size: int) -> Iterator[str]:
        """What a drafter beside a verifier of this shape cannot have, a line each."""
        if self.num_layers > num_layers:
            yield f"the drafter has {self.num_layers} layers, the verifier has {num_layers}; export it again"
        if self.taps[-1] > num_layers:
            yield f"the drafter reads the verifier after layer {self.taps[-1]}, it has {num_layers}; export it again"
        if self.head_vocab > vocab_size:
            yield f"the drafter has {self.head_vocab} output tokens, the verifier has {vocab_size}; export it again"


class ShallowDraft(ShallowShape, ModelDraftSettings):
    """A few decoder layers of the verifier's shape, conditioned on the verifier's residual stream."""

    kind: Literal["shallow"] = Field("shallow", description="a few decoder layers on the verifier's residual stream")
    tensors: TensorFile = Field(description="weights of the drafter")


ModelDraft = Annotated[CausalLMDraft | ShallowDraft, Field(discriminator="kind")]


class CombinedDraft(SpecModel):
    """Prompt lookup where a match is confident, a draft model elsewhere.

    ``lookup.min_ngram`` is the shortest match that is confident.
    """

    kind: Literal["combined"] = Field(
        "combined", description="prompt lookup where a match is confident, a draft model elsewhere"
    )
    lookup: PromptLookupDraft = Field(
        PromptLookupDraft(max_ngram=5, min_ngram=3),
        description="the lookup; its min_ngram is the shortest confident match",
    )
    model: ModelDraft = Field(description="what drafts elsewhere")


DraftSpec = Annotated[CausalLMDraft | PromptLookupDraft | ShallowDraft | CombinedDraft, Field(discriminator="kind")]
