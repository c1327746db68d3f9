"""Train, evaluate or time Spatial-Mamba on an image folder: arguments -> build -> loop.

    python main.py --cfg CFG --data-path DIR                       train, evaluate every epoch, save
    python main.py --cfg CFG --data-path DIR --pretrained CKPT     evaluate CKPT and stop
    python main.py --cfg CFG --throughput                          images per second, no data needed

The same under torchrun or `python -m torch.distributed.launch`, on GPUs (NCCL) or CPUs (gloo).
"""

import argparse
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from classification.checkpoint import (
    load_weights,
    read_checkpoint,
    save_checkpoint,
    state_dicts,
)
from classification.config import load_config
from classification.data import build_eval_loader, build_mixup, build_train_loader, class_names
from classification.engine import NonFiniteLossError, Trainer, evaluate, train_one_epoch
from classification.errors import UserError
from classification.flops import flops_table
from classification.memory import keep_freed_memory
from classification.models import VARIANTS, SpatialMamba
from classification.optim import build_optimizer, build_scheduler

logger = logging.getLogger("spatialmamba")

IMAGENET_CLASSES = 1000
THROUGHPUT_SECONDS = 10.0
NO_ACCURACY = -1.0  # before the first epoch: below any that can be measured


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and evaluate Spatial-Mamba.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML config, e.g. configs/spatialmamba/spatialmamba_tiny.yaml")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to change, e.g. TRAIN.EPOCHS 100")
    add("--data-path", "--data_path", metavar="DIR", help="image folder with train/ and val/")
    add("--batch-size", "--batch_size", type=int, help="images per process")
    add("--pretrained", metavar="CKPT", help="evaluate these weights and stop; with --finetune, train from them")
    add("--finetune", action="store_true", help="with --pretrained: train, from its weights")
    add("--resume", metavar="CKPT", help="go on training from this checkpoint")
    add("--eval", action="store_true", help="evaluate --pretrained or --resume and stop")
    add("--throughput", action="store_true", help="measure images per second on random images and stop")
    add("--flops", action="store_true", help="print parameters and FLOPs by layer and stop")
    add("--accumulation-steps", "--accumulation_steps", type=int, help="batches per update")
    add("--use-checkpoint", "--use_checkpoint", action="store_true", help="gradient checkpointing, to save memory")
    add("--disable-amp", "--disable_amp", action="store_true", help="train and evaluate in float32")
    add("--output", metavar="DIR", help="results go to DIR/MODEL.NAME/TAG")
    add("--tag", help="name of the run")
    add("--seed", type=int, help="of weights, data order and augmentation")
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    return parser.parse_args()


def config_from(args: argparse.Namespace) -> CfgNode:
    flags = {
        "DATA.DATA_PATH": args.data_path,
        "DATA.BATCH_SIZE": args.batch_size,
        "MODEL.PRETRAINED": args.pretrained,
        "MODEL.RESUME": args.resume,
        "TRAIN.ACCUMULATION_STEPS": args.accumulation_steps,
        "TRAIN.USE_CHECKPOINT": args.use_checkpoint or None,
        "TRAIN.AMP": "off" if args.disable_amp else None,
        "OUTPUT": args.output,
        "TAG": args.tag,
        "SEED": args.seed,
    }
    config = load_config(args.cfg, {k: v for k, v in flags.items() if v is not None}, args.opts)
    if args.finetune and not config.MODEL.PRETRAINED:
        raise UserError("--finetune needs --pretrained CKPT, the weights to start from")
    if config.MODEL.PRETRAINED and config.MODEL.RESUME:
        raise UserError("--pretrained starts from weights, --resume goes on with a run: pass one of them")
    if args.eval and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        raise UserError("--eval needs --pretrained CKPT or --resume CKPT, the weights to evaluate")
    if args.eval and args.finetune:
        raise UserError("--eval stops after evaluating, --finetune trains: pass one of them")
    return config


class Run:
    """The place of this process among the others, its device and its output folder."""

    def __init__(self, config: CfgNode):
        gpus = torch.cuda.device_count()
        if gpus and int(os.environ.get("LOCAL_RANK", 0)) >= gpus:
            raise UserError(f"more processes than GPUs on this node: it has {gpus}; lower --nproc_per_node")
        info = init_distributed_device_so("cuda" if gpus else "cpu")
        self.rank, self.world_size = info["global_rank"], info["world_size"]
        self.device = torch.device(info["device"])
        if self.device.type == "cpu":
            keep_freed_memory()
        self.folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        self.is_main = self.rank == 0
        amp = {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[config.TRAIN.AMP]
        # float16 has no fast kernels on a CPU, and needs none of its memory.
        self.amp_dtype = None if self.device.type == "cpu" and amp is torch.float16 else amp

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def open_log(self, to_file: bool = True) -> None:
        """Console on the first process; log.txt beside the checkpoints also gets every printed step."""
        logger.setLevel(logging.DEBUG if self.is_main else logging.CRITICAL)
        console = logging.StreamHandler(sys.stdout)
        # On a terminal the progress bar shows the steps.
        console.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
        handlers = [console]
        if self.is_main and to_file:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handlers.append(logging.FileHandler(self.folder / "log.txt"))
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be written to ({error}); choose another --output") from error
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.handlers = handlers

    def describe(self) -> str:
        amp = "float32" if self.amp_dtype is None else f"autocast {str(self.amp_dtype).removeprefix('torch.')}"
        if self.device.type == "cpu":
            return f"{self.world_size} process(es), CPU with {torch.get_num_threads()} thread(s) each, {amp}"
        return f"{self.world_size} process(es), {torch.cuda.get_device_name(self.device)}, {amp}"


def build_model(config: CfgNode, classes: int) -> SpatialMamba:
    model = SpatialMamba(num_classes=classes, drop_path_rate=config.MODEL.DROP_PATH_RATE, **VARIANTS[config.MODEL.NAME])
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model


def count_classes(config: CfgNode, split: str) -> int:
    """Classes of the data, which MODEL.NUM_CLASSES must equal if it is set."""
    found = len(class_names(config.DATA.DATA_PATH, split))
    if config.MODEL.NUM_CLASSES not in (0, found):
        raise UserError(
            f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {Path(config.DATA.DATA_PATH, split)} has {found} "
            "class folders; leave it at 0 to take the folders' number"
        )
    return found


# ----- evaluate and stop


def evaluate_checkpoint(config: CfgNode, run: Run, path: str) -> None:
    """Evaluate every set of weights in the checkpoint at `path`; rank 0 writes evaluation.json."""
    weights = state_dicts(read_checkpoint(path), path)
    classes = count_classes(config, "val")
    loader = build_eval_loader(config, run.rank, run.world_size)
    model = build_model(config, classes)
    for state in weights.values():
        load_weights(model, state, path)
    run.open_log()
    logger.info("evaluating %s on %s (%s)", path, Path(config.DATA.DATA_PATH, "val"), run.describe())
    results = {"checkpoint": str(path)}
    model.to(run.device)
    for name, state in weights.items():
        load_weights(model, state, path)
        results[name] = evaluate(model, loader, run.device, run.autocast)
        if not math.isfinite(results[name]["loss"]):
            raise UserError(f"{path}: its {name} weights give a loss of {results[name]['loss']}; they are not usable")
        _log_accuracy(name, results[name])
    if run.is_main:
        (run.folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")


def _log_accuracy(name: str, m: dict[str, float]) -> None:
    logger.info(
        "%s: top-1 %.3f%% top-5 %.3f%% loss %.4f on %d images", name, m["top1"], m["top5"], m["loss"], m["images"]
    )


# ----- measure and stop


def measure_throughput(config: CfgNode, run: Run) -> None:
    """Images per second of the forward pass on random images, for THROUGHPUT_SECONDS after a warm-up."""
    model = build_model(config, config.MODEL.NUM_CLASSES or IMAGENET_CLASSES).to(run.device).eval()
    size = config.DATA.IMG_SIZE
    images = torch.randn(config.DATA.BATCH_SIZE, model.in_chans, size, size, device=run.device)
    run.open_log(to_file=False)

    @torch.inference_mode()
    def step() -> None:
        with run.autocast():
            model(images)
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(10 if run.device.type == "cuda" else 1):
        step()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < THROUGHPUT_SECONDS:
        step()
        count += 1
    rate = count * len(images) / (time.perf_counter() - start)
    logger.info(
        "%s: %.1f images/s per process, batch %d, %dx%d (%s)",
        config.MODEL.NAME, rate, len(images), size, size, run.describe(),
    )  # fmt: skip


def print_flops(config: CfgNode) -> None:
    model = build_model(config, config.MODEL.NUM_CLASSES or IMAGENET_CLASSES).eval()
    print(flops_table(model, (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)))


# ----- train


def train(config: CfgNode, run: Run) -> None:
    classes = count_classes(config, "train")
    train_loader = build_train_loader(config, run.rank, run.world_size)
    eval_loader = build_eval_loader(config, run.rank, run.world_size)
    resume_from = _resume_path(config, run)
    random_seed(config.SEED)  # the same weights in every process, for the EMA's copy too
    model = build_model(config, classes)
    new_head = False if resume_from else _load_pretrained(config, model)
    random_seed(config.SEED, run.rank)  # other augmentation in each

    model.to(run.device)
    ema = ModelEmaV3(model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLE else None
    trainer = _build_trainer(config, run, model, ema, classes, len(train_loader))
    state = {"epoch": -1, "max_accuracy": NO_ACCURACY, "max_accuracy_ema": NO_ACCURACY}
    if resume_from:
        state = _resume(resume_from, run, trainer, model, ema)
        # From the config's schedule, not the saved one, so that more epochs or another batch size take effect.
        trainer.scheduler.step_update((state["epoch"] + 1) * trainer.updates_per_epoch(len(train_loader)))

    run.open_log()
    first = state["epoch"] + 1
    _log_setup(config, run, model, resume_from, first, new_head)
    if first >= config.TRAIN.EPOCHS:
        logger.info("all %d epochs are done; raise TRAIN.EPOCHS to go on", config.TRAIN.EPOCHS)
    for epoch in range(first, config.TRAIN.EPOCHS):
        train_loader.sampler.set_epoch(epoch)
        trainer.mesa_weight = config.TRAIN.MESA.WEIGHT * (epoch >= config.TRAIN.MESA.START * config.TRAIN.EPOCHS)
        metrics = {"epoch": epoch, **train_one_epoch(trainer, train_loader, epoch, config.PRINT_FREQ)}
        metrics |= _validate(run, model, ema, eval_loader)
        if not math.isfinite(metrics["model"]["loss"]):
            raise NonFiniteLossError(f"the validation loss of epoch {epoch} is not finite; its weights are not saved")
        state["epoch"] = epoch
        _save(config, run, trainer, model, ema, state, metrics)


def _resume_path(config: CfgNode, run: Run) -> Path | None:
    """The checkpoint to go on from: --resume's, or latest.pth in the output folder."""
    if config.MODEL.RESUME:
        return Path(config.MODEL.RESUME)
    latest = run.folder / "latest.pth"
    if not latest.exists():
        return None
    if not config.TRAIN.AUTO_RESUME:
        raise UserError(f"{run.folder}: holds a run already; pass another --tag, or TRAIN.AUTO_RESUME True to go on")
    return latest


def _load_pretrained(config: CfgNode, model: SpatialMamba) -> bool:
    """Start from MODEL.PRETRAINED's `model` weights, if set; returns whether the head stayed a new one."""
    path = config.MODEL.PRETRAINED
    if not path:
        return False
    return load_weights(model, state_dicts(read_checkpoint(path), path)["model"], path, new_head=True)


def _build_trainer(
    config: CfgNode, run: Run, model: SpatialMamba, ema: ModelEmaV3 | None, classes: int, batches: int
) -> Trainer:
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    global_batch = config.DATA.BATCH_SIZE * run.world_size * accumulation
    mixup = build_mixup(config, classes)
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    optimizer = build_optimizer(config, model, global_batch)
    return Trainer(
        model=_wrap(config, run, model),
        criterion=criterion,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, global_batch, updates_per_epoch=-(-batches // accumulation)),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype is torch.float16),
        device=run.device,
        autocast=run.autocast,
        mixup=mixup,
        ema=ema,
        clip_grad=config.TRAIN.CLIP_GRAD,
        accumulation_steps=accumulation,
    )


def _wrap(config: CfgNode, run: Run, model: SpatialMamba) -> nn.Module:
    if run.world_size == 1:
        return model
    on_gpu = run.device.type == "cuda"
    if on_gpu and config.TRAIN.SYNC_BN:  # PyTorch's SyncBatchNorm has no CPU kernels
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: optimizer and EMA keep the same parameters
    # Without broadcasting, each process keeps batch norm statistics of its own data for `_validate` to average.
    return DistributedDataParallel(model, device_ids=[run.device.index] if on_gpu else None, broadcast_buffers=False)


def _validate(run: Run, model: nn.Module, ema: ModelEmaV3 | None, loader: DataLoader) -> dict[str, dict]:
    """Accuracy of the model and its EMA, with the same batch norm statistics in every process."""
    results = {}
    for name, module in (("model", model), ("model_ema", ema and ema.module)):
        if module is None:
            continue
        if run.world_size > 1:
            distribute_bn(module, run.world_size, reduce=True)
        results[name] = evaluate(module, loader, run.device, run.autocast)
    return results


def _save(
    config: CfgNode,
    run: Run,
    trainer: Trainer,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    state: dict,
    metrics: dict,
) -> None:
    """Log the epoch; save latest.pth every SAVE_FREQ epochs and at the end, and the best ones as they come."""
    for name, m in metrics.items():
        if isinstance(m, dict):
            _log_accuracy(f"epoch {metrics['epoch']} {name}", m)
    best = {}
    for key, name, file in (("max_accuracy", "model", "best.pth"), ("max_accuracy_ema", "model_ema", "best_ema.pth")):
        if name in metrics and metrics[name]["top1"] > state[key]:
            state[key] = metrics[name]["top1"]
            best[file] = True
    logger.info(
        "epoch %d: train loss %.4f, %.1f s; best top-1 %.3f%%, of the EMA %.3f%%",
        metrics["epoch"], metrics["loss"], metrics["seconds"], state["max_accuracy"], state["max_accuracy_ema"],
    )  # fmt: skip
    if not run.is_main:
        return
    content = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "config": config.dump(),
        **state,
    }
    if ema:
        content["model_ema"] = ema.module.state_dict()
    due = (state["epoch"] + 1) % config.SAVE_FREQ == 0 or state["epoch"] + 1 == config.TRAIN.EPOCHS
    for file in [*best, *(["latest.pth"] if due else [])]:
        save_checkpoint(content, run.folder / file)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def _resume(path: Path, run: Run, trainer: Trainer, model: SpatialMamba, ema: ModelEmaV3 | None) -> dict:
    """Put back what `_save` wrote. Returns its epoch, and the best accuracies if their checkpoints lie beside it."""
    content = read_checkpoint(path)
    weights = state_dicts(content, path)
    start_over = "start from its weights with --pretrained and --finetune"
    if missing := [key for key in ("optimizer", "epoch") if key not in content]:
        raise UserError(f"{path}: has no {', '.join(missing)}, so training cannot go on from it; {start_over}")
    if not isinstance(content["epoch"], int) or content["epoch"] < 0:
        raise UserError(f"{path}: its epoch is {content['epoch']!r}, so training cannot go on from it; {start_over}")
    load_weights(model, weights["model"], path)
    if ema:
        load_weights(ema.module, weights.get("model_ema", weights["model"]), path)
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        if content.get("scaler") and trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(content["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer state is not of this model ({error}); {start_over}") from error
    state = {"epoch": content["epoch"], "max_accuracy": NO_ACCURACY, "max_accuracy_ema": NO_ACCURACY}
    if path.resolve().parent == run.folder.resolve():
        state |= {key: content[key] for key in ("max_accuracy", "max_accuracy_ema") if key in content}
    return state


def _log_setup(
    config: CfgNode, run: Run, model: SpatialMamba, resume_from: Path | None, first: int, new_head: bool
) -> None:
    logger.info("config:\n%s", config.dump().rstrip())
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("%s: %s parameters; %s; output in %s", config.MODEL.NAME, f"{parameters:,}", run.describe(), run.folder)
    if resume_from:
        ignored = "; --pretrained has done its part already" if config.MODEL.PRETRAINED else ""
        logger.info("resuming from %s, epoch %d%s", resume_from, first, ignored)
    elif config.MODEL.PRETRAINED:
        head = f"; its head has another size, a new one has {model.num_classes} classes" if new_head else ""
        logger.info("starting from the weights of %s%s", config.MODEL.PRETRAINED, head)
    else:
        logger.info("starting from scratch")


# ----- entry


def main() -> None:
    """Do what the command line asks; end on a user's error with its message alone and status 1.

    The launcher ends all processes when the first ends. So the first one speaks at once, and the others, which mostly
    have the same to say, wait to be ended; what only one of them knows is still said.
    """
    try:
        _main(parse_args())
    except (UserError, NonFiniteLossError) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)
        # A data loader's worker wraps the message in its traceback.
        message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
        sys.exit(f"error: {message}")


def _main(args: argparse.Namespace) -> None:
    config = config_from(args)
    if args.flops:
        print_flops(config)
        return
    run = Run(config)
    if args.throughput:
        measure_throughput(config, run)
    elif args.eval or (config.MODEL.PRETRAINED and not args.finetune):
        evaluate_checkpoint(config, run, config.MODEL.PRETRAINED or config.MODEL.RESUME)
    else:
        train(config, run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
