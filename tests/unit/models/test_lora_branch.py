"""LoRA layers whose branch is added by one product, against PEFT's own forward."""

import copy
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.models.loading import keep_4bit_weights_as_quantized

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one = nn.Linear(12, 20, bias=bias)
        self.two = nn.Linear(20, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x)
        output = self.two(torch.nn.functional.silu(hidden))
        # Some models go on in place.
        output += hidden[..., :8]
        return output


def adapted(bias: bool, **options: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Net(bias), LoraConfig(r=4, target_modules=["one", "two"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_and_gradients_are_those_of_peft(bias, dropout, dtype):
    stock = adapted(bias, lora_dropout=dropout).to(dtype if dtype == torch.float64 else torch.float32)
    ours = copy.deepcopy(stock)
    assert fuse_lora_forward(ours) == 2
    x = torch.randn(3, 5, 12, dtype=next(stock.parameters()).dtype)
    found = []
    for model in (stock, ours):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(leaf)
        (output.double() ** 2).sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([output.detach(), leaf.grad, *grads])
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < tolerance * one.norm()


def test_switched_off_it_is_the_base():
    model = adapted(True)
    fuse_lora_forward(model)
    x = torch.randn(2, 12)
    with model.disable_adapter():
        base = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(base, Net(True)(x))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_product_is_left_alone(options):
    assert fuse_lora_forward(adapted(True, **options)) == 0


def four_bit(linear: nn.Linear) -> Linear4bit:
    layer = Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    # As `from_pretrained` does: quantized from the dtype of the model.
    return layer.to(linear.weight.dtype).to("cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_of_four_bits_gives_what_peft_does(dropout, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(four_bit(nn.Linear(128, 96).to(torch.bfloat16))).requires_grad_(False)
    options = LoraConfig(r=8, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    stock = get_peft_model(base, options)
    ours = copy.deepcopy(stock)
    assert fuse_lora_forward(ours) == 1
    found = []
    for model in (stock, ours):
        # The layer computes in bfloat16, whatever its input has.
        x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        torch.manual_seed(2)
        output = model(x)
        (output.float() ** 2).sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.02 * one.norm()
    x = torch.randn(70, 128).to(dtype)
    keep_4bit_weights_as_quantized(ours)
    # An evaluation rounds as training does. A few rows, as when an answer is written, go through the layer itself.
    trained = ours.eval()(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        assert torch.equal(ours(x), trained)
        few = ours(x[:3])
    assert (few - trained[:3]).norm() < 0.02 * few.norm()


@pytest.mark.parametrize(("dropout", "in_four_bits"), [(0.0, False), (0.5, False), (0.0, True)])
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_small_adapter_counts_in_bfloat16(dropout, in_four_bits, is_compiled):
    """An adapter that adds less than half a unit in the last place, as in the first steps of a run."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 192, bias=True).to(torch.bfloat16)
    base = nn.Sequential(four_bit(linear) if in_four_bits else linear).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0"], lora_dropout=dropout))
    layer = model.base_model.model[0]
    x = torch.randn(400, 256).bfloat16().requires_grad_()
    grad_output = torch.randn(400, 192).bfloat16()

    def found(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and gradient of x with an adapter of this scale."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(torch.randn(192, 8, generator=generator) * scale)
        torch.manual_seed(2)
        output = forward(x)
        (grad,) = torch.autograd.grad(output, x, grad_output)
        return output.detach().float(), grad.float()

    def counted() -> list[float]:
        """What a small adapter changes, as a share of what one ten thousand times larger changes, scaled."""
        changes = [[with_it - without for with_it, without in zip(found(scale), found(0.0), strict=True)]
                   for scale in (1e-4, 1.0)]  # fmt: skip
        small, large = changes
        return [float((one * other).sum() / (other * other).sum() * 1e4)
                for one, other in zip(small, large, strict=True)]  # fmt: skip

    forward = model
    # PEFT loses most of it; where this fails, it does no more.
    assert counted()[0] < 0.5
    assert fuse_lora_forward(model) == 1
    # With dropout, autograd sums the gradients of both inputs, and rounds.
    forward = torch.compile(model, dynamic=True) if is_compiled else model
    assert all(0.9 < share < 1.1 for share in counted()[: 1 if dropout else 2])
