"""A weight that the model does not use is told after the first step; where all weights learn, nothing is."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from peftchat.training.context import RunNotes
from peftchat.training.number_checks import NumberChecks


def checks_with(notes: RunNotes) -> NumberChecks:
    context = cast("Any", SimpleNamespace(notes=notes, recipe=_RECIPE, distributed=SimpleNamespace(world_size=1)))
    return NumberChecks(context, torch.device("cpu"), lambda value: [value], lambda tensor: tensor)


_RECIPE = SimpleNamespace(
    training=SimpleNamespace(on_spike="log", logging_steps=1), model=SimpleNamespace(computed_in="float32")
)


def test_a_weight_without_a_gradient_is_told() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model["used"](torch.ones(1, 2)).sum().backward()
    notes = RunNotes(silent=True)
    checks_with(notes).tell_without_gradient(model)
    (line,) = notes.lines
    assert "to 2 of 4 trained tensors, the first is idle.weight" in line
    model["idle"](torch.ones(1, 2)).sum().backward()
    quiet = RunNotes(silent=True)
    checks_with(quiet).tell_without_gradient(model)
    assert not quiet.lines
