"""`MM_SpatialMamba`: the backbone as mmengine builds it, what it loads, and what mmengine reads safely."""

import argparse
import copy
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine", reason="make install-openmmlab")
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.fileio import dump, load
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.optim import (
    CosineAnnealingLR,
    CosineAnnealingMomentum,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    OptimWrapper,
    OptimWrapperDict,
    PolyLR,
    build_optim_wrapper,
)
from mmengine.registry import HOOKS, METRICS, MODELS, TRANSFORMS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, load_checkpoint
from mmengine.structures import BaseDataElement, PixelData
from torch.utils.data import DataLoader

from classification.checkpoint import read_checkpoint
from classification.errors import UserError, prepare_console
from classification.models import VARIANTS, SpatialMamba, spatialmamba_micro
from classification.models.openmmlab import MM_SpatialMamba
from classification.openmmlab import (
    checks,
    config_parts,
    hooks,
    label_maps,
    pipelines,
    saved_config,
    shared_memory,
    tools,
    transforms,
    unread_variables,
    yaml_files,
)
from classification.openmmlab.checkpoint import load_from_local, weights_of
from classification.openmmlab.transforms import CheckImage, CheckLabels, CheckMap, CheckSize

LAYOUT = json.loads((Path(__file__).parents[1] / "data/checkpoint_layout.json").read_text())
MICRO = VARIANTS["spatialmamba_micro"]


def build(**arguments) -> MM_SpatialMamba:
    return MODELS.build(dict(type="MM_SpatialMamba", **{**MICRO, **arguments}))


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """What mmengine's current logger says."""
    logger = MMLogger.get_instance("openmmlab-test")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def classifier() -> SpatialMamba:
    torch.manual_seed(1)
    return spatialmamba_micro(num_classes=7).eval()


def save(content: dict, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def loaded(path: str, **arguments) -> MM_SpatialMamba:
    backbone = build(pretrained=path, **arguments)
    backbone.init_weights()
    return backbone.eval()


def trunk(model: torch.nn.Module) -> dict:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("patch_embed.", "layers."))}


def assert_same_trunk(a: torch.nn.Module, b: torch.nn.Module):
    a, b = trunk(a), trunk(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# ----- what is built


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_names_and_shapes_are_the_published_ones(size):
    with torch.device("meta"):
        backbone = build(**VARIANTS[f"spatialmamba_{size}"])
    assert {k: list(v.shape) for k, v in backbone.state_dict().items()} == LAYOUT[f"{size}_backbone"]


def test_is_built_once(monkeypatch):
    calls = []
    original = SpatialMamba.__init__
    monkeypatch.setattr(SpatialMamba, "__init__", lambda self, *a, **k: (calls.append(k), original(self, *a, **k))[1])
    build()
    assert len(calls) == 1


def test_is_the_backbone(classifier, tmp_path):
    images = torch.randn(2, 3, 65, 97)
    backbone = loaded(save({"model": classifier.state_dict()}, tmp_path / "c.pth"))
    with torch.no_grad():
        maps = backbone(images)
        _, expected = classifier.forward_intermediates(images)
    for map_, plain in zip(maps, expected, strict=True):
        norm = torch.nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2])  # as new: weight 1, bias 0
        torch.testing.assert_close(map_, norm.permute(0, 3, 1, 2))


def test_own_weights_are_loaded_beside_swins_arguments(classifier, tmp_path):
    """In whatever folder they are."""
    (tmp_path / "in_place_of_swin").mkdir()
    path = save({"model": classifier.state_dict()}, tmp_path / "in_place_of_swin/c.pth")
    backbone = build(embed_dims=96, init_cfg=dict(type="Pretrained", checkpoint=path))
    backbone.init_weights()
    assert_same_trunk(backbone, classifier)


def test_names_that_share_weights(tmp_path):
    """As the heads of RTMDet do on all levels; but none may claim more than there is."""
    shared = torch.ones(3)
    path = save({"state_dict": {"a": shared, "b": shared, "c": shared[1:]}}, tmp_path / "tied.pth")
    assert load_from_local(str(path))["state_dict"]["c"].tolist() == [1, 1]
    path = save({"state_dict": {"a": torch.ones(1).expand(1000)}}, tmp_path / "expanded.pth")
    with pytest.raises(UserError, match=r"'a', which claims 4000 bytes of 4"):
        load_from_local(str(path))


@pytest.mark.parametrize("name", ["depth", "norm_cfgs", "mlp_ratios"])
def test_unknown_arguments_are_errors(name):
    with pytest.raises(TypeError, match=name):
        build(**{name: 1})


def test_what_is_inherited_from_swin_is_named_once(classifier, tmp_path, log):
    """As in the authors' configs, which derive from Swin's, whose init_cfg comes along."""
    inherited = dict(embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, pretrain_img_size=224, drop_rate=0.0)
    swin = dict(type="Pretrained", checkpoint="https://example.org/swin.pth")
    path = save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    backbone = build(**inherited, norm_cfg=dict(type="LN"), pretrained=path, init_cfg=swin)
    assert [r.message for r in log.records if r.levelno == logging.WARNING] == [
        "MM_SpatialMamba: arguments that do nothing here: drop_rate, embed_dims, init_cfg, norm_cfg, num_heads, "
        "pretrain_img_size, window_size"
    ]
    backbone.init_weights()
    assert_same_trunk(backbone, classifier)
    for name, value in dict(in_channels=1, drop_rate=0.5, use_abs_pos_embed=True, norm_layer="bn").items():
        with pytest.raises(ValueError, match=f"has no {name}, which here is always"):
            build(**{name: value})


@pytest.mark.parametrize(
    "base",
    ["mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
     "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"],
)  # fmt: skip
def test_configs_that_derive_from_swin_run(base, tmp_path, log):
    """As the authors' do, with their keys: Swin's own are not deleted."""
    if find_spec(base.partition("::")[0]) is None:
        pytest.skip("make install-openmmlab")
    sizes = 'out_indices=(0, 1, 2, 3), pretrained="", dims=16, d_state=1, depths=(1, 1, 2, 1), drop_path_rate=0.2'
    text = f'_base_ = ["{base}"]\nmodel = dict(backbone=dict(type="MM_SpatialMamba", {sizes}))\n'
    (tmp_path / "theirs.py").write_text(text)
    backbone = MODELS.build(Config.fromfile(tmp_path / "theirs.py").model.backbone)
    backbone.init_weights()
    assert [m.shape[1] for m in backbone(torch.randn(1, 3, 64, 64))] == [16, 32, 64, 128]
    warnings = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "do nothing here: " in warnings[0]
    assert "embed_dims" in warnings[0]
    assert "from scratch" in warnings[1]


@pytest.mark.parametrize("wanted", [(0,), (0, 1, 2), (2,)])
def test_a_checkpoint_of_all_stages_into_fewer(wanted, classifier, tmp_path, log):
    images = torch.randn(1, 3, 64, 64)
    sources = {"c.pth": {"model": classifier.state_dict()}}
    sources["d.pth"] = {"state_dict": {f"backbone.{k}": v for k, v in build().state_dict().items()}}
    for name, content in sources.items():
        backbone = loaded(save(content, tmp_path / name), out_indices=wanted)
        (*_, map_) = backbone(images)
        whole = loaded(str(tmp_path / name))
        assert torch.equal(map_, whole(images)[wanted[-1]])


@pytest.mark.parametrize("stages", [-2, 5])
def test_frozen_stages_out_of_range(stages):
    with pytest.raises(ValueError, match="frozen_stages"):
        build(frozen_stages=stages)


@pytest.mark.parametrize("stages", range(-1, 5))
def test_frozen_stages(stages):
    """Parameters without gradient, running statistics that stay, and the rest trains."""
    backbone = build(frozen_stages=stages).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    loss = sum((m**2).mean() for m in backbone(torch.randn(2, 3, 64, 64)))
    if stages < 4:
        loss.backward()
    frozen = ["patch_embed."] if stages >= 0 else []
    frozen += [f"{part}{i}." for i in range(max(stages, 0)) for part in ("layers.", "outnorm")]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen) or ("nothing",)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(tuple(frozen) or ("nothing",)), name


def test_with_cp_gives_the_same_gradients():
    images, gradients = torch.randn(2, 3, 48, 80), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)  # stochastic depth
        sum((m**2).mean() for m in backbone(images)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(block.grad_checkpointing for stage in backbone.layers for block in stage.blocks)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# ----- what it loads


def test_prefers_model_to_model_ema(classifier, tmp_path, log):
    other = spatialmamba_micro(num_classes=7)
    path = save({"model": classifier.state_dict(), "model_ema": other.state_dict()}, tmp_path / "c.pth")
    assert_same_trunk(loaded(path), classifier)
    assert f"'model' in {path} loaded; norm, head not needed; outnorm0, outnorm1" in log.text


def test_a_bare_state_dict(classifier, tmp_path):
    assert_same_trunk(loaded(save(classifier.state_dict(), tmp_path / "c.pth")), classifier)


@pytest.mark.parametrize("prefix", [None, "backbone", "backbone."])
def test_a_toolchain_checkpoint(prefix, tmp_path):
    """All of it, the maps' norms too, and by init_cfg as by pretrained."""
    source = build()
    torch.nn.init.normal_(source.outnorm2.weight)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {"neck.weight": torch.ones(1)}
    path = save({"meta": {}, "state_dict": state}, tmp_path / "d.pth")
    init_cfg = dict(type="Pretrained", checkpoint=path, **({"prefix": prefix} if prefix else {}))
    backbone = build(init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in backbone.state_dict().items())


def test_a_toolchain_classifier(classifier, tmp_path):
    """Names without a prefix, and `model` before `state_dict` where there are both."""
    other = spatialmamba_micro(num_classes=7)
    assert_same_trunk(loaded(save({"state_dict": classifier.state_dict()}, tmp_path / "s.pth")), classifier)
    both = {"state_dict": other.state_dict(), "model": classifier.state_dict()}
    assert_same_trunk(loaded(save(both, tmp_path / "b.pth")), classifier)


def test_a_checkpoint_comes_after_other_initialisation(classifier, tmp_path):
    path = save(classifier.state_dict(), tmp_path / "c.pth")
    constant = dict(type="Constant", layer="LayerNorm", val=3.0)
    backbone = build(init_cfg=[dict(type="Pretrained", checkpoint=path), constant])
    backbone.init_weights()
    assert_same_trunk(backbone, classifier)
    assert (backbone.outnorm0.weight == 3).all()


@pytest.mark.parametrize("pretrained", [None, ""])
def test_from_scratch_is_said_aloud(pretrained, log):
    backbone = build(pretrained=pretrained)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert any(r.levelno == logging.WARNING and "from scratch" in r.message for r in log.records)
    log.clear()
    backbone = build(pretrained=pretrained)
    backbone.loaded_later = True
    backbone.init_weights()
    assert "from scratch" not in log.text


def test_the_file_is_not_needed_to_build():
    assert build(pretrained="/nowhere/c.pth").init_cfg["checkpoint"] == "/nowhere/c.pth"


def test_bad_pretrained(classifier, tmp_path):
    with pytest.raises(UserError, match=r"/nowhere/c\.pth: no such checkpoint file"):
        loaded("/nowhere/c.pth")
    path = save(classifier.state_dict(), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth: .*another model.*spatialmamba_micro: dims=16, depths=\(1, 1, 2, 1\)"):
        loaded(path, dims=32)
    less = {k: v for k, v in classifier.state_dict().items() if k != "layers.0.blocks.0.ln_1.weight"}
    with pytest.raises(UserError, match="1 missing"):
        loaded(save(less, tmp_path / "missing.pth"))
    with pytest.raises(UserError, match=r"1 unexpected \(layers.0.extra"):
        loaded(save({**classifier.state_dict(), "layers.0.extra": torch.ones(1)}, tmp_path / "extra.pth"))
    with pytest.raises(UserError, match=r"begins with 'backbone\."):
        loaded(save({"state_dict": {"neck.weight": torch.ones(1)}}, tmp_path / "neck.pth"))
    (tmp_path / "half.pth").write_bytes(Path(path).read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        loaded(str(tmp_path / "half.pth"))
    with pytest.raises(ValueError, match="pretrained and init_cfg"):
        build(pretrained=path, init_cfg=dict(type="Pretrained", checkpoint=path))


# ----- what mmengine reads


def leave_file(path: Path) -> None:
    path.touch()


class Runs:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path, by_method: bool = False):
        self.path, self.by_method = path, by_method

    def __reduce__(self):
        return (Path.touch if self.by_method else leave_file), (self.path,)


def messages() -> MessageHub:
    hub = MessageHub.get_instance("openmmlab-test")
    for i in range(5):
        hub.update_scalar("train/loss", 1.5 * i)
    hub.update_info("iter", 5)
    return hub


def test_mmengine_checkpoints_keep_their_log(tmp_path):
    hub = messages()
    path = save({"meta": {"epoch": 1, "loss": np.float64(0.5)}, "message_hub": hub.state_dict()}, tmp_path / "e.pth")
    with pytest.raises(pickle.UnpicklingError):  # the reason for all this
        torch.load(path)
    content = load_from_local(path)
    restored = content["message_hub"]["log_scalars"]["train/loss"]
    assert type(restored) is HistoryBuffer
    for ours, theirs in zip(restored.data, hub.get_scalar("train/loss").data, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert restored.statistics("mean", 2) == hub.get_scalar("train/loss").mean(2)
    assert content["meta"]["loss"] == 0.5
    MessageHub.get_instance("another").load_state_dict(content["message_hub"])
    # and what has been read can be written and read again
    again = load_from_local(save(content, tmp_path / "again.pth"))
    assert again["message_hub"]["log_scalars"]["train/loss"].mean(2) == restored.mean(2)


def test_names_of_numpy_1(tmp_path):
    """Published checkpoints were written with it."""
    path = Path(save({"a": np.arange(3.0), "s": np.float64(2)}, tmp_path / "n.pth"))
    assert "numpy._core.multiarray._reconstruct" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    renamed = rewrite(path, b"numpy._core.", b"numpy.core.")
    assert "numpy.core.multiarray.scalar" in torch.serialization.get_unsafe_globals_in_checkpoint(renamed)
    content = load_from_local(str(renamed))
    np.testing.assert_array_equal(content["a"], [0, 1, 2])
    assert content["s"] == 2


def rewrite(path: Path, old: bytes, new: bytes) -> Path:
    """The checkpoint with other bytes in its pickle, checksums right."""
    target = path.with_name("rewritten.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for item in source.infolist():
            data = source.read(item)
            out.writestr(item, data.replace(old, new) if item.filename.endswith("data.pkl") else data)
    return target


def test_nothing_else_is_called_or_made(tmp_path):
    objects = {"x": [Runs(tmp_path / "ran")], "c": ConfigDict(a=1), "p": tmp_path}
    path = save({"state_dict": {"w": torch.ones(2)}, **objects}, tmp_path / "r.pth")
    content = load_from_local(path)
    assert torch.equal(content["state_dict"]["w"], torch.ones(2))
    assert not (tmp_path / "ran").exists()
    inert = content["x"][0], content["c"], content["p"]
    assert {type(one).__name__ for one in inert} == {"_Inert"}


def test_what_is_called_by_what_is_not_loaded_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"r\.pth: holds pickled objects.*getattr"):
        load_from_local(save({"x": Runs(tmp_path / "ran", by_method=True)}, tmp_path / "r.pth"))
    assert not (tmp_path / "ran").exists()


def test_schedules_keep_the_functions_of_the_config(tmp_path):
    """OneCycleLR holds the function that it anneals by; resumed without it, the rate could not be computed."""

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, OneCycleLR(optimizer, eta_max=0.5, total_steps=9)

    optimizer, whole = schedule()
    for _ in range(3):
        whole.step()
    path = save({"param_schedulers": {"lr": [whole.state_dict()]}}, tmp_path / "o.pth")
    resumed_optimizer, resumed = schedule()
    resumed.load_state_dict(load_from_local(path)["param_schedulers"]["lr"][0])
    for one in (whole, resumed):
        one.step()
    assert resumed_optimizer.param_groups[0]["lr"] != 0.1
    assert resumed.get_last_value() == whole.get_last_value()
    assert optimizer.param_groups[0]["lr"] == whole.get_last_value()[0]


def test_a_log_on_a_full_disk_is_one_line(monkeypatch, capsys):
    """mmengine's would print a traceback for each line of the log."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging.Handler, "handleError", logging.Handler.handleError)
    prepare_console()
    logger = MMLogger("full", log_file="/dev/full")
    for _ in range(3):
        logger.info("a line")
    assert capsys.readouterr().err == "/dev/full: cannot be written to ([Errno 28] No space left on device)\n"


def test_functions_in_a_log_are_left_out(tmp_path):
    """mmengine pickles a log's statistics with it, and calls what it finds there."""
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    path = save({"message_hub": buffer}, tmp_path / "b.pth")
    assert "builtins.getattr" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    before = dict(HistoryBuffer._statistics_methods)
    assert load_from_local(path)["message_hub"].mean() == 2
    assert HistoryBuffer._statistics_methods == before


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"o\.pth"):
        load_from_local(save({"a": np.array([Runs(tmp_path / "ran")])}, tmp_path / "o.pth"))
    assert not (tmp_path / "ran").exists()


class OfBytes:
    """An array of bytes that others can name too."""

    def __init__(self, held: bytes):
        self.held = held

    def __reduce__(self):
        state = (1, (len(self.held) // 8,), np.dtype(float), False, self.held)
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), state


def test_names_for_the_same_numbers_have_a_bound(tmp_path):
    """A file of 1 MB would fill gigabytes of memory, or be looked at for minutes."""
    held, weight = bytes(2**20), torch.zeros(2**18)
    log = HistoryBuffer([1.0], [1])
    log._log_history = log._count_history = np.zeros(2**17)
    logs = [copy.copy(log) for _ in range(20)]
    for content, message in (
        ({"a": [OfBytes(held)]}, None),
        ({"a": [OfBytes(held) for _ in range(20)]}, "its arrays claim more bytes than the file holds"),
        ({"message_hub": logs[:1] * 20}, None),
        ({"message_hub": logs}, "its arrays claim more bytes than the file holds"),
        ({"state_dict": {f"{i}.weight": weight for i in range(50)}}, None),
        ({"state_dict": {f"{i}.weight": weight for i in range(100)}}, "its weights claim 104857600 bytes, of which"),
    ):
        path = save(content, tmp_path / "a.pth")
        assert Path(path).stat().st_size < 2**21
        with pytest.raises(UserError, match=rf"a\.pth: {message}") if message else nullcontext():
            load_from_local(path)


class Forged:
    """A NumPy type whose state has been made up; NumPy believes it, and follows what it takes for pointers."""

    def __init__(self, *state: object):
        self.state = state

    def __reduce__(self):
        return np.dtype, ("V8", False, True), self.state


@pytest.mark.parametrize("state", [(3, "|", None, None, None, 8, 1, 63), (3, "|", ("O8", (2,)), None, None, 16, 1, 0)])
def test_forged_types_are_refused(state, tmp_path):
    with pytest.raises(UserError, match=r"f\.pth"):
        load_from_local(save({"d": Forged(*state)}, tmp_path / "f.pth"))


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.ones(2, ">i4"), np.zeros((0, 3)),
     np.array(5, "f4"), np.array([True, False]), np.array([1 + 2j])],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)  # fmt: skip
def test_arrays_are_what_they_were(array, tmp_path):
    content = load_from_local(save({"nested": [({"a": array},)], "s": array.dtype.type(1)}, tmp_path / "a.pth"))
    found = content["nested"][0][0]["a"]
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert content["s"] == 1


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where tmp_path / "served" is served from, and downloads that go to tmp_path / "hub"."""
    (tmp_path / "served").mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_downloaded_is_read_as_safely(address, tmp_path):
    """mmengine hands addresses to torch.hub, which unpickles whatever it gets."""
    save({"state_dict": {"weight": torch.ones(1, 1)}, "x": Runs(tmp_path / "ran")}, tmp_path / "served/m.pth")
    save({"x": Runs(tmp_path / "ran", by_method=True)}, tmp_path / "served/evil.pth")
    model = torch.nn.Linear(1, 1, bias=False)
    load_checkpoint(model, f"{address}/m.pth")
    assert model.weight.item() == 1
    with pytest.raises(UserError, match="holds pickled objects"):
        load_checkpoint(model, f"{address}/evil.pth")
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_checkpoint(model, f"{address}/none.pth")
    with pytest.raises(UserError, match="knows no checkpoint of that name"):
        load_checkpoint(model, "torchvision://none")
    assert not (tmp_path / "ran").exists()


def test_downloads_are_kept_by_their_whole_address_and_only_whole(address, tmp_path):
    """Two files of one name, and one that broke off: mmengine would give the first for both, and the rest for ever."""
    model = torch.nn.Linear(1, 1, bias=False)
    for value, folder in enumerate(("one", "two")):
        (tmp_path / "served" / folder).mkdir()
        save({"state_dict": {"weight": torch.full((1, 1), float(value))}}, tmp_path / f"served/{folder}/epoch_12.pth")
    for value, folder in ((0, "one"), (1, "two"), (0, "one")):
        load_checkpoint(model, f"{address}/{folder}/epoch_12.pth")
        assert model.weight.item() == value

    whole = (tmp_path / "served/one/epoch_12.pth").read_bytes()
    sent = [whole[:100], whole]

    class Broken(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if "nolength" not in self.path:
                self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(sent.pop(0))

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        broken = f"http://127.0.0.1:{server.server_port}/a.pth"
        with pytest.raises(UserError, match=f"cannot be downloaded .100 of {len(whole)} bytes have come"):
            load_checkpoint(model, broken)
        load_checkpoint(model, broken)
        sent[:] = [whole[:100], b"<html>log in</html>", whole]
        for _ in range(2):
            with pytest.raises(UserError, match=r"nolength\.pth: what has come is of no use, and is not kept"):
                load_checkpoint(model, broken.replace("a.pth", "nolength.pth"))
        load_checkpoint(model, broken.replace("a.pth", "nolength.pth"))
        server.shutdown()
    assert len(list((tmp_path / "hub/checkpoints").iterdir())) == 4


def test_named_checkpoints_are_downloaded(address, tmp_path, monkeypatch):
    save({"state_dict": {"weight": torch.ones(1, 1)}}, tmp_path / "served/m.pth")
    for names, name in (
        ("get_torchvision_models", "torchvision://n"),
        ("get_external_models", "open-mmlab://n"),
        ("get_mmcls_models", "mmcls://n"),
    ):
        monkeypatch.setattr(f"classification.openmmlab.checkpoint.{names}", lambda: {"n": f"{address}/m.pth"})
        model = torch.nn.Linear(1, 1, bias=False)
        load_checkpoint(model, name)
        assert model.weight.item() == 1


def test_classification_still_refuses_them(tmp_path):
    with pytest.raises(UserError, match="HistoryBuffer"):
        read_checkpoint(save({"model": HistoryBuffer([1.0], [1])}, tmp_path / "h.pth"))


NO_WEIGHTS = {
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor([w, w[:1]]),
    "text": lambda w: "x",
    "infinite": lambda w: w * torch.inf,
    "complex": lambda w: w + 0j,
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_mmengine_would_pass_over_is_an_error(kind, tmp_path):
    model = torch.nn.Linear(2, 3)
    state = {**model.state_dict(), "weight": NO_WEIGHTS[kind](torch.ones(3, 2))}
    with pytest.raises(UserError, match=r"n\.pth: .*('weight'|holds pickled objects)"):
        load_checkpoint(model, save({"state_dict": state}, tmp_path / "n.pth"))


class Asks:
    """Unpickled, it would take gigabytes."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("made", [(np.ndarray, (300_000_000,), np.dtype("O")), (np.ndarray, (3,)), (bytearray, 10**9)])
def test_arrays_are_not_made_of_what_is_said(made, tmp_path):
    path = save({"a": Asks(*made)}, tmp_path / "a.pth")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.pth"):
        load_from_local(path)
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


CONFIGS = {
    "code.yaml": ("a: !!python/object/apply:os.mkdir ['ran']", "tags are not read"),
    "laughs.yml": ("a: &a [x, x]\nb: &b [*a, *a]\n", "anchors and aliases are not read"),
    "date.yaml": ("a: 2024-99-99", "month must be in 1..12"),
    "half.json": ('{"model": ', "JSONDecodeError"),
    "deep.json": ("[" * 99999, "RecursionError"),
    "base.py": ("_base_ = './nowhere.py'", "FileNotFoundError"),
    "wrong.py": ("model = undefined", "NameError"),
    "empty.yaml": ("default_scope: mmdet", "has no model; write it, or inherit a config"),
    "call.json": (
        '{"default_scope": "mmdet", "model": {"a": [{"type": "subprocess.Popen", "args": ["touch", "ran"]}]}}',
        "model.a.0.type is 'subprocess.Popen', which is no registered name",
    ),
    "key.json": (
        json.dumps({"model": {"test_cfg": {"x': __import__('os').system('touch ran'), 'y": 0}}}),
        "whose quotes or escapes mmengine would write into a Python config as they are; leave them out",
    ),
    "folder.yaml": (
        "{model: {}, visualizer: {vis_backends: [{type: LocalVisBackend, save_dir: classification}]}}",
        "visualizer.vis_backends.0.save_dir is 'classification', where mmengine would write over config.py",
    ),
    "average.yaml": (
        "{model: {}, custom_hooks: [{type: EMAHook, ema_type: torch.hub.load}]}",
        "custom_hooks.0.ema_type is 'torch.hub.load', which is no registered name",
    ),
    "evaluated.yaml": (
        "model: {test_cfg: {rcnn: {nms: {type: exec(chr(97))}}}}",
        "model.test_cfg.rcnn.nms.type is 'exec(chr(97))', which is no registered name",
    ),
    "warp.yaml": (
        "model: {type: mmdet.CameraMotionCompensation, warp_mode: print(1)}",
        "model.type is 'mmdet.CameraMotionCompensation', which is no registered name",
    ),
    "target.yaml": (
        "model: {backbone: {type: mmseg.VPD, diffusion_cfg: {target: subprocess.Popen}}}",
        "model.backbone.type is 'mmseg.VPD', which is no registered name",
    ),
    "inferencer.json": (
        '{"model": {}, "custom_hooks": [{"type": "mmseg.apis.MMSegInferencer", "weights": "a.pth"}]}',
        "custom_hooks.0.type is 'mmseg.apis.MMSegInferencer', which is no registered name",
    ),
    "teacher.yaml": ("model: {teacher_config: a/teacher.py}", "model.teacher_config is 'a/teacher.py', a program"),
    "teacher.json": (
        '{"model": {"teacher_config": "a.yaml"}}',
        "model.teacher_config is 'a.yaml', a config of its own",
    ),
    "imported.yaml": ("{model: {}, visualizer: {type: on_path.X}}", "visualizer.type is 'on_path.X', which is no"),
    "compiler.yaml": (
        "{model: {}, compile: {options: {cpp.cxx: [evil]}}}",
        "compile.options may name a program, which",
    ),
    "unpickled.yaml": (
        "{model: {}, custom_hooks: [{switch_pipeline: [{decode_backend: pickle}]}]}",
        "custom_hooks.0.switch_pipeline.0.decode_backend is 'pickle', which can run code",
    ),
    "file.yaml": (
        "{model: {}, custom_hooks: [{type: logging.FileHandler, filename: mine.txt, mode: w}]}",
        "custom_hooks.0.type is 'logging.FileHandler', which is no registered name",
    ),
    "memcached.json": (
        '{"model": {"type": "mmengine.MemcachedBackend", "sys_path": "stranger"}}',
        "model.type is 'mmengine.MemcachedBackend', which is no registered name",
    ),
    "imports.json": (
        '{"model": {}, "custom_imports": {"imports": ["classification.models", "on_path"]}}',
        "custom_imports has 'on_path', which is no module of this repository or of the toolchains",
    ),
    "package.yaml": ("{model: {}, custom_imports: {imports: [mmengine]}}", "is a config of None, this is a tool for"),
    "hooks.json": (
        '{"default_scope": "mmdet", "model": {}, "train_cfg": {}, "train_dataloader": {}, "optim_wrapper": '
        '{"optimizer": 3}}',
        "a part of it is not what configs have there (AttributeError",
    ),
    "escapes.yaml": (
        'model: {metainfo: {classes: [ok, "\\e[31mX", b]}}',
        r"model.metainfo.classes.1 is '\x1b[31mX', whose control characters would steer a terminal; leave them out",
    ),
    "module.yaml": ("model: {type: on_path}", "model.type is 'on_path', which is no registered name"),
    "scope.yaml": ("model: {type: A, _scope_: on_path}", "model._scope_ is 'on_path', which mmengine may import"),
    "constructor.json": (
        '{"model": {}, "optim_wrapper": {"constructor": "subprocess.check_output"}}',
        "optim_wrapper.constructor is 'subprocess.check_output', which is no registered name",
    ),
    "clip.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {"clip_grad": {"max_norm": 0}}, "train_cfg": {}, '
        '"train_dataloader": {}}',
        "optim_wrapper.clip_grad.max_norm is 0, but must be a number above 0",
    ),
    "clip_value.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {"clip_grad": {"type": "value", "clip_value": 0.0}}, '
        '"train_cfg": {}, "train_dataloader": {}}',
        "optim_wrapper.clip_grad.clip_value is 0.0, but must be a number above 0",
    ),
    "power.json": (
        '{"default_scope": "mmdet", "model": {}, "train_cfg": {}, "train_dataloader": {}, "optim_wrapper": {}, '
        '"param_scheduler": [{"type": "PolyLR", "power": Infinity}]}',
        "param_scheduler[0].power is inf, with which nothing is learnt",
    ),
    "std.json": (
        '{"default_scope": "mmdet", "model": {"data_preprocessor": {"std": [1, Infinity, 1]}}, "train_cfg": {}, '
        '"train_dataloader": {}, "optim_wrapper": {}}',
        "model.data_preprocessor.std is [1, inf, 1], with which nothing is learnt",
    ),
    "accumulate.json": (
        '{"default_scope": "mmdet", "model": {}, "train_cfg": {}, "train_dataloader": {}, "optim_wrapper": '
        '{"accumulative_counts": 0}}',
        "optim_wrapper.accumulative_counts is 0, but must be a whole number above 0",
    ),
    "batch.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {"optimizer": {"lr": [1, 0]}}, "train_cfg": {}, '
        '"train_dataloader": {"batch_size": 0}}',
        "train_dataloader.batch_size is 0, but must be a whole number above 0",
    ),
    "rate.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {"optimizer": {"lr": [1, 0]}}, "train_cfg": {}, '
        '"train_dataloader": {"batch_size": 1}}',
        "optim_wrapper.optimizer.lr is [1, 0], but must be a number above 0",
    ),
    "infinite.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {"optimizer": {"eps": 1e400}}, "train_cfg": {}, '
        '"train_dataloader": {}}',
        "optim_wrapper.optimizer.eps is inf, with which nothing is learnt",
    ),
    "interval.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {}, "train_cfg": {"val_interval": 0}, '
        '"train_dataloader": {}}',
        "train_cfg.val_interval is 0, but must be a whole number above 0",
    ),
    "scaling.json": (
        '{"default_scope": "mmdet", "model": {}, "train_cfg": {}, "train_dataloader": {}, "optim_wrapper": {}, '
        '"auto_scale_lr": {"base_batch_size": Infinity}}',
        "auto_scale_lr.base_batch_size is inf, but must be a whole number above 0",
    ),
    "memcached.yaml": (
        "{model: {}, test_dataloader: {dataset: {backend_args: {backend: memcached, sys_path: evil}}}}",
        "test_dataloader.dataset.backend_args.backend is 'memcached', which may import a module",
    ),
    "client.yaml": (
        "{model: {}, default_hooks: {logger: {file_client_args: {backend: memcached, sys_path: evil}}}}",
        "default_hooks.logger.file_client_args.backend is 'memcached', which may import a module",
    ),
    "remote.yaml": (
        "model: {backbone: {type: mmpretrain.HuggingFaceClassifier, model_name: evil, trust_remote_code: true}}",
        "model.backbone.trust_remote_code is True, by which code of elsewhere may run",
    ),
    "function.yaml": (
        "model: {type: mmengine.call_command}",
        "model.type is 'mmengine.call_command', which is no registered name",
    ),
    "classes.json": (
        '{"default_scope": "x", "model": {"type": "mmdet.MaskRCNN", "a": {"type": "torch.optim.AdamW"}}}',
        "is a config of x",
    ),
    "typeless.json": (
        '{"default_scope": "mmdet", "model": {"backbone": {"depth": 1}}, "optim_wrapper": {}, "train_cfg": {}, '
        '"train_dataloader": {}}',
        "model.backbone has no type; set MM_SpatialMamba",
    ),
    "odd.json": (
        '{"default_scope": "mmdet", "model": {"backbone": 3}, "optim_wrapper": {}, "train_cfg": {}, '
        '"train_dataloader": {}}',
        "a part of it is not what configs have there (AttributeError",
    ),
    "short.json": (
        '{"default_scope": "mmdet", "model": {}, "optim_wrapper": {}, "train_cfg": {"max_iters": -1}, '
        '"train_dataloader": {}}',
        "train_cfg.max_iters is -1, but must be a whole number above 0",
    ),
    "scope.json": ('{"default_scope": "mmseg"}', "is a config of mmseg, this is a tool for mmdet"),
    "less.json": ('{"default_scope": "mmdet", "model": {}}', "has no optim_wrapper"),
    "options.json": ('{"default_scope": "mmdet", "model": [1]}', "--cfg-options: do not fit"),
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{custom_hooks: [{type: subprocess.Popen, args: touch ran, shell: true}]}",
            "custom_hooks.0.type is 'subprocess.Popen', which is no registered name",
        ),
        ("{custom_imports: {imports: [on_path]}}", "custom_imports has 'on_path', which is no module of this"),
        ("{model: {type: MaskRCNN}}", None),
    ],
)
def test_a_config_of_data_that_a_program_inherits(text, message, tmp_path, monkeypatch):
    """The one who names it as `_base_` need not be the one who wrote it."""
    (tmp_path / "strange.yaml").write_text(text)
    (tmp_path / "between.py").write_text("_base_ = './strange.yaml'\n")
    (tmp_path / "mine.py").write_text("_base_ = ['{{ fileDirname }}/between.py']\n")
    (tmp_path / "on_path.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over.json").write_text('{"_base_": "between.py"}')
    (tmp_path / "named.py").write_text("_base_ = './{{$NOT_SET:strange}}.yaml'\n")
    for name, there in (("over.json", "which is no" if message else "is a config of"), ("named.py", "by a variable")):
        monkeypatch.setattr("sys.argv", ["train.py", name])
        with pytest.raises(SystemExit, match=there):
            tools.train("mmdet")
    monkeypatch.setattr("sys.argv", ["train.py", "mine.py"])
    with pytest.raises(SystemExit) as stop:
        tools.train("mmdet")
    file = f"{tmp_path}/strange.yaml"
    assert (
        f"mine.py: its _base_ {file}: {message}" in stop.value.code.replace("/./", "/")
        if message
        else ("is a config of None, this is a tool for mmdet" in stop.value.code)
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_none(name, tmp_path, monkeypatch, capsys):
    """As the tools read them: a line, and nothing is run but what a Python config is."""
    text, message = CONFIGS[name]
    (tmp_path / name).write_text(text)
    (tmp_path / "on_path.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--cfg-options", "model.x.y=3"] if name == "options.json" else []
    monkeypatch.setattr("sys.argv", ["train.py", name, *options])
    with pytest.raises(SystemExit) as stop:
        tools.train("mmdet")
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert not (tmp_path / "ran").exists()
    for option in ("abc", "=3", "model..type=3", "data-root=a", "3=4", " model.type=3", "a.class=3"):
        monkeypatch.setattr("sys.argv", ["train.py", name, "--cfg-options", option])
        with pytest.raises(SystemExit):
            tools.train("mmdet")
        assert f"--cfg-options takes KEY=VALUE, got {option!r}" in capsys.readouterr().err
    for option in ("a=[[1,2],[3]", "a=(1,2", 'hooks=[dict(type="EMAHook",momentum=0.1)]'):
        monkeypatch.setattr("sys.argv", ["train.py", name, "--cfg-options", "b=1", option])
        with pytest.raises(SystemExit):
            tools.train("mmdet")
        assert f"--cfg-options {option!r}: mmengine reads KEY=V1,V2, " in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    tools.add_common_arguments(parser)
    given = ["a.x=/my data/b", "b='/my data'", "c= 3 ", "d=[1, (2, 3)]", "e=1, 2", "f=true"]
    options = parser.parse_args(["c.py", "--cfg-options", *given]).cfg_options
    assert options == {"a.x": "/my data/b", "b": "/my data", "c": 3, "d": [1, (2, 3)], "e": [1, 2], "f": True}
    with pytest.raises(SystemExit):
        parser.parse_args(["c.py", "--cfg-options", "classes=[back ground,b]"])
    assert "mmengine drops the spaces in a list's parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "variables", "message"),
    [
        ("pytorch", dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0"), "RANK is 2, but WORLD_SIZE is 2"),
        ("pytorch", dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="abc"), "LOCAL_RANK is 'abc', not a whole number"),
        ("none", dict(LOCAL_RANK="abc"), "LOCAL_RANK is 'abc', not a whole number"),
        ("none", dict(SLURM_NTASKS="4"), "is a config of None"),  # of a shell in a job: one process
        ("none", dict(RANK="1", WORLD_SIZE="2"), "WORLD_SIZE is 2, but --launcher is none: each process would work"),
        ("none", dict(SLURM_STEP_NUM_TASKS="4"), "pass --launcher slurm, or unset SLURM_STEP_NUM_TASKS"),
    ],
)
def test_environments_of_the_tools(launcher, variables, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "c.py").write_text("model = dict()")

    def read():
        tools._export_ranks(launcher, 0)
        tools._read_config(argparse.Namespace(config=str(tmp_path / "c.py")), "mmdet")

    with pytest.raises(UserError, match=message):
        read()


def test_what_a_resumed_run_may_not_touch(tmp_path, monkeypatch):
    """Its checkpoint names the best one of another run, which CheckpointHook would delete, and may hold code."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best_a.pth").touch()
    saver = CheckpointHook()
    run = argparse.Namespace(hooks=[saver], work_dir=str(tmp_path / "mine"), iter=3, val_loop=None, cfg=Config())
    said = []
    monkeypatch.setattr(hooks, "_warn", said.append)
    info = {"best_ckpt": str(tmp_path / "old" / "best_a.pth"), "best_score": 1.0, "epoch": 1}
    hooks._forget_other_best(run, info, "x.pth", {})
    assert info == {"best_ckpt": str(tmp_path / "mine" / "best_a.pth"), "best_score": 1.0, "epoch": 1}
    info = {"best_ckpt_mIoU": str(tmp_path / "old" / "best_b.pth"), "best_score_mIoU": 1.0}
    hooks._forget_other_best(run, info, "x.pth", {})
    assert info == {}
    info = {"best_score": 1e9, "epoch": 1}
    hooks._forget_other_best(run, info, "x.pth", {})
    assert info == {"epoch": 1}
    assert said.pop() == "x.pth: has a best_score, but names no best checkpoint; the best one is sought anew"
    saver.key_indicators = ["coco/bbox_mAP"]
    for best, kept in (("best_aAcc_iter_3.pth", False), ("best_coco_bbox_mAP_epoch_3.pth", True)):
        (tmp_path / "mine" / best).touch()
        info = {"best_ckpt": best, "best_score": 90.0}
        hooks._forget_other_best(run, info, "x.pth", {})
        assert len(info) == (2 if kept else 0)
    start, end = "x.pth: its best checkpoint, ", "; the best one is sought anew"
    assert said == [
        f"{start}best_b.pth, is not in {run.work_dir}{end}",
        f"{start}best_aAcc_iter_3.pth, is not by coco/bbox_mAP, which save_best names now{end}",
    ]
    run.val_loop, run.val_dataloader = True, argparse.Namespace(dataset=range(2))
    saved = {"meta": {}}
    hooks.CheckResumed().before_save_checkpoint(run, saved)
    for images, kept in ((2, True), (3, False)):
        run.val_dataloader.dataset = range(images)
        info = {"best_ckpt": "best_coco_bbox_mAP_epoch_3.pth", "best_score": 90.0}
        hooks._forget_other_best(run, info, "x.pth", saved["meta"])
        assert len(info) == (2 if kept else 0)
    assert said[2:] == [f"{start}best_coco_bbox_mAP_epoch_3.pth, was found with other validation data{end}"]

    def validating(scale, metric, file="a.json"):
        dataset = dict(type="CocoDataset", pipeline=[dict(type="Resize", scale=scale)])
        metric = dict(type="CocoMetric", metric=metric, ann_file=file)
        return Config(dict(val_dataloader=dict(dataset=dataset), val_evaluator=metric))

    class CocoMetric:  # the type of configs in mmengine's newer style
        pass

    meta = {"cfg": validating((128, 128), "bbox").pretty_text}
    for now, sought, kept in (
        (((128, 128), "bbox", "b.json"), "auto", True),
        (((128, 128), ["bbox", "segm"]), "auto", True),
        (((64, 64), "bbox"), "auto", False),
        (((128, 128), "segm"), "auto", False),
        (((128, 128), "segm"), "coco/bbox_mAP", True),  # whose name says it
    ):
        run.cfg, saver.key_indicators = validating(*now), [sought]
        info = {"best_ckpt": "best_coco_bbox_mAP_epoch_3.pth", "best_score": 90.0}
        hooks._forget_other_best(run, info, "x.pth", meta)
        assert len(info) == (2 if kept else 0)
    run.cfg = validating((128, 128), "bbox")
    run.cfg.val_evaluator.type = CocoMetric
    info = {"best_ckpt": "best_coco_bbox_mAP_epoch_3.pth", "best_score": 90.0}
    hooks._forget_other_best(run, info, "x.pth", meta)
    assert len(info) == 2
    assert "was found with images of another size, or by other metrics" in said.pop()

    path = save(
        {"state_dict": {"a": torch.ones(1)}, "meta": {"config": "import os", "cfg": "a = 1"}}, tmp_path / "c.pth"
    )
    assert load_from_local(path)["meta"] == {"cfg": "a = 1"}
    averaged = {"module.a": torch.tensor([torch.nan])}
    with pytest.raises(UserError, match=r"hold 'module\.a', which is not finite"):
        load_from_local(save({"state_dict": {}, "ema_state_dict": averaged}, tmp_path / "d.pth"))
    whole = {"neck.class_weight": torch.ones(3).int(), "backbone.fc.weight": torch.ones(3, 3).int()}
    with pytest.raises(UserError, match=r"hold 'backbone\.fc\.weight', which is of dtype int32, not of floating"):
        load_from_local(save({"state_dict": whole}, tmp_path / "d.pth"))
    with pytest.raises(UserError, match=r"hold 'a\\x1b\[31m', which is not a name"):
        load_from_local(save({"state_dict": {"a\x1b[31m": torch.ones(1)}}, tmp_path / "d.pth"))

    class Listed(list):
        def get_data_info(self, i):
            path, *box = self[i]
            label_map = tmp_path / f"map{path[1]}.png"
            label_map.write_bytes(path[1].encode() * int(path[1]))
            return dict(img_path=path, instances=[dict(bbox=box, bbox_label=0)], seg_map_path=str(label_map))

    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    first = []

    def gather(facts):
        first[1:] = [facts]  # of the first data, and of those that are compared with them
        return first

    monkeypatch.setattr(hooks, "all_gather_object", gather)
    for mine, message in (
        ([("/1/a.png", 0, 0, 2, 2), ("/1/b.png",)], None),
        ([("/1/deep/a.png", 0, 0, 2, 2), ("/1/deep/b.png",)], None),
        ([("/2/a.png", 0, 0, 2, 2), ("/2/b.png",)], "2 images with other boxes, labels or label maps"),
        ([("/1/a.png", 0, 0, 2, 2), ("/1/c.png",)], "2 images of other names"),
        ([("/1/a.png", 0, 0, 2, 3), ("/1/b.png",)], "2 images with other boxes, labels or label maps"),
        ([("/1/a.png", 0, 0, 2, 2)], "1 images in place of 2"),
    ):
        run.test_dataloader = argparse.Namespace(dataset=Listed(mine))
        if message:
            with pytest.raises(UserError, match=f"process 1 has other test data than process 0: {message}; give"):
                hooks.CheckSameData().before_test(run)
        else:
            hooks.CheckSameData().before_test(run)

    resumed = [hooks.CheckResumed() for _ in range(3)]
    run._resume, run._load_from, run.max_iters = True, "x.pth", 3
    said.clear()
    monkeypatch.setattr(hooks, "all_gather_object", lambda facts: [facts])
    resumed[0].before_train(run)
    assert said == [
        "x.pth: has trained for 3 of 3 iterations, so nothing is left to train; set a larger max_epochs or max_iters "
        "of train_cfg"
    ]
    run._resume = False
    for check, weight in zip(resumed, (1.0, 1.0, 2.0), strict=True):
        check.after_load_checkpoint(run, {"state_dict": {"a": torch.full((2,), weight), "b": 1}})
    for other, begun, message in (
        (resumed[1].weights, 3, None),
        (resumed[1].weights, 0, "process 1 begins at iteration 0, not 3: not all processes have found the checkpoint"),
        (resumed[2].weights, 3, "process 1 has loaded other weights: not all processes have found the checkpoint"),
        (None, 3, "process 1 has loaded other weights"),
    ):
        monkeypatch.setattr(hooks, "all_gather_object", lambda facts, of=(begun, other): [facts, of])
        if message:
            with pytest.raises(UserError, match=message):
                resumed[0].before_train(run)
        else:
            resumed[0].before_train(run)


def test_one_run_trains_in_a_folder(tmp_path, monkeypatch):
    places = dict(config="c.py", resume=None, launcher="none")
    args, cfg = argparse.Namespace(work_dir=str(tmp_path / "run"), **places), Config(dict())
    monkeypatch.setenv("RANK", "1")  # of no launcher: left over
    tools._lock(args, cfg).close()
    assert tools._lock(argparse.Namespace(work_dir=str(tmp_path), **{**places, "launcher": "pytorch"}), cfg) is None
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"run: another process is training in it; .* or pass another --work-dir"):
            tools._lock(args, cfg)
        other.communicate(b"\n")
    (tmp_path / "run" / "iter_3.pth").touch()  # by a run that has begun and ended since this one looked
    with pytest.raises(UserError, match=r"holds iter_3\.pth of an earlier run"):
        tools._lock(args, cfg)
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "iter_3.pth"))
    for found, refused in (("iter_2.pth", True), ("iter_3.pth", False), (None, False)):  # None: the config names it
        looked = found and str(tmp_path / "run" / found)
        message = r"iter_3\.pth: another run has saved it since this one found .*iter_2"
        with pytest.raises(UserError, match=message) if refused else nullcontext():
            tools._lock(args, Config(dict(resume=True, load_from=looked or "c.pth")), looked).close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written to"):
        tools._lock(argparse.Namespace(work_dir=str(tmp_path / "file" / "run"), **places), cfg)


def test_results_that_could_not_be_written(tmp_path, monkeypatch):
    """A test takes hours, and is lost if its results cannot be written in the end."""
    (tmp_path / "file").touch()
    for path, folder, refused in (
        (None, True, False), ("new/folder", True, False), ("new/a.pkl", False, False), ("file", False, False),
        ("file", True, True), ("file/a.pkl", False, True), ("", True, False), (".", False, True),
    ):  # fmt: skip
        path = str(tmp_path / path) if path else path
        if refused:
            with pytest.raises(
                UserError, match=r"cannot be written, because .* is in the way or may not be written to"
            ):
                tools._check_can_be_written(path, folder)
        else:
            tools._check_can_be_written(path, folder)
    with pytest.raises(UserError, match=r"cannot be looked at .File name too long"):
        tools._check_can_be_written("a" * 300)
    with pytest.raises(UserError, match="runner_type is FlexibleRunner, which is no kind of mmengine's Runner"):
        tools._build(Config(dict(model={}, runner_type="FlexibleRunner")), Config())
    monkeypatch.setattr(tools.Runner, "from_cfg", classmethod(lambda cls, cfg: MODELS.build(cfg.model)))
    for argument, message in (
        (dict(mlp_ratio=-1), "mlp_ratio must leave each MLP a hidden channel, got -1"),
        (dict(drop_path_rate=1), r"drop_rate and drop_path_rate must be in \[0, 1\), got 0\.0 and 1"),
        (dict(frozen_stages=9), r"frozen_stages must be in \[-1, 2\], got 9"),
        (dict(out_indices=(7,)), r"stage indices must lie in \[-2, 1\]"),
        (dict(sizes=3), "MM_SpatialMamba"),
    ):
        backbone = dict(type="MM_SpatialMamba", dims=16, depths=(1, 1), **{"out_indices": (0, 1), **argument})
        with pytest.raises(UserError, match=f"^model.backbone does not fit: .*{message}"):
            tools._build(Config(dict(model=backbone)), Config())
    cfg = Config(dict(default_scope="mmdet", test_evaluator=dict(type="mmdet.MultiDatasetsEvaluator", metrics=[])))
    with pytest.raises(UserError, match=r"--out a\.pkl: a MultiDatasetsEvaluator passes predictions to one metric"):
        tools._test(argparse.Namespace(out="a.pkl"), cfg)
    (tmp_path / "c.json").write_text('{"pipeline": [{"scale": [8, 6]}, {"transforms": [{"crop_size": [9, 9]}]}]}')
    config = Config.fromfile(tmp_path / "c.json")
    yaml_files.make_sizes_tuples(config)
    assert [config.pipeline[0].scale, config.pipeline[1].transforms[0].crop_size] == [(8, 6), (9, 9)]
    no_names = argparse.Namespace(
        dataloader=argparse.Namespace(dataset=[]),
        evaluator=Evaluator([METRICS.build(dict(type="mmseg.IoUMetric"))]),
    )
    no_names.evaluator.dataset_meta = {"CLASSES": ["a"]}
    with pytest.raises(UserError, match="the data set has no names of classes, which IoUMetric needs"):
        hooks.CheckLabelsOfCategories().before_test(argparse.Namespace(test_loop=no_names))
    (tmp_path / "names.txt").write_bytes("Käfer".encode("latin-1"))
    names = str(tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"names\.txt: is no text in UTF-8"):
        config_parts.class_names_of(ConfigDict(type=dict, metainfo=dict(classes=names)), "train_dataloader.dataset")


def test_iou_needs_maps():
    steps, prefix = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")], dict(img_path="a")
    augmented = [dict(type="TestTimeAug", transforms=[[dict(type="Resize")], [dict(type="LoadAnnotations")]])]
    for dataset, message in (
        (dict(pipeline=steps), None),
        (dict(pipeline=augmented), None),
        (dict(pipeline=steps[:1]), "has no LoadAnnotations in its pipeline"),
        (dict(pipeline=steps, data_prefix=prefix), r"has no data_prefix\.seg_map_path"),
        (dict(pipeline=steps, data_prefix=prefix | dict(seg_map_path="b")), None),
    ):
        for metric in (dict(type="mmseg.IoUMetric"), dict(type="IoUMetric", format_only=True)):
            call = partial(checks._check_loads_maps, ConfigDict(metric), [ConfigDict(dataset)], "test")
            if message and "format_only" not in metric:
                with pytest.raises(UserError, match=rf"but test_dataloader\.dataset {message}"):
                    call()
            else:
                call()
    metric = ConfigDict(type="IoUMetric", output_dir="maps")
    packs = [dict(type="mmseg.PackSegInputs"), dict(type="PackSegInputs", meta_keys=["img_path"])]
    for pack, reduces, refused in (*itertools.product(packs[:1], (True, False), (False,)), (packs[1], True, True)):
        dataset = ConfigDict(type="BaseSegDataset", reduce_zero_label=reduces, pipeline=[pack])
        with pytest.raises(UserError, match="would be too low by 1; add it") if refused else nullcontext():
            checks._check_packs_what_is_written(metric, [dataset], "test")


@pytest.mark.parametrize(
    ("metric", "named", "message"),
    [
        (dict(type="mmdet.CocoMetric"), "bbox_mAP", "but the values of CocoMetric are called 'coco/bbox_mAP' and"),
        (dict(type="mmdet.CocoMetric"), ["auto", "coco/bbox_mAP", "coco/cat/dog_precision"], None),
        (dict(type="mmdet.CocoMetric", prefix="own"), "coco/bbox_mAP", "are called 'own/bbox_mAP'"),
        ([dict(type="mmdet.VOCMetric"), dict(type="mmdet.CocoMetric")], "coco/bbox_mAP", None),
        (dict(type="MultiDatasetsEvaluator", metrics=[dict(type="mmdet.CocoMetric")]), "a/coco/bbox_mAP", None),
        (dict(type="mmseg.IoUMetric"), "mmseg/mIoU", "the values of IoUMetric are called 'mIoU'"),
        (dict(type="mmseg.IoUMetric"), "mIoU", None),
        (dict(type="Own"), "own/x", None),
        (dict(type="mmdet.CocoMetric"), "teacher/coco/bbox_mAP", None),
    ],
)
def test_the_best_checkpoint_is_sought_by_a_metric_that_is_there(metric, named, message, monkeypatch):
    """mmengine looks for it after the first validation, and ends in a KeyError."""
    for scope in ("mmdet", "mmseg"):
        pytest.importorskip(scope, reason="make install-openmmlab")
    hooks = dict(checkpoint=dict(type="CheckpointHook", save_best=named))
    loop = dict(type="TeacherStudentValLoop" if "teacher" in named else "mmengine.ValLoop")
    cfg = Config(dict(val_evaluator=metric, default_hooks=hooks, val_dataloader=dict(dataset={}), val_cfg=loop))
    with pytest.raises(UserError, match=f"save_best is .*{message}") if message else nullcontext():
        checks._check_save_best(cfg)
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, **_: said.append(message))
    checks._check_save_best(Config(dict(default_hooks=hooks)))
    assert said == ["default_hooks.checkpoint.save_best does nothing, for there is no val_dataloader"]


def test_maps_are_not_written_over_the_data(tmp_path):
    class Maps(list):
        def get_data_info(self, i):
            return dict(img_path=str(tmp_path / "images" / "a.jpg"), seg_map_path=str(tmp_path / "labels" / "a.png"))

    (tmp_path / "link").symlink_to(tmp_path / "labels")
    for folder, refused in (("out", False), ("link", True), ("images/../labels", True), ("images", True)):
        if refused:
            with pytest.raises(UserError, match=r"holds the data, and results would be written over it"):
                checks.check_written_names(Maps([0]), False, [str(tmp_path / folder)])
        else:
            checks.check_written_names(Maps([0]), False, [str(tmp_path / folder)])
    dataset = dict(type="A", data_root=str(tmp_path), data_prefix=dict(img_path="images", seg_map_path="labels/"))
    cfg = Config(dict(train_dataloader=dict(dataset=dataset), val_evaluator=dict(type="IoUMetric"), model={}))
    for folder, refused in (
        ("out", False),
        (".", False),
        ("link", True),
        ("images/../labels/x", True),
        ("images", True),
    ):
        for_all = (
            pytest.raises(UserError, match=r"--out: /.* holds data of train_dataloader") if refused else nullcontext()
        )
        with for_all:
            checks.check_is_no_data(cfg, str(tmp_path / folder), "--out")
    cfg.train_dataloader.dataset.data_prefix = dict(img_path=".")
    checks.check_is_no_data(cfg, str(tmp_path / "out"), "--out")
    cfg.train_dataloader.dataset.data_prefix = dict(img_path="images", seg_map_path="labels/")
    cfg.val_evaluator.output_dir = str(tmp_path / "labels")
    cfg.val_dataloader = dict(dataset=dict(type="A", pipeline=[]))
    with pytest.raises(UserError, match=r"val_evaluator\.output_dir=/.*labels: .* holds data of train_dataloader"):
        checks.check_data(cfg, ("val",))


def test_metrics_of_mmdet_remove_no_file_of_others(tmp_path):
    for kind, own, foreign in (
        ("MOTChallengeMetric", "default-tracker/a.txt", "epoch_1.pth"),
        ("CityScapesMetric", "results/a.png", "results/mine.csv"),
    ):
        metric = ConfigDict(type=kind, outfile_prefix=str(tmp_path / kind))
        for name, refused in ((own, False), (foreign, True)):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / name).touch()
            with pytest.raises(UserError, match=f"{kind} would remove .*{foreign}") if refused else nullcontext():
                checks._check_removes_nothing(metric, "test")


def test_a_name_makes_no_line_of_its_own():
    """Nor does the traceback in which a data loader's worker wraps an error."""
    assert str(UserError("a\nerror: b\x1b[0m")) == r"a\nerror: b\x1b[0m"
    wrapped = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    assert str(UserError(f"{wrapped}classification.errors.UserError: a.png: no\n")) == "a.png: no"


def test_a_folder_of_best_checkpoints_alone(tmp_path, monkeypatch):
    """They are of weights only: no run goes on from them, and a new one would overwrite them."""
    (tmp_path / "best_mIoU_iter_6.pth").touch()
    args, cfg = argparse.Namespace(work_dir=str(tmp_path), config="c.py", resume="a.pth"), Config(dict())
    with pytest.raises(
        UserError, match=r"holds best_mIoU_iter_6\.pth of an earlier run, which this one would overwrite"
    ):
        tools._check_nothing_is_overwritten(args, cfg)
    with pytest.raises(UserError, match=r"holds only best_mIoU_iter_6\.pth, from which no run can go on"):
        tools._check_nothing_is_lost(args, cfg)
    # CheckpointHook's out_dir has a folder of the work dir's name.
    elsewhere = argparse.Namespace(work_dir=f"work/{tmp_path.name}", config="c.py")
    saved = Config(dict(default_hooks=dict(checkpoint=dict(out_dir=str(tmp_path.parent)))))
    with pytest.raises(UserError, match=r"holds best_mIoU_iter_6\.pth of an earlier run"):
        tools._check_nothing_is_overwritten(elsewhere, saved)
    tools._check_nothing_is_overwritten(elsewhere, cfg)
    (tmp_path / "step_000007.pth").touch()  # by a template of the config
    saved.default_hooks.checkpoint.filename_tmpl = "step_{:06d}.pth"
    with pytest.raises(UserError, match=r"holds step_000007\.pth of an earlier run"):
        tools._check_nothing_is_overwritten(elsewhere, saved)
    (tmp_path / "step_000007.pth").unlink()
    # A run that goes on from another folder's checkpoint is another run.
    cfg.load_from = str(tmp_path / "other" / "iter_5.pth")
    with pytest.raises(UserError, match=r"of an earlier run, which the one that goes on from .*iter_5\.pth would"):
        tools._check_no_other_run_is_overwritten(args, cfg)
    cfg.load_from = str(tmp_path / "iter_5.pth")
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    for newest in ("iter_4.pth", "iter_5.pth", "iter_10.pth"):
        (tmp_path / newest).touch()
        tools._check_no_other_run_is_overwritten(args, cfg)
    args.resume, cfg.load_from = None, str(tmp_path / "other" / "iter_5.pth")
    with pytest.raises(UserError, match="of an earlier run"):
        tools._check_no_other_run_is_overwritten(args, cfg)
    assert "c.py: has resume=True, so this run goes on with that of " in said.pop()
    (said,) = said
    assert "the run goes back to iter_5.pth, and overwrites its later checkpoints up to iter_10.pth" in said


def test_what_another_process_leaves_behind_is_one_line(monkeypatch):
    def work(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(tools, "_read_config", lambda *_: None)
    error = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [::1]:1: Connection reset by peer"
    waits = []
    monkeypatch.setattr("classification.errors.time.sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(
            SystemExit, match=r"another process .* \(Read error \[::1\]:1: Connection reset by peer\); "
        ):
            tools._run(work, argparse.Namespace(), "mmdet")
    assert waits == [20]  # for the first process of the machine to say it
    monkeypatch.setattr("classification.errors.time.sleep", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="another process"):
        tools._run(work, argparse.Namespace(), "mmdet")
    error = "of another kind"
    with pytest.raises(RuntimeError, match=error):
        tools._run(work, argparse.Namespace(), "mmdet")


def test_images_of_another_suffix_are_counted(tmp_path, monkeypatch):
    """mmsegmentation passes over them."""
    said = []
    monkeypatch.setattr(label_maps, "print_log", lambda message, level: said.append(message))
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.JPG", "c.png", "notes.txt"):
        (folder / name).touch()

    class WithDefault:
        def __init__(self, img_suffix=".jpg", **others):
            pass

    class Inherits(WithDefault):
        pass

    for kind, suffix, left_out in ((Inherits, None, "2 images"), (dict, ".png", "2 images"), (dict, None, None)):
        dataset = dict(type=kind, data_root=str(tmp_path), data_prefix=dict(img_path="images", seg_map_path="labels"))
        (tmp_path / "labels").mkdir(exist_ok=True)
        cfg = Config(
            dict(model={}, train_dataloader=dict(dataset=dataset | ({"img_suffix": suffix} if suffix else {})))
        )
        checks.check_data(cfg, ("train",))
        assert [left_out in message for message in said] == [True] * bool(left_out)
        said.clear()


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        ("images", "labels", True),
        ("images", "images/labels", True),  # the folder of maps below that of images, or the other way round
        ("labels/images", "labels", True),
        ("images", "images/", False),
        (".", None, False),
    ],
)
def test_label_maps_without_an_image_are_counted(images, labels, found, tmp_path, monkeypatch):
    """As of images that were lost in a copy; but not maps of another split, nor maps in colour to look at."""
    said = []
    monkeypatch.setattr(label_maps, "print_log", lambda message, level: said.append(message))
    modes = {"a.png": "L", "a_colour.png": "RGB", "a1.png": "L", "a_flip.png": "P", "c.png": "L", "a1.txt": "L"}
    maps = {f"{labels}/{name}": mode for name, mode in modes.items() if labels}
    for name, mode in {f"{images}/a.jpg": "RGB", f"{images}/d.jpeg": "RGB", "others/c.jpg": "RGB", **maps}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (4, 4)).save(tmp_path / name, format="JPEG" if "jp" in name else "PNG")

    def loader(folder: str) -> dict:
        prefix = dict(img_path=folder, **({"seg_map_path": labels} if labels else {}))
        return dict(dataset=dict(type=WithSuffixes, data_root=str(tmp_path), data_prefix=prefix))

    checks.check_data(
        Config(dict(model={}, train_dataloader=loader(images), val_dataloader=loader("others"))), ("train",)
    )
    suffix = [one for one in said if "for example d.jpeg, are left out, for img_suffix is '.jpg'" in one]
    assert len(suffix) == (labels != "images/")
    alone = (
        f"2 label maps of {tmp_path / (labels or '')}, for example a1.png, are left out, for there is no such image in "
    )
    assert [alone in message for message in said if message not in suffix] == [True] * found


class WithSuffixes:
    def __init__(self, img_suffix=".jpg", seg_map_suffix=".png"):
        pass

    @classmethod
    def get_label_map(cls):
        pass


def test_colours_of_other_classes_are_refused():
    """mmseg raises an error that prints all its metainfo; it chooses the colours of a known data set's classes."""
    metainfo = dict(classes=["a", "b", "c"], palette=[[0, 0, 0], [1, 1, 1]])
    dataset = ConfigDict(type=WithSuffixes, metainfo=metainfo)
    with pytest.raises(
        UserError, match=r"k\.metainfo\.palette has 2 colours, but there are 3 classes; .* palette=\[\]"
    ):
        checks._check_dataset(dataset, "k", Config(dict(model={})))
    dataset.metainfo.palette = []
    checks._check_dataset(dataset, "k", Config(dict(model={})))


PICKLES = {
    "ann_file": ({"ann_file": "a.pkl"}, r"a\.pkl: is a pickle.*ann_file\); write the annotations as JSON"),
    "proposals": ({"proposal_file": "p.pickle"}, r"p\.pickle: is a pickle.*proposal_file\); leave it out"),
    "elsewhere": ({"ann_file": "s3://a.pkl", "backend_args": {"backend": "petrel"}}, r"s3://a\.pkl: is a pickle"),
    "wrapped": ({"type": "RepeatDataset", "dataset": {"ann_file": "a.PKL"}}, r"a\.PKL: is a pickle"),
    "pipeline": ({"pipeline": [{"type": "X", "decode_backend": "pickle"}]}, r"decode_backend is 'pickle'"),
    "tree": ({"hierarchy_file": "tree.np"}, r"tree\.np: is no array of numbers but a pickle"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_data_in_pickles_is_refused_before_it_is_loaded(kind, tmp_path, monkeypatch):
    """And where a config hides one, mmengine does not unpickle it."""
    monkeypatch.chdir(tmp_path)
    dataset, message = PICKLES[kind]
    np.save(tmp_path / "tree", np.array([Runs(tmp_path / "ran")], dtype=object))
    (tmp_path / "tree.npy").rename(tmp_path / "tree.np")
    cfg = Config(dict(model={}, train_dataloader=dict(dataset={"type": "BaseDetDataset", **dataset})))
    with pytest.raises(UserError, match=message):
        checks.check_data(cfg, ("train",))
    dump({"a": 1}, "a.pkl")  # predictions are still written so
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    for path in ("a.pkl", tmp_path / "a.pkl"):
        with pytest.raises(UserError, match=r"a pickle loaded, which can run code"):
            load(path)
    assert not (tmp_path / "ran").exists()


def test_images_that_pillow_would_clip_are_named(tmp_path, monkeypatch):
    """imdecode_backend="pillow" makes 16 bits white; cv2 scales them."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)
    plain, pillow = [dict(type="LoadImageFromFile", imdecode_backend=name) for name in ("cv2", "pillow")]
    for step, check in (
        (dict(type="LoadImageFromFile"), dict(backend="cv2")),
        (plain, dict(backend="cv2")),
        ({**plain, "ignore_empty": True}, dict(backend="cv2", ignore_empty=True)),
        (pillow, dict(backend="pillow")),
        ({**pillow, "color_type": "unchanged"}, dict(backend="pillow", unchanged=True)),
        ({**plain, "color_type": "unchanged"}, dict(backend="cv2", unchanged=True)),
    ):
        cfg = Config(dict(train_dataloader=dict(dataset=dict(pipeline=[dict(step)]))))
        for _ in range(2):
            pipelines.insert_image_checks(cfg)
        first, load, *after = cfg.train_dataloader.dataset.pipeline
        assert first == dict(type="CheckImage", unchanged=False, ignore_empty=False) | check
        assert load == step
        assert after == [dict(type="CheckValues")] * ("color_type" in step)
    assert isinstance(TRANSFORMS.build(dict(type="CheckBits", unchanged=True)), CheckImage)  # of an older saved config
    assert tools.transforms  # where these steps are registered, whatever the config imports
    results = {"img_path": str(path)}
    loading = pytest.importorskip("mmcv.transforms", reason="make install-openmmlab")
    read = loading.LoadImageFromFile(imdecode_backend="pillow")(dict(results))["img"]
    assert (read == 255).all()  # the reason for this
    with pytest.raises(UserError, match=r"deep\.png: is of mode I;16, which imdecode_backend='pillow' clips"):
        CheckImage("pillow")(results)
    grey = Image.fromarray(np.full((4, 4), 30, np.uint8))
    grey.save(path)
    assert CheckImage("pillow")(results) is results
    grey.save(tmp_path / "white.tif", tiffinfo={262: 0, 284: 2})
    with pytest.raises(
        UserError, match=r"white\.tif: its bands are stored one after another .*; or leave imdecode_backend"
    ):
        CheckImage("pillow")({"img_path": str(tmp_path / "white.tif")})


def test_values_that_are_loaded_as_they_are(tmp_path, monkeypatch):
    """color_type="unchanged" gives 16 bits, floats and numbers of palettes to a normalisation that is for 8 bits."""
    loading = pytest.importorskip("mmcv.transforms", reason="make install-openmmlab")
    cv2 = pytest.importorskip("cv2")
    path, said = tmp_path / "a.png", []
    monkeypatch.setattr(transforms, "print_log", lambda message, **_: said.append(message))
    step = dict(type="LoadImageFromFile", color_type="unchanged")
    cases = [(step | dict(to_float32=floats), deep, ".png") for floats in (False, True) for deep in (1, 257)]
    cases += [(step, 1 / 256, ".tiff"), (step | dict(imdecode_backend="pillow"), "P", ".png")]
    for kwargs, factor, suffix in cases:
        cfg = Config(dict(train_dataloader=dict(dataset=dict(pipeline=[dict(kwargs)]))))
        pipelines.insert_image_checks(cfg)
        before, _, after = map(TRANSFORMS.build, cfg.train_dataloader.dataset.pipeline)
        load = loading.LoadImageFromFile(**{key: value for key, value in kwargs.items() if key != "type"})
        image = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))
        if factor == "P":
            image.quantize(8).save(path)
        else:
            kind = np.uint8 if factor == 1 else np.uint16 if factor > 1 else np.float32
            values = (np.asarray(image, float) * factor).astype(kind)
            cv2.imwrite(str(path.with_suffix(suffix)), values)
        for _ in range(2):
            results = after(load(before({"img_path": str(path.with_suffix(suffix))})))
        loaded = results["img"]
        if factor == "P":
            assert loaded.ndim == 2  # indices
            expected = f"{path}: is of mode P, and color_type='unchanged' loads its values as they are"
        else:
            np.testing.assert_allclose(loaded, values)  # the reason for this
            expected = f"{path.with_suffix(suffix)}: is not of 8 bits, and color_type='unchanged' loads its values as"
        assert [one[: len(expected)] for one in said] == [expected] * (factor != 1)
        said.clear()
    (tmp_path / "dark.pgm").write_bytes(b"P5 1 1 100\nd")
    CheckImage(unchanged=True)({"img_path": str(tmp_path / "dark.pgm")})
    assert "dark.pgm: has 100 for white, but OpenCV takes 255" in said[0]


def test_images_that_opencv_misreads_are_named(tmp_path, monkeypatch):
    """It takes 255 or 65535 for white in a PGM or PPM, whatever its header says; and names no file that is empty."""
    read = pytest.importorskip("mmcv.transforms", reason="make install-openmmlab").LoadImageFromFile()
    said = []
    monkeypatch.setattr(transforms, "print_log", lambda message, **_: said.append(message))
    for kind, bands in (("P5", 1), ("P6", 3), ("P2", 1)):
        for white in (100, 255, 4095, 65535):
            values = np.full((2, 3, bands), white, ">u2" if white > 255 else "u1")
            pixels = values.tobytes() if kind != "P2" else (" ".join(map(str, values.ravel())) + "\n").encode()
            path = tmp_path / f"{kind}-{white}.ppm"
            path.write_bytes(f"{kind} 3 2 {white}\n".encode() + pixels)
            results, check = {"img_path": str(path)}, CheckImage()
            for _ in range(2):
                assert check(results) is results
            misread = bool((read(dict(results))["img"] != 255).any())
            assert [f"{path}: has {white} for white, but OpenCV takes" in one for one in said] == [True] * misread
            said.clear()
    for name, kind in (("uint8", np.uint8), ("uint16", np.uint16), ("int16", np.int16)):
        path, results = tmp_path / f"{name}.tif", {"img_path": str(tmp_path / f"{name}.tif")}
        tags = {} if kind is np.uint8 else {339: 2 if kind is np.int16 else 1}
        Image.fromarray(np.full((2, 3), np.iinfo(kind).max, np.uint16 if tags else kind)).save(path, tiffinfo=tags)
        assert CheckImage()(results) is results
        misread = bool((read(dict(results))["img"] != 255).any())
        assert misread == (kind is np.int16)
        assert [f"{path}: has numbers with a sign (SampleFormat 2)" in one for one in said] == [True] * misread
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.hdr"), np.full((4, 4, 3), 2, np.float32))
    assert (read({"img_path": str(tmp_path / "a.hdr")})["img"] == 255).all()
    CheckImage()({"img_path": str(tmp_path / "a.hdr")})
    assert "a.hdr: is a Radiance HDR, whose white OpenCV takes for 1, and clips what is above: convert" in said[-1]
    (tmp_path / "a.pfm").write_bytes(b"Pf\n1 1\n-1\n" + np.float32(0.4).tobytes())
    CheckImage()({"img_path": str(tmp_path / "a.pfm")})
    assert "a.pfm: is a PFM, whose numbers OpenCV rounds to 0 to 255: convert it, and others like it" in said[-1]
    for mode, factor, alpha in (("RGBA", 1, 255), ("RGBA", 1, 128), ("RGBA", 257, 128), ("LA", 1, 128)):
        said.clear()
        path = tmp_path / f"{mode}{factor}-{alpha}.tif"
        if factor == 1:
            Image.new(mode, (1, 1), (200, 100, 50, alpha)[-len(mode) :]).save(path)
        else:
            tags = {256: 1, 257: 1, 258: 134, 259: 1, 262: 2, 273: 142, 277: 4, 278: 1, 279: 8, 338: 2}
            entries = [struct.pack("<HHII", tag, 3, 4 if tag == 258 else 1, value) for tag, value in tags.items()]
            values = np.uint16([16] * 4 + [257 * one for one in (200, 100, 50, alpha)])
            path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 10) + b"".join(entries) + bytes(4) + values.tobytes())
        CheckImage()({"img_path": str(path)})
        truth = [50, 100, 200] if mode == "RGBA" else [50, 50, 50]
        misread = read({"img_path": str(path)})["img"].tolist() != [[truth]]
        assert misread == (mode == "RGBA" and alpha == 128)
        assert [f"{path}: has an alpha band, by which OpenCV multiplies" in one for one in said] == [True] * misread
    grey = [200, 200, 200]
    for bands, white, truth in ((1, 255, grey), (1, 100, [255, 255, 255]), (2, 255, grey), (3, 255, [50, 100, 200])):
        said.clear()
        path = tmp_path / f"{bands}-{white}.pam"
        kind = ("GRAYSCALE", "GRAYSCALE_ALPHA", "RGB")[bands - 1]
        header = f"P7\nWIDTH 2\nHEIGHT 1\nDEPTH {bands}\nMAXVAL {white}\nTUPLTYPE {kind}\nENDHDR\n"
        path.write_bytes(header.encode() + bytes([min(200, white), 100, 50][:bands] * 2))
        CheckImage()({"img_path": str(path)})
        misread = read({"img_path": str(path)})["img"].tolist() != [[truth] * 2]
        assert [f"{path}: is a PAM, of which OpenCV reads greys" in one for one in said] == [True] * misread
    said.clear()
    cv2.imwrite(str(tmp_path / "a.ras"), np.full((4, 4), 200, np.uint8))
    for unchanged, white in ((False, 200), (True, 0)):
        CheckImage(unchanged=unchanged)({"img_path": str(tmp_path / "a.ras")})
        flag = cv2.IMREAD_UNCHANGED if unchanged else cv2.IMREAD_COLOR
        assert (cv2.imread(str(tmp_path / "a.ras"), flag) == white).all()
        assert ["a.ras: is a Sun raster file, whose greys" in one for one in said] == [True] * unchanged
    for name in ("int16.tif", "P5-4095.ppm"):  # `CheckValues` says what they are
        CheckImage(unchanged=True)({"img_path": str(tmp_path / name)})
    assert len(said) == 1
    for mode in ("I;16", "F"):  # a format that main.py does not read, but mmcv does
        Image.new(mode, (2, 2)).save(tmp_path / "a.im")
        with pytest.raises(UserError, match=rf"a\.im: is of mode {mode}, .* clips to 8 bits: convert the image"):
            CheckImage("pillow")({"img_path": str(tmp_path / "a.im")})
    with pytest.raises(UserError, match=r"P5-4095\.ppm: is of mode I, .* clips to 8 bits: convert the image"):
        CheckImage("pillow")({"img_path": str(tmp_path / "P5-4095.ppm")})
    (tmp_path / "empty.jpg").touch()
    for backend in ("cv2", "pillow"):
        with pytest.raises(UserError, match=r"empty\.jpg: is empty; replace it, or take it out of the data"):
            CheckImage(backend)({"img_path": str(tmp_path / "empty.jpg")})
        assert CheckImage(backend, ignore_empty=True)({"img_path": str(tmp_path / "empty.jpg")})


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (dict(bbox_head=dict(type="RetinaHead", num_classes=1)), "model.bbox_head"),
        (dict(mask_head=dict(type="SOLOHead", num_classes=1)), "model.mask_head"),
        (dict(query_head=dict(num_classes=1), bbox_head=[dict(num_classes=2)]), "model.query_head"),
        (dict(roi_head=[dict(bbox_head=[])], bbox_head=[dict(num_classes=2), dict(num_classes=3)]), "model.bbox_head"),
        (dict(roi_head=dict(mask_head=[dict(num_classes=2), dict(num_classes=1)])), "model.roi_head.mask_head"),
        (dict(rpn_head=dict(num_classes=1), panoptic_head=dict(num_classes=9), train_cfg=None), None),
        (dict(bbox_head=dict(type="mmdet.GroundingDINOHead", num_classes=256)), None),
    ],
)
def test_heads_have_the_data_sets_classes(model, key):
    """Labels from num_classes on are mmdet's background."""
    dataset = dict(type="CocoDataset", metainfo=dict(classes=("cat", "dog")))
    cfg = Config(dict(model=model, train_dataloader=dict(dataset=dataset)))
    if key is None:
        checks.check_data(cfg, ("train",))
    else:
        with pytest.raises(
            UserError, match=rf"^{key}\.num_classes is [13], but train_dataloader.dataset has 2 classes"
        ):
            checks.check_data(cfg, ("train",))


PANOPTIC = {"num_things_classes": 2, "num_stuff_classes": 1}


class Panoptic:
    METAINFO = MappingProxyType(
        {"classes": ("cat", "dog", "sky"), "thing_classes": ("cat", "dog"), "stuff_classes": ("sky",)}
    )


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        (dict(panoptic_fusion_head=PANOPTIC), {}, None),
        (dict(panoptic_fusion_head=None), {}, None),
        (dict(panoptic_fusion_head={}), {}, None),  # as good as none
        (
            dict(panoptic_fusion_head=dict(PANOPTIC, num_things_classes=3)),
            {},
            "model.panoptic_fusion_head.num_things_classes is 3, but model.panoptic_head.num_things_classes is 2 (80",
        ),
        (
            dict(panoptic_fusion_head=dict(num_things_classes=2)),
            {},
            "model.panoptic_fusion_head.num_stuff_classes is 53, but model.panoptic_head.num_stuff_classes is 1 (53",
        ),
        (
            dict(
                panoptic_head=None, semantic_head=PANOPTIC, panoptic_fusion_head=PANOPTIC, roi_head=dict(mask_head={})
            ),
            {},
            "model.roi_head.mask_head.num_classes is 80, but model.semantic_head.num_things_classes is 2 (80",
        ),
        (
            dict(panoptic_fusion_head=PANOPTIC),
            dict(metainfo=dict(thing_classes=("cat",), stuff_classes=("dog", "sky"))),
            "the model's num_things_classes is 2, but train_dataloader.dataset has 1 such classes",
        ),
        (
            dict(panoptic_fusion_head=PANOPTIC),
            dict(type="CocoDataset", metainfo=dict(classes=("cat",))),
            "the model's num_things_classes is 2, but train_dataloader.dataset has 1 classes",
        ),
    ],
)
def test_things_and_stuff_are_as_many_everywhere(model, dataset, message):
    """Or a panoptic model's predictions are of other classes than its queries."""
    model = {"panoptic_head": PANOPTIC, **model}
    cfg = Config(dict(model=model, train_dataloader=dict(dataset={"type": Panoptic, **dataset})))
    if message is None:
        checks.check_data(cfg, ("train",))
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            checks.check_data(cfg, ("train",))


def test_what_is_ignored_is_the_same_everywhere():
    """Or IoUMetric counts as errors what the head has not learnt, and padding is learnt."""
    head = dict(type="UPerHead", ignore_index=254)
    model = dict(data_preprocessor=dict(type="SegDataPreProcessor"), decode_head=head)
    model["auxiliary_head"] = [dict(type="FCNHead"), dict(type="STDCHead")]
    pads = [dict(type="Pad", pad_val=3), dict(type="Pad", pad_val=dict(seg=254))]
    steps = [*pads, dict(type="RandomApply", transforms=[dict(type="RandomRotate")]), dict(type="RandomCrop")]
    metrics = [dict(type="DepthMetric"), dict(type="mmseg.IoUMetric")]
    cfg = Config(dict(
        model=model, train_dataloader=dict(dataset=dict(type="BaseSegDataset", pipeline=steps)), val_evaluator=metrics,
        test_evaluator=dict(type="IoUMetric", ignore_index=250),
    ))  # fmt: skip
    train = "train_dataloader.dataset.pipeline"
    for splits, keys in (
        (("train", "val"), (f"{train}.Pad.pad_val.seg is 255, {train}.RandomRotate.seg_pad_val is 255, "
                            "val_evaluator[1].ignore_index is 255, model.data_preprocessor.seg_pad_val is 255, "
                            "model.auxiliary_head[0].ignore_index is 255")),
        (("test",), "test_evaluator.ignore_index is 250"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(f"of model.decode_head is 254, but {keys} (255 where")):
            checks.check_data(cfg, splits)
    cfg.model = dict(module=cfg.model)  # with --tta
    with pytest.raises(UserError, match=r"test_evaluator\.ignore_index is 250"):
        checks.check_data(cfg, ("test",))
    cfg.test_evaluator.ignore_index = 254
    for value, said in ((0, True), (254, False)):  # mmseg's data sets take the argument, and do not use it
        cfg.test_dataloader = dict(dataset=dict(type="BaseSegDataset", ignore_index=value, pipeline=[dict(type="A")]))
        with pytest.raises(UserError, match=r"test_dataloader\.dataset\.ignore_index is 0") if said else nullcontext():
            checks.check_data(cfg, ("test",))
    cfg.model = cfg.model.module
    cfg.model.data_preprocessor.seg_pad_val = cfg.model.auxiliary_head[0].ignore_index = 254
    steps = cfg.train_dataloader.dataset.pipeline
    steps[0].pad_val, steps[2].transforms[0].seg_pad_val = dict(img=0, seg=254), 254
    cfg.val_evaluator[1].ignore_index = cfg.test_evaluator.ignore_index = 254
    checks.check_data(cfg, ("train", "val", "test"))
    steps += [dict(type="RandomCrop", cat_max_ratio=0.75), dict(type="GenerateEdge")]
    cfg.model.decode_head.loss_decode = [dict(type="CrossEntropyLoss"), dict(type="TverskyLoss"), dict(type="DiceLoss")]
    cfg.model.auxiliary_head[0].loss_decode = dict(type="HuasdorffDisstanceLoss", ignore_index=255)
    keys = (
        f"{train}.RandomCrop.ignore_index is 255, {train}.GenerateEdge.ignore_index is 255, "
        "model.decode_head.loss_decode[1].ignore_index is 255, model.decode_head.loss_decode[2].ignore_index is 255, "
        "model.auxiliary_head[0].loss_decode.ignore_index is 255 (255 where"
    )
    with pytest.raises(UserError, match=re.escape(f"of model.decode_head is 254, but {keys}")):
        checks.check_data(cfg, ("train",))
    generates = dict(type="FCNHead", ignore_index=7, loss_decode=dict(type="OhemCrossEntropy", ignore_label=8))
    knet = dict(type="IterativeDecodeHead", kernel_generate_head=generates, kernel_update_head=[dict(num_classes=3)])
    of_knet = Config(dict(model=dict(decode_head=knet), train_dataloader=dict(dataset=dict(type="BaseSegDataset"))))
    key = "model.decode_head.kernel_generate_head.loss_decode.ignore_label is 8"
    with pytest.raises(UserError, match=re.escape(f"the ignore_index of model.decode_head is 7, but {key} (255")):
        checks.check_data(of_knet, ("train",))
    of_knet.train_dataloader.dataset.metainfo = dict(classes=("a", "b"))
    with pytest.raises(UserError, match=r"kernel_update_head\[0\]\.num_classes is 3, but .* has 2 classes"):
        checks.check_data(of_knet, ("train",))
    for other in (dict(type="UPerHead", ignore_index=None), dict(type="VPDDepthHead"), None):
        cfg.model.decode_head = other
        checks.check_data(cfg, ("train", "val", "test"))


def test_subclasses_are_checked_as_what_they_inherit_from():
    """Types that a user registers, by any name, unless they read, load or compare otherwise."""
    pytest.importorskip("mmseg", reason="make install-openmmlab")

    class Mine(METRICS.get("mmseg.IoUMetric")):
        pass

    class Counts(Mine):
        def compute_metrics(self, results):
            return {}

    class MyLoad(TRANSFORMS.get("mmseg.LoadAnnotations")):
        def transform(self, results):
            return super().transform(results)

    class Named(MyLoad):
        def transform(self, results):
            return MyLoad.transform(self, results)

    class OfColours(MyLoad):
        def _load_seg_map(self, results):
            results["gt_seg_map"] = None

    class Anything:
        pass

    for kind, works in (
        (MyLoad, True),
        (Named, True),
        (OfColours, False),
        ("mmseg.LoadAnnotations", True),
        ("Foreign", False),
    ):
        step = ConfigDict(type=kind)
        assert config_parts.works_as(step, "LoadAnnotations") == works
        assert config_parts.is_kind(step, "LoadAnnotations") == (kind != "Foreign")
        # Labels are checked after each step that loads them as mmseg does.
        cfg = Config(dict(default_scope="mmseg", model=dict(decode_head=dict(num_classes=2))))
        cfg.train_dataloader = dict(dataset=dict(type=Anything, pipeline=[dict(type=kind)]))
        pipelines.insert_label_checks(cfg)
        steps = cfg.train_dataloader.dataset.pipeline
        if kind == "Foreign":
            assert [one.type for one in steps] == [kind]
        else:  # what it loads is checked in any case, the file only if it holds the same
            assert [one.type for one in steps] == ["CheckMap"] * works + [kind, "CheckLabels"]
            assert steps[-1].get("of_file", True) == works
    hook = dict(type="PipelineSwitchHook", switch_pipeline=[dict(type="LoadAnnotations")])
    cfg.custom_hooks = [hook]
    pipelines.insert_label_checks(cfg)
    assert [one.type for one in cfg.custom_hooks[0].switch_pipeline] == ["CheckMap", "LoadAnnotations", "CheckLabels"]
    for metric, step, message in (
        (Mine, MyLoad, "val_evaluator.ignore_index is 7"),
        (Mine, OfColours, "val_evaluator.ignore_index is 7"),
        (Mine, Anything, "val_evaluator.ignore_index is 7"),  # which may load label maps
        (Mine, "LoadImageFromFile", "has no LoadAnnotations in its pipeline"),
        (Counts, "LoadImageFromFile", "val_evaluator.ignore_index is 7"),
    ):
        cfg = Config(dict(model=dict(decode_head=dict(type="UPerHead")), val_evaluator=dict(type=metric)))
        cfg.val_evaluator.ignore_index = 7
        cfg.val_dataloader = dict(dataset=dict(type="BaseSegDataset", pipeline=[dict(type=step)]))
        with pytest.raises(UserError, match=re.escape(message)):
            checks.check_data(cfg, ("val",))


def maps(folder: str) -> dict:
    return {"data_prefix": {"seg_map_path": folder}}


@pytest.mark.parametrize(
    ("trained", "validated", "message"),
    [
        ({}, {}, None),
        ({}, {"metainfo": {"classes": ("b", "a")}}, "in another order: 'a' is class 0 and 1; make"),
        ({}, {"metainfo": {"classes": ("c", "a")}}, "in another order: 'a' is class 0 and 1; make"),
        ({}, {"metainfo": {"classes": ("c", "d", "c")}}, "val_dataloader.dataset has the class 'c' twice"),
        ({}, {"metainfo": {"classes": ("b",)}}, "in another order: 'b' is class 1 and 0; make"),
        ({}, {"metainfo": {"classes": ("a", "c")}}, None),  # as of trackers: no name is at two places
        ({"model": {"bbox_head": {"type": "GroundingDINOHead"}}}, {"metainfo": {"classes": ("b", "c")}}, None),
        ({"reduce_zero_label": False}, {}, "reduce_zero_label is False in train_dataloader.dataset and True in val"),
        (
            {"reduce_zero_label": False, **maps("a/maps/train")},
            {"data_root": "a/maps", **maps("val")},
            "reduce_zero_label is False in train_dataloader.dataset and True in val_dataloader.dataset; make",
        ),
        ({**maps("a/maps/train")}, {"reduce_zero_label": False, **maps("b/maps/val")}, None),  # reduced already
        ({"reduce_zero_label": False}, {"reduce_zero_label": None}, None),
    ],
)
def test_labels_mean_the_same_in_all_splits(trained, validated, message, monkeypatch):
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, level: said.append(message))
    monkeypatch.setattr(checks, "must_exist", lambda *what: None)

    class Dataset:
        METAINFO = MappingProxyType({"classes": ("a", "b")})

        def __init__(self, reduce_zero_label=True):
            pass

    model = trained.pop("model", {})
    loaders = [dict(dataset=dict(type=Dataset, **given)) for given in (trained, validated)]
    cfg = Config(dict(model=model, train_dataloader=loaders[0], val_dataloader=loaders[1]))
    if message is None:
        checks.check_data(cfg, ("train", "val"))
        found = [text for text in said if "reduce_zero_label is True in train_dataloader.dataset and False in" in text]
        assert len(said) == len(found) == ("data_prefix" in validated)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            checks.check_data(cfg, ("train", "val"))


def trained_so(**changed) -> Config:
    head = dict(type="mmdet.RPNHead", anchor_generator=dict(type="AnchorGenerator", strides=(4, 8)), num_convs=1)
    preprocessor = dict(type="mmdet.DetDataPreprocessor", mean=[123.7, 116, 103], bgr_to_rgb=True, pad_mask=True)
    norm = dict(type="SyncBN", requires_grad=True)
    backbone = dict(type="MM_SpatialMamba", drop_path_rate=0.1, pretrained="a.pth")
    model = dict(data_preprocessor=preprocessor, backbone=backbone, rpn_head=head, neck=dict(norm_cfg=norm))
    schedules = [dict(type="LinearLR", by_epoch=False, end=5), dict(type="PolyLR", end=12)]
    steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(128, 96), keep_ratio=True)]
    cfg = Config(dict(
        model=model, optim_wrapper=dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1)), param_scheduler=schedules,
        train_cfg=dict(max_epochs=12), train_dataloader=dict(batch_size=2),
        test_dataloader=dict(dataset=dict(type="CocoDataset", pipeline=steps)),
    ))  # fmt: skip
    cfg.merge_from_dict(changed)
    return cfg


HEAD, SIZE = "model.rpn_head.anchor_generator", "test_dataloader.dataset.pipeline"


@pytest.mark.parametrize(
    ("changed", "note", "said"),
    [
        ({}, "warn_of_other_config", []),
        (
            {"model.backbone.drop_path_rate": 0.3, "model.backbone.pretrained": None, "model.train_cfg": dict(a=1),
             "model.neck.norm_cfg.type": "BN", "model.data_preprocessor.size": (1, 1), "model.rpn_head.extra": 3},
            "warn_of_other_config",
            [],
        ),
        (
            {"model.data_preprocessor.mean": [0, 0, 0], "model.data_preprocessor.std": [1, 1, 1],
             f"{HEAD}.strides": [8, 16], f"{SIZE}.1.scale": (64, 64)},
            "warn_of_other_config",
            ["a.pth: was trained with another config: model.data_preprocessor.mean was [123.7, 116, 103], is [0, 0, 0]"
             "; model.rpn_head.anchor_generator.strides was [4, 8], is [8, 16]; model.data_preprocessor.std was not set"
             ", is [1, 1, 1]; test_dataloader.dataset.pipeline.Resize.scale was [128, 96], is [64, 64]"],
        ),
        ({f"{HEAD}.n{i}": i for i in range(1, 8)}, "warn_of_other_config", ["n5 was not set, is 5; and 2 more"]),
        ({f"{HEAD}.strides": [1], "model.data_preprocessor.bgr_to_rgb": False}, "warn_of_other_start",
         ["normalised otherwise: model.data_preprocessor.bgr_to_rgb was True, is False"]),
        ({f"{HEAD}.strides": [1], "optim_wrapper.clip_grad.max_norm": 5}, "warn_of_what_goes_on", []),
        (
            {"optim_wrapper.optimizer.lr": 1.0, "param_scheduler.1.end": 36, "train_cfg.max_epochs": 36},
            "warn_of_what_goes_on",
            ["load_from, without --resume): optim_wrapper.optimizer.lr was 0.001, is 1.0; param_scheduler.1.end was 12"
             ", is 36", "end where they did, but training does not: train_cfg.max_epochs was 12, is 36"],
        ),
        ({SIZE: [dict(type="LoadImageFromFile")]}, "warn_of_other_config",
         ["scale was [128, 96], is not set; test_dataloader.dataset.pipeline.Resize.keep_ratio was True, is not set"]),
        (
            {"model.rpn_head.feat_channels": 128, "model.rpn_head.num_classes": 1},  # the second is the default
            "warn_of_other_config",
            ["a.pth: was trained with another config: model.rpn_head.feat_channels was 256, is 128"],
        ),
        ({"auto_scale_lr": dict(enable=True)}, "warn_of_what_goes_on", ["so auto_scale_lr scales nothing"]),
        ({"train_dataloader.batch_size": 4}, "warn_of_what_goes_on", ["train_dataloader.batch_size was 2, is 4"]),
        ({"optim_wrapper.accumulative_counts": 3}, "warn_of_what_goes_on", ["wrapper.accumulative_counts was 1, is 3"]),
        ({"param_scheduler": None}, "warn_of_what_goes_on", ["param_scheduler.0.type was 'LinearLR', is not set"]),
    ],
)  # fmt: skip
def test_what_a_checkpoint_was_trained_with_is_compared(changed, note, said, log):
    """mmengine compares neither: only the names and shapes of weights."""
    meta = {"cfg": trained_so().pretty_text}
    assert saved_config.saved_config(meta).keys() == trained_so().keys()
    getattr(saved_config, note)(trained_so(**changed), meta, "a.pth")

    def warnings() -> list[str]:  # without what mmengine's registries say
        return [record.message for record in log.records if record.levelno >= logging.WARNING]

    found = warnings()
    assert len(found) == len(said), found
    assert all(expected in one for expected, one in zip(said, found, strict=True)), found
    tta = dict(type="TestTimeAug", transforms=[[dict(type="Resize", scale=(1, 1))]])
    cfg = trained_so(test_dataloader=dict(dataset=dict(pipeline=[tta])))
    cfg.model = dict(module=cfg.model)
    saved_config.warn_of_other_config(cfg, meta, "a.pth")
    assert len(warnings()) == len(said)
    cfg.model.data_preprocessor = dict(cfg.model.module.data_preprocessor, mean=[0, 0, 0])  # which mmengine takes
    saved_config.warn_of_other_config(cfg, meta, "a.pth")
    assert warnings()[len(said) :] == [
        "a.pth: was trained with another config: model.data_preprocessor.mean was [123.7, 116, 103], is [0, 0, 0]"
    ]


def test_settings_of_training_alone_matter_to_a_run_that_goes_on(log):
    meta, cfg = {"cfg": trained_so().pretty_text}, trained_so(**{"model.neck.norm_cfg.requires_grad": False})
    saved_config.warn_of_other_config(cfg, meta, "a.pth")
    assert not log.records
    saved_config.warn_of_other_config(cfg, meta, "a.pth", resumed=True)
    assert [record.message for record in log.records] == [
        "a.pth: was trained with another config: model.neck.norm_cfg.requires_grad was True, is False"
    ]


DEEP = 10**5


@pytest.mark.parametrize(
    "text",
    [None, b"a = 1", 3, "a = f()", "a = __import__('os').mkdir('ran')", "a = f'{1}'", "a = 1 if 1 else 2",
     "a = " + "-" * DEEP, "a = " + "(" * DEEP, "a = 1" + "+1" * DEEP, "a = a" + ".a" * DEEP, "a = a" + "()" * DEEP,
     "a = 1" + "[0]" * DEEP, "a = " + "not " * DEEP + "1", "a = " + "lambda: " * DEEP + "1", "a = 1" + ", 1" * 10**6,
     "a = TTTx'0TTT ((( '0'".replace("T", "'"), "a = dict(1)", "a = dict(**{})", "a =", "a\0= 1", "\ud800 = 1",
     "a = {[]: 1}", "a = '" + r"\'" * 2**17],
    ids=range(24),
)  # fmt: skip
def test_a_saved_config_is_read_as_data(text):
    """It is Python's text, of whoever made the checkpoint."""
    assert saved_config.saved_config({"cfg": text}) == {}
    assert saved_config.saved_config(text) == {}


def test_literals_of_a_saved_config_are_what_they_were():
    text = (
        "a = dict(b=[1, (2, )], c={'x y': dict(d=-1e-05), 3: 'it\\'s'})\nb = \"'(\"\n_c = None\nd = [\n    -1.5,\n]\n"
    )
    text += "e = dict(max_norm=inf, min=-inf)\nf = [2j, b'\\x00']\n"
    expected = dict(a=dict(b=[1, [2]], c={"x y": dict(d=-1e-5), 3: "it's"}), b="'(", _c=None, d=[-1.5])
    expected |= dict(e=dict(max_norm=math.inf, min=-math.inf), f=[2j, b"\0"])
    assert saved_config.saved_config({"cfg": text}) == expected


def test_a_config_that_cannot_be_compared_is_named(log):
    for text, said in (("a = f()", True), ("a = 1", False), ("", False)):
        saved_config.warn_of_other_config(trained_so(), {"cfg": text}, "a.pth")
        saved_config.warn_of_other_start(trained_so(), {"cfg": text}, "a.pth")
        assert ["a.pth: the config in it is not read" in one.message for one in log.records] == [True, True] * said
        log.clear()


def test_resuming_keeps_load_from_until_there_is_a_checkpoint(tmp_path, log, monkeypatch):
    def found(asked, **given):
        cfg = Config(dict(given))
        tools._find_what_to_resume(argparse.Namespace(resume=asked, work_dir=str(tmp_path), config="c.py"), cfg)
        return cfg.resume, cfg.load_from

    assert found("auto", load_from="a.pth") == (False, "a.pth")
    assert "nothing to resume yet: training starts from load_from, a.pth" in log.text
    assert found("auto") == (True, None)
    assert found("b.pth", load_from="a.pth") == (True, "b.pth")
    (tmp_path / "epoch_9.pth").touch()
    (tmp_path / "epoch_10.pth").touch()
    for more in ({}, {"load_from": "a.pth"}):  # of a run that was copied without it
        with pytest.raises(UserError, match=r"holds epoch_10\.pth, but no last_checkpoint .* --resume .*epoch_10\.pth"):
            found("auto", **more)
    of_ascii = UnicodeDecodeError("ascii", b"\xc3", 0, 1, "no")
    for content, error, said in (
        (b"\0" * 9, None, r"NUL bytes\): "),
        (b"\xff\xfe", None, r"can't decode byte .*\): "),
        (b"", of_ascii, r"can't decode byte .*\): set PYTHONUTF8=1, or "),
    ):
        (tmp_path / "last_checkpoint").write_bytes(content)
        with monkeypatch.context() as patch:
            if error:
                patch.setattr(tools, "find_latest_checkpoint", mock.Mock(side_effect=error))
            with pytest.raises(UserError, match=rf"last_checkpoint: .* \(.*{said}name the checkpoint by --resume"):
                tools._latest_checkpoint(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("/elsewhere/epoch_9.pth")
    latest = str(tmp_path / "epoch_9.pth")
    assert found("auto", load_from="a.pth") == found(None, resume=True) == (True, latest)


def test_schedules_that_do_not_end_with_training_are_named(monkeypatch):
    """A config that changes the length of training keeps the schedules that it inherits."""
    said = []
    monkeypatch.setattr(hooks, "_warn", said.append)
    warmup = LinearLR(OPTIMIZER, by_epoch=False, end=6)
    steps, endless = MultiStepLR(OPTIMIZER, milestones=[8, 11], end=12), MultiStepLR(OPTIMIZER, milestones=[8, 11])
    cosine, poly = CosineAnnealingLR(OPTIMIZER, T_max=12), PolyLR(OPTIMIZER, by_epoch=False, begin=6, end=48)
    for schedules, epochs, named in (
        ([warmup, steps], 12, []),
        ([warmup, steps], 1, ["LinearLR goes on to iteration 6, but training to 4", "MultiStepLR goes on to epoch 12"]),
        ([warmup, steps], 36, ["MultiStepLR goes on to epoch 12, but training to 36; if both are to end together"]),
        ([warmup, endless], 36, []),  # the last rate lasts
        ([warmup, endless], 10, ["MultiStepLR goes on to epoch 11, but training to 10"]),
        ([warmup], 36, []),
        ({"a": [warmup, cosine], "b": [steps]}, 12, []),
        ({"a": [warmup, cosine], "b": []}, 36, ["CosineAnnealingLR goes on to epoch 12, but training to 36"]),
        ([warmup, CosineAnnealingLR(OPTIMIZER, begin=1, end=12, T_max=12)], 12, []),  # of mmdet's YOLOX
        (
            [CosineAnnealingLR(OPTIMIZER, end=12, T_max=4)],
            12,
            ["CosineAnnealingLR has T_max=4, but 12 epochs"],
        ),
        ([CosineAnnealingLR(OPTIMIZER, end=12, T_max=48)], 12, ["CosineAnnealingLR has T_max=48, but 12 epochs"]),
        ([warmup, poly], 12, []),
        ([warmup, poly], 11, ["PolyLR goes on to iteration 48, but training to 44"]),
        ([steps, poly], 36, ["PolyLR goes on to iteration 48, but training to 144"]),
        (None, 12, []),
    ):
        loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
        lengths = dict(train_loop=loop, max_epochs=epochs, max_iters=4 * epochs)
        hooks.CheckLength().before_train(argparse.Namespace(param_schedulers=schedules, **lengths))
        assert len(said) == len(named)
        assert all(part in text for part, text in zip(named, said, strict=True))
        said.clear()
    with pytest.raises(UserError, match="an epoch has no batch, so nothing is trained"):
        hooks.CheckLength().before_train(argparse.Namespace(param_schedulers=[], max_iters=0))
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)  # whose epochs do not count; another warning says so
    hooks.CheckLength().before_train(argparse.Namespace(param_schedulers=[steps], train_loop=loop, max_iters=4))
    assert said == []


def test_options_that_a_tool_does_not_use_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    options = {"val_evaluator.ann_file": "a.json", "test_dataloader.batch_size": 1, "model.neck": None}
    for tool in ("train", "test", None):
        tools._warn_of_unused_options(argparse.Namespace(tool=tool, cfg_options=options))
    assert said == [
        "--cfg-options test_dataloader.batch_size: train.py does not use them",
        "--cfg-options val_evaluator.ann_file: test.py does not use them",
    ]


def test_variables_that_come_too_late_are_named(tmp_path, monkeypatch):
    """The config that is inherited has used its own values; what is read, or used in the same file, is not meant."""
    said = []
    monkeypatch.setattr(unread_variables, "print_log", lambda message, level: said.append(message))

    def named(path, cfg: dict | None = None) -> list[str]:
        said.clear()
        unread_variables.warn_of_unread_variables(str(path), unread_variables.settings_of(Config(cfg)))
        return [one.partition(": sets ")[2].partition(", which nothing reads")[0] for one in said]

    of_runner = re.findall(r"self\.cfg\.get\(\s*'(\w+)'", inspect.getsource(Runner))
    assert "compile" in of_runner
    assert {*of_runner} <= unread_variables.settings_of(Config())
    lines = [
        "max_iters = 5",
        "root = 'a'",
        "work_dir = root",
        "checkpoint_file = None",
        "train_cfg = dict(by_epoch=True)",
    ]
    for base, found in (("_base_ = 'b.py'", ["max_iters"]), ("", [])):
        (tmp_path / "c.py").write_text("\n".join([base, *lines]))
        assert named(tmp_path / "c.py") == found
    (tmp_path / "c.py").write_text("_base_ = 'b.py'\nmax_iters: int = 5\nsize, (a, b) = 1, (2, 3)\nc: int\nd = a")
    assert named(tmp_path / "c.py") == ["b, d, max_iters, size"]
    (tmp_path / "c.json").write_text(json.dumps({"_base_": "b.py", "max_iters": 5, "work_dir": "a", "size": None}))
    (tmp_path / "c.yaml").write_text("_base_: [./c.json, './b.py']\nwork_dir: a\nsize: 5\ntrain_cfg: {max_iters: 3}")
    assert named(tmp_path / "c.yaml") == ["size", "max_iters"]
    (tmp_path / "c.yaml").write_text("_base_: [./c.json]\ntrain_cfg: {max_iters: '{{ _base_.max_iters }}'}")
    assert named(tmp_path / "c.yaml") == []
    imports = "with read_base():\n    from mmdet.configs.a import *\n"
    (tmp_path / "lazy.py").write_text(f"{imports}max_iters = 5\nsize = 3")
    (tmp_path / "lazier.py").write_text("with read_base():\n    from .lazy import *\nwork_dir = f'{size}'")
    assert named(tmp_path / "lazier.py") == ["max_iters"]
    (tmp_path / "c.py").write_text("_base_ = 'b.py'\ndata_preprocessor = dict(mean=[0, 0, 0])")
    assert named(tmp_path / "c.py", dict(model=dict(data_preprocessor=dict(mean=[1, 1, 1])))) == ["data_preprocessor"]
    assert named(tmp_path / "c.py") == named(tmp_path / "c.py", dict(model=dict(type="A"))) == []
    # A config between, of which a later one reads one variable.
    (tmp_path / "c.py").write_text("\n".join(["_base_ = 'b.py'", "max_epochs = 5", *lines]))
    (tmp_path / "d.py").write_text("_base_ = ['./c.py']\ntrain_cfg = dict(max_epochs={{_base_.max_epochs}})")
    (tmp_path / "e.py").write_text("_base_ = 'd.py'")
    assert named(tmp_path / "e.py") == ["max_iters"]
    for path in Path(__file__).parents[2].glob("*/configs/spatialmamba/*.py"):
        assert named(path) == []


def test_data_root_of_a_config_that_names_classes(tmp_path):
    """A new-style config holds classes, and mmengine writes it as text after the option is merged."""
    (tmp_path / "base.py").write_text("data_root = 'a/'\n")
    (tmp_path / "c.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "from mmengine.dataset import BaseDataset\n"
        "model = dict(layers=[dict(type=BaseDataset)])\n"
        "train_dataloader = dict(dataset=dict(type=BaseDataset, data_root='a/', ann_file='a/b.json'))\n"
    )
    cfg = Config.fromfile(str(tmp_path / "c.py"))
    tools.merge_options(cfg, {"data_root": "e"})
    assert "ann_file='e/b.json'" in cfg.pretty_text
    assert "mmengine.dataset.BaseDataset" in cfg.pretty_text


def test_misspelt_options_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    right = {"data_root": "b", "load_from": "a.pth", "val_cfg.x": 1, "tta_pipeline": [], "model.bakbone": 1}
    tools.merge_options(Config(dict(model={}, data_root="a/", test_pipeline=[])), right)
    assert said == []
    tools.merge_options(Config(dict(model={})), {"mine": 1, "seed": 42, "data.samples_per_gpu": 1})
    assert [one.partition("nothing reads it")[2] for one in said] == [
        *(" but code of your own", "; randomness.seed is its newer name", "; train_dataloader is its newer name")
    ]
    said.clear()
    named = dict(classes=("cat", "dog"))  # one is called as the folder
    cfg = Config(dict(model={}, data_root="cat/", metainfo=named, a=dict(classes="cat/names.txt"), b=["cat", "cat/d"]))
    tools.merge_options(cfg, {"data_root": "e"})
    assert (cfg.metainfo.classes, cfg.a.classes, cfg.b) == (("cat", "dog"), "e/names.txt", ["e", "e/d"])
    tools.merge_options(Config(dict(model={}, max_epochs=12)), {"max_epochs": 36, "data_root": "b"})
    assert ["changes nothing now" in said[0], "none that could be replaced" in said[1]] == [True, True]
    said.clear()
    # A config that inherits another one has a data_root of its own, but the data sets have the other's.
    inner = dict(dataset=dict(type="RepeatDataset", dataset=dict(data_root="data/coco/")))
    for root, option, lost in (("", "b", True), ("a/", None, True), ("a/", "b", True), ("data/coco", "b", False)):
        cfg = Config(dict(model={}, data_root=root, train_dataloader=inner))
        tools.merge_options(cfg, {"data_root": option} if option else {})
        assert ["no data is read from there: train_dataloader.dataset has data/coco/" in one for one in said] == [
            True
        ] * lost
        said.clear()
    for key, meant in (("data_rot", "data_root"), ("load_form", "load_from"), ("optim_wraper.x", "optim_wrapper")):
        cfg = Config(dict(model={}, data_root="a/"))
        tools.merge_options(cfg, {key: 1})
        assert said == [f"--cfg-options {key}: the config has no {key.partition('.')[0]}; is {meant} meant?"]
        said.clear()

    class Takes(dict):
        def __init__(self, scales=None):
            pass

    loader = dict(batch_size=2, dataset=dict(type=Takes, scale=1, pipeline=[dict(type=Takes, scale=1)]))
    within = "train_dataloader.dataset.pipeline.0"
    for key, place, part, meant in (
        ("train_dataloader.batch_sise", "train_dataloader", "batch_sise", "batch_size"),
        ("train_dataloader.datset.scale", "train_dataloader", "datset", "dataset"),
        (f"{within}.scalle", within, "scalle", "scale"),
        (f"{within}.scales", None, None, None),  # which the class has
        (f"{within}.new", None, None, None),
        (f"{within}.scale", None, None, None),
        ("train_dataloader.dataset.pipeline.7.scalle", None, None, None),  # of which mmengine says more
        ("optim_wrapper.paramwise_cfg.custom_keys.head1.lr_mult", None, None, None),
    ):
        keys = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=1))))
        cfg = Config(dict(train_dataloader=loader, optim_wrapper=keys))
        with suppress(KeyError):
            tools.merge_options(cfg, {key: 1})
        assert said == ([f"--cfg-options {key}: {place} has no {part}; is {meant} meant?"] if place else []), key
        said.clear()


def test_advice_beside_the_libraries_errors(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="make install-openmmlab")
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 5, 4)]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path := tmp_path / "map.png")
    results = dict(seg_map_path=str(path), reduce_zero_label=False, seg_fields=[])
    load = TRANSFORMS.build(dict(type="mmseg.LoadAnnotations", reduce_zero_label=True))
    by_opencv = TRANSFORMS.build(dict(type="mmseg.LoadAnnotations", imdecode_backend="cv2"))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(odd := tmp_path / "map.im")
    preprocess = MODELS.build(dict(type="mmseg.SegDataPreProcessor", test_cfg=dict(size_divisor=32)))
    no_decay = dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    for call, advice in (
        (lambda: torch.nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1)), "batch_size to 2 or more"),
        (lambda: preprocess(dict(inputs=images, data_samples=None)), "set batch_size=1 of the data loader"),
        (lambda: load(results), "make that of LoadAnnotations, too, equal to it"),
        (lambda: by_opencv({**results, "seg_map_path": str(odd)}), "does not read a label map: write it as PNG"),
        (lambda: "é".encode("ascii"), "the locale is ASCII, for which set PYTHONUTF8=1, or an address has other"),
        (lambda: cv2.resize(np.zeros((8, 3000)), (128, 0)), "an image is so thin that no pixel is left"),
        (lambda: torch.ones(11)[torch.tensor(255)], "of images that are smaller than data_preprocessor.size"),
        (lambda: build_optim_wrapper(LAYER, no_decay), "set optim_wrapper.optimizer.weight_decay"),
        (lambda: {}["flip"], "DetTTAModel needs to know whether an image is mirrored; add a RandomFlip"),
        (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"."), "the disk of the work folder or of --out is full"),
    ):
        with pytest.raises(UserError, match=advice), tools._with_advice():
            call()
    with pytest.raises(ValueError, match="another"), tools._with_advice():
        raise ValueError("another")


class EinsumHead(torch.nn.Module):
    """As a head of panoptic segmentation: its last product is no layer's."""

    def forward(self, features: torch.Tensor) -> tuple:
        return [features], [torch.einsum("bchw,bdhw->bcd", features, features)]


class ModelOfParts(torch.nn.Module):
    """With a part called `module`, as wrappers of models have."""

    def __init__(self):
        super().__init__()
        self.module, self.panoptic_head = torch.nn.Identity(), EinsumHead()

    def forward(self, images: torch.Tensor) -> list:
        self.panoptic_head(self.module(images))
        return []


def test_rates_are_not_scaled_by_accumulation(monkeypatch):
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, **_: said.append(message))
    for counts, enable in ((1, True), (4, False), (4, True)):
        tools._warn_of_accumulation(
            Config(dict(optim_wrapper=dict(accumulative_counts=counts), auto_scale_lr=dict(enable=enable)))
        )
    assert [one.rpartition(", set")[2] for one in said] == [" its lr 4 times as high"]


def test_a_message_after_a_traceback():
    """Of a worker, about a file whose name has a line break."""
    worker = "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback:\n  File ..., in ...\n"
    error = FileNotFoundError(f"{worker}FileNotFoundError: failed to load image: e\nvil.png")
    with pytest.raises(UserError, match=r"^failed to load image: e\\nvil\.png; replace it"), tools._with_advice():
        raise error


def test_products_of_heads_are_finite():
    run, hook = argparse.Namespace(model=ModelOfParts()), hooks.CheckPredictions()
    assert hooks.unwrapped(run.model) is run.model
    hook.before_test_epoch(run)
    run.model(torch.ones(1, 3, 4, 4))
    with pytest.raises(UserError, match="what the model computes in panoptic_head is not finite"):
        run.model(torch.full((1, 3, 4, 4), 1e25))
    hook.after_test_epoch(run)
    run.model(torch.full((1, 3, 4, 4), 1e25))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--resume", ""], "resume is empty, as from a variable that is not set"),
        (["--resume=a.pth", "--cfg-options", "data_root="], "--cfg-options data_root= is empty, as from a variable"),
    ],
)
def test_empty_options(options, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "a.py", *options])
    with pytest.raises(SystemExit):
        tools.train("mmdet")
    assert expected in capsys.readouterr().err


def test_misspelt_settings_are_named(monkeypatch):
    """Where the toolchains take any name, and look for some."""
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    right = dict(norm_decay_mult=0, custom_keys={"head": {}, "absolute_pos_embed": {}, "backbone": {}})
    cfg = Config(dict(model=dict(test_cfg=dict(mode="slide", rcnn={})), optim_wrapper=dict(paramwise_cfg=right)))
    model = torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(1, 1), head=torch.nn.Linear(1, 1)))
    tools._warn_of_misspelt_settings(cfg)
    tools._warn_of_unknown_keys(cfg, model)
    assert said == []
    cfg.optim_wrapper.paramwise_cfg = dict(norm_decay=0, custom_keys={"backbonne": {}})
    cfg.merge_from_dict(dict(auto_scale_lr=dict(enabled=True), model=dict(test_cfg=dict(mod="slide"))))
    tools._warn_of_misspelt_settings(cfg)
    tools._warn_of_unknown_keys(cfg, model)
    assert [one.rpartition("; is ")[2] for one in said] == [
        *("norm_decay_mult meant?", "enable meant?", "mode meant?", "'backbone' meant?")
    ]
    cfg.optim_wrapper.paramwise_cfg = 3
    with pytest.raises(UserError, match=r"optim_wrapper\.paramwise_cfg is 3, not a dict"):
        tools._warn_of_misspelt_settings(cfg)


def test_classes_of_a_checkpoint_are_the_data_sets(tmp_path, log):
    """mmengine keeps their names, and does not look at them."""
    model = torch.nn.Linear(2, 3)
    names = ("cat", "dog", "owl")
    for meta in ({"dataset_meta": {"classes": names}}, {"dataset_meta": {"CLASSES": names}}, {"CLASSES": names}):
        path = save({"meta": meta, "state_dict": model.state_dict()}, tmp_path / "m.pth")
        checks.check_checkpoint(model, path, classes=["cat", "dog", "owl"])
        checks.check_checkpoint(model, path)
        for other, message in (
            (
                ["cat", "owl", "dog"],
                "class 1 is 'dog' in it and 'owl' in the data set (3 and 3 classes); set metainfo.classes to its own, "
                "and number the data alike",
            ),
            (["cat", "dog"], "class 2 is 'owl' in it and missing in the data set (3 and 2 classes)"),
        ):
            with pytest.raises(UserError, match=re.escape(message)):
                checks.check_checkpoint(model, path, classes=other)
            checks.warn_of_a_head_for_other_classes(meta, other, path)
        started = f"{path}: its class 1 is 'dog', the data set's 'owl': a head that fits begins"
        assert log.text.count(": a head that fits") == log.text.count(started) == 1
        log.clear()
    numbers = {"dataset_meta": {"classes": (0, 1, 2)}}
    path = save({"meta": numbers, "state_dict": model.state_dict()}, tmp_path / "m.pth")
    checks.check_checkpoint(model, path, classes=[0, 1, 2])
    checks.warn_of_a_head_for_other_classes(numbers, [0, 1, 2], path)
    assert not log.records
    arrays = {"dataset_meta": {"classes": [np.ones(2), np.ones(2), np.ones(2)]}}
    path = save({"meta": arrays, "state_dict": model.state_dict()}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"class 0 is '\[1\. 1\.\]' in it and 'cat' in the data set"):
        checks.check_checkpoint(model, path, classes=["cat", "dog", "owl"])
    nameless = save({"meta": {"dataset_meta": None}, "state_dict": model.state_dict()}, tmp_path / "n.pth")
    checks.check_checkpoint(model, nameless)
    assert "holds no names" not in log.text
    checks.check_checkpoint(model, nameless, classes=["cat"])
    assert log.text.count("n.pth: holds no names of classes; they are taken in the order of the data set's") == 1
    both = torch.nn.ModuleDict({"backbone": model, "head": torch.nn.Linear(2, 3), "slope": torch.nn.PReLU()})
    for name, fault in (
        ("slope.weight", "as torch.int64, which is torch.float32 in the model"),
        ("head.bias", "which is of dtype int64, not of floating point"),
        ("backbone.weight", "which is of dtype int64, not of floating point"),
        ("backbone.kernel_3_1", "which is of dtype int64, not of floating point"),
        ("state_fusion.alpha", "which is of dtype int64, not of floating point"),
        ("norm.running_var", "which is of dtype int64, not of floating point"),
    ):
        whole = both.state_dict() | {name: torch.ones(3 if name == "head.bias" else 1, dtype=torch.int64)}
        path = save({"meta": {}, "state_dict": whole}, tmp_path / "i.pth")
        with pytest.raises(UserError, match=f"hold '{name}'(,)? {fault}"):
            checks.check_checkpoint(both, path, only_backbone=True)
    cast = {key: value.double() for key, value in both.state_dict().items()}  # the counts of batches as well
    checks.check_checkpoint(both, save({"meta": {}, "state_dict": cast}, tmp_path / "d.pth"))
    meta = {"dataset_meta": {"reduce_zero_label": True}}
    path = save({"meta": meta, "state_dict": model.state_dict()}, tmp_path / "r.pth")
    for reduces, number in ((True, 0), (None, 0), (False, 1)):
        checks.check_checkpoint(model, path, reduces=reduces)
        assert log.text.count("reduce_zero_label=True, and the data set has False: in a map, label 1 was the") == number
    dataset = dict(type=dict, reduce_zero_label=True)
    assert checks.reduces_zero_label(Config(dict(test_dataloader=dict(dataset=dataset))), "test") is True


def test_files_of_two_images_are_two(tmp_path):
    """mmsegmentation's maps and both toolchains' drawings are called by the images' base names."""

    class Dataset(list):
        def get_data_info(self, i):
            return {"img_path": self[i]}

    checks.check_written_names(Dataset(["x/1.png", "x/2.png", "x/1.png"]), suffix=False)  # one of them twice
    checks.check_written_names(Dataset(["x/1.png", "x/1.jpg"]), suffix=True)
    for paths, suffix in ((["x/1.png", "x/1.jpg"], False), (["x/1.png", "y/1.png"], True)):
        with pytest.raises(UserError, match=rf"{paths[1]}: what is written for it .* that for {paths[0]}"):
            checks.check_written_names(Dataset(paths), suffix)
    latin = Dataset(["x/caf\udce9.png"])
    checks.check_written_names(latin, suffix=True)
    with pytest.raises(UserError, match=r"caf\\udce9\.png: its name is no UTF-8; name another"):
        checks.check_written_names(latin, suffix=True, by_opencv=True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"mean": [123.7, 116.3, 103.5]}, None),
        (
            {"mean": [0, 0, 0], "bgr_to_rgb": False},
            "mean is [0, 0, 0], theirs [123.675, 116.28, 103.53]; bgr_to",
        ),
        ({"std": [1.0]}, "std is [1.0], theirs [58.395, 57.12, 57.375]"),
        ({"std": None}, "std is None, theirs"),
    ],
)
def test_images_are_normalised_as_those_of_the_pretrained_weights(changed, expected, monkeypatch):
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, level: said.append(message))
    own = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True) | changed
    model = dict(data_preprocessor=own, backbone=dict(type="MM_SpatialMamba", pretrained=""))
    swins = dict(embed_dims=96, init_cfg=dict(type="Pretrained", checkpoint="https://example.org/swin.pth"))
    for more in ({}, swins):  # from scratch
        model["backbone"] |= more
        assert not checks.pretrained_of(model)
        checks.warn_of_other_normalisation(Config(dict(model=model)))
        assert said == []
    for more in (dict(pretrained="a.pth"), dict(init_cfg=[dict(type="Pretrained", checkpoint="a.pth")])):
        model["backbone"] = dict(type="MM_SpatialMamba", **more)
        assert checks.pretrained_of(model) == "a.pth"
        checks.warn_of_other_normalisation(Config(dict(model=model)))
        assert [expected in message for message in said] == [True] * bool(expected)
        said.clear()
    model |= dict(pretrained="b.pth", backbone=dict(type="MM_SpatialMamba"))  # which mmseg hands on
    assert checks.pretrained_of(model) == "b.pth"
    checks.warn_of_other_normalisation(Config(dict(model=model)))
    assert [expected in message for message in said] == [True] * bool(expected)
    model["backbone"] = dict(type="ResNet")
    assert checks.pretrained_of(model) == "b.pth"
    for named in ("open-mmlab://resnet50_v1c", None):  # mmengine downloads it
        assert checks.pretrained_of({**model, "pretrained": named}) is None


def test_images_have_the_size_that_their_annotations_are_for():
    """mmdet scales boxes by the image's own, whatever the file says."""
    plain = dict(type="LoadImageFromFile")
    datasets = dict(type="MultiImageMixDataset", dataset=dict(pipeline=[dict(plain), dict(type="LoadAnnotations")]))
    datasets["pipeline"] = [dict(type="Mosaic")]
    augmented = [dict(plain, type="mmdet.LoadImageFromFile"), dict(type="TestTimeAug", transforms=[[dict(plain)]])]
    loaders = dict(train_dataloader=dict(dataset=datasets), test_dataloader=dict(dataset=dict(pipeline=augmented)))
    for scope, checked in (("mmseg", []), ("mmdet", ["CheckSize"])):
        cfg = Config(dict(default_scope=scope, **loaders))
        for _ in range(2):
            pipelines.insert_size_checks(cfg)
        inner = cfg.train_dataloader.dataset
        assert [step.type for step in inner.dataset.pipeline] == ["LoadImageFromFile", *checked, "LoadAnnotations"]
        assert [step.type for step in inner.pipeline] == ["Mosaic"]
        steps = [step.type for step in cfg.test_dataloader.dataset.pipeline]
        assert steps == ["mmdet.LoadImageFromFile", *checked, "TestTimeAug"]
    results = dict(img_path="a.jpg", ori_shape=(48, 64))
    for noted in ({}, dict(height=0, width=0), dict(height=48, width=64.0), dict(height=None, width=64)):
        assert CheckSize()(results | noted) == results | noted
    for noted, advice in (((96, 128), "take the images that"), ((64, 48), "turned by its EXIF")):
        message = rf"^a\.jpg: has 64x48 pixels, but {noted[1]}x{noted[0]} in its annotation file: .*{advice}"
        with pytest.raises(UserError, match=message):
            CheckSize()(results | dict(height=noted[0], width=noted[1]))


def test_images_that_are_turned_but_keep_their_size(tmp_path, log):
    """By 180 degrees, or square: boxes and maps that were drawn on the image as it lies would be elsewhere."""
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    files = [str(tmp_path / f"{orientation}.jpg") for orientation in (1, 9, 3, 6)]
    for orientation, path in zip((1, 9, 3, 6), files, strict=True):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (8, 8)).save(path, exif=exif)
    (tmp_path / "damaged.jpg").write_bytes(Path(files[2]).read_bytes().replace(b"Exif\0\0MM", b"Exif\0\0MX"))
    kinds = [(None, True), ("color_ignore_orientation", False), ("unchanged", False)]
    for scope, (color_type, said_once) in itertools.product(("mmdet", "mmseg"), kinds):
        pipeline = [{**steps[0], **({"color_type": color_type} if color_type else {})}, steps[1]]
        dataset = dict(pipeline=pipeline, type=dict, metainfo=dict(classes=["a"]))
        cfg = Config(dict(default_scope=scope, model={}, train_dataloader=dict(dataset=dataset)))
        pipelines.insert_size_checks(cfg)
        pipelines.insert_label_checks(cfg)
        built = cfg.train_dataloader.dataset.pipeline
        added = next(step for step in built if step.type in ("CheckSize", "CheckLabels"))
        check = TRANSFORMS.build(added)
        labels = dict(gt_seg_map=np.zeros((8, 8), np.uint8), seg_map_path=str(tmp_path / "map.png"))
        for path in (files[0], None, str(tmp_path / "damaged.jpg"), *files[1:]):
            check(dict(img_path=path, ori_shape=(8, 8), height=8, width=8, **labels))
        said = [one.getMessage() for one in log.records if one.levelno == logging.WARNING]
        assert len(said) == said_once
        assert all(one.startswith(f"{files[2]}: is turned by its EXIF orientation, as other") for one in said)
        log.clear()


@pytest.mark.parametrize(
    ("labels", "more", "split", "message"),
    [
        ((0, 255), {}, "train", "hold only the labels 0, 255: the second of the two classes is 1, and 255 is ignored"),
        ((0, 255), {}, "val", "hold only the labels 0, 255: the second of the two classes is 1 (val"),
        ((0,), {}, "train", "hold only the labels 0: the second of the two classes is 1 (train"),
        ((0, 1, 255), dict(reduce_zero_label=True), "train", "the second of the two classes is 2, and 255 is ignored"),
        ((0, 1, 255), {}, "train", None),
        ((0, 1, 2), dict(reduce_zero_label=True), "train", None),
        ((0, 255), dict(metainfo=dict(classes=list("abc"))), "train", None),
    ],
)
def test_masks_of_0_and_255_have_no_foreground(labels, more, split, message, tmp_path, monkeypatch):
    """255 is ignored, so that a model learns nothing and is always right."""
    said = []
    monkeypatch.setattr(label_maps, "print_log", lambda message, level: said.append(message))
    for i in range(70):  # a label that is rare is looked for in all maps
        values = labels if i == 7 else labels[:1]
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{i:02}.png")
    dataset = dict(type=dict, data_root=str(tmp_path), data_prefix=dict(seg_map_path=""), seg_map_suffix=".png")
    dataset |= dict(metainfo=dict(classes=list("ab")), reduce_zero_label=False) | more
    cfg = Config({"model": dict(decode_head=dict(type="FCNHead")), f"{split}_dataloader": dict(dataset=dataset)})
    if message and "ignored" in message:
        with pytest.raises(UserError, match=re.escape(message)):
            checks.check_data(cfg, (split,))
    else:
        checks.check_data(cfg, (split,))
    assert [message in one for one in said] == ([True] if message and "ignored" not in message else [])


def test_classes_that_no_map_has_are_named():
    """mIoU is a mean without them."""
    areas = [[torch.tensor([1.0, 0, 0])] * 4, [torch.tensor([0.0, 0, 0]), torch.tensor([2.0, 3, 0])] * 2]
    areas = [(one[0], one[1], one[0], one[0]) for one in areas]

    class IoUMetric:
        dataset_meta = MappingProxyType({"classes": ("sky", "tree", "car")})

        def compute_metrics(self, results):
            return {"mIoU": 100.0} if results else {}

    metric, said = IoUMetric(), []
    runner = argparse.Namespace(val_evaluator=argparse.Namespace(metrics=[metric, object()]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "print_log", lambda message, logger, level: said.append(message))
        for _ in range(2):
            hooks.NameAbsentClasses().before_val_epoch(runner)
        assert metric.compute_metrics(areas) == {"mIoU": 100.0}
        assert metric.compute_metrics([]) == {}
    assert said == ["classes 'tree', 'car' are in no map; mIoU is the mean of 2 of 3 classes"]
    assert hooks.message_on_absent_classes("ab", np.array([5, 0]), np.array([5, 0])) == (
        "class 'b' is in no map; mIoU is the mean of 1 of 2 classes"
    )
    assert hooks.message_on_absent_classes("ab", np.array([5, 1]), np.array([5, 2])) is None
    filled = hooks.message_on_absent_classes("ab", np.array([5, 0]), np.array([5, 0]), filled=0)
    assert hooks.message_on_absent_classes("ab", np.array([0, 5]), np.array([0, 5]), ignored=0) is None
    assert filled.endswith("mIoU is the mean of 2 of 2 classes, and takes 0 for those that are not predicted either")


def loop_of(kind: type, **attributes) -> object:
    loop = kind.__new__(kind)
    vars(loop).update(attributes)
    return loop


def iterations(interval: int, *changes: tuple[int, int]) -> IterBasedTrainLoop:
    """A loop that validates each `interval` iterations, and from those of `changes` on at others."""
    begins, intervals = zip((0, interval), *changes, strict=True)
    return loop_of(IterBasedTrainLoop, dynamic_milestones=begins, dynamic_intervals=intervals)


def test_a_loss_that_is_not_finite_ends_training_in_all_processes(monkeypatch):
    hook = hooks.StopAtInvalidLoss()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    runner = argparse.Namespace(
        iter=6, max_iters=10, model=model, hooks=[CheckpointHook(interval=4, by_epoch=False)],
        train_loop=iterations(10),
    )  # fmt: skip
    good = {"loss": torch.tensor(1.5), "decode.acc_seg": torch.tensor(float("nan"))}
    for outputs in (good, {}, None):
        hook.after_train_iter(runner, 6, None, outputs)
    bad = {"loss": torch.tensor(float("nan")), "decode.loss_ce": float("inf"), "aux.loss_ce": torch.tensor(1.0)}
    with pytest.raises(
        UserError, match=r"iteration 7: the loss is not finite \(loss is nan, decode\.loss_ce is inf\), so"
    ):
        hook.after_train_iter(runner, 6, None, bad)
    of_two = {"loss_a": torch.tensor([1.0, float("nan")]), "loss_b": torch.tensor(1.0)}  # of several optimizers
    with pytest.raises(UserError, match=r"the loss is not finite \(loss_a is nan\)"):
        hook.after_train_iter(runner, 6, None, of_two)
    for name, value in (("0.weight", torch.nan), ("1.running_var", torch.inf)):  # the update's, after a good loss
        part = model.state_dict()[name]
        kept = part.clone()
        part.fill_(value)
        hook.after_train_iter(runner, 6, None, good)  # neither validated nor saved: the next loss tells
        for runner.iter in (3, 9):  # saved; validated
            with pytest.raises(
                UserError, match=rf"after its update, .* weights that are not finite \({name}\), so nothing"
            ):
                hook.after_train_iter(runner, runner.iter, None, good)
        part.copy_(kept)
        hook.after_train_iter(runner, runner.iter, None, good)
        runner.iter = 6
    for other, said in (
        ([1, 0, 0], r"is not finite \(in another process\), so"),
        ([1, 0, 1], r"for values of images are"),
    ):
        monkeypatch.setattr(hooks, "all_reduce", lambda value, op: value.clamp_(min=torch.tensor(other)))  # noqa: B023
        with pytest.raises(UserError, match=said):
            hook.after_train_iter(runner, 6, None, good)


def test_batch_norm_is_averaged_before_it_is_saved_and_validated(monkeypatch):
    """mmengine averages before validation, after a checkpoint by iteration is saved with the first process' own."""
    averaged = []
    monkeypatch.setattr(hooks, "average_batch_norm", averaged.append)
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    hook = HOOKS.build(dict(type="AverageBatchNorm"))
    saves = CheckpointHook(interval=4, by_epoch=False)
    runner = argparse.Namespace(hooks=[hook, saves], max_iters=10, train_dataloader=range(5))

    def done(loop):
        runner.train_loop = loop
        for i in range(10):
            runner.iter, runner.model = i, i + 1
            hook.after_train_iter(runner, i % 5)
        found = averaged.copy()
        averaged.clear()
        return found

    assert done(iterations(3)) == [3, 4, 6, 8, 9, 10]
    assert done(iterations(3, (4, 1))) == [3, *range(4, 11)]  # as mmengine validates
    runner.hooks.append(EMAHook())
    runner.hooks[-1].ema_model = "average"
    assert done(iterations(9)) == [4, "average", 8, "average", 9, "average", 10, "average"]
    runner.hooks.pop()
    saves.by_epoch = True
    assert done(loop_of(EpochBasedTrainLoop, val_interval=1)) == [5, 10]
    monkeypatch.setattr(hooks, "get_world_size", lambda: 1)
    assert done(iterations(3)) == []


@pytest.mark.parametrize(
    ("meta", "schedules", "loop", "said"),
    [
        ({"epoch": 2, "iter": 10, "processes": 1}, [dict(by_epoch=False, end=20)], EpochBasedTrainLoop, []),
        (
            {"epoch": 2, "iter": 40, "processes": 4},
            [dict(by_epoch=False, end=3), dict(by_epoch=False, end=80), dict(by_epoch=True, end=4),
             dict(by_epoch=False, end=hooks.ENDLESS)],
            EpochBasedTrainLoop,
            ["had 4 processes, and has 1; its rates are for 4 processes",
             "of 2 epochs and 40 iterations, but an epoch has 5 now: images",
             "Training ends at iteration 50, the schedule of its rate at 80"],
        ),
        ({"epoch": 0, "iter": 3}, None, EpochBasedTrainLoop, ["of 0 epochs and 3 iterations", "at iteration 23"]),
        ({"epoch": 0, "iter": 3, "processes": 1}, None, IterBasedTrainLoop, []),
        ({"epoch": "a", "iter": None, "processes": []}, 3, EpochBasedTrainLoop, []),
        (None, None, EpochBasedTrainLoop, []),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_counts_as_before(meta, schedules, loop, said, log):
    hook = hooks.NoteOtherProcesses()
    runner = argparse.Namespace(_resume=True, train_loop=loop_of(loop, _max_epochs=4), train_dataloader=range(5))
    hook.after_load_checkpoint(runner, {"meta": meta, "param_schedulers": schedules})
    assert all(one in log.text for one in said)
    assert bool(log.records) == bool(said)
    log.clear()
    runner._resume = False
    hook.after_load_checkpoint(runner, {"meta": meta})
    assert not log.records
    saved = {"meta": {}}
    hook.before_save_checkpoint(runner, saved)
    assert saved == {"meta": {"processes": 1}}


LAYER = torch.nn.Linear(2, 1, bias=False)
OPTIMIZER = torch.optim.AdamW(LAYER.parameters())
COSINE = CosineAnnealingLR(OPTIMIZER, T_max=5)


def resumable(**changed) -> dict:
    """A checkpoint of training of a layer of two weights, with a schedule."""
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(1, 2), "exp_avg_sq": torch.ones(2, 1).t()}}
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}]}
    parts = dict(meta={"epoch": 1, "iter": 3}, message_hub=MessageHub("a").state_dict(), optimizer=optimizer)
    parts["param_schedulers"] = [COSINE.state_dict() | {"last_step": 1}]  # after an epoch
    return {k: v for k, v in {**parts, **changed}.items() if v is not None}


def with_rate(rate: float) -> dict:
    found = resumable()
    found["optimizer"]["param_groups"][0]["lr"] = rate
    return found


def optimizer_of(groups: int = 1, **state) -> dict:
    settings = [{"betas": (0.9, 0.99), "params": [i]} for i in range(groups)]
    return dict(optimizer={"state": {0: state}, "param_groups": settings})


BETAS = {"betas": (0.9, 0.99)}
NOT_ITS_OWN = r"its optimizer does not fit the config's optim_wrapper \("
RESUMED = {
    "meta": (dict(meta=None), "has no meta.epoch, meta.iter, so training cannot go on from it; resume an epoch_"),
    "message_hub": (dict(message_hub=None), "has no message_hub, so"),
    "a negative iteration": (dict(meta={"epoch": 1, "iter": -5}), "has no meta.iter, so"),
    "a late iteration": (dict(meta={"epoch": 1, "iter": 2**31}), "has no meta.iter, so"),
    "a schedule's text": (dict(param_schedulers=[{"last_step": "a"}]), "has no param_schedulers, so"),
    "of message_hub": (dict(message_hub={"log_scalars": {}}), "has no message_hub.runtime_info, message_hub.resumed_k"),
    "seed": (dict(meta={"epoch": 1, "iter": 3, "seed": "7"}), "has no meta.seed that is a number, so"),
    "a best one": (dict(optimizer=None, param_schedulers=None), "has no optimizer, param_schedulers, so"),
    "no schedules": (dict(param_schedulers=[]), "has no param_schedulers, so"),
    "two schedules": (dict(param_schedulers=[COSINE.state_dict()] * 2), "has 2 rate schedules, which are not the 1 of"),
    "another schedule": (
        dict(param_schedulers=[LinearLR(OPTIMIZER, start_factor=0.1, end=5).state_dict()]),
        "has 1 rate schedules, which are not the 1 of the config's param_scheduler; set",
    ),
    "a schedule's optimizer": (
        dict(param_schedulers=[COSINE.state_dict() | {"optimizer": {}}]),
        "has 1 rate schedules,",
    ),
    "a schedule of decay": (
        dict(param_schedulers=[COSINE.state_dict() | {"param_name": "weight_decay"}]),
        "has 1 rate",
    ),
    "a schedule that is a number": (dict(param_schedulers=[3]), "has 1 rate schedules, which are not the 1 of"),
    "a schedule's odd end": (
        dict(param_schedulers=[COSINE.state_dict() | {"end": "b"}]),
        "has 1 rate schedules, which",
    ),
    "ema_state_dict, a list": (dict(ema_state_dict=[]), "its ema_state_dict is a list, not the weights of a model"),
    "ema_state_dict, less": (dict(ema_state_dict={}), r"its ema_state_dict is of another model: 1 missing \(weight\)"),
    "ema_state_dict, whole numbers": (
        dict(ema_state_dict={"steps": torch.tensor(3), "module.weight": torch.ones(1, 2, dtype=torch.int64)}),
        "its ema_state_dict holds 'weight' as torch.int64, not torch.float32",
    ),
    "EMAHook": (dict(ema_state_dict={}), "holds averaged weights and .* but the config has no EMAHook; add it"),
    "two groups": (optimizer_of(2), NOT_ITS_OWN + "it has 2 groups of 2 parameters, the config's 1 gr"),
    "another weight": (
        optimizer_of(exp_avg=torch.ones(3)),
        NOT_ITS_OWN + r"state\[0\]\.exp_avg is \(3,\), not \(1, 2\)",
    ),
    "NaN": (optimizer_of(exp_avg=torch.full((1, 2), torch.nan)), NOT_ITS_OWN + r"state\[0\]\.exp_avg is not finite"),
    "coarse moments": (
        optimizer_of(exp_avg=torch.ones(1, 2).bfloat16()),
        NOT_ITS_OWN + r"state\[0\]\.exp_avg is of dtype bfloat16, which loses small numbers of float32",
    ),
    "lost squares": (
        optimizer_of(exp_avg=torch.ones(1, 2), exp_avg_sq=torch.zeros(1, 2)),
        NOT_ITS_OWN + r"state\[0\]\.exp_avg_sq, a mean of squares, is 0, but exp_avg is not",
    ),
    "a negative step": (optimizer_of(step=torch.tensor(-3.0)), NOT_ITS_OWN + r"state\[0\]\.step is tensor\(-3\.\)"),
    "a complex step": (optimizer_of(step=torch.tensor(1j)), NOT_ITS_OWN),
    "NaN elsewhere": (optimizer_of(row=torch.full((1,), torch.nan)), NOT_ITS_OWN + r"state\[0\]\.row is"),
    "SGD": (
        dict(optimizer={"state": {}, "param_groups": [{"momentum": 0.9, "params": [0]}]}),
        NOT_ITS_OWN + "one of them has betas, the other has not",
    ),
    "Adam": (
        dict(optimizer={"state": {}, "param_groups": [{**BETAS, "decoupled_weight_decay": False, "params": [0]}]}),
        NOT_ITS_OWN + "one of them is AdamW, the other Adam",
    ),
    "ascent": (
        dict(optimizer={"state": {}, "param_groups": [{"betas": (0.9, 0.99), "maximize": True, "params": [0]}]}),
        NOT_ITS_OWN + "its maximize is True, the config's False",
    ),
    "no steps": (
        dict(optimizer={"state": {}, "param_groups": [{"betas": (0.9, 0.99), "eps": math.inf, "params": [0]}]}),
        NOT_ITS_OWN + "its eps is inf, not finite numbers",
    ),
    "betas of 1": (
        dict(optimizer={"state": {}, "param_groups": [{"betas": (1, 1), "params": [0]}]}),
        NOT_ITS_OWN + r"its betas are \(1, 1\), not in \[0, 1\)",
    ),
    "no groups": (dict(optimizer={"state": {}}), NOT_ITS_OWN + "'param_groups'"),
    "half the moments": (optimizer_of(exp_avg=torch.ones(1, 2)), NOT_ITS_OWN + r"state\[0\] has no exp_avg_sq"),
    "a number as moments": (
        optimizer_of(exp_avg=0.5, exp_avg_sq=torch.ones(1, 2)),
        NOT_ITS_OWN + r"state\[0\] has no exp_avg\)",
    ),
    "no moments": (
        dict(optimizer={"state": {}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]}),
        NOT_ITS_OWN + "its state is empty, so that all moments would begin anew",
    ),
    "moments of texts": (
        dict(optimizer={"state": {"0": {}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]}),
        NOT_ITS_OWN + "its state has the keys .*'0'.*, which are no parameters",
    ),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_goes_on_from_whole_checkpoints_alone(kind, monkeypatch):
    """mmengine would begin anew what a checkpoint lacks: moments, and with them schedules, at other rates."""
    said = []
    monkeypatch.setattr(hooks, "_warn", said.append)
    changed, message = RESUMED[kind]
    runner = argparse.Namespace(_resume=True, _load_from="c.pth", param_schedulers=[COSINE], hooks=[], model=LAYER)
    runner.optim_wrapper = OptimWrapper(OPTIMIZER)
    runner.hooks = [EMAHook()] if "ema_state_dict" in kind else []
    hook = hooks.CheckResumed()
    with pytest.raises(UserError, match=f"^c\\.pth: .*{message}"):
        hook.after_load_checkpoint(runner, resumable(**changed))
    runner._resume = False
    hook.after_load_checkpoint(runner, resumable(**changed))
    runner._resume = True
    whole = resumable()
    hook.after_load_checkpoint(runner, whole)
    assert whole["optimizer"]["state"][0]["exp_avg_sq"].stride() == LAYER.weight.stride()
    said.clear()
    whole["optimizer"]["param_groups"][0] |= {"eps": 1e10, "betas": [0.9, 0.999], "weight_decay": 0.01}
    hook.after_load_checkpoint(runner, whole)
    assert said == ["c.pth: its optimizer goes on with eps=10000000000.0, whatever the config says (1e-08)"]
    said.clear()
    scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))  # as mmdet's Scale; its step count is float32
    wrapper = OptimWrapper(torch.optim.AdamW([scale]))
    scale.grad = torch.ones_like(scale)
    wrapper.optimizer.step()
    hooks._check_optimizer(wrapper, wrapper.optimizer.state_dict(), "c.pth", set())
    hook.after_load_checkpoint(runner, resumable(state_dict={"weight": torch.ones(1, 2).half()}))
    assert said[-1:] == ["c.pth: its weights are rounded to float16, so training does not go on as it would have"]
    said.clear()
    hook.after_load_checkpoint(runner, resumable(param_schedulers=[COSINE.state_dict() | {"last_step": -(10**6)}]))
    assert "c.pth: its CosineAnnealingLR is at step -1000000, not at 1 as after 1 epochs" in said[0]
    said.clear()
    hook.after_load_checkpoint(runner, resumable(param_schedulers=[COSINE.state_dict() | {"eta_min": 2.0}]))
    assert said[0].startswith("c.pth: its CosineAnnealingLR goes on with eta_min=2.0, whatever the config says (0")
    with pytest.raises(UserError, match=r"^c\.pth: its CosineAnnealingLR has an array as T_max"):
        hook.after_load_checkpoint(runner, resumable(param_schedulers=[COSINE.state_dict() | {"T_max": np.ones(2)}]))
    said.clear()
    of_wrapper = COSINE.state_dict() | {"last_step": 1, "_last_value": [1e-3, 1e-3]}  # which has a group of its own
    with pytest.raises(UserError, match=r"^c\.pth: its optimizer has the rate -0\.1 in group 0"):
        hook.after_load_checkpoint(runner, with_rate(-0.1))
    hook.after_load_checkpoint(runner, with_rate(3e-3) | dict(param_schedulers=[of_wrapper]))
    assert said[-1] == (
        "c.pth: its optimizer has the rate 0.003 in group 0, where its schedules left 0.001: rates go on from it"
    )
    said.clear()
    later = COSINE.state_dict() | {"begin": 3, "end": 9, "last_step": 4}
    monkeypatch.setattr(COSINE, "begin", 3)
    monkeypatch.setattr(COSINE, "end", 9)
    hook.after_load_checkpoint(runner, resumable(param_schedulers=[later]))
    assert "c.pth: its CosineAnnealingLR is at step 4, not at -1 as after 1 epochs" in said[0]
    monkeypatch.undo()
    monkeypatch.setattr(hooks, "_warn", said.append)
    said.clear()
    runner.hooks = [EMAHook()]
    averaged = {"steps": torch.tensor(3), "module.weight": torch.ones(1, 2)}
    hook.after_load_checkpoint(runner, resumable(ema_state_dict=averaged))
    for steps in (None, torch.tensor(0), torch.tensor(-20000), torch.tensor(3.0), 3):
        wrong = {"module.weight": torch.ones(1, 2), **({} if steps is None else {"steps": steps})}
        with pytest.raises(UserError, match="no count of the steps that it averages"):
            hook.after_load_checkpoint(runner, resumable(ema_state_dict=wrong))
    later = dict(meta={"epoch": 1, "iter": 3}, ema_state_dict=averaged | {"steps": torch.tensor(0)})
    runner.hooks = [EMAHook(begin_iter=5)]
    hook.after_load_checkpoint(runner, resumable(**later))
    runner.hooks = [EMAHook(begin_iter=2)]
    began = dict(later["meta"], cfg="custom_hooks = [dict(begin_iter=5, type='EMAHook')]")
    hook.after_load_checkpoint(runner, resumable(**later | {"meta": began}))
    odd = dict(later["meta"], cfg="custom_hooks = [dict(begin_iter='x', type='EMAHook')]")
    with pytest.raises(UserError, match="no count of the steps that it averages"):  # as by this config
        hook.after_load_checkpoint(runner, resumable(**later | {"meta": odd}))
    runner.param_schedulers = None
    with pytest.raises(UserError, match="has 1 rate schedules, which are not the 0 of"):
        hook.after_load_checkpoint(runner, resumable())
    hook.after_load_checkpoint(runner, resumable(param_schedulers=None))
    runner.optim_wrapper = OptimWrapperDict(one=OptimWrapper(OPTIMIZER))
    whole = resumable(param_schedulers=None)
    hook.after_load_checkpoint(runner, whole | {"optimizer": {"one": whole["optimizer"]}})
    without = dict(whole["optimizer"], state={})
    for states, message in (({"one": without}, "moments"), ({}, "holds no state of the optimizer 'one'")):
        with pytest.raises(UserError, match=message):
            hook.after_load_checkpoint(runner, whole | {"optimizer": states})


def test_a_schedule_of_momentum_goes_on(monkeypatch):
    """mmengine's write `momentum` into Adam's groups, and change `betas`."""
    said = []
    monkeypatch.setattr(hooks, "_warn", said.append)
    optimizer = torch.optim.AdamW(LAYER.parameters())
    schedule = CosineAnnealingMomentum(optimizer, T_max=5)
    runner = argparse.Namespace(_resume=True, _load_from="c.pth", param_schedulers=[schedule], hooks=[], model=LAYER)
    runner.optim_wrapper = OptimWrapper(optimizer)
    saved = resumable(param_schedulers=[schedule.state_dict() | {"last_step": 1}])
    saved["optimizer"]["param_groups"][0] |= {"betas": (0.5, 0.999), "momentum": 0.5, "lr": 1e-3}
    hooks.CheckResumed().after_load_checkpoint(runner, saved)
    assert said == []


def after_an_update(kind: type[torch.optim.Optimizer]) -> tuple[torch.optim.Optimizer, argparse.Namespace]:
    """An optimizer of a layer that it has updated once, and a runner that is to go on with it."""
    layer = torch.nn.Linear(2, 3)
    optimizer = kind(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    runner = argparse.Namespace(_resume=True, _load_from="c.pth", param_schedulers=[COSINE], hooks=[], model=layer)
    runner.optim_wrapper = OptimWrapper(optimizer)
    return optimizer, runner


def test_a_capturable_optimizer_goes_on_without_a_gpu():
    optimizer, runner = after_an_update(torch.optim.AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["capturable"] = True
    hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=saved))
    optimizer.load_state_dict(saved)
    optimizer.step()  # PyTorch asserts that there is a GPU


OTHER_EPS = ((1e-30, 1e-3), (None, None), [None], (None, math.inf), 1e-3)


def test_an_optimizer_whose_settings_are_none_in_part_goes_on():
    """PyTorch's Adafactor has eps=(None, 1e-3)."""
    optimizer, runner = after_an_update(torch.optim.Adafactor)
    hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=optimizer.state_dict()))
    optimizer.param_groups[0]["param_names"] = ["weight", "bias"]  # as mmdet's and mmseg's decay by layers
    hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=optimizer.state_dict()))
    for name, value in (*(("eps", one) for one in OTHER_EPS), ("weight_decay", None)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][name] = value
        with pytest.raises(UserError, match=NOT_ITS_OWN + f"its {name} is "):
            hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=saved))
    for spoil, message in (
        (lambda states: states.clear(), "its state is empty"),
        (lambda states: states[0].pop("row_var"), r"state\[0\] has no row_var"),
        (lambda states: states[0].update(row_var=torch.ones(1, 1)), r"state\[0\]\.row_var is \(1, 1\), not \(3, 1\)"),
        (lambda states: states[0]["col_var"].neg_(), r"state\[0\]\.col_var, a mean of squares, is negative"),
        (lambda states: states[1]["variance"].fill_(math.nan), r"state\[1\]\.variance, .* is negative or no number"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        spoil(saved["state"])
        with pytest.raises(UserError, match=NOT_ITS_OWN + message):
            hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=saved))


def test_adagrads_sums_of_squares():
    optimizer, runner = after_an_update(torch.optim.Adagrad)
    hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=optimizer.state_dict()))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["sum"].neg_()
    with pytest.raises(UserError, match=NOT_ITS_OWN + r"state\[0\]\.sum, .* of squares, is negative"):
        hooks.CheckResumed().after_load_checkpoint(runner, resumable(optimizer=saved))


def test_synchronised_batch_norm_is_missed_aloud(monkeypatch):
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    monkeypatch.setattr(tools.torch.distributed, "init_process_group", lambda kind: None)
    for name, value in {"MASTER_ADDR": "here", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    norms = (("SyncBN", 1), ("MMSyncBN", 1), (torch.nn.SyncBatchNorm, 1), ("BN", 0))
    for model, found in ((dict(norm_cfg=dict(type=norm)), found) for norm, found in norms):
        said.clear()
        cfg = Config(dict(model=dict(decode_head=model, neck=[model])))
        tools._use_cpu(cfg, "pytorch")
        assert cfg.model.decode_head.norm_cfg.type == cfg.model.neck[0].norm_cfg.type == "BN"
        assert not cfg.model_wrapper_cfg.broadcast_buffers  # the statistics are averaged, and would be the first one's
        assert sum("there is no SyncBN: batch norm is each process's own" in one for one in said) == found
        tools._use_cpu(Config(dict(model=model)), "none")
        assert len(said) == 1 + found


def test_maps_of_other_images_and_lossy_ones(tmp_path, monkeypatch):
    """JPEG makes new labels where two meet; a map of another size is another image's."""
    cv2 = pytest.importorskip("cv2")
    said = []
    monkeypatch.setattr(transforms, "print_log", lambda message, **_: said.append(message))
    labels = np.zeros((16, 8), np.uint8)
    tags = {"four.tif": (0x102, 8, 4), "white.tif": (0x106, 1, 0)}  # bits, and whether 0 is white
    for name, size, message in (
        ("a.png", (16, 8, 3), None),
        ("a.png", (8, 16, 3), r"a\.png: is a map of 8x16 pixels, but the image a\.bmp has 16x8; make them equal"),
        ("a.jpg", (16, 8), r"a\.jpg: is a JPEG, which changes labels where they meet"),
        ("a.webp", (16, 8), r"a\.webp: is a WEBP, which changes labels"),
        ("lossless.webp", (16, 8), None),
        ("a.jp2", (16, 8), r"a\.jp2: is a JPEG2000, which changes labels"),
        ("reversible.jp2", (16, 8), None),  # which may be cut all the same
        ("a.ras", (16, 8), None),  # in which OpenCV reads greys as black
        ("a.hdr", (16, 8), None),
        ("a.gif", (16, 8), None),  # which Pillow numbers anew
        ("a.tga", (16, 8), None),
        ("a.pgm", (16, 8), None),
        ("eight.pgm", (16, 8), r"eight\.pgm: is a PGM whose white is 8, so that its labels are stretched to 255"),
        ("pages.tif", (16, 8), r"pages\.tif: has 2 pages, of which the first alone would be read"),
        ("overview.tif", (16, 8), None),
        ("jpeg.tif", (16, 8), r"jpeg\.tif: is a TIFF compressed as jpeg, which changes labels"),
        ("a.tif", (16, 8), None),
        ("four.tif", (16, 8), r"four\.tif: is a grey TIFF of 4 bits, whose labels are multiplied by 17"),
        ("white.tif", (16, 8), r"white\.tif: is a TIFF in which 0 is white, so that its labels are inverted"),
        ("planes.tif", (16, 8), r"planes\.tif: its bands are stored one after another"),
    ):
        options = {"jpeg.tif": dict(compression="jpeg"), "lossless.webp": dict(lossless=True)}.get(name, {})
        options |= {"a.jp2": dict(irreversible=True)}.get(name, {})
        options |= {"pages.tif": dict(save_all=True, append_images=[Image.fromarray(labels)])}.get(name, {})
        reduced = Image.fromarray(labels[::2, ::2])
        reduced.encoderinfo = dict(tiffinfo={254: 1})  # as a GeoTIFF has
        options |= {"overview.tif": dict(save_all=True, append_images=[reduced])}.get(name, {})
        options |= {"planes.tif": dict(tiffinfo={284: 2})}.get(name, {})
        if name in ("a.ras", "a.hdr"):
            assert cv2.imwrite(str(tmp_path / name), labels)
        else:
            kind = np.uint16 if name == "planes.tif" else np.uint8
            Image.fromarray(labels.astype(kind)).save(tmp_path / name, **options)
        if name == "eight.pgm":
            (tmp_path / name).write_bytes(b"P5\n8 16\n8\n" + labels.tobytes())
        if name in tags:
            tag, before, after = tags[name]
            data, entry = (tmp_path / name).read_bytes(), struct.pack("<HHIH", tag, 3, 1, before)
            assert data.count(entry) == 1
            (tmp_path / name).write_bytes(data.replace(entry, entry[:-2] + struct.pack("<H", after)))
        results = dict(seg_map_path=str(tmp_path / name), gt_seg_map=labels, ori_shape=size, img_path="a.bmp")
        if message:
            with pytest.raises(UserError, match=message):
                CheckLabels(5)(results)
        else:
            said.clear()
            assert CheckLabels(5)(results) is results
            odd = name in ("reversible.jp2", "a.ras", "a.hdr", "a.gif")
            assert [f"{name}: is of " in one and "labels may change" in one for one in said] == [True] * odd
    for name in ("grey.bmp", "white.bmp"):
        image = Image.fromarray(labels)
        if name == "white.bmp":  # of 8 bits; Pillow reads it as one of 1 bit
            image = Image.fromarray(labels, "P")
            image.putpalette([0, 0, 0, 255, 255, 255])
        image.save(tmp_path / name)
        said.clear()
        CheckLabels(5)(dict(seg_map_path=str(tmp_path / name), gt_seg_map=labels))
        assert [f"{name}: is of the format BMP with a palette" in one for one in said] == [True] * (name == "white.bmp")
    for name in ("turned.png", "turned.tif"):
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.fromarray(labels).save(tmp_path / name, exif=exif)
        said.clear()
        check = CheckLabels(5)
        for _ in range(2):
            check(dict(seg_map_path=str(tmp_path / name), gt_seg_map=labels))
        assert [f"{name}: has an EXIF orientation by which viewers turn it" in one for one in said] == [True]
    for check, results in (
        (CheckLabels(5), {"img_path": "a.png"}),
        (CheckImage(), {"img": labels}),
    ):  # of an inferencer
        assert check(dict(results)) == results
    assert CheckImage()("a.png") == "a.png"  # which mmseg's loader takes


@pytest.mark.parametrize(
    ("greys", "reduced", "suspicious"),
    [
        ([0, 2, 6, 255], False, True),  # as oxipng and GIF number the labels of a grey map
        ([0, 5, 7], True, True),
        ([0, 1, 2, 3], False, False),
        ([0, 255], False, False),  # a mask in black and white
        ([0, 0, 255], False, False),  # a palette in which label 1 is not drawn
        ([0, 2, 2], False, False),  # no grey map has one grey for two labels
        ([0, 80, 160], False, False),  # to look at: these are no labels
        (None, False, False),
        ("1", False, True),  # of 0 and 255
        ("1", True, True),
    ],
)
def test_a_palette_of_greys_that_could_be_labels(greys, reduced, suspicious, tmp_path, monkeypatch):
    """Labels are then numbers of colours, other ones in each file."""
    said = []
    monkeypatch.setattr(transforms, "print_log", lambda message, **_: said.append(message))
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2) % (2 if greys == "1" else len(greys or "abcd"))
    image = Image.fromarray(indices, "P")
    if greys == "1":
        image, text = (
            Image.fromarray(indices * 255).convert("1"),
            "a.png: is a map of 1 bit, whose white is read as label",
        )
    else:
        image.putpalette([band for grey in greys for band in [grey] * 3] if greys else range(30))
        label = int(greys is not None and greys[1] != 1)
        grey = greys and greys[1]
        text = f"a.png: has a palette in which label {label} is the grey {grey}, and {label} is what is read"
    image.save(tmp_path / "a.png")
    labels = indices - np.uint8(1) if reduced else indices
    results = dict(seg_map_path=str(tmp_path / "a.png"), gt_seg_map=labels, reduce_zero_label=reduced)
    check = CheckLabels(7)
    for _ in range(2):
        assert check(dict(results))
    assert [text in one for one in said] == [True] * suspicious


def test_palettes_of_other_maps(tmp_path, monkeypatch):
    """Tools that make files smaller renumber the colours of each map: VOC's (128, 0, 0) is no longer label 1."""
    said, check = [], CheckLabels(7)
    monkeypatch.setattr(transforms, "print_log", lambda message, **_: said.append(message))
    voc = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    filled = [0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9]  # with black, for labels that are not drawn
    for name, colours, indices in (
        ("a", voc, [[0, 1]]),
        ("b", voc, [[2, 3]]),
        ("c", voc[:6], [[1, 0]]),
        ("d", filled, [[0, 2]]),
        ("e", [*voc[:3], *voc[6:9]], [[0, 1]]),
    ):
        assert said == []
        labels = np.repeat(np.repeat(np.array(indices, np.uint8), 9, 0), 9, 1)
        image = Image.fromarray(labels, "P")
        image.putpalette(colours)
        image.save(tmp_path / f"{name}.png")
        check(dict(seg_map_path=str(tmp_path / f"{name}.png"), gt_seg_map=labels))
    (said,) = said
    assert f"e.png: has the colour (0, 128, 0) for label 1, and {tmp_path / 'b.png'} for 2; labels are read as" in said


def test_maps_of_labels_beyond_a_byte(tmp_path):
    """LoadAnnotations takes them modulo 256: 259 would be 3."""
    path = tmp_path / "map.png"
    for labels, largest in (([[3, 259], [0, 255]], 259), ([[3, 4], [0, 255]], None)):
        Image.fromarray(np.array(labels, np.uint16)).save(path)
        results = {"seg_map_path": str(path), "gt_seg_map": np.array(labels).astype(np.uint8)}
        if largest:
            with pytest.raises(UserError, match=f"map.png: has label {largest}, but with 5 classes 0 to 4 are labels"):
                CheckLabels(5)(results)
        else:
            assert CheckLabels(5)(results) is results
    with pytest.raises(UserError, match=r"map.png: has ignored pixels .*class_weight"):
        CheckLabels(5, class_weight=True)(results)
    for kind, ignored, lacks in [
        ("CrossEntropyLoss", 255, True),
        ("CrossEntropyLoss", 0, None),  # has a weight
        ("LovaszLoss", 255, None),
        ("OhemCrossEntropy", 255, None),
    ]:
        loss = dict(type=kind, class_weight=[1, 2])
        heads = dict(decode_head=dict(loss_decode=[loss], ignore_index=ignored), auxiliary_head=None)
        pipeline = [dict(type="LoadAnnotations"), dict(type="CheckLabels", num_classes=2)]
        cfg = Config(dict(model=heads, train_dataloader=dict(dataset=dict(pipeline=pipeline))))
        pipelines.pass_class_weights(cfg)
        assert cfg.train_dataloader.dataset.pipeline[1].get("class_weight") is lacks
    for size in ((), (50,)):  # as LoadAnnotations squeezes them
        with pytest.raises(UserError, match=r"map.png: is one pixel wide or high"):
            CheckLabels(5)({**results, "gt_seg_map": np.zeros(size, np.uint8)})
    with pytest.raises(UserError, match=r"map.png: is a picture of 3 colours, not a map of labels"):
        CheckLabels(5)({**results, "gt_seg_map": np.zeros((2, 2, 3), np.uint8)})


def test_epochs_beside_iterations(monkeypatch):
    """A config has both after its loop was changed: schedules that do nothing, an epoch without an end."""
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    parts = dict(
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=24),
        train_dataloader=dict(sampler=dict(type="InfiniteSampler")),
        param_scheduler=[dict(type="LinearLR", by_epoch=False), dict(type="MultiStepLR", by_epoch=True)],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
    )
    tools._check_training(Config(parts))
    assert [one.partition(" counts epochs, but train_cfg iterations")[0] for one in said] == [
        "param_scheduler[1]",
        "default_hooks.checkpoint",
    ]
    parts |= dict(param_scheduler=dict(type="PolyLR", by_epoch=False), default_hooks={})
    tools._check_training(Config(parts))
    assert len(said) == 2
    for loop in (dict(type="EpochBasedTrainLoop", max_epochs=2), dict(by_epoch=True, max_epochs=2)):
        with pytest.raises(UserError, match="takes an InfiniteSampler, whose epoch has no end"):
            tools._check_training(Config({**parts, "train_cfg": loop}))


def test_a_damaged_map_is_named(tmp_path, monkeypatch):
    """LoadAnnotations' error names no file."""
    path = tmp_path / "map.png"
    Image.fromarray(np.arange(2500, dtype=np.uint8).reshape(50, 50)).save(path)
    whole, results = path.read_bytes(), {"seg_map_path": str(path)}
    assert CheckMap()(results) is results
    assert CheckMap()({"seg_map_path": str(tmp_path / "none.png")})  # which the loader names
    assert CheckMap()({}) == {}
    for content, fault in (
        (whole[:-20], "is damaged"), (whole[:60], "is damaged"), (b"", "is empty"), (b"<html>", "is no image"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"map\.png: {fault}.*; replace it"):
            CheckMap()(results)
    path.write_bytes(b"text")
    CheckMap(images_only=False)(results)
    with open(latin := f"{tmp_path}/caf\udce9.png", "wb") as file:
        file.write(b"<html>")
    with pytest.raises(UserError, match=r"caf\\udce9\.png: its name is no UTF-8; name another"):
        CheckMap()({"seg_map_path": latin})  # where OpenCV ends the process
    monkeypatch.setattr("cv2.haveImageReader", lambda path: False)
    path.write_bytes(b"II*\0 of a kind that tifffile alone may read")
    CheckMap()(results)
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match=r"map\.png: is damaged"):
        CheckMap()(results)
    for suffix in (".tga", ".bmp", ".im"):
        path = tmp_path / f"map{suffix}"
        Image.new("L", (50, 50)).save(path)
        assert CheckMap()({"seg_map_path": str(path)})
        path.write_bytes(path.read_bytes()[:-900])
        with pytest.raises(UserError, match=rf"map{suffix}: is damaged"):
            CheckMap()({"seg_map_path": str(path)})


def test_batches_that_shared_memory_does_not_hold(monkeypatch, capfd):
    """A thread of the worker would note it, and the run would wait."""
    mask = PixelData(sem_seg=torch.ones(1, 128, 128))
    batch = dict(
        inputs=[torch.ones(3, 128, 128), torch.eye(128).to_sparse()],
        data_samples=[BaseDataElement(mask=mask, labels=torch.ones(9))],
    )
    with monkeypatch.context() as patch:
        patch.setattr(shared_memory, "get_worker_info", lambda: object())
        assert shared_memory.SharingCollate(lambda samples: batch)([]) is batch
    assert batch["inputs"][0].is_shared()
    assert mask.sem_seg.is_shared()
    assert not batch["data_samples"][0].labels.is_shared()  # each has a file descriptor

    def fails(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    build = shared_memory.sharing(lambda **more: DataLoader([torch.ones(3, 128, 128)] * 2, collate_fn=list, **more))
    assert len(list(build(num_workers=0))) == 2
    message = r"allocate shared memory.*docker's --shm-size=16g.*num_workers=0"
    with pytest.raises(UserError, match=message), tools._with_advice():
        list(build(num_workers=1, timeout=60))
    build = shared_memory.sharing(lambda **more: DataLoader([lambda: 0] * 2, collate_fn=list, **more))  # not pickled
    with (
        pytest.raises(UserError, match=r"exited unexpectedly.*the lines above may say why"),
        tools._with_advice(),
    ):
        list(build(num_workers=1, timeout=60))
    # Python's versions word it otherwise.
    assert re.search(r"a worker cannot hand over a batch: \w+Error: .* local object", capfd.readouterr().err)


@pytest.mark.parametrize(("value", "refused"), [(0.5, False), (1, False), (-1, False), (50, True), (math.nan, True)])
def test_overlaps_and_scores_are_at_most_1(value, refused):
    """Suppression at 50, in percent, suppresses nothing; a score of 5 finds nothing."""
    model = dict(test_cfg=dict(rcnn=[dict(nms=dict(type="nms", iou_threshold=value), max_per_img=100)]))
    message = rf"^model\.test_cfg\.rcnn\[0\]\.nms\.iou_threshold is {value}, but an overlap or a score is at most 1"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        checks.check_data(Config(dict(model=model)), ())
    with pytest.raises(UserError, match=r"^model\.neg_iou_thr is ") if refused else nullcontext():
        checks.check_thresholds(dict(neg_iou_thr=(0.1, value)), "model")


def test_images_that_would_not_be_tested_and_models_that_would_not_learn(monkeypatch):
    loader = dict(dataset=dict(type="BaseSegDataset"))
    for name, dropping in itertools.product(("val", "test"), ({}, {"batch_sampler": dict(type="A", drop_last=True)})):
        cfg = Config({"model": {}, f"{name}_dataloader": dict(**loader, **(dropping or {"drop_last": True}))})
        with pytest.raises(UserError, match=f"^{name}_dataloader has drop_last=True, so the last"):
            checks.check_data(cfg, (name,))
    checks.check_data(Config(dict(model={}, train_dataloader=dict(**loader, drop_last=True))), ("train",))
    for processes, sampler in itertools.product(("1", "2"), ("BatchSampler", "mmdet.AspectRatioBatchSampler")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        cfg = Config(dict(model={}, val_dataloader=dict(**loader, batch_sampler=dict(type=sampler))))
        refused = processes == "2" and sampler != "BatchSampler"
        with pytest.raises(UserError, match="count an image twice") if refused else nullcontext():
            checks.check_data(cfg, ("val",))
    monkeypatch.setenv("WORLD_SIZE", "1")
    endless = dict(**loader, sampler=dict(type="InfiniteSampler"))
    with pytest.raises(UserError, match="val_dataloader has an InfiniteSampler, which has no end"):
        checks.check_data(Config(dict(model={}, val_dataloader=endless)), ("val",))
    repeated = dict(dataset=dict(type="RepeatDataset", times=2, dataset=dict(type="CocoDataset")))
    cfg = Config(dict(model={}, val_dataloader=repeated, val_evaluator=dict(type="IoUMetric", format_only=True)))
    checks.check_data(cfg, ("val",))
    cfg.val_evaluator = dict(type="CocoMetric")
    with pytest.raises(UserError, match=r"val_dataloader\.dataset has a RepeatDataset, so images are tested several"):
        checks.check_data(cfg, ("val",))
    steps = [dict(type="mmdet.LoadAnnotations", with_bbox=True)]
    cfg = Config(dict(model=dict(roi_head=dict(mask_head=dict(num_classes=80))), train_dataloader=dict(dataset={})))
    cfg.train_dataloader.dataset = dict(type="CocoDataset", pipeline=steps)
    with pytest.raises(UserError, match=r"has a mask_head, but LoadAnnotations .* set its with_mask=True"):
        checks.check_data(cfg, ("train",))
    cfg.train_dataloader.dataset.pipeline[0].with_mask = True
    checks.check_data(cfg, ("train",))
    cfg.train_dataloader.dataset.pipeline[0] = dict(type="mmdet.LoadPanopticAnnotations")  # with masks by default
    checks.check_data(cfg, ("train",))
    tools._check_training(Config(dict(train_cfg=dict(max_iters=9e4, val_interval=9e4 / 5))))  # as mmdet's of V3Det
    with pytest.raises(UserError, match=r"train_cfg\.val_interval is 1\.5, but must be a whole number"):
        tools._check_training(Config(dict(train_cfg=dict(val_interval=1.5))))
    for ratio in (1.0, float("nan")):
        with pytest.raises(
            UserError, match=r"model\.decode_head\.dropout_ratio is .*, but must be below 1: else, nothing"
        ):
            tools._check_training(Config(dict(model=dict(decode_head=dict(dropout_ratio=ratio)))))
    for eps in (1e8, -1e-8):
        with pytest.raises(UserError, match=r"optimizer\.eps is .*, but must be from 0 to 1: else, nothing is"):
            tools._check_training(Config(dict(optim_wrapper=dict(optimizer=dict(eps=eps)))))
    logged = dict(type="UPerHead", num_classes=3, loss_decode=[dict(type="DiceLoss"), dict(type="A", loss_name="ce")])
    cfg = Config(dict(model=dict(decode_head=logged), train_dataloader=loader))
    with pytest.raises(UserError, match=r"loss_decode\[1\]\.loss_name is 'ce', without 'loss' in it, .* 'loss_ce'"):
        checks.check_data(cfg, ("train",))
    softmax, sigmoid = (dict(type="CrossEntropyLoss", use_sigmoid=way) for way in (False, True))
    one_class = r"decode_head has one class, so each label is 0 or ignored, .* make the background a class"
    one_channel = r"decode_head has one channel, .* set model\.decode_head\.loss_decode\[1\]\.use_sigmoid"
    for head, message in (
        (dict(num_classes=1), one_class),
        (dict(num_classes=1, loss_decode=softmax), one_class),
        (dict(num_classes=1, loss_decode=sigmoid), one_class),  # its target is 0 everywhere
        (dict(num_classes=2, out_channels=1, loss_decode=[sigmoid, softmax]), one_channel),
        (dict(num_classes=2, out_channels=1, loss_decode=sigmoid), None),
        (
            dict(num_classes=2, out_channels=1, loss_decode=[sigmoid, dict(type="DiceLoss")]),
            r"\[1\] is a DiceLoss, which",
        ),
        (dict(num_classes=2, out_channels=1, loss_decode=dict(type="LovaszLoss")), "is a LovaszLoss, which is not for"),
        (dict(num_classes=2, out_channels=1, loss_decode=dict(type="LovaszLoss", loss_type="binary")), None),
        (dict(num_classes=2, loss_decode=dict(type="DiceLoss")), None),
        (dict(num_classes=2), None),
        (dict(num_classes=2, loss_decode=dict(softmax, class_weight=[1, 1, 1])), "class_weight has 3 numbers"),
        (dict(num_classes=2, loss_decode=dict(softmax, class_weight=[1, -1])), "class_weight has -1, by which"),
        (dict(num_classes=2, loss_decode=dict(softmax, class_weight=[1, 1])), None),
        (dict(num_classes=2, out_channels=1, loss_decode=dict(sigmoid, class_weight=[3.0])), None),
        (dict(num_classes=2, out_channels=1, loss_decode=dict(sigmoid, class_weight=[1, 3])), "but .* has 1 channels"),
    ):
        cfg = Config(dict(model=dict(decode_head=dict(type="UPerHead", **head)), train_dataloader=loader))
        with pytest.raises(UserError, match=message) if message else nullcontext():
            checks.check_data(cfg, ("train",))
    cfg.model.decode_head = dict(type="STDCHead", num_classes=1)  # of borders
    checks.check_data(cfg, ("train",))


def test_maps_that_only_tifffile_reads(tmp_path, monkeypatch):
    """64 bits, which LoadAnnotations(imdecode_backend="tifffile") takes modulo 256."""
    path, labels = tmp_path / "map.tif", np.array([[256, 259]])
    path.write_bytes(b"II*\0")
    monkeypatch.setitem(sys.modules, "tifffile", argparse.Namespace(imread=lambda path: labels))
    with pytest.raises(UserError, match=r"map.tif: has label 259, but with 5 classes"):
        CheckLabels(5)({"seg_map_path": str(path), "gt_seg_map": labels.astype(np.uint8)})


def test_steps_that_spoil_what_is_compared(monkeypatch):
    """Images normalised twice, labels scaled after they are loaded, or images before, crops smaller than batches."""
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, level: said.append(message))
    steps = [dict(type=name) for name in ("LoadAnnotations", "Resize", "Normalize")]
    cfg = Config(dict(model=dict(data_preprocessor=dict(mean=[1])), val_evaluator=dict(type="VOCMetric")))
    for scope, order, found in ((None, steps, 2), (None, steps[1::-1], 0), ("mmseg", steps, 2), ("mmdet", steps, 2)):
        cfg.default_scope = scope
        checks._check_steps(cfg, "val", ConfigDict(type="A", pipeline=order))
        assert len(said) == found
        said.clear()
    cfg.val_evaluator = dict(type="IoUMetric")
    for scope, found in (("mmseg", ["scales the true maps"]), ("mmdet", [])):
        cfg.default_scope = scope
        checks._check_steps(cfg, "val", ConfigDict(type="A", pipeline=steps[:2]))
        assert [one.partition("which then ")[2].partition(",")[0] for one in said] == found
        said.clear()
        checks._check_steps(cfg, "val", ConfigDict(type="A", pipeline=steps[1::-1]))
        checks._check_steps(cfg, "train", ConfigDict(type="A", pipeline=steps[:2]))
        assert said == []
        for name in ("Resize", "Rotate", "RandomAffine"):
            early = ConfigDict(type="A", pipeline=[dict(type=name), steps[0]])
            with pytest.raises(UserError, match=f"has {name} before LoadAnnotations, so boxes, masks or maps are not"):
                checks._check_steps(cfg, "train", early)
    cfg.model.data_preprocessor = dict(size=(64, 96))
    for size, then, found in (((64, 64), [], 1), ((64, 96), [], 0), (96, [], 0), (64, [dict(type="Pad")], 0)):
        cfg.default_scope = "mmseg"
        crop = ConfigDict(type="A", pipeline=[steps[0], dict(type="RandomCrop", crop_size=size), *then])
        checks._check_steps(cfg, "train", crop)
        assert ["but data_preprocessor.size is (64, 96)" in one for one in said] == [True] * found
        said.clear()
    cfg.default_scope = None
    cfg.model.data_preprocessor, cfg.val_evaluator = dict(mean=[1]), dict(type="VOCMetric")
    mixing = ConfigDict(type="MultiImageMixDataset", dataset=dict(type="A", pipeline=steps[1:2]), pipeline=steps[2:])
    checks._check_steps(cfg, "train", mixing)
    assert ["images are normalised twice" in one for one in said] == [True]
    said.clear()
    chance = [dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion"), dict(type="RandomFlip", prob=0.0)]
    chance.append(dict(type="TestTimeAug", transforms=[[dict(type="RandomFlip", prob=1.0)]]))
    checks._check_steps(cfg, "test", ConfigDict(type="A", pipeline=chance))
    assert [one.partition(" has ")[2].partition(",")[0] for one in said] == ["RandomFlip", "PhotoMetricDistortion"]
    said.clear()
    decoded = ConfigDict(type="A", pipeline=[dict(type="LoadImageFromFile", imdecode_backend="tifffile")])
    for spec in (None, object()):
        monkeypatch.setattr(checks, "find_spec", lambda name, spec=spec: spec)
        with nullcontext() if spec else pytest.raises(UserError, match="needs that package: pip install tifffile"):
            checks._check_steps(cfg, "test", decoded)
    assert ["bgr_to_rgb of the data_preprocessor must be False, and its mean and std" in one for one in said] == [True]
    said.clear()
    cfg.default_scope = "mmseg"
    moving = [dict(type=name) for name in ("Pad", "mmseg.RandomCutOut", "CenterCrop", "ColorTransform")]
    checks._check_steps(cfg, "test", ConfigDict(type="A", pipeline=[moving[0]]))  # no map to compare with
    assert said == []
    checks._check_steps(cfg, "test", ConfigDict(type="A", pipeline=[*moving, dict(type="LoadAnnotations")]))
    found = [one.partition(" has ")[2].partition(",")[0] for one in said]
    assert found == ["Pad", "CenterCrop", "RandomCutOut"]
    metric = ConfigDict(type="CocoMetric", sort_categories=True)
    with pytest.raises(UserError, match=r"val_evaluator\.sort_categories=True numbers labels by the categories' ids"):
        checks._check_compared(metric, [ConfigDict(type="CocoDataset", ann_file="a.json")], "val")
    cfg = Config(dict(test_evaluator=dict(type="IoUMetric"), test_dataloader=dict(dataset=dict(type=dict))))
    cfg.test_dataloader.dataset.metainfo = dict(classes=[str(i) for i in range(300)])
    with pytest.raises(UserError, match="maps are written in 8 bits, which hold 256 labels, not 300"):
        tools.write_maps(cfg, "out")
    assert tools._work_dir(argparse.Namespace(work_dir="~/run"), cfg) == str(Path("~/run").expanduser())


LOCAL = [dict(type="LocalVisBackend")]


def test_what_drawings_need(monkeypatch):
    """Drawing hooks read the image again, turn it, and leave its size. mmseg writes it by a backend."""
    said = []
    monkeypatch.setattr(tools, "print_log", lambda message, level: said.append(message))
    for colour, expected in (("color", 0), ("color_ignore_orientation", 1), ("unchanged", 1)):
        cfg = Config(
            dict(default_hooks=dict(visualization=dict(type="A")), visualizer=dict(type="B"), default_scope="mmdet")
        )
        pipeline = [dict(type="LoadImageFromFile", color_type=colour)]
        cfg.test_dataloader = dict(dataset=dict(type="CocoDataset", pipeline=pipeline))
        tools._draw(argparse.Namespace(show=False, wait_time=2, show_dir="drawn"), cfg)
        assert ["on turned photographs, drawings are not in" in one for one in said] == [True] * expected
        said.clear()
    pipeline[1:] = [dict(type="LoadAnnotations"), dict(type="Resize")]
    cfg.test_dataloader.dataset.pipeline = pipeline
    draw = argparse.Namespace(config="a.py", show=False, wait_time=2, show_dir="drawn")
    with pytest.raises(UserError, match=r"has LoadAnnotations before a Resize, .*put it after Resize"):
        tools._draw(draw, cfg)
    cfg.default_scope, cfg.test_dataloader.dataset.pipeline = "mmseg", pipeline[::-1]
    for backends, writes in ((None, False), ([dict(type="TensorboardVisBackend")], False), (LOCAL, True)):
        cfg.visualizer.vis_backends = backends
        with nullcontext() if writes else pytest.raises(UserError, match="drawn: mmseg writes images by a LocalVis"):
            tools._draw(draw, cfg)


def test_augmentation_in_wrapped_data_sets():
    inner = dict(type="CocoDataset", pipeline=[])
    dataset = dict(type="ConcatDataset", datasets=[inner, dict(type="RepeatDataset", dataset=dict(inner))])
    cfg = Config(dict(model={}, tta_model=dict(type="A"), tta_pipeline=[dict(type="B")], test_dataloader={}))
    cfg.test_dataloader.dataset = dataset
    one = Config(dict(cfg.to_dict(), default_scope="mmseg", model=dict(decode_head=dict(out_channels=1))))
    flips = [dict(type="RandomFlip"), dict(type="mmseg.PackSegInputs", meta_keys=("img_path",))]
    flipped = Config(dict(cfg.to_dict(), tta_pipeline=[dict(type="TestTimeAug", transforms=[flips[:1], flips[1:]])]))
    for wrong, message in (
        (one, "not for a decode_head of one channel"),
        (flipped, "lack 'flip' or 'flip_direction'"),
    ):
        with pytest.raises(UserError, match=rf"^c\.py: .*{message}"):
            tools._augment(argparse.Namespace(config="c.py"), wrong)
    flips[1]["meta_keys"] = ("flip", "flip_direction")
    tools._augment(argparse.Namespace(config="c.py"), Config(dict(cfg.to_dict(), tta_pipeline=flips)))
    tools._augment(argparse.Namespace(config="c.py"), cfg)
    assert "pipeline" not in cfg.test_dataloader.dataset
    assert [one.pipeline[0].type for one in config_parts.datasets_of(cfg.test_dataloader.dataset)] == ["B", "B"]


@pytest.mark.parametrize(
    "text",
    ["model=[1]", "model=dict(module=3)", "train_dataloader=5", "test_dataloader=dict(dataset=5)", "optim_wrapper=5",
     "test_dataloader=dict(dataset=dict(pipeline=[[[5]]]))", "param_scheduler=5", "train_cfg=5"],
)  # fmt: skip
def test_a_saved_config_of_odd_kinds_is_not_read(text, log):
    """Or what there is of it is compared; no error."""
    cfg = trained_so(optim_wrapper=dict(optimizer=dict(type="A")), train_dataloader=dict(batch_size=2))
    for compare in ("warn_of_other_config", "warn_of_other_start", "warn_of_what_goes_on"):
        getattr(saved_config, compare)(cfg, {"cfg": text}, "a.pth")
    assert text != "model=[1]" or "a.pth: the config in it is not read, because it is no plain data" in log.text


def test_a_saved_config_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = "test_dataloader=dict(dataset=dict(pipeline=[dict(type='stranger.X', scale=(1, 1))]))"
    for compare in ("warn_of_other_config", "warn_of_other_start", "warn_of_what_goes_on"):
        getattr(saved_config, compare)(trained_so(), {"cfg": text}, "a.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_two_values_or_of_no_batch_norm_are_refused(tmp_path):
    state = {"0.weight": torch.ones(2), "module.0.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"hold '0\.weight' and 'module\.0\.weight', which are one parameter"):
        weights_of({"state_dict": state}, "a.pth")
    with pytest.raises(UserError, match=r"hold 'norm\.running_var', a variance below 0"):
        weights_of({"state_dict": {"norm.running_var": torch.tensor([1.0, -1.0])}}, "a.pth")
    weights_of({"state_dict": {"norm.running_var": torch.ones(2).to(torch.float8_e4m3fn)}}, "a.pth")


def test_mmengine_loads_through_it(tmp_path):
    """Importing the backbone is enough, as `custom_imports` does."""
    model = torch.nn.Linear(2, 3)
    state = OrderedDict((k, torch.full_like(v, 0.5)) for k, v in model.state_dict().items())
    path = save({"state_dict": state, "message_hub": messages().state_dict()}, tmp_path / "m.pth")
    load_checkpoint(model, path)
    assert (model.weight == 0.5).all()
