"""The models under timm's names and arguments, in torch.hub, and under the tools that trace, hook and count modules."""

import copy
import dataclasses
import warnings
from unittest import mock
from urllib.parse import urlparse
from urllib.response import addinfourl

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from running import ROOT
from timm.models import PretrainedCfg, group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from classification.checkpoint import save_checkpoint
from classification.config import default_config
from classification.flops import count_flops
from classification.models import VARIANTS, SpatialMambaBackbone, optimise_for_cpu, registry, spatialmamba_micro
from classification.models.spatialmamba import Stage

PLAIN = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
BARE = ("StructureAwareSSM", "StateFusion")  # whose parameters are none of a layer's, by the published names
HUB = ("source", "hf-hub")  # of timm, which would read the weights itself
IMAGES = torch.randn(2, 3, 70, 97, generator=torch.Generator().manual_seed(0))


def seeded(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("spatialmamba_micro", **kwargs).eval()


def test_all_are_there():
    assert set(timm.list_models("spatialmamba_*")) == VARIANTS.keys()
    model = seeded(num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
    assert model(IMAGES[:, :1]).shape == (2, 7)
    assert (model.head_drop.p, model.layers[-1].blocks[-1].drop_path.drop_prob) == (0.1, 0.2)
    config = timm.data.resolve_data_config(model=model)
    assert (config["crop_pct"], config["interpolation"], config["mean"]) == (0.875, "bicubic", (0.485, 0.456, 0.406))


def test_every_layer_is_a_plain_one():
    for module in seeded().modules():
        if list(module.parameters(recurse=False)):
            assert type(module) in PLAIN or type(module).__name__ in BARE


def test_features():
    whole = seeded()
    for wanted in ((0, 1, 2, 3), (1, 2), (-1,)):
        model = seeded(features_only=True, out_indices=wanted)
        maps = model(IMAGES)
        expected = whole.forward_intermediates(IMAGES, list(wanted), intermediates_only=True)
        for found, one, channels, stride in zip(
            maps, expected, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            torch.testing.assert_close(found, one)
            assert found.shape[1:] == (channels, -(-70 // stride), -(-97 // stride))
    model = seeded(features_only=True, out_indices=(1,)).train()
    assert model.model.num_features == model.model.head_hidden_size == model.feature_info.channels()[0]
    model(IMAGES)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing is kept that no map needs
    with pytest.raises(ValueError, match="stage indices must lie in"):
        seeded(features_only=True, out_indices=(7,))
    with pytest.raises(ValueError, match=r"a number of last stages must lie in \[1, 4\], got -1"):
        seeded(features_only=True, out_indices=-1)


@pytest.mark.parametrize("by", ["hook", "fx"])
def test_features_by_module_names(by):
    """timm's other two ways to the maps: `feature_info` names modules before downsampling."""
    model = seeded(features_only=True, feature_cls=by)
    expected = seeded().forward_intermediates(IMAGES, intermediates_only=True, output_fmt="NHWC")
    for found, one, channels in zip(model(IMAGES), expected, model.feature_info.channels(), strict=True):
        torch.testing.assert_close(found, one)
        assert found.shape[-1] == channels


def test_pooling_and_head():
    model = seeded(global_pool="max")
    tokens = model.forward_features(IMAGES)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.amax((1, 2)))
    model.reset_classifier(3)
    torch.testing.assert_close(model(IMAGES), model.head(tokens.amax((1, 2))))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(IMAGES), tokens)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', 'max', 'avgmax', '', got 'catavgmax'"):
        seeded(global_pool="catavgmax")
    both = seeded().forward_intermediates(IMAGES, [3], output_dict=True)
    assert both.keys() == {"image_intermediates", "image_features"}


def test_weights_from_a_file(tmp_path, monkeypatch):
    """Ours with what lies beside the weights, another head and other channels; timm's folders; a hub's local copy."""
    model = seeded(num_classes=7)
    save_checkpoint({"model": model.state_dict(), "config": {"A": 1}}, tmp_path / "micro.pth")
    expected = model(IMAGES)
    config = default_config()
    config.DATA.IMG_SIZE, config.DATA.INTERPOLATION, config.TEST.CROP_PCT = 70, "bilinear", 1.0
    save_checkpoint({"model": model.state_dict(), "config": config.dump()}, tmp_path / "of_main.pth")
    of_main = timm.create_model("spatialmamba_micro", str(tmp_path / "of_main.pth"), num_classes=7)
    found = timm.data.resolve_data_config(model=of_main)
    assert (found["input_size"], found["interpolation"], found["crop_pct"]) == ((3, 70, 70), "bilinear", 1.0)
    assert of_main.pretrained_cfg["pool_size"] == (3, 3)  # tokens that are left of it
    assert "label_names" not in of_main.pretrained_cfg
    registered = timm.get_pretrained_cfg("spatialmamba_micro")
    registered.file = str(tmp_path / "of_main.pth")
    whole = registered, registered.to_dict(), {**of_main.pretrained_cfg, "file": registered.file, "num_classes": 1000}
    array = PretrainedCfg(file=registered.file, mean=np.array([0.485, 0.456, 0.406]))
    for cfg in (PretrainedCfg(file=registered.file), array, *whole):  # a thousand classes at 224 are their defaults
        found = timm.create_model("spatialmamba_micro", pretrained=True, pretrained_cfg=cfg, num_classes=7).eval()
        torch.testing.assert_close(found(IMAGES), expected)
        at = found.pretrained_cfg
        assert (at["num_classes"], at["input_size"], at["crop_pct"]) == (7, (3, 70, 70), 1.0)
    registered.mean = (0.5, 0.5, 0.5)
    found = timm.create_model("spatialmamba_micro", pretrained=True, pretrained_cfg=registered)
    assert found.pretrained_cfg["mean"] == registered.mean
    path = str(tmp_path / "micro.pth")
    torch.testing.assert_close(timm.create_model("spatialmamba_micro", path, num_classes=7).eval()(IMAGES), expected)
    hub = dict.fromkeys(((), ("it.bin",)), model.state_dict())
    monkeypatch.setattr(registry, "load_state_dict_from_hf", lambda name, *file, **_: hub[file])
    monkeypatch.setattr(
        registry, "load_model_config_from_hf", lambda name, **_: (dict([HUB]), "spatialmamba_micro", None)
    )
    overlays = [{"file": path}, {"hf_hub_id": "me/it"}, {"state_dict": model.state_dict()}]
    of_hub = dataclasses.replace(timm.get_pretrained_cfg("spatialmamba_micro"), hf_hub_id="me/it")
    overlays += [of_hub, *({"hf_hub_id": "me/it", one: two} for one, two in (("hf_hub_filename", "it.bin"), HUB))]
    named = [{"pretrained": True, "pretrained_cfg" + "_overlay" * isinstance(one, dict): one} for one in overlays]
    named += [{"pretrained": "hf-hub:me/it"}, {"pretrained": tmp_path / "micro.pth"}]
    named += [{"pretrained": 1, "pretrained_cfg_overlay": {"file": path}}]
    named += [
        {"pretrained": True, "pretrained_cfg": one} for one in ({"file": path}, dict([HUB, ("hf_hub_id", "me/it")]))
    ]
    for arguments in named:
        found = timm.create_model("spatialmamba_micro", num_classes=7, **arguments).eval()
        torch.testing.assert_close(found(IMAGES), expected)  # its head too
        new = timm.create_model("spatialmamba_micro", num_classes=3, in_chans=1, **arguments)
        torch.testing.assert_close(new.layers.state_dict(), model.layers.state_dict())
    for number in ({}, {"num_classes": 7}, {"num_classes": 7, "pretrained_cfg": {"num_classes": -1}}):
        new = {"file": path, "num_classes": -1}  # of timm's train.py --pretrained-path
        new = {"file": path} if len(number) == 2 else new
        found = timm.create_model("spatialmamba_micro", True, pretrained_cfg_overlay=new, **number).eval()
        assert found.num_classes == number.get("num_classes", 1000)
        torch.testing.assert_close(found.forward_features(IMAGES), model.forward_features(IMAGES))
        assert (found(IMAGES)[:, :7] - expected).abs().max() > 0.01
    made_with = dict(global_pool="max", num_classes=7)
    monkeypatch.setattr(registry, "load_model_config_from_hf", lambda name, **_: ({}, "spatialmamba_micro", made_with))
    other = seeded(**made_with)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(timm.create_model("spatialmamba_micro", "hf-hub:me/it").eval()(IMAGES), other(IMAGES))
    own = timm.create_model("spatialmamba_micro", "hf-hub:me/it", global_pool="avg")  # over what it was made with
    torch.testing.assert_close(own.eval()(IMAGES), expected)
    for error, said in (
        (LocalEntryNotFoundError("no network"), pytest.raises(LocalEntryNotFoundError, match="no network")),
        (EntryNotFoundError("none"), pytest.warns(UserWarning, match=r"hf-hub:me/it: has no config\.json \(none\)")),
    ):
        with monkeypatch.context() as patch, said:
            patch.setattr(registry, "load_model_config_from_hf", mock.Mock(side_effect=error))
            found = timm.create_model("spatialmamba_micro", "hf-hub:me/it", num_classes=7).eval()
            torch.testing.assert_close(found(IMAGES), model(IMAGES))
    for known in (False, True):  # without a network, to have no config.json, as the hub's cache notes it
        at = tmp_path / "cache/models--me--it"
        for name, text in (("refs/main", "c0"), (".no_exist/c0/config.json", ""))[: 1 + known]:
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_text(text)
        (at / "snapshots/c0").mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), at / "snapshots/c0/pytorch_model.bin")
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            patch.setattr(registry, "load_model_config_from_hf", timm.models.load_model_config_from_hf)
            patch.setattr(registry, "load_state_dict_from_hf", timm.models.load_state_dict_from_hf)
            arguments = dict(pretrained="hf-hub:me/it", cache_dir=tmp_path / "cache")
            if known:
                with pytest.warns(UserWarning, match=r"hf-hub:me/it: has no config\.json"):
                    found = timm.create_model("spatialmamba_micro", **arguments).eval()
                torch.testing.assert_close(found(IMAGES), expected)
            else:
                with pytest.raises(LocalEntryNotFoundError):
                    timm.create_model("spatialmamba_micro", **arguments)
    five = seeded(num_classes=5)
    hub["other.bin",] = five.state_dict()
    for way in ("pretrained_cfg", "pretrained_cfg_overlay"):
        named = {way: {"hf_hub_filename": "other.bin"}}
        found = timm.create_model("spatialmamba_micro", "hf-hub:me/it", num_classes=5, **named).eval()
        torch.testing.assert_close(found(IMAGES), five(IMAGES))
    with pytest.raises(ValueError, match="hf-hub:me/it: is a spatialmamba_micro, not a spatialmamba_tiny"):
        timm.create_model("spatialmamba_tiny", "hf-hub:me/it")
    hub = torch.hub.load(ROOT, "spatialmamba_micro", source="local", pretrained=path, num_classes=7)
    torch.testing.assert_close(hub.eval()(IMAGES), expected)
    save_for_hf(model, tmp_path / "folder")
    torch.testing.assert_close(timm.create_model(f"local-dir:{tmp_path}/folder", True).eval()(IMAGES), expected)
    state = model.state_dict()
    for place, cfg, overlay in (
        (path, {}, {"state_dict": state}),
        (path, {"file": path}, {}),
        (True, of_hub, {"url": path}),
        (True, {"file": path, "url": path}, {}),
        (True, {"hf_hub_id": "me/it", "source": "hf-hub", "num_classes": 7, "file": path}, {}),
        *((one, None, {}) for one in (path, "hf-hub:me/it")),
        *((True, None, {key: value}) for key, value in (("file", path), ("state_dict", state), ("hf_hub_id", "it"))),
    ):
        name = f"local-dir:{tmp_path}/folder" if cfg is None else "spatialmamba_micro"
        with pytest.raises(ValueError, match=r"weights are named twice, by .* and by .*: name one of them"):
            timm.create_model(name, place, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    for number in ("1", -1, 7):
        with pytest.raises(ValueError, match=rf"micro\.pth: label_offset is {number!r}, of 7 classes"):
            timm.create_model("spatialmamba_micro", path, pretrained_cfg_overlay={"label_offset": number})
    of_folder = {"source": "local-dir", "file": f"{tmp_path}/folder"}
    with pytest.raises(ValueError, match=rf"pass it as the model's name: timm\.create_model\('local-dir:{tmp_path}"):
        timm.create_model("spatialmamba_micro", True, pretrained_cfg_overlay=of_folder)
    described = {**registered.to_dict(), "mean": (0.5, 0.5, 0.5), "num_classes": 7, "file": None}  # by config.json
    described |= dict([HUB, ("hf_hub_id", "me/it")])
    sizes = dict(depths=[1, 1], dims=8, num_classes=7)
    of_sizes = seeded(**sizes)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: state)
    monkeypatch.setattr(
        "timm.models._factory.load_model_config_from_hf", lambda *_, **__: (dict(described), "spatialmamba_micro", {})
    )
    for mean, classifier in (((0.485, 0.456, 0.406), "head"), ((0.4, 0.4, 0.4), None)):  # the first is a default
        described["classifier"] = classifier  # a config.json may lack it
        way = dict(pretrained_cfg_overlay={"mean": mean})
        resolved = timm.models._factory.resolve_model_input_args("hf-hub:me/it", **way)  # as timm's scripts do
        for arguments in (resolved, dict(model_name="hf-hub:me/it", **way)):
            found = timm.create_model(pretrained=True, **arguments).eval()
            torch.testing.assert_close(found(IMAGES), expected)
            assert found.pretrained_cfg["mean"] == mean
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_model_config_from_hf", lambda *_, **__: ({}, "spatialmamba_micro", sizes))
        patch.setattr(registry, "load_state_dict_from_hf", lambda *_, **__: of_sizes.state_dict())
        save_for_hf(timm.create_model("spatialmamba_micro", "hf-hub:me/it"), tmp_path / "sizes")
        patch.setattr(
            registry,
            "load_model_config_from_hf",
            lambda *_, **__: ({}, "spatialmamba_micro", {**sizes, "num_classes": 5}),
        )
        with pytest.raises(ValueError, match=r"it: has 7 classes, but its config\.json says 5: .* or pass num_classes"):
            timm.create_model("spatialmamba_micro", "hf-hub:me/it")
        features = dict(features_only=True, out_indices=(0, 1))
        for more in (features, dict(pretrained_cfg_overlay={"num_classes": -1}), dict(num_classes=5)):
            timm.create_model("spatialmamba_micro", "hf-hub:me/it", **more)
        none = {**sizes, "num_classes": 0}
        patch.setattr(registry, "load_model_config_from_hf", lambda *_, **__: ({}, "spatialmamba_micro", none))
        assert timm.create_model("spatialmamba_micro", "hf-hub:me/it").num_classes == 0
        # Of a hub's id that is no model's name, config.json is read.
        beside = {"mean": (0.4, 0.4, 0.4), "label_names": list("abcdefg"), "num_classes": 7}
        patch.setattr(registry, "load_model_config_from_hf", lambda *_, **__: (beside, "spatialmamba_micro", sizes))
        own = dict([HUB, ("hf_hub_id", "me/it"), ("num_classes", 7)])
        found = timm.create_model("spatialmamba_micro", True, pretrained_cfg=own).pretrained_cfg
        assert {key: found[key] for key in beside} == beside
    found = timm.create_model(f"local-dir:{tmp_path}/sizes", pretrained=True).eval()
    torch.testing.assert_close(found(IMAGES), of_sizes(IMAGES))
    with pytest.raises(
        ValueError, match=r"of_main\.pth: its crop_pct is 1\.0, but pretrained_cfg says 0\.5: leave that"
    ):
        timm.create_model("spatialmamba_micro", tmp_path / "of_main.pth", pretrained_cfg={"crop_pct": 0.5})
    odd = state | {"head.weight": state["head.weight"][..., None, None]}
    for one, said in ((odd, r"head\.weight of shape \(7, \d+, 1, 1\)"), (odd | {"head.weight": None}, "head.bias")):
        save_checkpoint({"model": {k: v for k, v in one.items() if v is not None}}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=rf"odd\.pth: its {said}.* is no head's"):
            timm.create_model("spatialmamba_micro", tmp_path / "odd.pth", num_classes=7)
    for way in ("pretrained_cfg", "pretrained_cfg_overlay"):
        with pytest.raises(ValueError, match=r"micro\.pth: has 7 classes, but .* says num_classes=9: leave that out"):
            timm.create_model("spatialmamba_micro", path, **{way: {"num_classes": 9}})
        for said in ({"label_offset": 2}, {"label_offset": 2, "num_classes": 5}):
            for number in ({}, {"num_classes": 5}):
                found = timm.create_model("spatialmamba_micro", path, **{way: said}, **number).eval()
                torch.testing.assert_close(found(IMAGES), expected[:, 2:])
        with pytest.raises(ValueError, match=r"label_offset=2 leaves 5 of 7 classes: pass num_classes=5"):
            timm.create_model("spatialmamba_micro", path, num_classes=7, **{way: {"label_offset": 2}})
        timm.create_model("spatialmamba_micro", path, num_classes=7, features_only=True, **{way: {"label_offset": 2}})
        with pytest.raises(ValueError, match=r"has 5 classes after label_offset=2, but .* says num_classes=7"):
            timm.create_model("spatialmamba_micro", path, **{way: {"label_offset": 2, "num_classes": 7}})
        own = {"file": tmp_path / "of_main.pth", "crop_pct": 0.5}  # the caller's word on the file that it names
        found = timm.create_model("spatialmamba_micro", True, **{way: own})
        assert found.pretrained_cfg["crop_pct"] == 0.5
    whole = seeded()
    save_checkpoint({"model": whole.state_dict()}, tmp_path / "imagenet.pth")
    whole.reset_classifier(0)
    one = timm.create_model("spatialmamba_micro", str(tmp_path / "imagenet.pth"), num_classes=0, in_chans=1).eval()
    grey = IMAGES[:, :1]
    # timm's rule for one channel is the sum of the three.
    torch.testing.assert_close(one(grey), whole(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no weights are published for spatialmamba_micro.*pretrained='/path"):
        timm.create_model("spatialmamba_micro", pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such checkpoint; a hub id is written hf-hub:"):
        timm.create_model("spatialmamba_micro", pretrained="nowhere.pth")
    shorter = {key: value for key, value in whole.state_dict().items() if not key.startswith("layers.2.blocks.1.")}
    save_checkpoint({"model": shorter}, tmp_path / "shorter.pth")
    for model, source in (("spatialmamba_tiny", path), ("spatialmamba_micro", str(tmp_path / "shorter.pth"))):
        with pytest.raises(ValueError, match=f"its weights are none of a {model}: "):
            timm.create_model(model, pretrained=source, num_classes=5)


def test_class_names_go_with_the_weights(tmp_path):
    """Numbered folders, which timm sorts otherwise: the names reach timm's folders, and its data as a class map."""
    names = [str(number) for number in (1, 10, 2, 3)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    save_checkpoint({"model": seeded(num_classes=4).state_dict(), "classes": names}, tmp_path / "named.pth")
    warned = r": its class 1 is '10', but timm's readers .* number '2' so"
    with pytest.warns(UserWarning, match=rf"named\.pth{warned}"):
        model = timm.create_model("spatialmamba_micro", tmp_path / "named.pth")
    save_for_hf(model, tmp_path / "folder")
    with pytest.warns(UserWarning, match=rf"folder{warned}"):
        read = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True)
    assert read.pretrained_cfg["label_names"] == names
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    arguments = dict(name="folder", root=str(tmp_path / "data"))
    assert timm.data.create_dataset(**arguments).reader.class_to_idx != dict(zip(names, range(4), strict=True))
    mapped = timm.data.create_dataset(**arguments, class_map=str(tmp_path / "classes.txt"))
    assert mapped.reader.class_to_idx == dict(zip(names, range(4), strict=True))
    save_checkpoint({"model": seeded(num_classes=4).state_dict(), "classes": sorted("abcd")}, tmp_path / "plain.pth")
    plain = {"file": tmp_path / "plain.pth"}
    cfg = dict(model.pretrained_cfg)  # of another file
    for named in (dict(pretrained_cfg=cfg, pretrained_cfg_overlay=plain), dict(pretrained_cfg=cfg | plain)):
        with pytest.raises(
            ValueError, match=r"plain\.pth: its label_names is \['a', .* pretrained_cfg says \['1', '10',"
        ):
            timm.create_model("spatialmamba_micro", True, **named)
    for offset, found in ((0, "abcd"), (1, "bcd")):
        cut = timm.create_model("spatialmamba_micro", plain["file"], pretrained_cfg_overlay={"label_offset": offset})
        assert cut.pretrained_cfg["label_names"] == list(found)
    new = dict(pretrained_cfg_overlay={"label_names": ["a", "b"]})
    for more in (dict(num_classes=2), dict(num_classes=2, pretrained_cfg={"num_classes": -1})):  # of the new head
        assert timm.create_model("spatialmamba_micro", plain["file"], **new, **more).pretrained_cfg["label_names"] == [
            *"ab"
        ]
    bare = {"state_dict": seeded(num_classes=4).state_dict(), "label_names": sorted("abcd")}
    for described in (bare, PretrainedCfg(**bare)):
        found = timm.create_model("spatialmamba_micro", True, pretrained_cfg=described)
        assert found.pretrained_cfg["label_names"] == sorted("abcd")
    with pytest.raises(ValueError, match=r"plain\.pth: has 4 classes, but its pretrained_cfg holds 2 label_names"):
        timm.create_model("spatialmamba_micro", plain["file"], pretrained_cfg_overlay={"label_names": ["a", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.create_model("spatialmamba_micro", tmp_path / "plain.pth")
        for without_head in (dict(num_classes=2), dict(num_classes=0), dict(features_only=True)):
            timm.create_model("spatialmamba_micro", tmp_path / "named.pth", **without_head)


def test_weights_by_address(tmp_path, monkeypatch):
    """Two files of one name: timm keeps a download by its name, and would give the first one for both."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(
        "classification.download.urlopen", lambda at: addinfourl((tmp_path / urlparse(at).path[1:]).open("rb"), {}, at)
    )
    models = {folder: timm.create_model("spatialmamba_micro", num_classes=3).eval() for folder in ("one", "two")}
    for folder, model in models.items():
        (tmp_path / folder).mkdir()
        save_checkpoint({"model": model.state_dict()}, tmp_path / folder / "epoch_12.pth")
    for _ in range(2):
        for folder, model in models.items():
            address = f"http://host/{folder}/epoch_12.pth"
            ways = dict(pretrained=address), dict(pretrained=True, pretrained_cfg_overlay=dict(url=address))
            for arguments in (*ways, dict(pretrained=True, pretrained_cfg=dict(url=address))):
                found = timm.create_model("spatialmamba_micro", num_classes=3, **arguments).eval()
                assert torch.equal(found(IMAGES), model(IMAGES))
    for folder, model in models.items():  # which timm would read, and keep by name
        path = tmp_path / folder / "epoch_12.pth"
        for url in (path.as_uri(), path.as_uri().replace("file", "FILE"), str(path)):
            for way in ("pretrained_cfg", "pretrained_cfg_overlay"):
                found = timm.create_model("spatialmamba_micro", True, num_classes=3, **{way: dict(url=url)}).eval()
                assert torch.equal(found(IMAGES), model(IMAGES))
    for address, message in (("http://[::1/b.pth", "cannot be downloaded"), ("", "pretrained is empty: name a")):
        with pytest.raises(ValueError, match=message):
            timm.create_model("spatialmamba_micro", address)
    with pytest.raises(ValueError, match=r"file://a/b\.pth: names another machine, 'a'; write file:///path"):
        timm.create_model("spatialmamba_micro", "file://a/b.pth")
    (tmp_path / "page.pth").write_text("log in")
    with pytest.raises(ValueError, match=r"http://host/page\.pth: what has come is of no use, and is not kept"):
        timm.create_model("spatialmamba_micro", "http://host/page.pth")
    assert len(list((tmp_path / "hub/checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    "spoil",
    [lambda t: t / 0, lambda t: t.double() + 1e300, lambda t: t.to(torch.int8)],
    ids=["infinite", "large", "int8"],
)
@pytest.mark.parametrize("by", ["overlay", "hub"])
def test_unusable_weights_are_refused(spoil, by, monkeypatch):
    state = seeded().state_dict()
    state["head.weight"] = spoil(state["head.weight"])
    monkeypatch.setattr(registry, "load_model_config_from_hf", lambda name, **_: ({}, "spatialmamba_micro", {}))
    monkeypatch.setattr(registry, "load_state_dict_from_hf", lambda name, **_: state)
    given = dict(pretrained="hf-hub:me/it") if by == "hub" else dict(pretrained=True)
    overlay = None if by == "hub" else {"state_dict": state}
    with pytest.raises(ValueError, match=r"its weights hold 'head\.weight', which is"):
        timm.create_model("spatialmamba_micro", pretrained_cfg_overlay=overlay, **given)


def test_groups_for_layer_decay():
    """Stem, then blocks in their order, each stage's downsampling with its last block, the head last."""
    model = seeded()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    first = {name: layer for name, layer in groups.items() if name.endswith((".cpe1.weight", "conv1.conv.weight"))}
    assert list(first.values()) == sorted(first.values())
    assert groups["layers.0.blocks.0.ln_1.weight"] == groups["layers.0.downsample.conv.0.conv.weight"]
    assert groups["layers.3.blocks.0.ln_1.weight"] == groups["norm.weight"]
    assert max(groups.values()) == groups["head.weight"]
    decayed = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    scales = [group["lr_scale"] for group in decayed]
    assert (scales, scales[-1]) == (sorted(scales), 1)
    names = {id(p): n for n, p in model.named_parameters()}
    spared = {names[id(p)] for group in decayed if not group["weight_decay"] for p in group["params"]}
    assert spared == {n for n, p in model.named_parameters() if p.ndim <= 1}  # as the recipe has it


def test_traced_and_hooked():
    """torch.fx, torchvision's extractor and torch.jit.trace; backward hooks of every module in training."""
    model = seeded(num_classes=5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES))
    extractor = create_feature_extractor(model, {"layers.1.blocks.0": "tokens"})
    assert extractor(IMAGES)["tokens"].shape == (2, 9, 13, 32)
    trained = seeded(num_classes=5, drop_path_rate=0.5).train()
    extractor = create_feature_extractor(copy.deepcopy(trained), {"head": "logits"}).train()
    logits = []
    for call in (trained, lambda x: extractor(x)["logits"]):
        torch.manual_seed(3)
        logits.append(call(IMAGES))
    torch.testing.assert_close(logits[1], logits[0])
    traced = torch.jit.trace(model, IMAGES)
    torch.testing.assert_close(traced(IMAGES + 1), model(IMAGES + 1))
    seen = []
    for module in model.train().modules():
        module.register_full_backward_hook(lambda *_: seen.append(1))
    model(IMAGES).sum().backward()
    assert len(seen) >= sum(1 for _ in model.modules()) - 10  # but for what is not called, as lists of blocks are


def test_hooks_and_wrappers_of_a_stage():
    """The classifier and dense tasks call the stage itself, not its parts."""
    backbone = SpatialMambaBackbone(**VARIANTS["spatialmamba_micro"]).eval()
    expected = backbone(IMAGES)
    shapes = []
    hook = backbone.layers[1].register_forward_hook(
        lambda module, inputs, out: shapes.append([t.shape[-1] for t in out])
    )
    changing = backbone.layers[0].register_forward_hook(lambda module, inputs, out: (out[0], 0.5 * out[1]))
    maps = backbone(IMAGES)
    assert shapes == [[32, 64]]  # the map and the next stage's input
    assert [torch.equal(a, b) for a, b in zip(maps, expected, strict=True)] == [True, False, False, False]
    hook.remove(), changing.remove()
    model, called = seeded(num_classes=5), []
    model.set_grad_checkpointing()
    model.layers[0].downsample.conv.register_forward_hook(lambda module, inputs, out: called.append(out.shape[1]))
    model(IMAGES)
    assert called == [32]
    gradients = []
    for wraps in (False, True):
        if wraps:
            apply_activation_checkpointing(backbone, check_fn=lambda module: isinstance(module, Stage))
        backbone.zero_grad()
        sum(m.square().mean() for m in backbone(IMAGES)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all("_checkpoint_wrapped" in name for name, _ in backbone.layers.named_parameters())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_vmap_over_images():
    model = seeded(num_classes=5)
    large = torch.randn(2, 3, 224, 224)  # for whose tokens an Intel processor takes another way
    for images in (IMAGES, large):
        expected = model(images)
        for one in (model, optimise_for_cpu(copy.deepcopy(model))):
            found = torch.func.vmap(lambda image, one=one: one(image[None])[0])(images)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_flop_counters_agree():
    """PyTorch's counts a multiply-add as two, and no norms."""
    model = spatialmamba_micro(num_classes=5).eval()
    with FlopCounterMode(display=False) as counter:
        out = model(IMAGES[:1])
    by_operator = count_flops(model, (70, 97)).by_operator()
    norms = sum(count for name, count in by_operator.items() if "norm" in name)
    assert counter.get_total_flops() == pytest.approx(2 * (sum(by_operator.values()) - norms), rel=1e-3)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    there, back = (
        {str(operator): count for operator, count in c.get_flop_counts()["Global"].items()} for c in (counter, backward)
    )
    for name, times in {"selective_scan.selective_scan_state": 18 / 7, "dwconv2d.state_fusion_output": 3}.items():
        assert back[f"{name}_backward"] == pytest.approx(times * there[name])
