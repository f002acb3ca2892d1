"""Variants that rotate the weights or the outputs instead of adding to them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    Formerly,
    NotInConfig,
    Paper,
    TargetedAdapter,
    TypeSpecific,
    incompatible,
    unquantized_only,
)
from peftchat.variants.model_shape import ModelShape, largest_divisor

RotationDropout = Annotated[float, Field(ge=0, lt=1, description="Fraction of rotations left out during training.")]


def _block_size(chosen: int | None, limit: int, adapter: TargetedAdapter, shape: ModelShape) -> int:
    """Return the chosen size of blocks, or the largest one up to `limit` that divides all inputs.

    Raises:
        UserError: the chosen one does not divide all inputs. PEFT would take another one for OFT, with a warning.
    """
    inputs = [inputs for inputs, _ in shape.sizes(adapter.target_modules)]
    undivided = next((size for size in inputs if chosen and size % chosen), None)
    if undivided is not None:
        raise UserError(
            f"{chosen} does not divide the {undivided} inputs of a layer",
            where=f"adapter.{adapter.variant}_block_size",
            hint=f"{largest_divisor(inputs, min(inputs))} is the largest number that divides all inputs.",
        )
    return chosen or largest_divisor(inputs, limit)


class Oft(TargetedAdapter):
    """Multiplies each weight by trained rotations of blocks of its inputs, which keep angles between neurons."""

    title = "OFT"
    paper = Paper("Qiu et al.", 2023, "2306.07280")
    learning_rate = 5e-4
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "OFTConfig"
    peft_dropout = "module_dropout"
    supports_conv1d = False

    variant: Literal["oft"] = "oft"
    oft_block_size: Annotated[int | None, Formerly("block_size")] = Field(
        None,
        ge=2,
        description="Size of the rotations on the diagonal; it must divide all inputs. Default: the largest such "
        "number up to 32.",
    )
    dropout: RotationDropout = 0.0

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of OFTConfig, which takes either a rank or a block size."""
        size = _block_size(self.oft_block_size, 32, self, shape)
        return {**super().peft_settings(shape), "r": 0, "oft_block_size": size}


class Boft(TargetedAdapter):
    """OFT with a rotation that is a product of sparse ones in butterfly order, so that all inputs can mix."""

    title = "BOFT"
    paper = Paper("Liu et al.", 2023, "2311.06243")
    learning_rate = 1e-3
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "BOFTConfig"
    peft_dropout = "boft_dropout"
    supports_conv1d = False

    variant: Literal["boft"] = "boft"
    boft_block_size: Annotated[int | None, Formerly("block_size")] = Field(
        None,
        ge=2,
        description="Size of the rotations on the diagonal; it must divide all inputs. Default: the largest such "
        "number up to 8.",
    )
    boft_n_butterfly_factor: Annotated[int, Formerly("factors")] = Field(
        1,
        ge=1,
        description="Factors of the butterfly. More factors mix more inputs, and cost more. More than one needs a "
        "kernel that PEFT compiles on an NVIDIA GPU.",
    )
    dropout: RotationDropout = 0.0

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of BOFTConfig, with a block size that suits the model."""
        size = _block_size(self.boft_block_size, 8, self, shape)
        if self.boft_n_butterfly_factor > 1:
            _check_butterfly_kernel(self.boft_n_butterfly_factor)
        return {**super().peft_settings(shape), "boft_block_size": size}


def _check_butterfly_kernel(factors: int) -> None:
    """Raise a UserError where PEFT lacks the kernel for several factors: it then takes one, with a warning.

    See https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/boft/layer.py
    """
    from peft.tuners.boft.layer import get_fbd_cuda

    if get_fbd_cuda() is None:
        raise UserError(
            f"{factors}: PEFT's kernel for more than one factor cannot be compiled on this machine",
            where="adapter.boft_n_butterfly_factor",
            hint="Write 1, or train on an NVIDIA GPU with a CUDA toolkit.",
        )


class Hra(TargetedAdapter):
    """Multiplies each weight by a chain of trained Householder reflections."""

    title = "HRA"
    paper = Paper("Yuan et al.", 2024, "2405.17484")
    learning_rate = 1e-3
    tested_zero_stages = frozenset({"zero3"})
    incompatible_with = incompatible(unquantized_only("PEFT multiplies the packed numbers instead of the weights"))
    peft_class = "HRAConfig"
    supports_conv1d = False

    variant: Literal["hra"] = "hra"
    r: TypeSpecific[int] = Field(
        8,
        ge=2,
        multiple_of=2,
        description="Number of reflections; an even number makes their initial product the identity.",
    )


class Road(TargetedAdapter):
    """Rotates and scales pairs of each layer's outputs by trained angles and factors."""

    title = "RoAd"
    paper = Paper("Liao and Monz", 2024, "2409.00119")
    learning_rate = 1e-2
    tested_zero_stages = frozenset({"zero3"})
    peft_class = "RoadConfig"
    supports_conv1d = False

    variant: Literal["road"] = "road"
    # PEFT calls it `variant`, which is the name of the adapter here.
    road_variant: Annotated[NotInConfig[Literal["road_1", "road_2", "road_4"]], Formerly("form")] = Field(
        "road_1",
        description="Trained numbers per pair of outputs: `road_1` one angle and one factor, `road_2` two of each, "
        "`road_4` four of each. PEFT calls this setting `variant`.",
    )
    group_size: int | None = Field(
        None,
        ge=2,
        description="How outputs are paired: an even number that divides all outputs. Default: the largest such "
        "number up to 64.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of RoadConfig, with a group size that suits the model."""
        half = largest_divisor([outputs // 2 for _, outputs in shape.sizes(self.target_modules)], 32)
        group_size = self.group_size or 2 * half
        return {**super().peft_settings(shape), "variant": self.road_variant, "group_size": group_size}
