"""Train, evaluate or time Spatial-Mamba on an image folder: arguments -> build -> loop.

    python main.py --cfg CFG --data-path DIR                       train, evaluate every epoch, save
    python main.py --cfg CFG --data-path DIR --pretrained CKPT     evaluate CKPT and stop
    python main.py --cfg CFG --throughput                          images per second, no data needed

All of these also run under torchrun or `python -m torch.distributed.launch`, on GPUs (NCCL) or CPUs (gloo).
"""

import argparse
import gc
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from classification.checkpoint import (
    class_names_of,
    load_weights,
    read_checkpoint,
    state_dicts,
    tensors_digest,
    write_atomically,
)
from classification.compiling import MODES, WITH_CUDA_GRAPHS, compile_in_place
from classification.config import changed_evaluation_keys, load_config, shared_settings
from classification.data import build_eval_loader, class_names
from classification.engine import evaluate
from classification.errors import UserError, end_with, prepare_console, printable, refuse_empty
from classification.flops import flops_table
from classification.guards import NonFiniteError
from classification.metrics import ONE_CLASS
from classification.run import Preempted, Run, lost_another
from classification.training import Training, build_model, log_accuracy

logger = logging.getLogger("spatialmamba")

IMAGENET_CLASSES = 1000
THROUGHPUT_SECONDS = 10.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and evaluate Spatial-Mamba.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML config, e.g. configs/spatialmamba/spatialmamba_tiny.yaml")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to change")
    add("--data-path", "--data_path", metavar="DIR", help="image folder with train/ and val/")
    add("--batch-size", "--batch_size", type=int, help="images per process")
    add("--pretrained", metavar="CKPT", help="evaluate these weights and stop; with --finetune, train from them")
    add("--finetune", action="store_true", help="with --pretrained: train, from its weights")
    add("--resume", metavar="CKPT", help="go on training from this checkpoint")
    add("--eval", action="store_true", help="evaluate --pretrained or --resume and stop")
    add("--throughput", action="store_true", help="measure images per second on random images and stop")
    add("--compile", nargs="?", const="default", choices=MODES, help="through torch.compile; the mode, if not default")
    add("--channels-last", "--channels_last", action="store_true", help="with --throughput: images laid out as NHWC")
    add("--flops", action="store_true", help="print parameters and FLOPs by layer and stop")
    add("--accumulation-steps", "--accumulation_steps", type=int, help="batches per update")
    add("--use-checkpoint", "--use_checkpoint", action="store_true", help="gradient checkpointing, to save memory")
    add("--disable-amp", "--disable_amp", action="store_true", help="train and evaluate in float32")
    add("--output", metavar="DIR", help="results go to DIR/MODEL.NAME/TAG")
    add("--tag", help="name of the run")
    add("--seed", type=int, help="of weights, data order and augmentation")
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args, unknown = parser.parse_known_args()
    for flag in (word.partition("=")[0] for word in unknown):
        if instead := AUTHORS_FLAGS.get(flag.replace("-", "_").lstrip("_")):
            parser.error(f"{flag} is of the authors' repository: {instead}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    refuse_empty(parser, args)
    return args


# Advice for flags of the authors' repository; see docs/from_the_authors_code.md.
_OFF = "leave it out"
AUTHORS_FLAGS = {
    "model_ema": "set --opts TRAIN.EMA.ENABLE True or False",
    "model_ema_decay": "set --opts TRAIN.EMA.DECAY",
    "model_ema_force_cpu": f"{_OFF}; the average is kept on the device",
    "zip": f"{_OFF}; the data is an image folder",
    "cache_mode": f"{_OFF}; images are read as they are needed",
    "fused_layernorm": f"{_OFF}; there is one LayerNorm, PyTorch's",
    "fused_window_process": f"{_OFF}; there are no windows in this model",
    "optim": f"{_OFF}; the optimizer is AdamW, with PyTorch's fused update",
    "memory_limit_rate": f"{_OFF}; PYTORCH_CUDA_ALLOC_CONF limits PyTorch's memory",
    "enable_persistance": f"{_OFF}; the data loader's workers stay from epoch to epoch",
    "amp_opt_level": "set --opts TRAIN.AMP float16, bfloat16 or off",
    "ddp": f"{_OFF}; training is distributed by PyTorch",
    "mesa": "set --opts TRAIN.MESA.WEIGHT",
    "traincost": "`python -m classification.benchmark --train` times training",
}


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
    if args.channels_last and not args.throughput:
        raise UserError("--channels-last goes with --throughput")
    if args.compile and args.flops:
        raise UserError("--compile has no part in --flops: leave it out")
    trains = not (args.throughput or _evaluates(args, config))
    if trains and args.compile in WITH_CUDA_GRAPHS and config.TRAIN.ACCUMULATION_STEPS > 1:
        raise UserError(
            f"--compile {args.compile} replays CUDA graphs, which write each batch's gradients over those of the last: "
            "pass --compile alone, or set TRAIN.ACCUMULATION_STEPS to 1"
        )
    if args.finetune and not config.MODEL.PRETRAINED:
        raise UserError("--finetune needs --pretrained CKPT, the weights to start from")
    if config.MODEL.PRETRAINED and config.MODEL.RESUME:
        raise UserError("--pretrained starts from weights, --resume goes on with a run: pass one of them")
    if args.eval and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        raise UserError("--eval needs --pretrained CKPT or --resume CKPT, the weights to evaluate")
    tasks = ("--flops", "--throughput", "--eval", "--finetune")
    if len(given := [flag for flag in tasks if getattr(args, flag[2:])]) > 1:
        raise UserError(f"{' and '.join(given)} are different tasks: pass one of them")
    return config


def _evaluates(args: argparse.Namespace, config: CfgNode) -> bool:
    return args.eval or bool(config.MODEL.PRETRAINED and not args.finetune)


def count_classes(config: CfgNode, split: str) -> int:
    """Return the number of classes of the data; MODEL.NUM_CLASSES must equal it if it is set."""
    found = len(class_names(config.DATA.DATA_PATH, split))
    if config.MODEL.NUM_CLASSES not in (0, found):
        raise UserError(
            f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {Path(config.DATA.DATA_PATH, split)} has {found} "
            "class folders; leave it at 0 to take the folders' number"
        )
    return found


# ----- evaluate and stop


def evaluate_checkpoint(config: CfgNode, run: Run, path: str, compile_mode: str | None = None) -> None:
    """Evaluate every set of weights in the checkpoint at `path`; the first process writes evaluation.json."""

    def read() -> tuple[dict, list[str] | None, list[str]]:
        content = read_checkpoint(path)
        return state_dicts(content, path), class_names_of(content, path), changed_evaluation_keys(content, config, path)

    weights, names, otherwise = run.from_main(read)
    num_classes = run.together(lambda: count_classes(config, "val"))
    loader = run.together(lambda: build_eval_loader(config, run.rank, run.world_size))
    images_digest = loader.dataset.folder.digest()
    run.check_alike(
        {
            "classes": loader.classes,
            "images": len(loader.dataset),
            "names of images": images_digest,
            **shared_settings(config),
        }
    )
    if names is not None:
        loader.renumber(names, path)
    model = build_model(config, num_classes)
    for state in weights.values():  # each is checked before the log is opened
        load_weights(model, state, path)
    run.open_log()
    logger.info("evaluating %s on %s (%s)", path, Path(config.DATA.DATA_PATH, "val"), run.describe())
    if names is None:
        logger.info("%s: holds no names of classes; they are taken in the order of the folders", path)
    if run.is_main and otherwise:
        logger.warning("%s: is evaluated differently than in training: %s", path, ", ".join(otherwise))
    if run.is_main and loader.dataset.folder.left_out:
        logger.warning("%s", loader.dataset.folder.left_out)
    if run.is_main and num_classes == 1:
        logger.warning(ONE_CLASS)
    results = {
        "checkpoint": str(path),
        "sha256": tensors_digest(weights["model"]),
        "data_path": str(Path(config.DATA.DATA_PATH).resolve()),
        "images_digest": images_digest,
        "otherwise": otherwise,
    }
    run.place(model)
    if compile_mode:
        compile_in_place(model, compile_mode)
    for name, state in weights.items():
        load_weights(model, state, path)
        results[name] = evaluate(model, loader, run.device, run.autocast)
        if not math.isfinite(results[name]["loss"]):
            raise UserError(f"{path}: its {name} weights give a loss of {results[name]['loss']}; they are not usable")
        log_accuracy(name, results[name])
    if run.is_main:
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(run.folder / "evaluation.json", lambda file: file.write(text.encode()))


# ----- measure and stop


def measure_throughput(config: CfgNode, run: Run, compile_mode: str | None, channels_last: bool) -> None:
    """Log the images per second of the forward pass on random images, over THROUGHPUT_SECONDS after a warm-up."""
    model = run.place(build_model(config, config.MODEL.NUM_CLASSES or IMAGENET_CLASSES)).eval()
    size = config.DATA.IMG_SIZE
    images = torch.randn(config.DATA.BATCH_SIZE, model.in_chans, size, size, device=run.device)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    if compile_mode:
        compile_in_place(model, compile_mode)
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
        "%s: %.1f images/s per process, batch %d, %dx%d, %s images, compile %s, TF32 %s (%s)",
        config.MODEL.NAME, rate, len(images), size, size, "NHWC" if channels_last else "NCHW",
        compile_mode or "off", _tf32(run), run.describe(),
    )  # fmt: skip


def _tf32(run: Run) -> str:
    if run.device.type != "cuda":
        return "does not apply"
    states = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cuDNN": torch.backends.cudnn.allow_tf32}
    return ", ".join(f"{name} {'on' if allowed else 'off'}" for name, allowed in states.items())


def print_flops(config: CfgNode) -> None:
    model = build_model(config, config.MODEL.NUM_CLASSES or IMAGENET_CLASSES).eval()
    print(flops_table(model, (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)))


# ----- train


def train(config: CfgNode, run: Run, compile_mode: str | None) -> None:
    num_classes = run.together(lambda: count_classes(config, "train"))
    training = Training(config, run, num_classes, compile_mode)
    try:
        training.lock()
        run.open_log()
        training.log_setup()
        training.fit()
    finally:
        training.close()


# ----- entry


def main() -> None:
    """Do what the command line asks. A user's error ends the process with one line and status 1."""
    prepare_console()
    try:
        _main(parse_args())
        status = 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Preempted as request:
        status = 128 + request.signal  # the shell's convention; not 0, because the run is not finished
    except (UserError, NonFiniteError) as error:
        end_with(str(error))
    except RuntimeError as error:
        if gone := lost_another(error):
            sys.exit(f"error: {printable(gone)}")
        if "DataLoader worker" not in str(error):
            raise
        cause = str(error).splitlines()[0]
        sys.exit(
            f"error: {printable(cause)}. If it is memory: start the container with a larger /dev/shm (docker's "
            "--shm-size=16g or --ipc=host), or lower DATA.NUM_WORKERS, 0 for none"
        )
    gc.collect()  # deletes DistributedDataParallel before the process group ends
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def _main(args: argparse.Namespace) -> None:
    config = config_from(args)
    if args.flops:
        print_flops(config)
        return
    run = Run(config)
    evaluates = _evaluates(args, config)
    run.check_alike(
        {"--throughput": args.throughput, "--eval or --finetune": evaluates, "--compile": args.compile or "off"}
    )
    if args.throughput:
        measure_throughput(config, run, args.compile, args.channels_last)
    elif evaluates:
        evaluate_checkpoint(config, run, config.MODEL.PRETRAINED or config.MODEL.RESUME, args.compile)
    else:
        train(config, run, args.compile)


if __name__ == "__main__":
    main()
