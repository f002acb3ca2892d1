"""LoRA layers whose branch is added by one product, against PEFT's own forward."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peftchat.models.fused_lora import fuse_lora_forward


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
