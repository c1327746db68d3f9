"""Gradient accumulation, self-distillation, guards and exact evaluation on models small enough to check by hand."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from classification.engine import EpochProgress, TrainContext, evaluate, train_one_epoch
from classification.guards import NonFiniteError, NonFiniteGuard
from classification.metrics import accuracy_on_all


def trainer(model, lr=0.1, limit=3, scaled=False, **options) -> TrainContext:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    return TrainContext(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        scheduler=CosineLRScheduler(optimizer, t_initial=1000, lr_min=lr, t_in_epochs=False),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled),
        device=torch.device("cpu"),
        autocast=nullcontext,
        guard=NonFiniteGuard(model, limit),
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


def test_an_epoch_in_two_parts_is_the_whole_one(task):
    """Batches of 2 in updates of 3: the second part begins after the second update."""
    model, data = task
    halves = copy.deepcopy(model)
    whole = train_one_epoch(trainer(model, accumulation_steps=3), DataLoader(data, 2), epoch=2)

    progress = EpochProgress()
    split = trainer(halves, accumulation_steps=3)
    learning_rates = []

    def stop(update, measure):
        learning_rates.append(split.optimizer.param_groups[0]["lr"])
        if update == 2 * 4 + 2:
            measure()
            raise KeyboardInterrupt

    split.after_update = stop
    with pytest.raises(KeyboardInterrupt):
        train_one_epoch(split, DataLoader(data, 2), epoch=2, progress=progress)
    assert (progress.step, progress.finite) == (6, 6)
    rest = DataLoader(TensorDataset(*data[12:]), 2)
    second = train_one_epoch(trainer(halves, accumulation_steps=3), rest, epoch=2, progress=progress)
    assert second["loss"] == whole["loss"]
    assert progress.step == 11
    assert torch.equal(halves.weight, model.weight)


def test_optimizer_that_cannot_skip_is_refused(task):
    model, _ = task
    good = trainer(model)
    with pytest.raises(ValueError, match="fused=True"):
        TrainContext(**{**vars(good), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})


def test_updates_that_are_not_finite_are_skipped_and_logged(task, caplog):
    """One image of 22 is NaN: its update leaves no trace, in the average neither."""
    model, data = task
    images, targets = data.tensors
    expected = copy.deepcopy(model)
    kept = [i for i in range(22) if i not in (6, 7)]
    without = train_one_epoch(trainer(expected), DataLoader(TensorDataset(images[kept], targets[kept]), 2), epoch=0)
    images[7, 3] = torch.nan
    metrics = train_one_epoch(trainer(model), DataLoader(data, 2), epoch=0)
    assert torch.equal(model.weight, expected.weight)
    assert metrics["loss"] == pytest.approx(without["loss"])
    assert metrics["skipped"] == 1
    assert "epoch 0, step 4: gradients are not finite, so 1 update(s) were skipped" in caplog.text


def test_loss_scaling_changes_nothing_but_the_scale(task):
    """As for float16 on a GPU: an update that is not finite halves the scale and is skipped, clipping or not."""
    model, data = task
    data.tensors[0][7, 3] = torch.inf
    for options in ({}, {"clip_grad": 0.5, "accumulation_steps": 2}):
        plain, scaled = copy.deepcopy(model), copy.deepcopy(model)
        train_one_epoch(trainer(plain, **options), DataLoader(data, 2), epoch=0)
        t = trainer(scaled, scaled=True, **options)
        assert train_one_epoch(t, DataLoader(data, 2), epoch=0)["skipped"] == 1
        torch.testing.assert_close(scaled.weight, plain.weight)
        assert not torch.equal(scaled.weight, model.weight)
        assert t.scaler.get_scale() == 512.0


def test_too_many_in_a_row_end_the_run(task):
    model, data = task
    images, _ = data.tensors
    images[4:] = torch.inf
    with pytest.raises(NonFiniteError, match=r"epoch 4, step 5: .*3 in a row and 3 in all"):
        train_one_epoch(trainer(model), DataLoader(data, 2), epoch=4)


def test_weights_that_are_not_finite_are_named(task):
    model, data = task
    with torch.no_grad():
        model.bias[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"parameter bias \(1 in all\) is not finite itself"):
        train_one_epoch(trainer(model, limit=1), DataLoader(data, 2), epoch=0)


def test_clipping_spoils_no_gradient_that_is_finite(task):
    """The guard names those that are not: clipped by a norm of NaN, all would be."""
    model, data = task
    model.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteError, match=r"outputs are finite, the gradient of weight \(1 in all\) is not"):
        train_one_epoch(trainer(model, limit=1, clip_grad=0.5), DataLoader(data, 2), epoch=0)


def test_an_epoch_of_which_nothing_was_finite_ends_the_run(task):
    model, data = task
    data.tensors[0][:] = torch.nan
    with pytest.raises(NonFiniteError, match="no loss of epoch 0 was finite"):
        train_one_epoch(trainer(model, limit=1000), DataLoader(data, 2), epoch=0)


def test_evaluation_counts_by_hand():
    """Logits are the images: targets ranked first, second, sixth and first."""
    images = torch.tensor([[9.0, 0, 0, 0, 0, 0], [8, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 7]])
    targets = torch.tensor([0, 0, 0, 5])
    model = nn.Identity().train()
    result = evaluate(model, DataLoader(TensorDataset(images, targets), 3), torch.device("cpu"), nullcontext)
    assert (result["images"], result["top1"], result["top5"]) == (4, 50.0, 75.0)
    assert result["loss"] == pytest.approx(F.cross_entropy(images, targets).item())
    assert model.training
    assert "unreadable" not in result


def test_evaluation_sums_the_losses_of_16_bits_in_float32():
    images, targets = torch.randn(300, 6).bfloat16(), torch.randint(6, (300,))
    result = evaluate(nn.Identity(), DataLoader(TensorDataset(images, targets), 150), torch.device("cpu"), nullcontext)
    assert result["loss"] == pytest.approx(F.cross_entropy(images.float(), targets).item(), rel=1e-5)


def test_evaluation_leaves_out_what_could_not_be_read():
    images, targets = torch.eye(4), torch.tensor([0, -1, 2, 0])
    result = evaluate(nn.Identity(), DataLoader(TensorDataset(images, targets), 3), torch.device("cpu"), nullcontext)
    seen = [0, 2, 3]
    assert (result["images"], result["unreadable"]) == (3, 1)
    assert result["top1"] == pytest.approx(200 / 3)
    assert result["loss"] == pytest.approx(F.cross_entropy(images[seen], targets[seen]).item())


def test_images_that_could_not_be_read_make_no_best_epoch():
    few, all_of_them = {"top1": 100.0, "images": 6, "unreadable": 6}, {"top1": 75.0, "images": 12}
    assert accuracy_on_all(few) == 50
    assert accuracy_on_all(all_of_them) == 75
