"""Updates made of fixed random matrices, or of few coefficients of a fixed transform."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from peftchat.variants.base import (
    Dropout,
    Paper,
    TargetedAdapter,
    TypeSpecific,
    incompatible,
    unquantized_only,
)
from peftchat.variants.model_shape import ModelShape, largest_divisor


class Vera(TargetedAdapter):
    """Two fixed random matrices that all layers share; only two vectors per layer are trained."""

    title = "VeRA"
    paper = Paper("Kopiczko et al.", 2023, "2310.11454")
    learning_rate = 5e-3
    tested_zero_stages = frozenset({"zero2", "zero3"})
    peft_class = "VeraConfig"
    peft_dropout = "vera_dropout"

    variant: Literal["vera"] = "vera"
    r: TypeSpecific[int] = Field(
        256, ge=1, description="Rank of the fixed random matrices. It costs time, and hardly any trained parameters."
    )
    dropout: Dropout = 0.0
    d_initial: float = Field(0.1, gt=0, description="Initial value of the trained vector between the two matrices.")


class Randlora(TargetedAdapter):
    """A full-rank update as a weighted sum of fixed random low-rank pairs; the weights of the sum are trained."""

    title = "RandLoRA"
    paper = Paper("Albert et al.", 2025, "2502.00987")
    learning_rate = 5e-4
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "RandLoraConfig"
    peft_alpha = "randlora_alpha"
    peft_dropout = "randlora_dropout"
    shared_tensors = ("randlora_A", "randlora_B")

    variant: Literal["randlora"] = "randlora"
    r: TypeSpecific[int] = Field(
        32, ge=1, description="Rank of each fixed random pair; a layer has as many pairs as full rank needs."
    )
    alpha: TypeSpecific[int] = Field(640, ge=1, description="Scale of the update: `alpha / r`; the paper uses 20.")
    dropout: Dropout = 0.0


class Fourierft(TargetedAdapter):
    """Trains a few coefficients of the update's Fourier transform."""

    title = "FourierFT"
    paper = Paper("Gao et al.", 2024, "2405.03003")
    learning_rate = 5e-2
    peft_class = "FourierFTConfig"

    variant: Literal["fourierft"] = "fourierft"
    n_frequency: TypeSpecific[int | None] = Field(
        None,
        ge=1,
        description="Trained Fourier coefficients of each layer. Default: 1000, or half the weights of the smallest "
        "layer.",
    )
    scaling: TypeSpecific[float] = Field(150.0, gt=0, description="Scale of the update.")

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of FourierFTConfig.

        PEFT's default initialization is random; with zeros the adapter is the identity before the first step.
        """
        n_frequency = self.n_frequency or min(1000, _half_of_smallest(self, shape))
        return {**super().peft_settings(shape), "n_frequency": n_frequency, "init_weights": True}


class Waveft(TargetedAdapter):
    """Trains a few coefficients of the update's wavelet transform."""

    title = "WaveFT"
    paper = Paper("Bilican et al.", 2025, "2505.12532")
    learning_rate = 5e-4
    peft_class = "WaveFTConfig"

    variant: Literal["waveft"] = "waveft"
    n_frequency: TypeSpecific[int | None] = Field(
        None,
        ge=1,
        description="Trained wavelet coefficients of each layer. Default: 2592, or half the weights of the smallest "
        "layer.",
    )
    scaling: TypeSpecific[float] = Field(25.0, gt=0, description="Scale of the update.")

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of WaveFTConfig."""
        n_frequency = self.n_frequency or min(2592, _half_of_smallest(self, shape))
        return {**super().peft_settings(shape), "n_frequency": n_frequency}


def _half_of_smallest(adapter: TargetedAdapter, shape: ModelShape) -> int:
    return min(inputs * outputs for inputs, outputs in shape.sizes(adapter.target_modules)) // 2


class C3a(TargetedAdapter):
    """An update of circulant blocks, each of which is one trained vector."""

    title = "C3A"
    paper = Paper("Chen et al.", 2024, "2407.19342")
    learning_rate = 1e-1
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "C3AConfig"
    supports_conv1d = False

    variant: Literal["c3a"] = "c3a"
    block_size: int | None = Field(
        None,
        ge=1,
        description="Size of the circulant blocks; it must divide all inputs and outputs. Default: the largest such "
        "number up to 256.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of C3AConfig, with a block size that suits the model."""
        return {**super().peft_settings(shape), "block_size": self.block_size or _common_divisor(self, shape)}


def _common_divisor(adapter: TargetedAdapter, shape: ModelShape) -> int:
    """Return the largest number up to 256 that divides the inputs and outputs of all target layers."""
    return largest_divisor([side for size in shape.sizes(adapter.target_modules) for side in size], 256)


class Tinylora(TargetedAdapter):
    """Changes the main singular directions of each weight by a few trained numbers through a fixed projection."""

    title = "TinyLoRA"
    paper = Paper("Morris et al.", 2026, "2602.04118")
    learning_rate = 1e-3
    incompatible_with = incompatible(unquantized_only("PEFT decomposes the packed numbers instead of the weights"))
    peft_class = "TinyLoraConfig"
    peft_dropout = "tinylora_dropout"
    shared_tensors = (".tinylora_v.",)

    variant: Literal["tinylora"] = "tinylora"
    r: TypeSpecific[int] = Field(2, ge=1, description="Singular directions of each weight that the update changes.")
    u: int = Field(64, ge=1, description="Trained numbers of each layer.")
    dropout: Dropout = 0.0


class Unilora(TargetedAdapter):
    """All LoRA matrices of the model are one trained vector, which a fixed projection distributes over them."""

    title = "Uni-LoRA"
    paper = Paper("Li et al.", 2025, "2506.00799")
    learning_rate = 5e-3
    peft_class = "UniLoraConfig"
    peft_dropout = "unilora_dropout"
    shared_tensors = (".unilora_theta_d.",)

    variant: Literal["unilora"] = "unilora"
    r: TypeSpecific[int] = Field(4, ge=1, description="Rank of the update of each layer.")
    theta_d_length: int = Field(4096, ge=1, description="Trained numbers of the complete model.")
    dropout: Dropout = 0.0


class Vblora(TargetedAdapter):
    """LoRA matrices composed of vectors from a bank that all layers share."""

    title = "VB-LoRA"
    paper = Paper("Li et al.", 2024, "2405.15179")
    learning_rate = 1e-3
    peft_class = "VBLoRAConfig"
    peft_dropout = "vblora_dropout"
    shared_tensors = ("vblora_vector_bank",)

    variant: Literal["vblora"] = "vblora"
    r: TypeSpecific[int] = Field(4, ge=1, description="Rank of the update of each layer.")
    num_vectors: int = Field(256, ge=1, description="Vectors in the bank that all layers share.")
    vector_length: int | None = Field(
        None,
        ge=1,
        description="Length of each vector; it must divide all inputs and outputs. Default: the largest such number "
        "up to 256.",
    )
    topk: int = Field(2, ge=1, description="Vectors of the bank that make up each piece of an update.")
    dropout: Dropout = 0.0

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield a choice of more vectors than the bank has."""
        if self.topk > self.num_vectors:
            yield "topk", f"must be at most `num_vectors` ({self.num_vectors}), got {self.topk}"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of VBLoRAConfig, with a vector length that suits the model."""
        return {**super().peft_settings(shape), "vector_length": self.vector_length or _common_divisor(self, shape)}
