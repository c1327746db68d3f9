"""Gradient accumulation, self-distillation and exact evaluation on models small enough to check by hand."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from classification.engine import NonFiniteLossError, Trainer, evaluate, train_one_epoch


def trainer(model, lr=0.1, **options) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Trainer(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        scheduler=CosineLRScheduler(optimizer, t_initial=1000, lr_min=lr, t_in_epochs=False),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        autocast=nullcontext,
        **options,
    )


@pytest.fixture
def task():
    torch.manual_seed(0)
    return nn.Linear(6, 7), TensorDataset(torch.randn(22, 6), torch.randint(7, (22,)))


def test_accumulation_equals_the_larger_batch_and_its_leftover(task):
    """Batches of 2, five of them to an update: 10, 10 and a leftover of one batch of 2."""
    model, data = task
    expected = copy.deepcopy(model)
    train_one_epoch(trainer(model, accumulation_steps=5), DataLoader(data, 2), epoch=0)
    for indices in (range(10), range(10, 20), range(20, 22)):
        images, targets = data[list(indices)]
        grads = torch.autograd.grad(F.cross_entropy(expected(images), targets), list(expected.parameters()))
        with torch.no_grad():
            for p, g in zip(expected.parameters(), grads, strict=True):
                p -= 0.1 * g
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_clipped_to_the_norm(task):
    model, data = task
    before = copy.deepcopy(model)
    train_one_epoch(trainer(model, lr=1.0, clip_grad=0.01), DataLoader(data, 22), epoch=0)
    moved = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_mesa_adds_the_emas_cross_entropy(task):
    model, data = task
    ema = ModelEmaV3(nn.Linear(6, 7), decay=0.5)
    images, targets = data.tensors
    logits = model(images)
    soft = -(ema.module(images).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    expected = (F.cross_entropy(logits, targets) + 1.5 * soft).item()
    loaded = DataLoader(data, 22)
    assert train_one_epoch(trainer(model, ema=ema, mesa_weight=1.5), loaded, epoch=0)["loss"] == pytest.approx(expected)


def test_ema_follows_every_update(task):
    model, data = task
    ema = ModelEmaV3(model, decay=0.5)
    start = model.weight.detach().clone()
    train_one_epoch(trainer(model, ema=ema), DataLoader(data, 22), epoch=0)
    torch.testing.assert_close(ema.module.weight, (start + model.weight.detach()) / 2)


def test_loss_that_is_not_finite_is_an_error(task):
    model, data = task
    with torch.no_grad():
        model.bias[2] = torch.inf
    with pytest.raises(NonFiniteLossError, match="epoch 4 before step 3"):
        train_one_epoch(trainer(model), DataLoader(data, 2), epoch=4, print_freq=3)


def test_evaluation_counts_by_hand():
    """Logits are the images: targets ranked first, second, sixth and first."""
    images = torch.tensor([[9.0, 0, 0, 0, 0, 0], [8, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 7]])
    targets = torch.tensor([0, 0, 0, 5])
    model = nn.Identity().train()
    result = evaluate(model, DataLoader(TensorDataset(images, targets), 3), torch.device("cpu"), nullcontext)
    assert (result["images"], result["top1"], result["top5"]) == (4, 50.0, 75.0)
    assert result["loss"] == pytest.approx(F.cross_entropy(images, targets).item())
    assert model.training
