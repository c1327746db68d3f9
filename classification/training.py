"""A training run: build it from the config, resume it exactly, validate and save it every epoch."""

import logging
import math
import reprlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from classification.checkpoint import (
    CLASSES,
    StateDict,
    class_names_of,
    in_layout_of,
    load_weights,
    read_checkpoint,
    rounded_weights,
    state_dicts,
)
from classification.checkpoint_archive import DamagedCheckpointError
from classification.checkpoint_folder import BEST, BEST_EMA, LATEST, CheckpointFolder
from classification.compiling import compile_in_place
from classification.config import changed_keys, saved_config, settings_without_effect, shared_settings
from classification.data import (
    UnreadableImages,
    build_eval_loader,
    build_mixup,
    build_train_loader,
    names_differ,
)
from classification.engine import EpochProgress, TrainContext, evaluate, train_one_epoch
from classification.errors import UserError, is_file
from classification.guards import NonFiniteError, NonFiniteGuard
from classification.metrics import COUNT_AS_WRONG, ONE_CLASS, MetricsLog, accuracy_on_all
from classification.models import VARIANTS, SpatialMamba
from classification.optim import build_optimizer, build_scheduler, load_moments
from classification.run import Preempted, Preemption, Run
from classification.sync_bn import average_batch_norm, mean_statistics, running_statistics, synchronise_batch_norm

logger = logging.getLogger("spatialmamba")

VALIDATION_IMAGES = "validation_images"
VALIDATION_DIGEST = "validation_digest"  # of the images' names
IMAGE_NAMES = "image names"  # a digest of those for training
VALIDATION_KEYS = ("DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP_PCT")  # how validation prepares the images
COMPILED = "compile"  # the compile mode; compiled code rounds differently from eager execution
WENT_BACK_TO = "went_back_to"  # the checkpoint of this folder that --resume named
NO_ACCURACY = -1.0  # before the first epoch: lower than any measured accuracy
START_OVER = "start from its weights with --pretrained and --finetune"


def build_model(config: CfgNode, num_classes: int) -> SpatialMamba:
    model = SpatialMamba(
        num_classes=num_classes, drop_path_rate=config.MODEL.DROP_PATH_RATE, **VARIANTS[config.MODEL.NAME]
    )
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model


def wrap(model: SpatialMamba, config: CfgNode, run: Run) -> nn.Module:
    """Wrap the model for training on several processes; its parameters stay the same for optimizer and EMA."""
    if run.world_size == 1:
        return model
    on_gpu = run.device.type == "cuda"
    if config.TRAIN.SYNC_BN and on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif config.TRAIN.SYNC_BN:
        synchronise_batch_norm(model)
    # Without broadcasting, unsynchronised batch norms keep each process's own statistics, which are averaged later.
    device_ids = [run.device.index] if on_gpu else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
    _order_buckets(wrapped, config.DATA.IMG_SIZE, run.device)
    return wrapped


def _order_buckets(wrapped: DistributedDataParallel, size: int, device: torch.device) -> None:
    """Run one forward and backward pass, after which DistributedDataParallel has its final buckets.

    DistributedDataParallel rearranges its buckets after the first pass, and the last bit of a sum over three processes
    depends on where in a bucket a gradient lies. Without this pass, the first update after resuming would differ from
    the same update in an uninterrupted run.
    """
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    wrapped.train()
    wrapped(torch.zeros(2, wrapped.module.in_chans, size, size, device=device)).sum().backward()
    wrapped.zero_grad()
    for name, buffer in wrapped.named_buffers():
        buffer.copy_(buffers[name])


def log_accuracy(name: str, m: dict[str, float]) -> None:
    missing = f", {m['unreadable']} could not be read" if "unreadable" in m else ""
    logger.info(
        "%s: top-1 %.3f%% top-5 %.3f%% loss %.4f on %d images%s",
        name, m["top1"], m["top5"], m["loss"], m["images"], missing,
    )  # fmt: skip


@dataclass
class RunState:
    """How far a run is; a checkpoint holds this beside weights and optimizer."""

    epoch: int = -1  # the last finished and validated epoch
    max_accuracy: float = NO_ACCURACY
    max_accuracy_ema: float = NO_ACCURACY


class Training:
    """A training run of `config` on the processes of `run`; with a `compile_mode`, torch.compile compiles the model."""

    def __init__(self, config: CfgNode, run: Run, num_classes: int, compile_mode: str | None = None):
        self.config, self.run = config, run
        self.train_loader = run.together(lambda: build_train_loader(config, run.rank, run.world_size))
        self.eval_loader = run.together(lambda: build_eval_loader(config, run.rank, run.world_size))
        digests = [loader.dataset.folder.digest() for loader in (self.train_loader, self.eval_loader)]
        self.training_digest, self.validation_digest = digests
        run.check_alike(
            {
                "classes": self.train_loader.classes,
                "images for training": len(self.train_loader.dataset),
                "images for validation": len(self.eval_loader.dataset),
                "names of images": digests,
                **shared_settings(config),
            }
        )
        self.checkpoints = CheckpointFolder(run.folder, config.KEEP_LAST)
        self.notes = settings_without_effect(config)  # logged later: the log is not open yet
        resumed = run.from_main(self._find_checkpoint_to_resume)
        if resumed:
            self._match_classes(*resumed)
        random_seed(config.SEED)  # gives every process the same weights, also in the EMA's copy
        self.model = build_model(config, num_classes)
        self.new_head = False if resumed else self._load_pretrained()
        run.place(self.model)
        self.ema = ModelEmaV3(self.model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLE else None
        self.batches = len(self.train_loader)
        self.compile_mode = compile_mode
        self.context = self._build_context(num_classes)
        if compile_mode:  # after the pass in `_order_buckets`, whose batch is smaller
            for module in (self.model, *([self.ema.module] if self.ema else [])):
                compile_in_place(module, compile_mode)
        self.state, self.progress = RunState(), EpochProgress()
        self.resumed_from = None
        self.other_batches = False  # whether an update has other batches than in the resumed run
        self.own_batch_norm = run.world_size > 1 and not config.TRAIN.SYNC_BN
        self.went_back_to = ""
        if resumed:
            content, self.resumed_from = resumed
            self._resume(content, self.resumed_from)

    # ----- building

    def _load_pretrained(self) -> bool:
        """Load the `model` weights of MODEL.PRETRAINED, if it is set. Return whether the model keeps its new head."""
        path = self.config.MODEL.PRETRAINED
        if not path:
            return False

        def read() -> tuple[dict, bool, list[str] | None]:
            content = read_checkpoint(path)
            found = state_dicts(content, path)
            return found["model"], "model_ema" in found, class_names_of(content, path)

        weights, averaged, names = self.run.from_main(read)
        if averaged:
            self.notes.append(
                f"{path}: training starts from its model, not from its model_ema (python -m classification.convert "
                "--weights model_ema writes a file of the average alone)"
            )
        others = names is not None and bool(names_differ(names, self.train_loader.dataset.folder.classes))
        if names is not None and not others:
            self._renumber(names, path)
        elif names is None:
            self.notes.append(f"{path}: holds no names of classes; they are taken in the order of the folders")
        return load_weights(self.model, weights, path, new_head=True, other_classes=others)

    def _match_classes(self, content: dict, path: Path) -> None:
        names = class_names_of(content, path)
        if names is None:
            self.notes.append(f"{path}: holds no names of classes; they are taken in the order of the folders")
        else:
            self._renumber(names, path)

    def _renumber(self, names: list[str], path: str | Path) -> None:
        for loader in (self.train_loader, self.eval_loader):
            loader.renumber(names, str(path))

    def _build_context(self, num_classes: int) -> TrainContext:
        config, run = self.config, self.run
        accumulation = config.TRAIN.ACCUMULATION_STEPS
        global_batch = config.DATA.BATCH_SIZE * run.world_size * accumulation
        if accumulation > self.batches:
            self.notes.append(
                f"an epoch has {self.batches} batches, fewer than TRAIN.ACCUMULATION_STEPS {accumulation}: an update "
                f"has {global_batch // accumulation * self.batches} images, but the learning rate of {global_batch}; "
                f"set it to {self.batches} or less"
            )
        mixup = build_mixup(config, num_classes)
        criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
        optimizer = build_optimizer(config, self.model, global_batch)
        updates_per_epoch = -(-self.batches // accumulation)
        return TrainContext(
            model=wrap(self.model, config, run),
            criterion=criterion,
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer, global_batch, updates_per_epoch),
            scaler=GradScaler(run.device.type, enabled=run.amp_dtype is torch.float16),
            device=run.device,
            autocast=run.autocast,
            guard=NonFiniteGuard(self.model, config.TRAIN.MAX_SKIPPED, probe=not self.compile_mode),
            mixup=mixup,
            ema=self.ema,
            clip_grad=config.TRAIN.CLIP_GRAD,
            accumulation_steps=accumulation,
            seed=config.SEED,
            rank=run.rank,
            unreadable=UnreadableImages(config.DATA.MAX_UNREADABLE),
        )

    # ----- resuming

    def _find_checkpoint_to_resume(self) -> tuple[dict, Path] | None:
        """Find and read, in the first process, the checkpoint with which the run goes on.

        An interrupted command with --resume can be run again. So the first of these that applies is taken:

        1. If --resume names an older checkpoint of the output folder: this one, or the folder's last one if the run
           has gone back to it before.
        2. If the folder holds a run: its last checkpoint.
        3. The checkpoint that --resume names.
        4. None.
        """
        path = Path(self.config.MODEL.RESUME) if self.config.MODEL.RESUME else None
        holds_a_run = self.checkpoints.has_run()
        is_in_folder = holds_a_run and path is not None and path.parent.resolve() == self.run.folder.resolve()
        goes_back = is_in_folder and path.name != LATEST
        if goes_back and self.config.TRAIN.AUTO_RESUME and (last := self._last_if_gone_back_to(path.name)):
            return last
        if path and (is_in_folder or not holds_a_run):
            content = read_checkpoint(path)
            _check_resumable(content, path)
            if goes_back:
                self._note_lost_checkpoints(path)
            return content, path
        if not holds_a_run:
            return None
        if not self.config.TRAIN.AUTO_RESUME:
            raise UserError(
                f"{self.run.folder}: holds a run already; pass another --tag, or TRAIN.AUTO_RESUME True to go on"
            )
        self.checkpoints.lock()  # before anything in the folder changes
        self.checkpoints.remove_partial()
        return self.checkpoints.read_last(_check_resumable)

    def _last_if_gone_back_to(self, name: str) -> tuple[dict, Path] | None:
        """Return the run's last checkpoint if the run went back to the checkpoint `name` before, else None.

        In that case the user has run the same command again.
        """
        for path in filter(is_file, [self.run.folder / LATEST, *reversed(self.checkpoints.numbered())]):
            with suppress(DamagedCheckpointError):
                content = read_checkpoint(path)
                _check_resumable(content, path)
                if content.get(WENT_BACK_TO) != name:
                    return None
                self.notes.append(
                    f"{path}: the run has gone back to {name} before, and goes on from here; to go back once more, "
                    "set TRAIN.AUTO_RESUME False"
                )
                return content, path
        return None

    def _note_lost_checkpoints(self, path: Path) -> None:
        """Note that a run that goes back to `path` gives up its later checkpoints."""
        numbered, latest = self.checkpoints.numbered(), self.run.folder / LATEST
        newest = [*numbered[-1:], *filter(is_file, [latest])]  # two names of a file, or of its copy
        if newest and not any(one.samefile(path) for one in newest):
            names = ", ".join(one.name for one in self.checkpoints.own() if not one.samefile(path))
            self.notes.append(
                f"{self.run.folder}: the run goes back to {path.name}. As it goes on, it writes over {LATEST} and the "
                f"checkpoints whose names it comes to, and removes all but the last {self.config.KEEP_LAST} "
                f"({names} beside it now); {BEST} stays until a better one comes. Pass another --tag to keep both"
            )

    def _resume(self, content: dict, path: Path) -> None:
        """Restore what `_save` wrote. Best accuracies count only if the checkpoint is in the output folder."""
        weights = state_dicts(content, path)
        load_weights(self.model, weights["model"], path)
        if self.ema:
            load_weights(self.ema.module, weights.get("model_ema", weights["model"]), path)
            if "model_ema" not in weights:
                self.notes.append(f"{path}: has no model_ema; the average begins anew, at its model's weights")
        if rounded := rounded_weights(self.model.state_dict(), weights["model"]):
            self.notes.append(f"{path}: {rounded}")
        context = self.context
        try:
            load_moments(context.optimizer, content["optimizer"])
            if content.get("scaler") and context.scaler.is_enabled():
                context.scaler.load_state_dict(content["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its optimizer state is not of this model ({error}); {START_OVER}") from error
        self.state.epoch = content["epoch"]
        named = self.config.MODEL.RESUME and path.resolve() == Path(self.config.MODEL.RESUME).resolve()
        here = path.parent.resolve() == self.run.folder.resolve()
        back = named and path.name != LATEST  # latest.pth is where the run is already
        self.went_back_to = "" if not here else path.name if back else content.get(WENT_BACK_TO, "")
        self._restore_best_accuracies(content, path)
        self._compare_config(content, path)
        # A step number within an epoch means the same place only if the batches are the same.
        others = _differing(content.get("shares"), self._batch_facts())
        self.other_batches = bool({"batches", "accumulation"} & set(others))
        if content.get("progress") and not others:
            self.progress = EpochProgress(**content["progress"])
            within = self.progress.step % self.config.TRAIN.ACCUMULATION_STEPS and self.progress.step != self.batches
            if within or self.progress.step > self.batches:
                raise UserError(f"{path}: its step is {self.progress.step} of {self.batches}, between no two updates")
            self._load_own_statistics(content.get("batch_norm"), path)
        elif content.get("progress"):
            self.notes.append(f"{path}: its {', '.join(others)} are others than now; its epoch is begun anew")
        # The schedule follows the config, not the checkpoint, so that more epochs or another batch size take effect.
        if updates := self.updates():
            context.scheduler.step_update(updates - 1)  # the number of the last update, as in `train_one_epoch`

    def _compare_config(self, content: dict, path: Path) -> None:
        """Note the settings that changed since the checkpoint and that change the numbers.

        The config in a published checkpoint has other keys.
        """
        text, changed = content.get("config"), []
        try:
            changed += changed_keys(text, self.config, path) if isinstance(text, str) else []
        except UserError as error:
            changed.append(f"({error})")
        shares = content.get("shares") if isinstance(content.get("shares"), dict) else {}
        own = {name: self._batch_facts()[name] for name in ("processes", "images")}  # no config key holds these
        if VALIDATION_IMAGES in content:
            shares = {**shares, VALIDATION_IMAGES: content[VALIDATION_IMAGES]}
        own[VALIDATION_IMAGES] = len(self.eval_loader.dataset)
        changed += [
            f"{name} {reprlib.repr(shares[name])} -> {number}"
            for name, number in own.items()
            if name in shares and (type(shares[name]), shares[name]) != (int, number)
        ]
        others = shares.get(IMAGE_NAMES, self.training_digest) != self.training_digest
        if others and shares.get("images") == own["images"]:
            changed.append("other training images")
        compiled = content.get(COMPILED)
        compiled = compiled if isinstance(compiled, str) else reprlib.repr(compiled)  # of a file that was altered
        if COMPILED in content and compiled != (self.compile_mode or ""):
            changed.append(f"--compile {compiled or 'off'} -> {self.compile_mode or 'off'}")
        if changed:
            self.notes.append(f"{path}: training goes on with another config: {', '.join(changed)}")
        self._note_other_start(content, path)

    def _note_other_start(self, content: dict, path: Path) -> None:
        """Note that the run has already begun, so the weights named by --pretrained or --resume are not read.

        Say nothing if the run was given the same weights before.
        """
        flag, given = self._start()
        if not given or path.resolve() == given.resolve() or not isinstance(content.get("config"), str):
            return
        try:
            model = saved_config(content["config"], f"{path}: its config", ("MODEL.PRETRAINED", "MODEL.RESUME")).MODEL
        except UserError:
            return  # `changed_keys` reported it
        if given.resolve() not in (Path(one).resolve() for one in (model.PRETRAINED, model.RESUME) if one):
            self.notes.append(
                f"{flag} {given} is not read: {self.run.folder} holds a run, which goes on; pass another --tag to "
                "start from these weights"
            )

    def _start(self) -> tuple[str, Path | None]:
        """Return the flag that names weights to start from, and the file of these weights."""
        model = self.config.MODEL
        flag, path = ("--pretrained", model.PRETRAINED) if model.PRETRAINED else ("--resume", model.RESUME)
        return flag, Path(path) if path else None

    def _own_statistics(self) -> list[StateDict]:
        """Return this process's running statistics of model and EMA; within an epoch each process has its own."""
        modules = [self.model, *([self.ema.module] if self.ema else [])]
        return [running_statistics(module) for module in modules] if self.own_batch_norm else []

    def _load_own_statistics(self, saved: object, path: Path) -> None:
        own = self._own_statistics()
        if not own:
            return
        if saved is None:
            self.notes.append(f"{path}: has no batch norm statistics of each process; all go on with the first one's")
            return
        try:
            of_process = saved[self.run.rank]
            if len(of_process) not in (1, len(own)):  # 1: the file lacks the EMA's
                raise ValueError(f"it holds {len(of_process)} sets of them for process {self.run.rank}")
            for mine, theirs in zip(own, of_process, strict=False):
                for name, buffer in mine.items():
                    value = in_layout_of(buffer, theirs[name], name)
                    if name.endswith("running_var") and (value < 0).any():
                        raise ValueError(f"{name} is negative")
                    buffer.copy_(value)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: its batch norm statistics are not of this model ({error}); {START_OVER}"
            ) from error

    def _restore_best_accuracies(self, content: dict, path: Path) -> None:
        """Set the best accuracies so far, so that no worse epoch replaces best.pth or best_ema.pth.

        The checkpoint may be older than best.pth, so the accuracies in these files count too. The first process decides
        for all processes, because the other processes may have other output folders.
        """

        def accuracies() -> dict[str, float]:
            if path.parent.resolve() != self.run.folder.resolve():  # a checkpoint may be a link to another disk
                return {}
            found = {}
            for key, name in (("max_accuracy", BEST), ("max_accuracy_ema", BEST_EMA)):
                there = [] if self._validated_differently(content, path) else [content.get(key)]
                best = self.run.folder / name
                if is_file(best):
                    there.append(self._accuracy_of_best(best, key))
                found[key] = max([NO_ACCURACY, *(one for one in there if _is_number(one, NO_ACCURACY, 100))])
            return found

        for key, accuracy in self.run.from_main(accuracies).items():
            setattr(self.state, key, accuracy)

    def _accuracy_of_best(self, best: Path, key: str) -> object:
        """Return the accuracy in `best`; None if the file is damaged or was validated in another way.

        Such a file is set aside before another checkpoint takes its name.
        """
        try:
            content = read_checkpoint(best)
        except DamagedCheckpointError as error:  # damage does not stop training; a file that cannot be read now does
            reason = str(error)
        else:
            reason = self._validated_differently(content, best)
        if not reason:
            return content.get(key)
        self.checkpoints.to_set_aside.add(best.name)
        self.notes.append(f"{reason}: the best epoch is looked for anew, and this file will be set aside for it")
        return None

    def _validated_differently(self, content: dict, path: Path) -> str:
        """Say why the accuracies in a checkpoint do not compare with today's; "" if they do.

        Checkpoints of earlier versions lack some of the compared facts; a missing fact counts as equal.
        """
        changed = []
        if isinstance(content.get("config"), str):
            with suppress(UserError):  # `_compare_config` reports it
                changed += changed_keys(content["config"], self.config, path, VALIDATION_KEYS)
        images = len(self.eval_loader.dataset)
        for key, own in ((VALIDATION_IMAGES, images), (VALIDATION_DIGEST, self.validation_digest)):
            if key in content and (type(content[key]), content[key]) != (type(own), own):
                changed.append(
                    f"{reprlib.repr(content[key])} -> {images} images" if key == VALIDATION_IMAGES else "other images"
                )
        return f"{path}: was validated differently ({', '.join(changed)})" if changed else ""

    def _batch_facts(self) -> dict[str, int | str]:
        """Return the facts that decide which images a batch number within an epoch stands for."""
        config = self.config
        return {
            "processes": self.run.world_size,
            "batch": config.DATA.BATCH_SIZE,
            "accumulation": config.TRAIN.ACCUMULATION_STEPS,
            "batches": self.batches,
            "images": len(self.train_loader.dataset),
            IMAGE_NAMES: self.training_digest,
            "seed": config.SEED,
        }

    def updates(self) -> int:
        """Return the number of updates made so far."""
        in_epoch = self.context.updates_for(self.progress.step)
        return (self.state.epoch + 1) * self.context.updates_for(self.batches) + in_epoch

    # ----- running

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Preempted: a signal asked the run to stop; the run is saved.
            NonFiniteError: too many updates, a whole epoch's losses or a validation loss were not finite.
        """
        config, run = self.config, self.run
        first = self.state.epoch + 1
        if first >= config.TRAIN.EPOCHS:
            logger.info("all %d epochs are done; raise TRAIN.EPOCHS to go on", config.TRAIN.EPOCHS)
            return
        updates = None if self.other_batches else self.updates()
        self.metrics = MetricsLog(run.folder, updates, config.TENSORBOARD) if run.is_main else None
        if self.metrics:
            self.context.on_report = self.metrics.step
        self.context.after_update = self._after_update
        with Preemption(run) as self.preemption:
            try:
                for epoch in range(first, config.TRAIN.EPOCHS):
                    self._train_and_validate(epoch)
                self.preemption.settle()
            except Preempted as request:
                path = self._save([LATEST])
                logger.info("%s: saved %s; the same command goes on from there", request, path)
                raise
            finally:
                if self.metrics:
                    self.metrics.close()

    def close(self) -> None:
        """End the loaders' workers. The garbage collector would wait five seconds for each worker."""
        for loader in (self.train_loader, self.eval_loader):
            loader._iterator = None

    def _train_and_validate(self, epoch: int) -> None:
        config, context, sampler = self.config, self.context, self.train_loader.sampler
        sampler.set_epoch(epoch)
        sampler.start = self.progress.step * config.DATA.BATCH_SIZE
        context.mesa_weight = config.TRAIN.MESA.WEIGHT * (epoch >= int(config.TRAIN.MESA.START * config.TRAIN.EPOCHS))
        trained = train_one_epoch(context, self.train_loader, epoch, config.PRINT_FREQ, self.progress)
        validated = self._validate()
        for name, result in validated.items():
            if not math.isfinite(result["loss"]):
                raise NonFiniteError(f"the validation loss of {name} in epoch {epoch} is not finite; it is not saved")
        metrics = {"epoch": epoch, **trained, **validated}
        self.state.epoch, self.progress = epoch, EpochProgress()
        best = self._note_best(metrics)
        due = (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS
        if self.metrics:  # before the checkpoint: metrics may hold an epoch twice, but never lack an epoch
            self.metrics.epoch(metrics, self.updates())
        if best or due:
            self._save([*best, LATEST])

    def _validate(self) -> dict[str, dict]:
        """Return the accuracy of the model and its EMA, with the same batch norm statistics in every process."""
        results = {}
        for name, module in (("model", self.model), ("model_ema", self.ema and self.ema.module)):
            if module is None:
                continue
            if self.own_batch_norm:
                average_batch_norm(module)
            results[name] = evaluate(
                module, self.eval_loader, self.run.device, self.run.autocast, self.preemption.check
            )
        return results

    def _note_best(self, metrics: dict) -> list[str]:
        """Log the epoch. Return the file names, best.pth or best_ema.pth, for which it is the best epoch so far."""
        best = []
        for key, name, file in (("max_accuracy", "model", BEST), ("max_accuracy_ema", "model_ema", BEST_EMA)):
            if name not in metrics:
                continue
            log_accuracy(f"epoch {metrics['epoch']} {name}", metrics[name])
            accuracy = accuracy_on_all(metrics[name])
            if metrics[name].get("unreadable"):
                logger.info(
                    "epoch %d %s: %.3f%% if %s, as for %s", metrics["epoch"], name, accuracy, COUNT_AS_WRONG, file
                )
            if accuracy > getattr(self.state, key):
                setattr(self.state, key, accuracy)
                best.append(file)
        of_ema = f", of the EMA {self.state.max_accuracy_ema:.3f}%" if "model_ema" in metrics else ""
        logger.info(
            "epoch %d: train loss %.4f, %.1f s; best top-1 %.3f%%%s",
            metrics["epoch"], metrics["loss"], metrics["seconds"], self.state.max_accuracy, of_ema,
        )  # fmt: skip
        return best

    def _after_update(self, update: int, measure: Callable[[], None]) -> None:
        """Within an epoch, stop if asked to and save if due. `measure` brings `self.progress` up to date."""
        try:
            self.preemption.check()
        except Preempted:
            measure()
            raise
        if self.config.SAVE_STEPS and update % self.config.SAVE_STEPS == 0:
            if skipped := self.context.guard.skipped_in_a_row():  # saving would replace older weights by these
                logger.info("no checkpoint is saved, because the last %d update(s) were skipped", skipped)
                return
            measure()
            self._save([LATEST])

    def _save(self, names: list[str]) -> Path:
        """Write a checkpoint in the first process, also under `names`; all processes wait until it is written."""
        statistics = None
        if self.progress.step and self.own_batch_norm:
            own = [{name: buffer.cpu() for name, buffer in state.items()} for state in self._own_statistics()]
            statistics = self.run.gather(own)
        return self.run.from_main(
            lambda: self.checkpoints.save(self._content(statistics), self.state.epoch + 1, self.progress.step, names)
        )

    def _content(self, statistics: list | None) -> dict:
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.context.optimizer.state_dict(),
            "scaler": self.context.scaler.state_dict(),
            "config": self.config.dump(),
            CLASSES: list(self.train_loader.classes),
            "shares": self._batch_facts(),
            VALIDATION_IMAGES: len(self.eval_loader.dataset),
            VALIDATION_DIGEST: self.validation_digest,
            WENT_BACK_TO: self.went_back_to,
            COMPILED: self.compile_mode or "",
            "progress": asdict(self.progress) if self.progress.step else {},
            **asdict(self.state),
        }
        if self.ema:
            content["model_ema"] = self.ema.module.state_dict()
        if statistics:
            content["batch_norm"] = statistics  # of each process, which resumes with its own
            # Evaluating the file, or resuming it with another number of processes, uses the mean over the processes.
            for name, of_each in zip(("model", "model_ema"), zip(*statistics, strict=True), strict=False):
                content[name].update(mean_statistics(of_each))
        return content

    def lock(self) -> None:
        """Keep other runs out of the output folder, before this run writes into it; do nothing if the run is finished.

        Raises:
            UserError: another run is in the folder, or was there since this run looked for checkpoints.
        """
        if self.state.epoch + 1 < self.config.TRAIN.EPOCHS:
            self.run.from_main(self.checkpoints.lock)

    def log_setup(self) -> None:
        config, run = self.config, self.run
        logger.info("config:\n%s", config.dump().rstrip(), extra={"lines": True})
        count = f"{sum(p.numel() for p in self.model.parameters()):,}"
        how = f"{run.describe()}{f', compiled ({self.compile_mode})' if self.compile_mode else ''}"
        logger.info("%s: %s parameters; %s; output in %s", config.MODEL.NAME, count, how, run.folder)
        train, val = (loader.dataset.folder for loader in (self.train_loader, self.eval_loader))
        messages = [*self.checkpoints.damage_messages, *self.checkpoints.notes, *self.notes]
        messages += [train.left_out, val.left_out, val.shared_with(train)]
        for message in filter(None, [*messages, ONE_CLASS if self.model.num_classes == 1 else ""]):
            logger.log(logging.WARNING if run.is_main else logging.DEBUG, "%s", message)
        if self.resumed_from:
            flag, given = self._start()
            ignored = f"; {flag} is not read, for the run goes on" if given not in (None, self.resumed_from) else ""
            place = f"epoch {self.state.epoch + 1}, step {self.progress.step}"
            logger.info("resuming from %s, %s%s", self.resumed_from, place, ignored)
        elif config.MODEL.PRETRAINED:
            classes = self.model.num_classes
            head = f"; its head is for other classes, a new one has {classes} classes" if self.new_head else ""
            logger.info("starting from the weights of %s%s", config.MODEL.PRETRAINED, head)
        else:
            logger.info("starting from scratch")


def _differing(saved: object, own: dict[str, int | str]) -> list[str]:
    """Return the names of the facts that differ. A fact that an earlier version did not save counts as equal."""
    if not isinstance(saved, dict) or not {"processes", "batch", "seed"} <= saved.keys():
        return list(own)
    return [
        name
        for name, value in own.items()
        if name in saved and (type(saved[name]), saved[name]) != (type(value), value)
    ]


def _check_resumable(content: dict, path: Path) -> None:
    """Check that training can go on from a checkpoint.

    Raises:
        UserError: the checkpoint does not hold the state of a run, although it may hold weights.
    """
    state_dicts(content, path)
    if missing := [key for key in ("optimizer", "epoch") if key not in content]:
        raise UserError(f"{path}: has no {', '.join(missing)}, so training cannot go on from it; {START_OVER}")
    epoch, progress = content["epoch"], content.get("progress", {})
    if type(epoch) is not int or not -1 <= epoch < LAST_EPOCH:
        raise UserError(f"{path}: its epoch is {reprlib.repr(epoch)}, so training cannot go on from it; {START_OVER}")
    if not isinstance(progress, dict) or (progress and not _is_progress(progress)):
        shown = reprlib.repr(progress)
        raise UserError(f"{path}: its progress is {shown}, so training cannot go on from it; {START_OVER}")
    for key in ("max_accuracy", "max_accuracy_ema") if "shares" in content else ():  # only our checkpoints
        if not _is_number(content.get(key, NO_ACCURACY), NO_ACCURACY, 100):
            raise UserError(f"{path}: its {key} is {reprlib.repr(content[key])}, not an accuracy; {START_OVER}")
    scaler = {} if content.get("scaler") is None else content["scaler"]
    if not isinstance(scaler, dict) or not all(_is_number(value, 0, LARGEST_SCALE) for value in scaler.values()):
        raise UserError(f"{path}: its scaler is {reprlib.repr(scaler)}, not that of a run; {START_OVER}")


LAST_EPOCH, LARGEST_SCALE = 2**31, 2.0**127


def _is_progress(progress: dict) -> bool:
    counts = all(type(progress.get(key)) is int and progress[key] >= 0 for key in ("step", "finite"))
    floats = all(_is_number(progress.get(key), -LARGEST_SCALE, LARGEST_SCALE) for key in ("loss", "seconds"))
    keys = asdict(EpochProgress()).keys()
    return set(progress) == keys and counts and floats and progress["finite"] <= progress["step"]


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high
