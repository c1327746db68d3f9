"""Hooks that our tools add to a toolchain's training: they report what the toolchain does in silence, or stop it."""

import hashlib
import inspect
import logging
import math
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import (
    ConstantParamScheduler,
    LinearParamScheduler,
    OptimWrapper,
    OptimWrapperDict,
    ReduceOnPlateauParamScheduler,
)
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from classification.checkpoint import differences, in_layout_of, moment_like, rounded_weights, squares_are_lost
from classification.digests import DIGESTS, digests_of
from classification.errors import UserError
from classification.openmmlab.coco import check_labels, check_order
from classification.openmmlab.config_parts import kind_of
from classification.openmmlab.messages import print_log
from classification.openmmlab.saved_config import saved_config, validates_otherwise
from classification.sync_bn import average_batch_norm

NAMED = 5  # classes


class StopAtInvalidLoss(Hook):
    """Ends training at the first loss that is NaN or infinite. mmsegmentation would go on to the last iteration.

    With float16, infinite gradients are normal: the scaler lowers its scale until they are finite. A loss does not
    recover, and batch norm's statistics already hold what made it NaN. All processes stop together, so that one of them
    can print the reason.

    A loss is that of the weights before the update. So the weights themselves are checked before they are validated or
    saved: in a validation, NaN can look like a better model, and the new checkpoint would take the place of a good one.
    CheckPredictions looks at what finite weights predict.

    Raises:
        UserError: a loss or a weight is not finite; the message says whether the images are not.
    """

    priority = "HIGH"  # before the hooks that average or save the weights

    def after_train_iter(self, runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None) -> None:
        outputs = outputs or {}
        # "loss" is the sum of all. A model with several optimizers may name its losses otherwise.
        named = {k: v for k, v in outputs.items() if "loss" in k and isinstance(v, torch.Tensor | int | float)}
        sums = [outputs["loss"]] if "loss" in outputs else named.values()
        bad = not all(_number(value).isfinite().all() for value in sums)
        invalid = _invalid_weights(runner.model) if _validates_or_saves(self, runner, batch_idx) else []
        images = bad and not _are_finite(getattr(unwrapped(runner.model), "data_preprocessor", None), data_batch)
        anywhere = torch.tensor([bad, bool(invalid), images], dtype=torch.int64)
        all_reduce(anywhere, "max")
        if anywhere[2]:
            raise UserError(f"iteration {runner.iter + 1}: the loss is not finite, for {INVALID_IMAGES}")
        if anywhere.any():
            losses = {name: _number(value) for name, value in named.items() if bad}
            parts = [f"{name} is {value.sum().item()}" for name, value in losses.items() if not value.isfinite().all()]
            after = "after its update, the model has weights that are"  # or statistics of batch norm
            what, which = ("the loss is", parts) if anywhere[0] else (after, invalid[:1])
            raise UserError(
                f"iteration {runner.iter + 1}: {what} not finite ({', '.join(which) or 'in another process'}), so "
                "nothing more is learnt; go on from an earlier checkpoint with a lower optim_wrapper.optimizer.lr, "
                "gradients that are clipped (optim_wrapper.clip_grad), or without --amp"
            )


INVALID_IMAGES = (
    "values of images are not finite where the model takes them: correct model.data_preprocessor's std, the steps of "
    "the pipeline, or an image that holds such values itself"
)


def _are_finite(preprocessor: nn.Module | None, batch: object) -> bool:
    """Return whether the images of a batch are finite, and remain so by the mean and std of a data_preprocessor."""
    numbers = [value for name, value in _tensors_in("", batch) if name.startswith("inputs")]
    for part in preprocessor.modules() if preprocessor is not None else ():  # one may hold another
        mean, std = getattr(part, "mean", None), getattr(part, "std", None)
        numbers += [mean, 1 / std] if isinstance(mean, Tensor) and isinstance(std, Tensor) else []
    return all(bool(value.isfinite().all()) for value in numbers)


def _number(value: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(value).detach()


def _invalid_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters and of statistics of batch norm that are not finite."""
    statistics = ((k, v) for k, v in model.named_buffers() if k.endswith(("running_mean", "running_var")))
    return [name for name, value in chain(model.named_parameters(), statistics) if not value.isfinite().all()]


def _validates_or_saves(hook: Hook, runner, batch_idx: int) -> bool:
    """Whether a validation or a checkpoint follows this iteration."""
    saved = [one for one in runner.hooks if isinstance(one, CheckpointHook) and not one.by_epoch]
    if any(hook.every_n_train_iters(runner, one.interval, one.save_begin) for one in saved):
        return True
    loop = runner.train_loop
    if isinstance(loop, IterBasedTrainLoop):  # its interval changes after this iteration, if dynamic_intervals says so
        every = loop.dynamic_intervals[bisect(loop.dynamic_milestones, runner.iter + 2) - 1]
        return hook.every_n_train_iters(runner, every) or hook.is_last_train_iter(runner)
    return hook.end_of_epoch(runner.train_dataloader, batch_idx)


class CheckPredictions(Hook):
    """Ends a validation or a test at the first image for which the model computes numbers that are not finite.

    Weights that are finite can give logits that are not. mmsegmentation takes NaN as the first class: if most pixels
    are of that class, the model looks better than a good one, and its checkpoint would take the good one's place.
    mmdetection drops boxes with scores of NaN. So the outputs of the backbone and of the heads that predict masks, of
    the convolutions and products behind the backbone, and the scores are looked at.

    Raises:
        UserError: an output holds NaN or infinity; the message names the image and the layer.
    """

    def before_val_epoch(self, runner) -> None:
        model = unwrapped(runner.model)
        self.finite: dict[str, Tensor] = {}  # whether the outputs of each layer are, for this batch; on their device
        self.handles = [
            module.register_forward_hook(partial(self._note, name))
            for name, module in model.named_modules()
            if name.endswith(LOOKED_AT) or (isinstance(module, LAYERS) and "backbone." not in name)
        ]
        self.handles.append(model.register_forward_hook(self._check))

    before_test_epoch = before_val_epoch

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        for handle in self.handles:
            handle.remove()

    after_test_epoch = after_val_epoch

    def _note(self, name: str, module: nn.Module, inputs: tuple, outputs: object) -> None:
        if torch.compiler.is_compiling():
            return
        images = inputs[:1] if name.endswith("backbone") else ()
        for key, values in ((INPUT, images), (name, outputs)):
            for _, value in _tensors_in("", values):
                self.finite[key] = value.isfinite().all() & self.finite.get(key, True)

    def _check(self, model: nn.Module, inputs: tuple, outputs: object) -> None:
        samples = outputs if isinstance(outputs, list | tuple) else []
        for name, value in (pair for sample in samples for pair in _tensors_in("", sample)):
            if name.startswith("seg_logits") or name.endswith("scores"):  # a box may be infinite before it is clipped
                self._note(name, model, (), value)
        finite, self.finite = self.finite, {}
        device = next((one.device for one in finite.values()), None)
        found = torch.stack([one.to(device) for one in finite.values()]).tolist() if finite else []
        if not all(found):
            name = list(finite)[found.index(False)]
            path = samples[0].get("img_path") if samples and isinstance(samples[0], BaseDataElement) else "an image"
            where = f"{path}{' or another image of its batch' if len(samples) > 1 else ''}"
            if name == INPUT:
                raise UserError(f"{where}: {INVALID_IMAGES}")
            raise UserError(
                f"{where}: what the model computes in {name} is not finite, so its predictions mean nothing: its "
                "weights have grown too large, or float16 is too small for its features; use an earlier checkpoint. "
                "To train on from it, lower optim_wrapper.optimizer.lr, or clip gradients (optim_wrapper.clip_grad)"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without its wrappers for several processes and for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


INPUT = "the input of the backbone"
# Other heads' boxes may be infinite, and clipped; but not the mean of a distribution (GFLHead.integral): its softmax
# makes NaN of infinity, and mmdet drops all boxes.
LOOKED_AT = ("backbone", "decode_head", "mask_head", "panoptic_head", "integral")
LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def _tensors_in(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a batch, in outputs or in the results for an image, as "pred_instances.scores"."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, BaseDataElement | dict):
        for key, part in value.items():
            yield from _tensors_in(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(name, part)


@HOOKS.register_module()
class AverageBatchNorm(Hook):
    """Averages the statistics of batch norm over all processes before each validation and checkpoint.

    mmengine's SyncBuffersHook is too late for checkpoints by iteration and for EMAHook's copy: they would differ from
    the model that is validated.
    """

    priority = "HIGH"  # before EMAHook

    def after_train_iter(self, runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None) -> None:
        if get_world_size() > 1 and _validates_or_saves(self, runner, batch_idx):
            average_batch_norm(runner.model)
            # With update_buffers=True, EMAHook has averaged each process's own statistics.
            for hook in (hook for hook in runner.hooks if isinstance(hook, EMAHook)):
                average_batch_norm(hook.ema_model)


class CheckLength(Hook):
    """Checks that training has updates, and warns of schedules that do not end when training ends.

    A config that changes the length of training keeps the `param_scheduler` that it inherits. A warm-up over 1000
    iterations is longer than all training if there are few images.
    """

    def before_train(self, runner) -> None:
        if runner.max_iters == 0:
            raise UserError(
                "an epoch has no batch, so nothing is trained: train_dataloader has no images, or fewer than "
                "batch_size and drop_last=True"
            )
        schedules = runner.param_schedulers
        for of_one_optimizer in schedules.values() if isinstance(schedules, dict) else [schedules or []]:
            _compare_ends(of_one_optimizer, runner)


def _compare_ends(schedules: list, runner) -> None:
    """Warn of schedules that end after training, and of a last one, which is no warm-up, that ends before it."""
    by_iteration = isinstance(runner.train_loop, IterBasedTrainLoop)  # another warning names schedules by epochs
    early, reaches_end = [], False
    for schedule in schedules:
        if schedule.by_epoch and by_iteration:
            return
        unit, length = ("epoch", runner.max_epochs) if schedule.by_epoch else ("iteration", runner.max_iters)
        end = _end_of(schedule)
        last = max([0 if end is None else end, *getattr(schedule, "milestones", ())])
        text = (
            f"param_scheduler's {type(schedule).__name__} goes on to {unit} {last}, but training to {length}; if both "
            "are to end together, set its end, and its milestones, T_max or total_iters if it has them"
        )
        if last > length:
            _warn(text)
        elif schedule.end < ENDLESS and not 0.9 <= getattr(schedule, "T_max", 1) / _steps(schedule) <= 1.1:
            _warn(
                f"param_scheduler's {type(schedule).__name__} has T_max={schedule.T_max}, but {_steps(schedule)} "
                f"{unit}s from its begin to its end: it is not at its lowest when it ends; make them equal"
            )
        if end is None or end >= length:
            reaches_end = True
        elif not isinstance(schedule, LinearParamScheduler | ConstantParamScheduler):
            early.append(text)
    if early and not reaches_end:
        _warn(early[-1])


def _steps(schedule) -> int:
    return schedule.end - schedule.begin if hasattr(schedule, "T_max") else 1


def _end_of(schedule) -> int | None:
    """Return when a schedule ends: at its `end`, or else after `T_max`, or never."""
    if schedule.end < ENDLESS:
        return schedule.end
    return schedule.begin + schedule.T_max if hasattr(schedule, "T_max") else None


class NoteOtherProcesses(Hook):
    """Warns if a resumed run counts differently. mmengine keeps iterations and epochs, whatever their length is now.

    mmengine does not save the number of processes, so this hook saves it in `meta`.
    """

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint["meta"]["processes"] = get_world_size()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        meta = checkpoint.get("meta")
        if not (runner._resume and isinstance(meta, dict)):
            return
        before, now = meta.get("processes"), get_world_size()
        if isinstance(before, int) and before != now:
            _warn(f"the run that goes on had {before} processes, and has {now}; its rates are for {before} processes")
        loop, epoch, done = runner.train_loop, meta.get("epoch"), meta.get("iter")
        if not (isinstance(loop, EpochBasedTrainLoop) and isinstance(epoch, int) and isinstance(done, int)):
            return
        length = len(runner.train_dataloader)
        if done != epoch * length:
            end = done + (loop.max_epochs - epoch) * length
            _warn(
                f"the checkpoint is of {epoch} epochs and {done} iterations, but an epoch has {length} now: images, "
                "processes or images per batch are others, or it was saved within an epoch, which begins anew. "
                f"Training ends at iteration {end}{_schedules(checkpoint, done, end)}"
            )


class SaveDigests(Hook):
    """Saves digests of the weights and of the optimizer, so that whoever reads a changed checkpoint is told."""

    priority = "LOWEST"  # after EMAHook, which exchanges the weights

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        parts = [part for part in ("state_dict", "ema_state_dict", "optimizer") if part in checkpoint]
        checkpoint[DIGESTS] = digests_of(checkpoint, parts)


class CheckResumed(Hook):
    """Stops a run from going on from a checkpoint that lacks a part of it. mmengine would begin that part anew.

    Without the optimizer's moments and the schedules' state, the rates of a resumed run are not those of its epoch.
    Checkpoints of weights only, for example mmengine's best_*.pth, lack both.

    Raises:
        UserError: the checkpoint lacks the optimizer, the schedules or what counts epochs; or they are of another model
            or config; or it holds averaged weights (EMAHook), and the config has no EMAHook; or the processes begin at
            different iterations.
    """

    priority = "HIGH"  # before EMAHook
    weights: str | None = None  # a digest of those that were loaded

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint["meta"]["validation_data"] = _validation_data(runner)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self.weights = _digest(checkpoint.get("state_dict", checkpoint))
        if not runner._resume:
            return
        path, meta = runner._load_from, checkpoint.get("meta")
        parts = {f"meta.{key}": isinstance(meta, dict) and _counts(meta.get(key)) for key in ("epoch", "iter")}
        parts |= {key: isinstance(checkpoint.get(key), dict) for key in ("message_hub", "optimizer")}
        hub = checkpoint["message_hub"] if parts["message_hub"] else {}
        kept = ("log_scalars", "runtime_info", "resumed_keys")
        parts |= {f"message_hub.{key}": isinstance(hub.get(key), dict) for key in kept if hub}
        seed = meta.get("seed") if isinstance(meta, dict) else None
        parts["meta.seed that is a number"] = seed is None or isinstance(seed, int)
        schedules, states = runner.param_schedulers or [], checkpoint.get("param_schedulers") or []
        steps = [state.get("last_step", 0) for state in states if isinstance(state, dict)] if states else []
        parts["param_schedulers"] = not schedules or (bool(states) and all(isinstance(step, int) for step in steps))
        if lacking := [name for name, there in parts.items() if not there]:
            raise UserError(
                f"{path}: has no {', '.join(lacking)}, so training cannot go on from it; resume an epoch_*.pth or "
                "iter_*.pth, or start from its weights by load_from, without --resume"
            )
        if "ema_state_dict" in checkpoint and not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise UserError(
                f"{path}: holds averaged weights and those that training goes on from, but the config has no EMAHook; "
                "add it to custom_hooks, or start from the averaged weights by load_from, without --resume"
            )
        if "ema_state_dict" in checkpoint:
            _check_averaged(runner.model, checkpoint["ema_state_dict"], path)
            _check_average_count(runner.hooks, checkpoint["ema_state_dict"], path, meta)
        _check_schedules(schedules, states, path, meta)
        of_schedules = chain(*schedules.values()) if isinstance(schedules, dict) else schedules
        names = {"lr", *(schedule.param_name for schedule in of_schedules)}
        names |= {"betas"} if "momentum" in names else set()  # which a schedule of Adam's momentum changes
        scheduled = names | {f"initial_{name}" for name in names}
        if not schedules:
            scheduled = set()
        _check_optimizer(runner.optim_wrapper, checkpoint["optimizer"], path, scheduled)
        weights = {**checkpoint.get("state_dict", {}), **checkpoint.get("ema_state_dict", {})}
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        if rounded := rounded_weights(unwrapped(runner.model).state_dict(), weights):
            _warn(f"{path}: {rounded}")
        if not isinstance(runner.optim_wrapper, OptimWrapperDict):
            _check_rates(checkpoint["optimizer"], states, path)
        _forget_other_best(runner, hub["runtime_info"], path, meta)

    def before_train(self, runner) -> None:
        if runner._resume and runner.iter >= runner.max_iters:
            _warn(
                f"{runner._load_from}: has trained for {runner.iter} of {runner.max_iters} iterations, so nothing is "
                "left to train; set a larger max_epochs or max_iters of train_cfg"
            )
        if get_world_size() == 1:
            return
        first, *others = all_gather_object((runner.iter, self.weights))
        for rank, (begun, weights) in enumerate(others, start=1):
            if (begun, weights) != first:  # from folders that the machines do not share
                how = (
                    f"begins at iteration {begun}, not {first[0]}" if begun != first[0] else "has loaded other weights"
                )
                raise UserError(
                    f"process {rank} {how}: not all processes have found the checkpoint of process 0; let all machines "
                    f"share {runner.work_dir} and the files that the config names, or copy these to each"
                )


def _check_averaged(model: nn.Module, state: object, path: str) -> None:
    """Check what EMAHook has saved: the weights that training goes on from. mmengine would load the part that fits."""
    own = unwrapped(model).state_dict()
    if not isinstance(state, dict):
        raise UserError(f"{path}: its ema_state_dict is a {type(state).__name__}, not the weights of a model")
    state = {key.removeprefix("module."): value for key, value in state.items() if key != "steps"}
    for key, value in state.items():
        if key in own and value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path}: its ema_state_dict holds {key!r} as {value.dtype}, not {own[key].dtype}")
    if found := differences(own, state):
        raise UserError(f"{path}: its ema_state_dict is of another model: {found}")


def _check_average_count(hooks: Sequence[Hook], state: dict, path: str, meta: dict) -> None:
    """Raise a UserError if an average does not say how many steps it is of: mmengine would begin it anew."""
    steps = state.get("steps")
    begins = [(hook.begin_iter, hook.begin_epoch) for hook in hooks if isinstance(hook, EMAHook)]
    saved = saved_config(meta).get("custom_hooks")  # the average began as that config says
    saved = [one for one in saved if isinstance(one, dict)] if isinstance(saved, list) else []
    if averaging := [one for one in saved if kind_of(one) == "EMAHook"]:
        before = [(one.get("begin_iter", 0), one.get("begin_epoch", 0)) for one in averaging]
        begins = before if all(_counts(value) for pair in before for value in pair) else begins
    begun = any(meta["iter"] > at and (epoch == 0 or meta["epoch"] > epoch) for at, epoch in begins)
    counts = isinstance(steps, torch.Tensor) and steps.numel() == 1 and not steps.is_floating_point()
    if not counts or steps < 0 or (begun and steps == 0):
        raise UserError(
            f"{path}: its ema_state_dict has steps={steps!r:.60}, no count of the steps that it averages, so the "
            "average would begin anew; start from its weights by load_from, without --resume"
        )


def _digest(state: dict) -> str:
    """Return a digest of the sums of all tensors."""
    sums = [float(value.sum(dtype=torch.float64)) for value in state.values() if isinstance(value, torch.Tensor)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def _counts(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


class CheckLabelsOfCategories(Hook):
    """Checks that each category of a COCO file gets the label of its name, in data sets and metrics of any type.

    Raises:
        UserError: a category has another label.
    """

    def before_train(self, runner) -> None:
        check_labels(runner.train_dataloader.dataset)
        if runner.val_loop is not None:  # now, not after the first epoch
            _check_validation(runner.val_loop)

    def before_val(self, runner) -> None:
        _check_validation(runner.val_loop)

    def before_test(self, runner) -> None:
        _check_validation(runner.test_loop)


def _check_validation(loop: ValLoop | TestLoop) -> None:
    check_labels(loop.dataloader.dataset)
    if isinstance(loop.evaluator, Evaluator):
        for metric in loop.evaluator.metrics:
            _check_has_classes(metric)
            check_order(metric, (metric.dataset_meta or {}).get("classes") or ())


def _check_has_classes(metric: BaseMetric) -> None:
    """Raise a UserError if mmseg's IoUMetric has no names of classes, which it needs after all images are tested."""
    kinds = {kind.__name__ for kind in type(metric).__mro__}
    compares = "IoUMetric" in kinds and not getattr(metric, "format_only", False)
    if compares and not (metric.dataset_meta or {}).get("classes"):
        raise UserError(
            "the data set has no names of classes, which IoUMetric needs: set its metainfo=dict(classes=[...]) "
            "(CLASSES is the spelling of older versions)"
        )


class CheckSameData(Hook):
    """Compares what the processes are to read. With other lists of images, each trains or is tested on other data.

    Raises:
        UserError: in all processes, if the data of one differ from those of the first, as a stale copy does.
    """

    def before_train(self, runner) -> None:
        _check_same_data(runner.train_dataloader.dataset, "training")

    def before_val(self, runner) -> None:
        _check_same_data(runner.val_dataloader.dataset, "validation")

    def before_test(self, runner) -> None:
        _check_same_data(runner.test_dataloader.dataset, "test")


def _facts(dataset: object) -> tuple[int, str, str]:
    """Return the number of images, a digest of their names, and one of their boxes or the sizes of their maps."""
    infos = map(dataset.get_data_info, range(len(dataset))) if hasattr(dataset, "get_data_info") else ()
    names, objects = hashlib.sha256(), hashlib.sha256()
    for info in infos:
        names.update(os.path.basename(str(info.get("img_path"))).encode(errors="replace") + b"\n")
        boxes = [(one.get("bbox_label"), one.get("bbox")) for one in info.get("instances") or ()]
        labels = str(info.get("seg_map_path"))  # a digest of what is in the maps would take too long
        size = os.path.getsize(labels) if os.path.isfile(labels) else None
        objects.update(repr((boxes, size)).encode())
    return len(dataset), names.hexdigest(), objects.hexdigest()


def _check_same_data(dataset: object, name: str) -> None:
    if get_world_size() == 1:
        return
    first, *others = all_gather_object(_facts(dataset))
    for rank, (images, *digests) in enumerate(others, start=1):
        if (images, *digests) != first:
            what = "with other boxes, labels or label maps" if digests[0] == first[1] else "of other names"
            raise UserError(
                f"process {rank} has other {name} data than process 0: {images} images "
                f"{what if images == first[0] else f'in place of {first[0]}'}; give all machines the same data"
            )


def _validation_data(runner) -> list | None:
    """Return the number of validation images, and digests of what they are; None without validation."""
    dataset = runner.val_loop and runner.val_dataloader.dataset
    return list(_facts(dataset)) if dataset is not None else None


def _forget_other_best(runner, info: dict, path: str, meta: dict) -> None:
    """Let CheckpointHook know a best checkpoint only if it is in this run's own folder and its score compares.

    CheckpointHook deletes the best checkpoint as soon as it has a better one, wherever the file is.

    Args:
        meta: the checkpoint's. Its `validation_data` is `_validation_data`; those of other tools have none.
    """
    savers = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    folders = [saving_folder(hook.out_dir, runner.work_dir) for hook in savers]
    if any("://" in folder for folder in folders):
        return
    sought = [name for hook in savers for name in getattr(hook, "key_indicators", None) or ()]
    for name in [name for name in info if str(name).startswith("best_score")]:
        if name.replace("score", "ckpt", 1) not in info:
            info.pop(name)
            _warn(f"{path}: has a {name}, but names no best checkpoint; the best one is sought anew")
    for name in [name for name in info if str(name).startswith("best_ckpt")]:
        best = os.path.basename(str(info.pop(name)))
        own = [file for file in (os.path.join(folder, best) for folder in folders) if os.path.isfile(file)]
        alike = len(sought) != 1 or sought == ["auto"] or best.startswith(f"best_{sought[0].replace('/', '_')}_")
        same_data = meta.get("validation_data") in (None, _validation_data(runner))
        same_scores = not validates_otherwise(runner.cfg, meta, automatic=sought in ([], ["auto"]))
        if own and alike and same_data and same_scores:
            info[name] = own[0]
            continue
        info.pop(name.replace("ckpt", "score", 1), None)
        if not alike:
            why = f"is not by {sought[0]}, which save_best names now"
        elif not own:
            why = f"is not in {runner.work_dir}"
        else:
            other = "other validation data" if not same_data else "images of another size, or by other metrics"
            why = f"was found with {other}"
        _warn(f"{path}: its best checkpoint, {best}, {why}; the best one is sought anew")


def saving_folder(out_dir: str | None, work_dir: str) -> str:
    """Return the folder in which CheckpointHook saves: the work dir or, in `out_dir`, a folder of its name."""
    if out_dir is None or str(out_dir) == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir.rstrip(os.sep)))


def _check_schedules(schedules: list | dict, states: object, path: str, meta: dict) -> None:
    """Check that the states are of these schedules: mmengine would load what both have, and replace other attributes.

    It warns if a schedule has not made the steps that the checkpoint counts: its rate is then that of another step.

    Raises:
        UserError: they are of other schedules.
    """
    if isinstance(schedules, dict):  # of several optimizers
        return
    states = states if isinstance(states, list) else []
    pairs = list(zip(schedules, states, strict=False))
    kinds = [_is_of(schedule, state) for schedule, state in pairs]
    if len(states) != len(schedules) or not all(kinds):
        raise UserError(
            f"{path}: has {len(states)} rate schedules, which are not the {len(schedules)} of the config's "
            "param_scheduler; set those that it was trained with, or start from its weights by load_from, without "
            "--resume"
        )
    for schedule, state in pairs:
        for name in sorted(_settings(schedule) - {"last_step"}):
            ours = getattr(schedule, name)
            if isinstance(state[name], np.ndarray | torch.Tensor):
                raise UserError(
                    f"{path}: its {type(schedule).__name__} has an array as {name}; start from its weights by "
                    "load_from, without --resume"
                )
            if state[name] != ours:
                _warn(
                    f"{path}: its {type(schedule).__name__} goes on with {name}={state[name]!r:.60}, whatever the "
                    f"config says ({ours!r:.60})"
                )
        done, begin, end = meta["epoch" if schedule.by_epoch else "iter"], state["begin"], state["end"]
        if isinstance(schedule, ReduceOnPlateauParamScheduler):
            continue  # it steps when a score is known
        expected = max(min(done - begin, end - begin - 1), -1)  # -1 before it begins
        if state["last_step"] != expected:
            _warn(
                f"{path}: its {type(schedule).__name__} is at step {state['last_step']}, not at {expected} as after "
                f"{done} {'epochs' if schedule.by_epoch else 'iterations'}: its rate goes on from there"
            )


def _is_of(schedule: object, state: object) -> bool:
    """Return whether a state is of such a schedule, for the same setting and unit, and would replace nothing else."""
    own = schedule.state_dict()
    if not (isinstance(state, dict) and all(isinstance(state.get(name), int) for name in ("begin", "end"))):
        return False
    alike = all(state.get(name) == own[name] for name in ("by_epoch", "param_name"))
    return alike and _settings(schedule) <= set(state) and not any(hasattr(schedule, key) for key in state.keys() - own)


def _settings(schedule: object) -> set[str]:
    """Return the names of a schedule's own settings that are part of its state, for example `T_max`."""
    initialisers = [vars(base)["__init__"] for base in type(schedule).__mro__ if "__init__" in vars(base)]
    names = {name for one in initialisers[:-1] for name in inspect.signature(one).parameters}  # but object's
    return {name for name, value in schedule.state_dict().items() if name in names and not callable(value)}


OF_ALGORITHM = ("alpha", "betas", "lambd", "momentum", "rho")  # settings that tell one kind of optimizer from another


def _check_optimizer(wrapper: OptimWrapper | OptimWrapperDict, saved: dict, path: str, scheduled: set[str]) -> None:
    """Check that an optimizer's saved state fits, and bring it into the layout of the parameters.

    It warns of settings that differ from the config's, but for those that a schedule changes (`scheduled`).
    """
    if isinstance(wrapper, OptimWrapperDict):  # a subclass of OptimWrapper
        for name, own in wrapper.items():
            if not isinstance(saved.get(name), dict):
                raise UserError(f"{path}: holds no state of the optimizer {name!r}, so training cannot go on from it")
            _check_optimizer(own, saved[name], path, scheduled)
        return
    # The optimizer's own groups: the wrapper adds one for its settings.
    own = [group["params"] for group in wrapper.optimizer.param_groups]
    try:
        groups = saved["param_groups"]
        there = [list(group["params"]) for group in groups]
        if list(map(len, there)) != list(map(len, own)):
            sizes = [f"{len(sides)} groups of {sum(map(len, sides))} parameters" for sides in (there, own)]
            raise ValueError(f"it has {sizes[0]}, the config's {sizes[1]}")
        for name in OF_ALGORITHM:
            if (name in groups[0]) != (name in wrapper.optimizer.param_groups[0]):
                raise ValueError(f"one of them has {name}, the other has not")
        adam = [one.get("decoupled_weight_decay", False) for one in (groups[0], wrapper.optimizer.defaults)]
        if adam[0] != adam[1] and "decoupled_weight_decay" in groups[0]:
            raise ValueError("one of them is AdamW, the other Adam")
        other: dict[str, tuple] = {}
        for group, ours in zip(groups, wrapper.optimizer.param_groups, strict=True):
            _check_settings(group, ours)
            if group.get("capturable") and not all(parameter.is_cuda for parameter in ours["params"]):
                group["capturable"] = False  # of a run on a GPU; PyTorch asserts that there is one
            for name in ours.keys() & group.keys() - {"params", *scheduled, *HOW}:
                if not isinstance(ours[name], bool) and _plain(group[name]) != _plain(ours[name]):
                    other.setdefault(name, (group[name], ours[name]))
        for name, (there_is, ours) in sorted(other.items()):
            _warn(f"{path}: its optimizer goes on with {name}={there_is!r}, whatever the config says ({ours!r})")
        parameters = list(zip(chain(*there), chain(*own), strict=True))
        _check_has_moments(saved["state"], _keeps_moments(wrapper.optimizer, groups), parameters, path)
        for i, parameter in zip(chain(*there), chain(*own), strict=True):
            state = saved["state"].get(i, {})
            if not torch.as_tensor(state.get("step", 0)).ge(0).all():
                raise ValueError(f"state[{i}].step is {state['step']!r}")
            from_start = isinstance(wrapper.optimizer, torch.optim.Adagrad)  # others make them at the first update
            for name in (*SQUARES, *(["sum"] if from_start else [])):
                if isinstance(squares := state.get(name), torch.Tensor) and not squares.ge(0).all():
                    raise ValueError(f"state[{i}].{name}, a mean of squares, is negative or no number")
            moments = _moments(wrapper.optimizer, parameter) if state or from_start else {}
            for name, value in state.items():
                is_moment = name != "step" and isinstance(value, torch.Tensor)  # PyTorch counts in float32
                if is_moment and (value.shape == parameter.shape or name in moments):
                    state[name] = moment_like(moments.get(name, parameter), value, f"state[{i}].{name}")
                elif isinstance(value, torch.Tensor) and (name in OF_EACH_WEIGHT or not value.isfinite().all()):
                    in_layout_of(parameter, value, f"state[{i}].{name}")  # raises an error that says what is wrong
            if lacking := [name for name in moments if not isinstance(state.get(name), torch.Tensor)]:
                raise ValueError(f"state[{i}] has no {lacking[0]}")
            if {"exp_avg", "exp_avg_sq"} <= moments.keys() and squares_are_lost(state["exp_avg"], state["exp_avg_sq"]):
                raise ValueError(f"state[{i}].exp_avg_sq, a mean of squares, is 0, but exp_avg is not")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its optimizer does not fit the config's optim_wrapper ({error!s:.300}); set the one that it was "
            "trained with, or start from its weights by load_from, without --resume"
        ) from error


def _keeps_moments(optimizer: torch.optim.Optimizer, groups: list[dict]) -> bool:
    """Return whether an optimizer keeps moments of each parameter that it has updated."""
    if isinstance(optimizer, torch.optim.Adadelta | torch.optim.Adafactor | torch.optim.Adagrad | torch.optim.Rprop):
        return True
    return any("betas" in group or group.get("momentum") or "alpha" in group for group in groups)


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return tensors like the moments that an optimizer keeps of a parameter, where these are known."""
    if isinstance(optimizer, torch.optim.Adagrad):
        return {"sum": parameter}
    if isinstance(optimizer, torch.optim.Adam):
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
    if isinstance(optimizer, torch.optim.Adafactor):
        if parameter.dim() < 2:
            return {"variance": parameter}
        # Means over the last side, and over the one before.
        return {"row_var": parameter[..., :1], "col_var": parameter[..., :1, :]}
    return {}


def _check_has_moments(states: dict, keeps: bool, parameters: list[tuple], path: str) -> None:
    """Warn of parameters without moments, which begin anew; those that nothing trains have none.

    Args:
        states: the saved moments.
        keeps: whether the optimizer keeps some.
        parameters: the saved numbers of the parameters, and the parameters.
        path: the checkpoint.

    Raises:
        ValueError: there are no moments at all, or some of no parameter.
    """
    if others := states.keys() - {i for i, _ in parameters}:
        raise ValueError(f"its state has the keys {sorted(map(repr, others))[:3]}, which are no parameters")
    trained = [i for i, parameter in parameters if parameter.requires_grad]
    if keeps and trained and not states:
        raise ValueError("its state is empty, so that all moments would begin anew")
    lacking = [i for i in trained if not states.get(i)]
    if keeps and lacking:
        _warn(
            f"{path}: its optimizer has no moments of {len(lacking)} of {len(trained)} parameters (the first is number "
            f"{lacking[0]}), which begin anew unless nothing trains them"
        )


def _check_rates(saved: dict, schedules: list, path: str) -> None:
    """Check the rate of each group: mmengine's schedules multiply it, so that a wrong one stays wrong to the end.

    Raises:
        UserError: a rate is negative.
    """
    for i, group in enumerate(saved["param_groups"]):
        rate = group.get("lr", 0)
        if not isinstance(rate, int | float | torch.Tensor) or rate < 0:
            raise UserError(
                f"{path}: its optimizer has the rate {rate!r} in group {i}; start from its weights by load_from, "
                "without --resume"
            )
        values = [one.get("_last_value") for one in schedules if one.get("param_name") == "lr"]
        values = [float(one[i]) for one in values if isinstance(one, list) and len(one) >= len(saved["param_groups"])]
        if values and not any(math.isclose(rate, one, rel_tol=1e-6) for one in values):
            _warn(
                f"{path}: its optimizer has the rate {float(rate)!r} in group {i}, where its schedules left "
                f"{values[-1]!r}: rates go on from it"
            )
            return


def _check_settings(group: dict, ours: dict) -> None:
    """Raise a ValueError if a saved group lacks a number, or has another switch than ours, for example `maximize`."""
    for name, value in group.items():
        wanted = ours.get(name)
        of_words = isinstance(wanted, list | tuple) and any(isinstance(one, str) for one in wanted)  # as param_names
        if name == "params" or of_words or (value is None and not isinstance(wanted, float | list | tuple)):
            continue
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        if isinstance(wanted, list | tuple):  # of which PyTorch's Adafactor leaves a part None
            if [one is None for one in numbers] != [one is None for one in wanted]:
                raise ValueError(f"its {name} is {value!r}, the config's {wanted!r}")
            numbers = [one for one in numbers if one is not None]
        if isinstance(wanted, bool) and name not in HOW and value != wanted:
            raise ValueError(f"its {name} is {value!r}, the config's {wanted!r}")
        if isinstance(wanted, int | float | list | tuple) and not all(
            isinstance(one, int | float | torch.Tensor) and math.isfinite(one) for one in numbers
        ):
            raise ValueError(f"its {name} is {value!r}, not finite numbers")
        if name == "betas" and not all(0 <= one < 1 for one in numbers):
            raise ValueError(f"its betas are {value!r}, not in [0, 1)")


def _plain(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    return [float(one) if isinstance(one, int | float | Tensor) else one for one in value]


HOW = ("capturable", "differentiable", "foreach", "fused")  # how an optimizer computes, not what
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "row_var", "col_var", "variance", "square_avg", "acc_delta")
OF_EACH_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def _schedules(checkpoint: dict, done: int, end: int) -> str:
    """Return the end of a message: where schedules by iteration end, if they do not end with training."""
    schedules = checkpoint.get("param_schedulers")
    schedules = [one for one in schedules if isinstance(one, dict)] if isinstance(schedules, list) else []
    ends = [one.get("end") for one in schedules if not one.get("by_epoch", True)]
    others = sorted({one for one in ends if isinstance(one, int) and done < one < ENDLESS and one != end})
    return f", the schedule of its rate at {', '.join(map(str, others))}" if others else ""


ENDLESS = int(1e9)  # mmengine's end of a schedule that has none


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


class NameAbsentClasses(Hook):
    """Makes mmseg's IoUMetric name the classes that have no pixel in the ground truth.

    Their IoU is NaN, which the mean leaves out, or 0 if the model predicts them.
    """

    def before_val_epoch(self, runner) -> None:
        _name_absent(runner.val_evaluator)

    def before_test_epoch(self, runner) -> None:
        _name_absent(runner.test_evaluator)


def _name_absent(evaluator: Evaluator) -> None:
    for metric in evaluator.metrics:
        kinds = {kind.__name__ for kind in type(metric).__mro__}
        if "IoUMetric" in kinds and "compute_metrics" not in vars(metric):
            metric.compute_metrics = _naming(metric, metric.compute_metrics)


def _naming(metric: BaseMetric, compute: Callable[[list], dict]) -> Callable[[list], dict]:
    def named(results: list) -> dict:
        found = compute(results)
        if found and results:  # not of format_only
            _, union, _, labels = (sum(areas).numpy() for areas in zip(*results, strict=True))
            classes, filled = metric.dataset_meta["classes"], getattr(metric, "nan_to_num", None)
            if message := message_on_absent_classes(
                classes, labels, union, filled, getattr(metric, "ignore_index", None)
            ):
                print_log(message, logger="current", level=logging.WARNING)
        return found

    return named


def message_on_absent_classes(
    classes: Sequence[str],
    labels: np.ndarray,
    union: np.ndarray,
    filled: float | None = None,
    ignored: int | None = None,
) -> str | None:
    """Name the classes without a pixel in the label maps, and say over how many classes mIoU is the mean.

    Args:
        classes: the names of all classes.
        labels: the number of pixels of each class in the label maps.
        union: the number of pixels of each class in the label maps or the predictions.
        filled: the IoU that the mean takes for a class without a pixel in either: `nan_to_num` of IoUMetric. With
            None, the mean leaves it out.
        ignored: a class whose pixels are not counted.

    Returns:
        None if each class has a pixel in the label maps.
    """
    named = enumerate(zip(classes, labels, strict=False))
    missing = [repr(name) for i, (name, pixels) in named if not pixels and i != ignored]
    if not missing:
        return None
    more = f" and {len(missing) - NAMED} more" if missing[NAMED:] else ""
    one = len(missing) == 1
    counted = np.count_nonzero(union) if filled is None else len(classes)
    return (
        f"{'class' if one else 'classes'} {', '.join(missing[:NAMED])}{more} {'is' if one else 'are'} in no map; mIoU "
        f"is the mean of {counted} of {len(classes)} classes"
        + (f", and takes {filled:g} for those that are not predicted either" if filled is not None else "")
    )
