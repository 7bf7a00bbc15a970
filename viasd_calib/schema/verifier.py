"""The verifier that a spec belongs to."""

from __future__ import annotations

from pydantic import Field

from viasd_calib.schema.base import DType, Revision, Sha256, SpecModel


class VerifierRef(SpecModel):
    """The full verifier a spec belongs to.

    ``weights_sha256`` is the hash of its weight files; specs of earlier releases have none.
    """

    name_or_path: str = Field(min_length=1, description="hub id, or path from the spec's folder")
    revision: Revision | None = Field(None, description="commit, branch or tag of a hub id, or hash of a GGUF file")
    architecture: str = Field(min_length=1, description="class of the model in transformers")
    num_layers: int = Field(gt=0, description="decoder layers")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    vocab_size: int = Field(gt=0, description="rows of the output head")
    config_sha256: Sha256 = Field(description="of the configuration entries that decide what the model computes")
    tokenizer_sha256: Sha256 = Field(description="of the tokenizer")
    weights_sha256: Sha256 | None = Field(None, description="of its weight files; null in specs of earlier releases")
    dtype: DType = Field(description="number format it runs in unless told otherwise")

    @property
    def weights(self) -> str | None:
        """Hash that says which weights these are; None where it is not known.

        A spec of an earlier release names the hash of a GGUF file, and no other.
        """
        if self.weights_sha256 is None and self.revision is not None and self.revision.startswith("sha256:"):
            return self.revision.removeprefix("sha256:")
        return self.weights_sha256

    def agrees_with(self, other: VerifierRef) -> bool:
        """Whether both are one verifier; a hash of weights that one of them lacks is not compared."""
        return self.says_the_same(other) and (self.model_copy(update={"weights_sha256": other.weights_sha256}) == other)

    def says_the_same(self, other: VerifierRef) -> bool:
        """Whether both compute the same, as far as is known, wherever they lie and whatever their number format."""
        known = None not in (self.weights, other.weights)
        return self.config_sha256 == other.config_sha256 and (not known or self.weights == other.weights)
