"""`MM_SpatialMamba`: the backbone for mmdetection, mmsegmentation and mmpretrain, registered once for all of them.

A config registers it by naming this module:

    custom_imports = dict(imports=["classification.models.openmmlab"], allow_failed_imports=False)
    model = dict(backbone=dict(type="MM_SpatialMamba", dims=64, depths=(2, 4, 8, 4), drop_path_rate=0.2))

No other module of the model imports mmengine. This import also makes mmengine read checkpoints safely, see
`classification.openmmlab.checkpoint`. It registers the hook of our configs, and the transforms that our tools write
into configs.
"""

import logging
import os
from collections.abc import Sequence

from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor, nn

from classification.checkpoint import StateDict, differences, in_layout_of, state_dicts, variant_of
from classification.errors import UserError
from classification.models.spatialmamba import VARIANTS, SpatialMambaBackbone
from classification.openmmlab import hooks, transforms  # noqa: F401
from classification.openmmlab.checkpoint import load_from_local, weights_of
from classification.openmmlab.config_parts import DO_NOTHING
from classification.openmmlab.messages import print_log

BACKBONE = "backbone."  # where a toolchain's model keeps it
STEM = "patch_embed."
ONLY_CLASSIFIER, ONLY_BACKBONE = ("norm.", "head."), "outnorm"


@MODELS.register_module()
class MM_SpatialMamba(SpatialMambaBackbone, BaseModule):
    """Images (B, 3, H, W) -> the maps of `out_indices`, each (B, dims[i], ceil(H / 2^(i+2)), ceil(W / 2^(i+2))).

    Args:
        dims: channels in each stage, each double the one before; or the first stage's.
        depths: blocks in each stage.
        d_state: states per channel.
        mlp_ratio: hidden channels of the MLP over the block's.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks.
        out_indices: stages whose maps are returned.
        pretrained: a classification checkpoint, short for `init_cfg=dict(type="Pretrained", checkpoint=...)`.
        frozen_stages: -1 for none; 0 freezes the stem, i > 0 also the first i stages. Frozen modules stay in evaluation
            mode.
        with_cp: recompute each block in the backward pass instead of storing its activations.
        init_cfg: as in mmengine. For the type "Pretrained": a classification checkpoint, or a checkpoint of a
            toolchain's model with this backbone.
        inherited: arguments that a config inherits from Swin's and that have no effect here. One warning names them.
            With any of these, an `init_cfg` whose checkpoint has "swin" in its file name is ignored too.

    `init_weights` loads the weights. mmengine calls it before training but not before testing. Loading is strict,
    except for the classifier's head and norm and the norms of the maps: a classifier and a backbone lack one or the
    other.
    """

    def __init__(
        self,
        dims: Sequence[int] | int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **inherited: object,
    ):
        if inherited:
            _check_inherited(inherited)
            swins = _is_swins(init_cfg)
            left_aside = [*inherited, *(["init_cfg"] if swins else [])]
            _say(f"arguments that do nothing here: {', '.join(sorted(left_aside))}", logging.WARNING)
            init_cfg = None if swins else init_cfg
        if pretrained and init_cfg:
            raise ValueError("pretrained and init_cfg say the same thing: give one of them")
        if not -1 <= frozen_stages <= len(depths):
            raise ValueError(f"frozen_stages must be in [-1, {len(depths)}], got {frozen_stages}")
        # Both parents' constructors: SpatialMamba's calls the next in line, BaseModule's, which takes no sizes.
        super().__init__(
            depths=depths,
            dims=dims,
            d_state=d_state,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
        )
        self.init_cfg = dict(type="Pretrained", checkpoint=pretrained) if pretrained else init_cfg
        self.frozen_stages = frozen_stages
        self.loaded_later = False  # with the whole model's weights: then this does not start from scratch
        self.set_grad_checkpointing(with_cp)
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        norms = [getattr(self, f"outnorm{i}") for i in self.out_indices if i < self.frozen_stages]
        return [self.patch_embed, *self.layers[: self.frozen_stages], *norms]

    def train(self, mode: bool = True) -> "MM_SpatialMamba":
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(super().forward(x))  # mmpretrain's necks take no list

    def init_weights(self) -> None:
        """Apply `init_cfg`, a checkpoint last.

        Raises:
            UserError: the checkpoint is not there, damaged, or another model's.
        """
        wanted = self.init_cfg
        configs = [wanted] if isinstance(wanted, dict) else list(wanted or [])
        checkpoints = checkpoints_of(wanted)
        first_time = not self.is_init
        self.init_cfg = [config for config in configs if config not in checkpoints] or None
        try:
            super().init_weights()
        finally:
            self.init_cfg = wanted
        if first_time:
            for config in checkpoints:
                self._load(config["checkpoint"], config.get("prefix", ""))
            if not checkpoints and not self.loaded_later:
                _say(
                    "pretrained names no checkpoint: initialised from scratch; weights of load_from replace these",
                    logging.WARNING,
                )

    def _load(self, path: str, prefix: str) -> None:
        state, source = _backbone_weights(load_from_local(path), path, prefix)
        own = self.state_dict()
        ignored = [key for key in state if key.startswith((*ONLY_CLASSIFIER, *self._not_built()))]
        fresh = [key for key in own if key.startswith(ONLY_BACKBONE) and key not in state]
        if found := differences(own, state, ignore=(*ignored, *fresh)):
            raise UserError(f"{path}: its weights are of another model: {found}{size_hint(state)}")
        try:
            loaded = {key: in_layout_of(own[key], value, key) for key, value in state.items() if key not in ignored}
        except ValueError as error:
            raise UserError(f"{path}: its weights hold what is no weight: {error}") from error
        self.load_state_dict({**own, **loaded})
        left = f"; {_modules(ignored)} not needed" if ignored else ""
        new = f"; {_modules(fresh)} not in it and new" if fresh else ""
        _say(f"{len(state) - len(ignored)} tensors of {source} in {path} loaded{left}{new}", logging.INFO)

    def _not_built(self) -> list[str]:
        """Return prefixes of weights that a checkpoint of all stages has, but that `out_indices` does not need."""
        last = len(self.layers) - 1
        stages = [f"layers.{i}." for i in range(last + 1, len(self.depths))]
        return [*stages, f"layers.{last}.downsample.", *(f"{ONLY_BACKBONE}{i}." for i in self._without_map())]

    def _without_map(self) -> list[int]:
        return [i for i in range(len(self.depths)) if i not in self.out_indices]


def _is_swins(init_cfg: dict | list[dict] | None) -> bool:
    configs = init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]
    named = [os.path.basename(str(one.get("checkpoint"))) for one in configs]  # folders may have any name
    return any("swin" in name.lower() for name in named)


def checkpoints_of(init_cfg: dict | list[dict] | None, inherited: object = ()) -> list[dict]:
    """Return the entries of an `init_cfg` that load a checkpoint, without one that a config inherits from Swin's."""
    configs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
    if inherited and _is_swins(init_cfg):
        return []
    return [config for config in configs if config.get("type") in ("Pretrained", PretrainedInit)]


def _check_inherited(inherited: dict) -> None:
    for name, value in inherited.items():
        if name not in DO_NOTHING:
            hint = ", which is called with_cp here" if name == "use_checkpoint" else ""
            raise TypeError(f"MM_SpatialMamba has no argument {name!r}{hint}")
        allowed = DO_NOTHING[name]
        if allowed is not None and value not in allowed:
            raise ValueError(f"MM_SpatialMamba has no {name}, which here is always {allowed[0]!r}: got {value!r}")


def _backbone_weights(content: dict, path: str, prefix: str) -> tuple[StateDict, str]:
    """Return the backbone's weights and where they are: in 'model', as in the authors' files, or in 'state_dict'."""
    if "model" in content or "state_dict" not in content:
        if prefix:
            raise UserError(f"{path}: has no 'state_dict', so there is no prefix {prefix!r} in it; leave it out")
        return state_dicts(content, path)["model"], "'model'" if "model" in content else "the state dict"
    state = weights_of(content, path)
    if not prefix and any(key.startswith(STEM) for key in state):
        return state, "'state_dict'"
    prefix = f"{prefix.rstrip('.')}." if prefix else BACKBONE
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not found:
        raise UserError(f"{path}: no name in its 'state_dict' begins with {prefix!r}; name another prefix in init_cfg")
    return found, f"'{prefix}*'"


def size_hint(state: StateDict) -> str:
    """Return the end of a message: the arguments that a backbone with these weights needs."""
    name = variant_of(state)
    if name is None:
        return ""
    sizes = VARIANTS[name]
    return f"; it is a {name}: dims={sizes['dims']}, depths={sizes['depths']}"


def _modules(keys: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(key.partition(".")[0] for key in keys))


def _say(message: str, level: int) -> None:
    print_log(f"MM_SpatialMamba: {message}", logger="current", level=level)
