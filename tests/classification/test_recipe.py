"""main.py against a training loop written by hand, with timm and PyTorch and nothing of ours but the model.

In double precision: two processes, accumulation 2 with a batch left over, mixup, random crops, stochastic depth, EMA,
MESA, clipping, warmup and cosine, for 24 updates. The loop has the order of steps of the authors' code: the schedule is
stepped after each update with that update's number, and MESA starts at epoch int(0.25 * epochs). It knows the rule by
which seeds follow from a place in the run.
"""

import pytest
import torch
from running import MICRO, free_port, run_command

from classification.checkpoint import read_checkpoint
from classification.metrics import read_lines

BATCH, ACCUMULATION, EPOCHS, SEED = 4, 2, 6, 7  # MESA from epoch 1: 0.25 * 6 is 1.5
PER_EPOCH = 7  # batches: three updates of two, and one of the batch left over
DOUBLE = """
import torch

torch.set_default_dtype(torch.float64)
from classification.main import main

main()
"""
LOOP = """
import math
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import ImageFolder

from classification.models import optimise_for_cpu, spatialmamba_micro

data, output, batch, accumulation, epochs, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])


def set_seed(*numbers):
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(number), np.random.seed(number), torch.manual_seed(number)


torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
transform = create_transform(
    32, is_training=True, scale=(0.6, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.0, color_jitter=0.0, auto_augment=None,
    interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1,
)
images = ImageFolder(f"{data}/train", transform)
mixup = Mixup(0.2, 1.0, None, 1.0, 0.5, "batch", label_smoothing=0.1, num_classes=10)

torch.manual_seed(seed)
model = optimise_for_cpu(spatialmamba_micro(num_classes=10, drop_path_rate=0.2))  # as main.py does
ema = ModelEmaV3(model, decay=0.9)
ddp = DistributedDataParallel(model, broadcast_buffers=False).train()

scale = batch * accumulation * processes / 512
peak, floor, start = 4e-3 * scale, 1e-4 * scale, 1e-4 * scale
share = math.ceil(len(images) / processes)
steps = share // batch
updates = math.ceil(steps / accumulation)
warmup, total = 1 * updates, epochs * updates


def learning_rate(update):
    if update < warmup:
        return start + update * (peak - start) / warmup
    progress = (update - warmup) / (total - warmup)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


spared = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".bias")]
decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(".bias")]
optimizer = torch.optim.AdamW(
    [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}], betas=(0.9, 0.999), eps=1e-8,
    fused=True, lr=start,
)
losses, norms, update = [], [], 0
for epoch in range(epochs):
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(images), generator=generator).tolist()
    order += order[: share * processes - len(order)]
    mine = order[rank::processes]
    for step in range(steps):
        samples = []
        for index in mine[step * batch : (step + 1) * batch]:
            set_seed(seed, epoch, index)
            samples.append(images[index])
        set_seed(seed, epoch, step, rank)
        x, y = mixup(torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples]))
        group = min(accumulation, steps - step // accumulation * accumulation)
        last = step % accumulation == group - 1
        ddp.require_backward_grad_sync = last
        logits = ddp(x)
        loss = torch.sum(-y * logits.log_softmax(-1), dim=-1).mean()
        if epoch >= int(0.25 * epochs):  # MESA
            with torch.no_grad():
                teacher = ema.module(x).softmax(-1)
            loss = loss + 1.5 * SoftTargetCrossEntropy()(logits, teacher)
        (loss / group).backward()
        losses.append(loss.item())
        if last:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate(update)
            update += 1
    for module in (model, ema.module):
        distribute_bn(module, processes, reduce=True)
if rank == 0:
    state = {"model": model.state_dict(), "model_ema": ema.module.state_dict()}
    torch.save({**state, "losses": losses, "norms": norms}, output)
del ddp
dist.destroy_process_group()
"""


def test_main_is_the_recipe_written_by_hand(digits, tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    (tmp_path / "double.py").write_text(DOUBLE)
    data = tmp_path / "data"
    for split, count in (("train", 6), ("val", 1)):  # 60 images: 30 a process, 7 batches and 2 images left over
        for label in range(10):
            (data / split / str(label)).mkdir(parents=True)
            files = sorted((digits / "train" / str(label)).iterdir())
            for i in range(count):
                (data / split / str(label) / f"{i}.png").symlink_to(files[i])
    launcher = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}"]
    numbers = [BATCH, ACCUMULATION, EPOCHS, SEED]
    by_hand = run_command(*launcher, tmp_path / "loop.py", data, tmp_path / "loop.pt", *numbers)
    assert by_hand.returncode == 0, by_hand.stderr

    options = [
        *("DATA.BATCH_SIZE", BATCH, "TRAIN.ACCUMULATION_STEPS", ACCUMULATION, "TRAIN.EPOCHS", EPOCHS, "SEED", SEED),
        # Gradients of biases before batch norm are rounding alone, which AdamW scales up: at this rate, not to 1e-12.
        *("TRAIN.BASE_LR", 4e-3, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.EMA.DECAY", 0.9, "TRAIN.MESA.WEIGHT", 1.5),
        *("TRAIN.CLIP_GRAD", 1.0, "MODEL.DROP_PATH_RATE", 0.2, "AUG.REPROB", 0.25, "AUG.CUTMIX", 1.0),
        *("PRINT_FREQ", ACCUMULATION, "DATA.NUM_WORKERS", 1),
    ]
    main = [tmp_path / "double.py", "--cfg", MICRO, "--data-path", data, "--output", tmp_path, "--opts", *options]
    ours = run_command(*launcher, *main)
    assert ours.returncode == 0, ours.stderr

    run = tmp_path / "spatialmamba_micro/default"
    expected = torch.load(tmp_path / "loop.pt", weights_only=True)
    assert len(expected["norms"]) == 24
    assert len(expected["losses"]) == EPOCHS * PER_EPOCH
    steps = read_lines(run / "steps.jsonl", "epoch", "step")
    assert len(steps) == 24
    for step in steps:
        first = step["epoch"] * PER_EPOCH
        losses = expected["losses"][first : first + step["step"]]
        assert step["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert step["grad_norm"] == pytest.approx(expected["norms"][step["update"] - 1], rel=1e-12)
    saved = read_checkpoint(run / "latest.pth")
    for name in ("model", "model_ema"):
        for key, value in expected[name].items():
            torch.testing.assert_close(saved[name][key], value, rtol=0, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
