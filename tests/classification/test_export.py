"""Exported programs and ONNX files, run where this repository's packages are missing; and what cannot be exported."""

import json
import sys
import zipfile

import pytest
import torch
from export_shapes import run_elsewhere

from classification import export as exporting
from classification.checkpoint import save_checkpoint
from classification.errors import UserError
from classification.explain import load
from classification.export import SMALLEST, difference, export, export_checkpoint, read_model, write
from classification.models import VARIANTS, SpatialMamba, optimise_for_cpu, spatialmamba_micro

SHAPES = [(1, 2, 33, 33), (3, 2, 40, 95), (2, 2, 129, 64)]


def small_model() -> SpatialMamba:
    """Two stages and two states, with weights and running statistics that are none of the initial ones."""
    torch.manual_seed(0)
    model = SpatialMamba(in_chans=2, num_classes=5, depths=(1, 1), dims=4, d_state=2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


def test_any_batch_and_size_where_our_packages_are_missing(tmp_path):
    model = small_model()
    program = export(model, size=48, dynamic=("batch", "size"))
    assert not [n.target for n in program.graph.nodes if str(n.target).startswith(("selective_scan", "dwconv2d"))]
    write(program, tmp_path / "model.pt2", ["a", "b", "c", "d", "e"])
    images = [torch.randn(shape) for shape in SHAPES]
    for found, x in zip(run_elsewhere(tmp_path / "model.pt2", images), images, strict=True):
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("classes.json"))
        assert json.loads(archive.read(name)) == ["a", "b", "c", "d", "e"]

    untrained = small_model()
    untrained.head.weight.data.zero_(), untrained.head.bias.data.zero_()
    assert difference(untrained, untrained, SHAPES) == 0
    pytest.importorskip("onnxruntime")
    assert difference(model, write(program, tmp_path / "model.onnx"), SHAPES) < 1e-5


def test_after_optimise_for_cpu():
    """Its layers choose by size; the program must not, and the model keeps them."""
    model = optimise_for_cpu(small_model())
    model.train().layers[0].eval()  # as while a model is trained
    classes = [(type(module), module.training) for module in model.modules()]
    run = export(model, size=100, dynamic=("batch", "size")).module()
    assert [(type(module), module.training) for module in model.modules()] == classes
    model.eval()
    for shape in SHAPES:
        images = torch.randn(shape)
        torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_a_fixed_size(tmp_path, monkeypatch, capsys, full_disk):
    torch.manual_seed(0)
    config = "DATA: {IMG_SIZE: 32}"  # which is its size then, as the demo's: the last map is one token
    content = {"model": spatialmamba_micro(num_classes=10).state_dict(), "config": config}
    save_checkpoint(content, tmp_path / "micro.pth")
    with full_disk(100_000), pytest.raises(UserError, match=r"micro\.pt2: cannot be written \(.*File too large"):
        export_checkpoint(tmp_path / "micro.pth", tmp_path / "micro.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["micro.pth"]
    arguments = ["export", str(tmp_path / "micro.pth"), str(tmp_path / "micro.pt2")]
    monkeypatch.setattr(sys, "argv", arguments)
    exporting.main()
    assert "differ from the model's by" in capsys.readouterr().out
    run = torch.export.load(tmp_path / "micro.pt2").module()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(run(images), read_model(tmp_path / "micro.pth")[0](images), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit, match=r"micro\.pt2: exists; remove it"):
        exporting.main()


def test_a_checkpoint_of_other_channels(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(
        {"model": SpatialMamba(1, 10, **VARIANTS["spatialmamba_micro"]).state_dict()}, tmp_path / "grey.pth"
    )
    assert export_checkpoint(tmp_path / "grey.pth", tmp_path / "grey.pt2", size=33) < 1e-5
    with pytest.raises(UserError, match=r"grey\.pth: takes images of 1 channels, but figures"):
        load(str(tmp_path / "grey.pth"))


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    path = tmp_path / "micro.pth"
    save_checkpoint({"model": spatialmamba_micro(num_classes=10).state_dict()}, path)
    with pytest.raises(UserError, match=r"model\.pt: must end in \.onnx or \.pt2"):
        export_checkpoint(path, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"\\udcff\.pt2: its name is no UTF-8; name another"):
        export_checkpoint(path, tmp_path / "\udcff.pt2")
    with pytest.raises(UserError, match=r"model\.pt2: cannot be written, for .*nowhere is no folder"):
        export_checkpoint(path, tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(UserError, match=f"--size is 32, but must be {SMALLEST} to 8192 with --dynamic size"):
        export_checkpoint(path, tmp_path / "model.pt2", size=32, dynamic=["size"])
    with pytest.raises(UserError, match="--size is 0, but must be 1 to 8192"):
        export_checkpoint(path, tmp_path / "model.pt2", size=0)
    with pytest.raises(UserError, match="holds no model_ema, only model"):
        export_checkpoint(path, tmp_path / "model.pt2", weights="model_ema")
    large = {"model": spatialmamba_micro(num_classes=10).state_dict(), "config": "DATA: {IMG_SIZE: 8192}"}
    save_checkpoint(large, tmp_path / "large.pth")  # a stranger's may ask for all memory
    with pytest.raises(UserError, match=r"large\.pth: is for images of 8192 pixels; pass --size"):
        export_checkpoint(tmp_path / "large.pth", tmp_path / "model.pt2")
    save_checkpoint({"model": small_model().state_dict()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is of none of the sizes spatialmamba_micro"):
        export_checkpoint(tmp_path / "other.pth", tmp_path / "model.pt2")
    monkeypatch.setattr(exporting, "NEEDED_FOR_ONNX", ("onnx_of_nobody",))
    with pytest.raises(UserError, match="needs onnx_of_nobody: pip install onnx_of_nobody"):
        export_checkpoint(path, tmp_path / "model.onnx")
    monkeypatch.setattr(exporting, "export", lambda model, size, dynamic: None)
    monkeypatch.setattr(exporting, "write", lambda program, target, names: lambda images: images.new_zeros(1, 10))
    with pytest.raises(UserError, match="not written, for it differs from the model by 1"):
        export_checkpoint(path, tmp_path / "model.pt2")
    monkeypatch.setattr(
        exporting, "write", lambda program, target, names: lambda images: torch.full((1, 10), torch.nan)
    )
    with pytest.raises(UserError, match="not written, for it differs from the model by inf"):
        export_checkpoint(path, tmp_path / "model.pt2")
    assert not list(tmp_path.glob("*model.*"))
