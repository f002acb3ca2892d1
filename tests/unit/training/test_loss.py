"""The loss against the plain formula: same value, same gradients, whatever stands behind the head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftchat.models.added_tokens import AddedTokenHead
from peftchat.training import linear_cross_entropy as module
from peftchat.training.linear_cross_entropy import linear_cross_entropy
from peftchat.training.lm_head import Head, LogitTransform
from peftchat.training.reference_kl import NextTokens, kl_from_reference

N, HIDDEN, VOCABULARY = 37, 16, 50


def plain_nll(hidden, targets, weight, bias, rows, ids, rows_bias, size, transform):
    """The formula as one would write it: all logits at once."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if rows is not None:
        columns = [logits[:, index] for index in range(logits.shape[1])]
        columns += [torch.zeros(len(hidden))] * (size - len(columns))
        for place, token_id in enumerate(ids.tolist()):
            new = hidden @ rows[place]
            columns[token_id] = new if rows_bias is None else new + rows_bias[place]
        logits = torch.stack(columns, dim=1)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    if ids is not None:
        # What no token has cannot be predicted.
        nobody = [token for token in range(len(weight), size) if token not in ids.tolist()]
        logits[:, nobody] = float("-inf")
    return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()


@pytest.mark.parametrize("ids", [None, [50, 51, 52], [47, 49], [48, 50, 53]], ids=["none", "behind", "inside", "mixed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(softcap=5.0), LogitTransform(scale=0.3), LogitTransform(2.0, 4.0)],
    ids=str,
)
@pytest.mark.parametrize(("chunk", "in_tiles"), [(16, False), (1000, False), (1000, True), (20, True)])
def test_equals_the_plain_formula(ids, bias, transform, chunk, in_tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size = VOCABULARY if ids is None else max(VOCABULARY, max(ids) + 1)
    monkeypatch.setattr(module, "_CPU_CHUNK_BYTES", 4 * chunk * size)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 8 * size)
    hidden, weight = torch.randn(N, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    head_bias = torch.randn(VOCABULARY) if bias else None
    rows = None if ids is None else torch.randn(len(ids), HIDDEN)
    rows_bias = torch.randn(len(ids)) if bias and ids else None
    row_ids = None if ids is None else torch.tensor(ids)
    known = [token for token in range(size) if token < VOCABULARY or token in (ids or [])]
    targets = torch.tensor(known)[torch.randint(len(known), (N,))]

    gradients = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, head_bias, rows) if tensor is not None]
        given = iter(leaves)
        h, w = next(given), next(given)
        b = next(given) if head_bias is not None else None
        r = next(given) if rows is not None else None
        if ours:
            added = None if r is None else AddedTokenHead(r, rows_bias, row_ids, size)
            head = Head(w, b, added, transform, in_tiles=in_tiles)
            total, correct = linear_cross_entropy(h, targets, head, count_correct=True)
        else:
            total, correct = plain_nll(h, targets, w, b, r, row_ids, rows_bias, size, transform)
        (total / 7).backward()
        gradients.append((total.detach(), correct, [leaf.grad for leaf in leaves]))
    (total, correct, ours), (plain_total, plain_correct, plain) = gradients
    torch.testing.assert_close(total, plain_total)
    assert correct == plain_correct
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("ids", [None, [50, 51, 52], [47, 49], [48, 50, 53]], ids=["none", "behind", "inside", "mixed"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0, 4.0)], ids=str)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_divergence_from_another_model_equals_the_plain_formula(ids, transform, chunk) -> None:
    torch.manual_seed(0)
    size = VOCABULARY if ids is None else max(VOCABULARY, max(ids) + 1)
    models, logits = [], []
    weight, bias = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY)
    for _ in range(2):
        states, rows = torch.randn(N, HIDDEN), None if ids is None else torch.randn(len(ids), HIDDEN)
        added = None if rows is None else AddedTokenHead(rows, None, torch.tensor(ids), size)
        models.append(NextTokens(states, Head(weight, bias, added, transform)))
        whole = torch.full((N, size), float("-inf"))
        whole[:, :VOCABULARY] = states @ weight.T + bias
        if rows is not None:
            whole[:, ids] = states @ rows.T
        whole = whole * transform.scale
        if transform.softcap is not None:
            whole = torch.where(whole.isinf(), whole, transform.softcap * torch.tanh(whole / transform.softcap))
        logits.append(whole.double().log_softmax(-1))
    own, other = logits
    expected = torch.where(own.isinf(), 0.0, own.exp() * (own - other)).sum(-1)
    found = kl_from_reference(*models, torch.float32, chunk)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert kl_from_reference(models[0], models[0], torch.float32, chunk).abs().max() == 0


@pytest.mark.parametrize("ids", [None, [48, 50, 53]], ids=["none", "mixed"])
@pytest.mark.parametrize("trains", ["hidden", "adapter", "everything"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0, 4.0)], ids=str)
def test_single_losses_may_be_weighed(ids, trains, transform, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pairs weigh them: the gradient of any function of the losses is that of the plain formula."""
    torch.manual_seed(0)
    size = VOCABULARY if ids is None else max(ids) + 1
    monkeypatch.setattr(module, "_CPU_CHUNK_BYTES", 4 * 16 * size)
    rows = None if ids is None else torch.randn(len(ids), HIDDEN)
    row_ids = None if ids is None else torch.tensor(ids)
    targets = torch.randint(VOCABULARY, (N,))
    inputs = [torch.randn(N, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY), rows]
    results = []

    def weigh(each):
        return torch.sigmoid(each[: N // 2].sum() / 30 - each[N // 2 :].sum() / 40)

    for ours in (True, False):
        h, w, b, r = (None if one is None else one.clone() for one in inputs)
        trained = {"hidden": (h,), "adapter": (h, r), "everything": (h, w, b, r)}[trains]
        leaves = [one for one in trained if one is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        if ours:
            head = Head(w, b, None if r is None else AddedTokenHead(r, None, row_ids, size), transform)
            losses = torch.empty(N)
            value, _ = linear_cross_entropy(h, targets, head, losses=losses, weigh=weigh)
        else:
            rest = w, b, r, row_ids, None, size, transform
            losses = torch.stack([plain_nll(h[n : n + 1], targets[n : n + 1], *rest)[0] for n in range(N)])
            value = weigh(losses)
        (value * 3).backward()
        results.append((value.detach(), losses.detach(), [leaf.grad for leaf in leaves]))
    (value, losses, found), (plain_value, plain_losses, plain) = results
    torch.testing.assert_close(value, plain_value)
    torch.testing.assert_close(losses, plain_losses, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    """The gradient of a frozen head is as large as the vocabulary; it must not be formed."""
    hidden, weight = torch.randn(N, HIDDEN, requires_grad=True), nn.Parameter(torch.randn(VOCABULARY, HIDDEN), False)
    rows = nn.Parameter(torch.randn(2, HIDDEN))
    head = Head(weight, None, AddedTokenHead(rows, None, torch.tensor([50, 51]), 52), LogitTransform())
    total, _ = linear_cross_entropy(hidden, torch.randint(52, (N,)), head)
    saved = total.grad_fn.saved_tensors
    assert all(tensor.shape[0] in (N, 2) for tensor in saved)
    total.backward()
    assert weight.grad is None
    assert rows.grad is not None


def test_no_target_is_a_differentiable_zero() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    head = Head(torch.randn(VOCABULARY, HIDDEN), None, None, LogitTransform())
    total, correct = linear_cross_entropy(hidden, torch.zeros(0, dtype=torch.int64), head)
    total.backward()
    assert total == 0
    assert correct == 0


def test_under_autocast_it_is_the_loss_of_autocast() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(VOCABULARY, (N,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, targets, Head(weight, None, None, LogitTransform()))
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(total, plain)
