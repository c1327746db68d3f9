"""`train.py` and `test.py` of detection and segmentation: OpenMMLab's command lines over mmengine's Runner."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint

from classification.errors import UserError
from classification.openmmlab.checks import check_channels, check_checkpoint, check_data, check_file
from classification.openmmlab.flops import complexity_table

RESUME_LATEST = "auto"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="config file")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE",
        help="settings over the config's, e.g. model.backbone.pretrained=CKPT; with data_root=DIR/, paths under the "
        "config's data_root move along")  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add = parser.add_argument
    add("--work-dir", help="folder of logs and checkpoints; ./work_dirs/CONFIG by default")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="how processes are started")
    add("--local-rank", "--local_rank", type=int, default=0, help="set by torch.distributed.launch")


def train(scope: str) -> None:
    """The command line of `train.py`; `scope` is the toolchain's, "mmdet" or "mmseg"."""
    parser = argparse.ArgumentParser(description="Train.", allow_abbrev=False)
    add_run_arguments(parser)
    add = parser.add_argument
    add("--resume", nargs="?", const=RESUME_LATEST, metavar="CKPT",
        help="go on from a checkpoint, by default the work dir's latest")  # fmt: skip
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch size")
    _run(_train, parser.parse_args(), scope)


def test(scope: str) -> None:
    """The command line of `test.py`; `scope` as for `train`."""
    parser = argparse.ArgumentParser(description="Test a checkpoint.", allow_abbrev=False)
    add_run_arguments(parser)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file")
    add("--out", metavar="PKL", help="write the predictions to a pickle file")
    add("--show", action="store_true", help="show predictions on a screen")
    add("--show-dir", help="folder for images with predictions drawn; under the work dir unless absolute")
    add("--wait-time", type=float, default=2, help="seconds that --show shows an image")
    _run(_test, parser.parse_args(), scope)


def get_flops(scope: str, size: tuple[int, int]) -> None:
    """The command line of `get_flops.py`; `size` is the published figures' height and width."""
    parser = argparse.ArgumentParser(description="Print parameters and FLOPs, custom operators counted.")
    add_common_arguments(parser)
    parser.add_argument("--shape", type=int, nargs=2, default=size, metavar=("H", "W"), help="of the image")
    _run(_get_flops, parser.parse_args(), scope)


def _run(work: Callable[[argparse.Namespace, Config], None], args: argparse.Namespace, scope: str) -> None:
    """Do it; what goes wrong by the user's hand is said once, by the first process."""
    try:
        work(args, _read_config(args, scope))
    except UserError as error:
        sys.exit(f"error: {error}" if _rank() == 0 else 1)


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


# ----- the config


def _read_config(args: argparse.Namespace, scope: str) -> Config:
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such config file")
    cfg = Config.fromfile(args.config)
    if cfg.get("default_scope") != scope:
        raise UserError(f"{args.config}: is a config of {cfg.get('default_scope')}, this is a tool for {scope}")
    merge_options(cfg, args.cfg_options or {})
    init_default_scope(scope)
    check_channels(cfg.model)
    return cfg


def merge_options(cfg: Config, options: dict) -> None:
    """Merge `--cfg-options`. A new `data_root` also replaces the old one where the config has copied it to.

    A config's `val_evaluator.ann_file = data_root + ...` and the like were put together when it was read.
    """
    before = cfg.get("data_root")
    cfg.merge_from_dict(options)
    if "data_root" in options and before:
        cfg.data_root = os.path.join(cfg.data_root, "")
        for key, value in list(cfg.items()):
            cfg[key] = _replace_prefix(value, before, cfg.data_root)


def _replace_prefix(value: object, old: str, new: str) -> object:
    if isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = _replace_prefix(item, old, new)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_replace_prefix(item, old, new) for item in value)
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def _prepare(cfg: Config, args: argparse.Namespace) -> None:
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if torch.cuda.is_available():
        _check_gpus(args.launcher)
    else:
        _use_cpu(cfg, args.launcher)


def _check_gpus(launcher: str) -> None:
    there, local_rank = torch.cuda.device_count(), os.environ["LOCAL_RANK"]
    local_rank = int(os.environ.get("SLURM_LOCALID", local_rank) if launcher == "slurm" else local_rank)
    asked = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if launcher != "none" and max(asked, local_rank + 1) > there:
        raise UserError(
            f"{max(asked, local_rank + 1)} GPUs were asked for, but there are {there} here; ask for {there}"
        )


def _use_cpu(cfg: Config, launcher: str) -> None:
    """mmengine's own set-up of several processes calls CUDA; it leaves alone one that is there already."""
    if cfg.optim_wrapper.type == "AmpOptimWrapper":
        raise UserError("mixed precision (--amp) needs a GPU, and there is none; leave it out")
    _replace_sync_bn(cfg)
    if launcher == "none":
        return
    if launcher == "slurm":
        for name, of_slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            os.environ[name] = os.environ[f"SLURM_{of_slurm}"]
    torch.distributed.init_process_group("gloo")
    if _rank() == 0:
        print_log(f"no GPU: {os.environ['WORLD_SIZE']} processes on the CPU", level=logging.WARNING)
    wrapper = cfg.get("model_wrapper_cfg") or {}
    unused = cfg.get("find_unused_parameters", False)
    cfg.model_wrapper_cfg = dict(
        type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=unused, **wrapper
    )
    cfg.model_wrapper_cfg.device_ids = None


def _replace_sync_bn(value: object) -> None:
    """PyTorch's synchronised batch norm is for GPUs."""
    items = value.values() if isinstance(value, (dict, Config)) else value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict) and value.get("type") == "SyncBN":
        value["type"] = "BN"
    for item in items:
        _replace_sync_bn(item)


def _build(cfg: Config) -> Runner:
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


# ----- the work


def _train(args: argparse.Namespace, cfg: Config) -> None:
    if args.amp:
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(f"{args.config}: has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs")
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == RESUME_LATEST else args.resume
    check_file(cfg.get("load_from"))
    check_file(cfg.model.backbone.get("pretrained"))
    check_data(cfg, ("train", "val"))
    _prepare(cfg, args)
    runner = _build(cfg)
    resumed = cfg.load_from or find_latest_checkpoint(cfg.work_dir) if cfg.get("resume") else None
    if resumed or cfg.get("load_from"):
        check_checkpoint(_unwrapped(runner), resumed or cfg.load_from, only_backbone=not resumed)
    runner.train()


def _test(args: argparse.Namespace, cfg: Config) -> None:
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"{args.out}: predictions are written as a pickle; name a .pkl file")
    check_file(args.checkpoint)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(
            draw=True, show=args.show, wait_time=args.wait_time, test_out_dir=args.show_dir
        )
    check_data(cfg, ("test",))
    _prepare(cfg, args)
    runner = _build(cfg)
    check_checkpoint(_unwrapped(runner), args.checkpoint)
    if args.out:
        runner.test_evaluator.metrics.append(_dump(cfg.default_scope, args.out))
    runner.test()


def _unwrapped(runner: Runner) -> torch.nn.Module:
    return getattr(runner.model, "module", runner.model)


def _dump(scope: str, path: str) -> object:
    from mmengine.registry import METRICS

    kind = "DumpDetResults" if scope == "mmdet" else "DumpResults"
    return METRICS.build(dict(type=kind, out_file_path=path))


def _get_flops(args: argparse.Namespace, cfg: Config) -> None:
    print(complexity_table(cfg, tuple(args.shape)))
