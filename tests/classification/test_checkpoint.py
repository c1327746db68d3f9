"""Checkpoints: the published layout is read safely and strictly, ours are written whole or not at all."""

import errno
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import shutil
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from hostile import BOMBS, before_1_6, pickled, storage_of, tensor_of, weights_of, with_second_directory
from kill_and_resume import differences
from running import CLASSIFICATION, QUICK, ROOT, run_command
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch._tensor import _rebuild_from_type_v2
from yacs.config import CfgNode

from classification.checkpoint import (
    check_weights,
    in_layout_of,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    state_dicts,
    tensors_digest,
)
from classification.checkpoint_archive import DamagedCheckpointError, is_momentary
from classification.checkpoint_folder import CheckpointFolder
from classification.config import changed_evaluation_keys, changed_keys, default_config, trained_with
from classification.convert import convert
from classification.convert import main as convert_main
from classification.errors import UserError
from classification.models import VARIANTS, SpatialMamba, spatialmamba_micro
from classification.models.spatialmamba import Mlp
from classification.training import Training


def published(model, ema) -> dict:
    """What a published checkpoint holds, `max_accuray_ema` spelt as there."""
    config = CfgNode({"MODEL": CfgNode({"NAME": "x", "DEPTHS": [1, 2]}), "AUG": CfgNode({"MIXUP": 0.8})})
    config.freeze()
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": model.state_dict(),
        "model_ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t_initial": 300},
        "scaler": {"scale": 65536.0},
        "epoch": 299,
        "steps": 1251,
        "max_accuracy": 83.5,
        "max_accuray_ema": 83.4,
        "config": config,
    }


def test_published_layout_loads_with_both_weights(tmp_path):
    model, ema = spatialmamba_micro(), spatialmamba_micro()
    torch.save(published(model, ema), tmp_path / "ckpt.pth")
    content = read_checkpoint(tmp_path / "ckpt.pth")
    assert content["config"]["AUG"]["MIXUP"] == 0.8
    weights = state_dicts(content, "ckpt.pth")
    for name, source in (("model", model), ("model_ema", ema)):
        target = spatialmamba_micro()
        assert load_weights(target, weights[name], "ckpt.pth") is False
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("size", ["tiny", *(pytest.param(size, marks=pytest.mark.long) for size in ("small", "base"))])
def test_published_layout_is_evaluated_by_the_documented_command(size, few_digits, tmp_path):
    """`model` gets the image of class 3 right and `model_ema` that of class 5: their head's biases see to it."""
    torch.manual_seed(0)
    models = [SpatialMamba(num_classes=10, **VARIANTS[f"spatialmamba_{size}"]) for _ in range(2)]
    for model, label in zip(models, (3, 5), strict=True):
        torch.nn.init.zeros_(model.head.weight)
        model.head.bias.data = torch.eye(10)[label]
    torch.save(published(*models), tmp_path / "ckpt.pth")
    for label in (1, 3, 5, 5, 5):
        folder = tmp_path / "data/val" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(list(folder.iterdir()))}.png"
        shutil.copy(next((few_digits / "val" / str(label)).iterdir()), folder / name)
    for label in (0, 2, 4, 6, 7, 8, 9):
        (tmp_path / "data/val" / str(label)).symlink_to(few_digits / "val" / str(label))
    config = CLASSIFICATION / f"configs/spatialmamba/spatialmamba_{size}.yaml"
    command = ["python", "main.py", "--cfg", config, "--batch-size", "16", "--data-path", tmp_path / "data"]
    opts = ["--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"]
    done = run_command(*command, "--output", tmp_path, "--pretrained", tmp_path / "ckpt.pth", *opts)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"spatialmamba_{size}/default/evaluation.json").read_text())
    images = results["model"]["images"]
    assert images == results["model_ema"]["images"] > 20
    assert results["model"]["top1"] == pytest.approx(100 * 1 / images)
    assert results["model_ema"]["top1"] == pytest.approx(100 * 3 / images)


def training_as_published(content: dict) -> dict:
    """One of our checkpoints in the layout of the authors': their optimizer's first group is the one that decays."""
    config = CfgNode({"MODEL": CfgNode({"TYPE": "spatial_mamba", "NAME": "tiny"}), "AMP_ENABLE": True})
    spared, decayed = content["optimizer"]["param_groups"]
    old = [*decayed["params"], *spared["params"]]
    groups = [{**decayed, "params": list(range(len(decayed["params"])))}, spared]
    groups[1] = {**spared, "params": list(range(len(decayed["params"]), len(old)))}
    return {
        **{key: content[key] for key in ("model", "model_ema", "epoch", "max_accuracy")},
        "optimizer": {
            "state": {new: content["optimizer"]["state"][i] for new, i in enumerate(old)},
            "param_groups": groups,
        },
        "lr_scheduler": {"t_initial": 300},
        "scaler": {},
        "max_accuray_ema": content["max_accuracy_ema"],
        "config": config,
    }


def test_published_training_checkpoint_resumes(few_digits, tmp_path, run_main):
    """To the same bits as ours; and the schedule goes on where it was."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK]
    run_main("--tag", "whole", *arguments, "SAVE_FREQ", "1")
    run = tmp_path / "spatialmamba_micro"
    torch.save(training_as_published(read_checkpoint(run / "whole/epoch_1.pth")), tmp_path / "ckpt_epoch_0.pth")
    run_main("--tag", "on", "--resume", tmp_path / "ckpt_epoch_0.pth", *arguments)
    whole, on = (read_checkpoint(run / name / "epoch_2.pth") for name in ("whole", "on"))
    for key in ("model", "model_ema", "optimizer", "epoch"):
        assert differences(whole[key], on[key]) == []


def test_bare_state_dict_loads(tmp_path):
    model = spatialmamba_micro()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    weights = state_dicts(read_checkpoint(tmp_path / "bare.pth"), "bare.pth")
    assert list(weights) == ["model"]
    load_weights(spatialmamba_micro(), weights["model"], "bare.pth")


def test_nothing_is_loaded_from_a_state_dict_that_does_not_fit():
    model, other = spatialmamba_micro(num_classes=4), spatialmamba_micro(num_classes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = other.state_dict()
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\); 1 unexpected \(extra\)"):
        load_weights(model, state, "x.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


FULL_DISK = """
import resource, sys
from pathlib import Path
from unittest.mock import DEFAULT, Mock
import torch
from classification.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
save_checkpoint({"model": {"w": torch.zeros(2_000_000)}}, Path(sys.argv[1]))
"""


def test_full_disk_is_an_error_that_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint({"model": {"w": torch.ones(3)}}, path)
    done = run_command("python", "-c", FULL_DISK, path)
    assert f"UserError: {path}: cannot be written (" in done.stderr
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["latest.pth"]


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint({"model": {"w": torch.ones(3)}}, path)
    with pytest.raises(TypeError):
        save_checkpoint({"model": {"w": torch.zeros(3)}, "broken": (i for i in range(3))}, path)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["latest.pth"]


# ----- damage


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_two_hundred_damaged_checkpoints(tmp_path):
    """Truncated, with bits flipped, emptied, or a pickle with code in it: refused by name, or read as they were."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = spatialmamba_micro(num_classes=4)
    whole = published(model, spatialmamba_micro(num_classes=4)) | {"config": "MODEL: {}"}
    save_checkpoint(whole, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    expected = read_checkpoint(tmp_path / "whole.pth")
    marker, path = tmp_path / "code_ran", tmp_path / "damaged.pth"
    refused = 0
    for i in range(200):
        kind = ("truncated", "flipped", "flipped at its end", "overwritten", "code")[i % 5]
        damaged = bytearray(content)
        if kind == "truncated":
            del damaged[rng.randrange(len(content)) if i else 0 :]
        elif kind.startswith("flipped"):
            start = 0 if kind == "flipped" else len(content) - 60_000  # where the archive's directory is
            for _ in range(rng.choice([1, 1, 8])):
                damaged[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
        elif kind == "overwritten":
            start = rng.randrange(len(content))
            damaged[start : start + 4096] = rng.randbytes(len(damaged[start : start + 4096]))
        if kind != "code":
            path.write_bytes(damaged)
        elif i % 2:
            torch.save(whole | {"extra": Payload(marker)}, path, _use_new_zipfile_serialization=rng.random() < 0.5)
        else:
            path.write_bytes(pickle.dumps(Payload(marker), protocol=rng.randrange(6)))
        read, message = None, None
        try:
            read = read_checkpoint(path)
        except UserError as error:
            message = str(error)
        assert not marker.exists()
        if message is None:
            assert "flipped" in kind, kind
            assert differences(read, expected) == []  # the bits were in padding or a time stamp
        else:
            assert message.startswith(f"{path}: ")
            refused += 1
    assert refused > 180


MOMENTARY = {
    "memory": MemoryError(),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "torch": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes."),
}


@pytest.mark.parametrize("place", ["torch.load", "zipfile.ZipFile.testzip", "torch._C.PyTorchFileReader"])
@pytest.mark.parametrize("fault", MOMENTARY)
def test_what_keeps_a_file_from_being_read_now_is_no_damage(fault, place, tmp_path, monkeypatch):
    """Good checkpoints stay where they are."""
    content = {"model": spatialmamba_micro(num_classes=4).state_dict()}
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (1, 2, 3):
        folder.save(content, epoch, 0, ["latest.pth"])
    files = sorted(f.name for f in tmp_path.iterdir())

    def fail(*_, **__):
        raise MOMENTARY[fault]

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(UserError, match=r"latest\.pth: cannot be read now .* it was left as it is"):
            folder.read_last(lambda *_: None)
    assert sorted(f.name for f in tmp_path.iterdir()) == files
    assert folder.read_last(lambda *_: None)[1].name == "latest.pth"


def test_an_invalid_argument_is_damage_only_if_the_file_can_be_read(tmp_path, monkeypatch):
    """The system reports EINVAL for the wrong offsets of a damaged file, but some file systems for a read."""
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save({"model": spatialmamba_micro(num_classes=4).state_dict()}, 1, 0, ["latest.pth"])
    files = sorted(f.name for f in tmp_path.iterdir())

    def fail(*_, **__):
        raise OSError(errno.EINVAL, "Invalid argument")

    class Unreadable(io.FileIO):
        def read(self, size=-1):
            return fail() if self.tell() else super().read(size)  # what tells the format can be read

    def opened(path, *args, real=Path.open, **kwargs):
        return Unreadable(path) if path.suffix == ".pth" else real(path, *args, **kwargs)

    for place in ("torch.load", "zipfile.ZipFile.testzip", "torch._C.PyTorchFileReader", "zipfile.ZipFile.__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            patch.setattr(Path, "open", opened)
            with pytest.raises(UserError, match=r"latest\.pth: cannot be read now .* it was left as it is") as caught:
                folder.read_last(lambda *_: None)
        assert is_momentary(caught.value)  # else a download would be discarded
        assert sorted(f.name for f in tmp_path.iterdir()) == files
    with monkeypatch.context() as patch:
        patch.setattr("torch._C.PyTorchFileReader", fail)
        with pytest.raises(DamagedCheckpointError, match=r"latest\.pth: is not a checkpoint .* or is damaged"):
            read_checkpoint(tmp_path / "latest.pth")
    once = Mock(side_effect=[OSError(errno.EINVAL, "Invalid argument"), DEFAULT], wraps=zipfile.ZipFile.testzip)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", lambda archive: once(archive))
        assert folder.read_last(lambda *_: None)[1].name == "latest.pth"
    assert once.call_count == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == files


@pytest.mark.parametrize("fault", ["memory", "torch"])
def test_memory_that_runs_out_while_weights_are_checked_or_loaded(fault, monkeypatch):
    """Weights that fit into memory once may not fit twice."""
    model = spatialmamba_micro(num_classes=4)
    state = model.state_dict()

    def fail(*_, **__):
        raise MOMENTARY[fault]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "isfinite", fail)
        with pytest.raises(UserError, match=r"mine\.pth: cannot be read now .* it was left as it is"):
            check_weights(state, "mine.pth")
        with pytest.raises(UserError, match=r"mine\.pth: cannot be read now .* it was left as it is"):
            load_weights(model, state, "mine.pth")
    check_weights(state, "mine.pth")


def test_checkpoints_are_ordered_by_the_run_and_not_by_the_clock(tmp_path):
    """The clock is set back before the fourth; then the run goes on from an earlier one, as --resume has it."""
    folder = CheckpointFolder(tmp_path, keep=3)
    for i, epoch in enumerate((1, 2, 3, 4, 8)):
        path = folder.save({"epoch": epoch}, epoch, 0, ["latest.pth"])
        os.utime(path, ns=((100 - i) * 10**9,) * 2)
    assert [p.name for p in folder.numbered()] == ["epoch_3.pth", "epoch_4.pth", "epoch_8.pth"]
    folder.save({"epoch": 4}, 4, 0, ["latest.pth"])
    assert [p.name for p in folder.numbered()] == ["epoch_3.pth", "epoch_8.pth", "epoch_4.pth"]
    (tmp_path / "latest.pth").unlink()
    assert folder.read_last(lambda *_: None)[0]["epoch"] == 4
    (tmp_path / "checkpoints.txt").unlink()
    assert [p.name for p in folder.numbered()] == ["epoch_3.pth", "epoch_4.pth", "epoch_8.pth"]


def test_only_what_the_run_has_written_is_removed_or_overwritten(tmp_path, caplog):
    """A good checkpoint that was copied into the folder, also under a name that the run comes to, or has removed."""
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in (1, 2, 3, 4):
        folder.save({"epoch": epoch}, epoch, 0, ["latest.pth"])
    for epoch in (1, 6, 300):
        save_checkpoint({"copied": epoch}, tmp_path / f"epoch_{epoch}.pth")
    for epoch in (5, 6, 7, 8):
        folder.save({"epoch": epoch}, epoch, 0, ["latest.pth"])
    assert sorted(f.name for f in tmp_path.glob("epoch_*")) == [
        *("epoch_1.pth", "epoch_300.pth", "epoch_6.pth.replaced", "epoch_7.pth", "epoch_8.pth")
    ]
    assert caplog.messages == [f"{tmp_path / 'epoch_6.pth'}: is none of this run's; set aside as epoch_6.pth.replaced"]
    for epoch, name in ((1, "epoch_1.pth"), (6, "epoch_6.pth.replaced"), (300, "epoch_300.pth")):
        assert read_checkpoint(tmp_path / name) == {"copied": epoch}
    assert folder.read_last(lambda *_: None)[0] == {"epoch": 8}


def test_a_folder_of_best_checkpoints_alone_is_not_overwritten(few_digits, tmp_path, run_main, capsys):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    run = tmp_path / "spatialmamba_micro/default"
    for path in (run / "latest.pth", run / "epoch_1.pth", run / "checkpoints.txt"):
        path.unlink()
    before = {path: path.read_bytes() for path in run.glob("best*.pth")}
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments, "2")
    assert "holds best.pth and best_ema.pth, but neither latest.pth nor epoch_*.pth to go on from" in stop.value.code
    assert f"pass --resume {run / 'best.pth'} to go on from that one, or another --tag" in stop.value.code
    assert {path: path.read_bytes() for path in run.glob("*.pth")} == before
    assert "resuming from" in run_main("--resume", run / "best.pth", *arguments, "2")
    capsys.readouterr()


def test_a_link_that_leads_nowhere_is_no_empty_folder(tmp_path):
    """Its disk may be there again later: nothing starts from scratch in its place."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest.pth").symlink_to(tmp_path / "disk/latest.pth")
    with pytest.raises(UserError, match=r"latest\.pth: is a link to .*disk/latest\.pth, which is not there; mend or"):
        CheckpointFolder(tmp_path / "run", keep=3).has_run()
    with pytest.raises(UserError, match=r"aaa: cannot be looked at \(File name too long\)"):
        CheckpointFolder(tmp_path / ("a" * 300), keep=3).has_run()


def test_no_bit_of_the_directory_makes_another_weight(tmp_path):
    """The record of one tensor in the archive's directory, bit by bit: the same weights are read, or none."""
    path, weights = tmp_path / "c.pth", {"a": torch.arange(40.0), "b": torch.arange(40.0, 80.0)}
    torch.save(weights, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/1")).encode()
    start = whole.rindex(name) - 46  # the directory is the last to name it
    refused = 0
    for bit in range(8 * (46 + len(name))):
        altered = bytearray(whole)
        altered[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        try:
            found = read_checkpoint(path)
        except DamagedCheckpointError:  # so that training goes on from the one before
            refused += 1
        else:
            assert all(torch.equal(found[key], weights[key]) for key in weights), bit
    assert refused > 100


def test_a_run_that_looked_before_another_one_saved_does_not_start_over_it(tmp_path):
    first, second = (CheckpointFolder(tmp_path / "run", keep=3) for _ in range(2))
    assert not first.has_run()
    assert not second.has_run()
    first.lock()
    first.save({"epoch": 1}, 1, 0, ["latest.pth"])
    first.lock_file.close()
    with pytest.raises(UserError, match="another process has trained in it meanwhile"):
        second.lock()


# ----- what a file claims


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_are_made(bomb, tmp_path):
    """Of some hundred bytes each; made, they would be gigabytes."""
    path = pickled(tmp_path / "bomb.pth", BOMBS[bomb], {"data/0": bytes(16)})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.pth: "):
        read_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


def test_claims_beyond_what_the_file_holds_are_refused(tmp_path):
    path = tmp_path / "claims.pth"
    held = {"data/0": torch.arange(4.0).numpy().tobytes()}
    assert read_checkpoint(pickled(path, storage_of(4), held))["model"]["w"].tolist() == [0, 1, 2, 3]
    for elements in (5, 2**30, 3, -1):  # read, what lies behind would be weights
        with pytest.raises(
            UserError, match=r"claims\.pth: (claims \d+ bytes for a tensor of which it holds 16|.*storage)"
        ):
            read_checkpoint(pickled(path, storage_of(elements), held))
    with pytest.raises(UserError, match="holds 0"):
        read_checkpoint(pickled(path, storage_of(4)))
    with pytest.raises(UserError, match=r"read \(UnpicklingError: Can only SETITEM") as refused:
        read_checkpoint(pickled(path, b"\x80\x02]K\x01K\x02s."))
    assert "weights_only" not in str(refused.value)  # PyTorch's advice is to read such a file unsafely
    for name, make in (
        ("expanded", lambda: torch.zeros(1).expand(40_000, 40_000)),
        ("tied", lambda: torch.zeros(2**20)),
    ):
        shared = make()
        torch.save({"model": {f"{i}": shared for i in range(50)}}, path)
        with pytest.raises(UserError, match=r"its weights claim \d+ bytes, of which the file holds"):
            convert(path, tmp_path / f"{name}.pth")
        assert not (tmp_path / f"{name}.pth").exists()


def test_what_pytorch_reads_is_what_is_looked_at(tmp_path):
    """Its reader takes names in any case, and a directory where the end's record says, which zipfile does not."""
    bomb, good = BOMBS["bytearray"], storage_of(4)
    held = {"data/0": bytes(16)}
    path = tmp_path / "two.pth"
    assert read_checkpoint(pickled(path, good, held, name="Data.PKL"))["model"]["w"].tolist() == [0] * 4
    with pytest.raises(UserError, match=r"two\.pth: holds pickled objects"):
        read_checkpoint(pickled(path, bomb, held, name="DATA.PKL"))
    with pytest.raises(UserError, match=r"two\.pth: is packed as torch\.save does not"):
        read_checkpoint(pickled(path, good, {**held, "DATA.PKL": bomb}))
    with_second_directory(pickled(path, good, held), pickled(tmp_path / "other.pth", bomb.ljust(len(good), b"."), held))
    with zipfile.ZipFile(path) as archive:
        seen = archive.read("archive/data.pkl")
    assert {seen, torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")[: len(bomb)]} == {good, bomb}
    with pytest.raises(UserError, match=r"two\.pth: is packed as torch\.save does not"):
        read_checkpoint(path)


def test_the_format_before_1_6_is_looked_at_to_its_end(tmp_path):
    """The pickle of its storages' names too; and its storages grow with what a tensor claims."""
    path, keys = tmp_path / "old.pth", pickle.dumps(["0"], 2)
    good = weights_of(tensor_of(4, old=True))
    assert read_checkpoint(before_1_6(path, good, keys))["model"]["w"].tolist() == [0] * 4
    larger, by_one = (weights_of(tensor_of(4, size, old=True)) for size in (2**28, 5))
    for content, last in ((BOMBS["bytearray"], keys), (good, BOMBS["bytearray"]), (larger, keys), (by_one, keys)):
        before_1_6(path, content, last)
        tracemalloc.start()
        with pytest.raises(UserError, match=r"old\.pth: holds pickled objects"):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
        tracemalloc.stop()


class Made:
    """A tensor that is pickled with attributes of its own."""

    def __init__(self, function, rebuild, arguments, state):
        self.made = function, (rebuild, torch.Tensor, arguments, state)

    def __reduce__(self):
        return self.made


def test_harmless_objects_are_read_without_their_attributes(tmp_path):
    """Bytes, sets and the like; and attributes of a tensor, which could stand for its methods."""
    odd = torch.arange(3.0)
    odd.numel = odd.isfinite = odd.detach = odd.note = "x"
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.untyped_storage = 3
    named = Made(_rebuild_from_type_v2, *torch.arange(3.0).__reduce_ex__(2), {"names": ("a",)})
    plain = {"bytes": b"ab", "array": bytearray(b"ab\xff"), "empty": bytearray(), "set": {1, 2}, "complex": 2j}
    torch.save({"model": {"a": odd, "b": parameter, "c": named}, **plain}, tmp_path / "odd.pth")
    content = read_checkpoint(tmp_path / "odd.pth")
    assert {key: content[key] for key in plain} == plain
    for value in state_dicts(content, "odd.pth")["model"].values():
        assert in_layout_of(torch.zeros(3), value, "w").tolist() == [0, 1, 2]
        assert torch.equal(value, torch.arange(3.0))
        assert not vars(value)


def test_what_was_changed_and_saved_again_is_named(tmp_path):
    """The file's checksums are new ones then. The order of keys and the layout of tensors change no number."""
    torch.manual_seed(0)
    path, said = tmp_path / "epoch_1.pth", []
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 5)} for i in range(2)}
    content = {
        "model": {"a.weight": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.randn(0, 2)},
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0, 1]}]},
        "classes": ["a", "\udce9"],
        "epoch": 2,
        "odd": {1, 2},  # has no digest
    }
    save_checkpoint(content, path)
    saved = torch.load(path, weights_only=True)
    assert list(saved["sha256"]) == [name for name in content if name != "odd"]  # the same bytes each time
    assert differences(read_checkpoint(path, warn=said.append)["model"], content["model"]) == []

    def changed(**parts) -> list[str]:
        torch.save({**saved, **parts}, path)
        said.clear()
        assert "sha256" not in read_checkpoint(path, warn=said.append)
        read_checkpoint(path, warn=said.append)  # is said once
        return said

    same = dict(reversed(saved["model"].items())) | {"a.weight": saved["model"]["a.weight"].t().contiguous().t()}
    assert changed(model=same) == []
    half = {**saved["optimizer"], "state": {i: {**s, "exp_avg": s["exp_avg"].half()} for i, s in moments.items()}}
    message = f"{path}: a tool has changed what was saved in it (%s), so numbers may be others"
    assert changed(optimizer=half) == [message % "optimizer"]
    assert changed(epoch=3, model={**same, "b": same["b"] * 2}) == [message % "epoch, model"]
    assert changed(model={**same, "b": torch.ones(1).expand(4)}) == [message % "model"]
    assert changed(sha256={"\x1b[31m": "", "epoch": "", 3: ""}) == [message % "epoch"]
    assert changed(epoch=2**500, classes={("a",): 1}) == [message % "classes, epoch"]
    del saved["optimizer"]
    assert changed() == []  # a part that is gone is missed where it is needed


def encrypted(archive: bytes) -> bytes:
    """With the flag of encryption set in the first entry's header and in the directory."""
    content = bytearray(archive)
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


def test_a_checkpoint_that_was_packed_anew_stays_where_it_is(tmp_path):
    """Deflated, with a comment, or another whole file: that is no damage."""
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save({"model": {"w": torch.arange(4.0)}}, 1, 0, ["latest.pth"])
    path = tmp_path / "latest.pth"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    for kind, comment, message in (
        (zipfile.ZIP_DEFLATED, b"", r"whose entries are deflated \(\w+/data\.pkl\), as torch\.save does not pack it"),
        (zipfile.ZIP_LZMA, b"", "whose entries are compressed"),
        (zipfile.ZIP_STORED, b"mine", "with a comment, as torch"),
    ):
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.comment = comment
            for name, content in records.items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=rf"latest\.pth: is an archive {message}"):
            folder.read_last(lambda *_: None)
        assert sorted(f.name for f in tmp_path.glob("*.pth*")) == ["epoch_1.pth", "latest.pth"]
    whole = (tmp_path / "epoch_1.pth").read_bytes()
    for content, message in (
        (encrypted(path.read_bytes()), r"an archive whose entries are encrypted"),
        (gzip.compress(whole), "one packed by gzip"),
        (lzma.compress(whole), "one packed by gzip, bzip2, xz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "a pointer of Git LFS"),
        (safetensors_bytes({"w": torch.arange(4.0)}), "a safetensors file"),
        (b"\n<!DOCTYPE html><html>Not Found</html>", "a page that a browser shows"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"latest\.pth: is (no checkpoint but )?{message}"):
            folder.read_last(lambda *_: None)
        assert path.read_bytes() == content
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.arange(4.0)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(UserError, match=r"latest\.pth: was saved without checksums .* adds them"):
        folder.read_last(lambda *_: None)
    assert sorted(f.name for f in tmp_path.glob("*.pth*")) == ["epoch_1.pth", "latest.pth"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert folder.read_last(lambda *_: None)[1] == path  # stored, by whatever tool


def with_attributes(state: dict, **attributes) -> OrderedDict:
    state = OrderedDict(state)
    state.__dict__.update(attributes)
    return state


def test_attributes_of_a_dict_are_not_obeyed(few_digits, tmp_path, run_main):
    """_metadata that has load_state_dict adopt the file's tensors, and names of a dict's methods."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    run = tmp_path / "spatialmamba_micro"
    content = read_checkpoint(run / "default/latest.pth")
    before = content["model"]
    adopt = {"": {"version": 1, "assign_to_params_buffers": True}}
    for name in ("model", "model_ema"):
        content[name] = with_attributes(content[name], _metadata=adopt, get=3, keys=None, values=None)
    torch.save(with_attributes(content, get=3, keys=None), tmp_path / "changed.pth")
    run_main("--tag", "on", "--resume", tmp_path / "changed.pth", *arguments, "2")
    run_main(*arguments, "2")
    on, whole = (read_checkpoint(run / name / "latest.pth") for name in ("on", "default"))
    assert differences(on["model"], whole["model"]) == []
    assert differences(before, whole["model"]) != []


def test_moments_take_the_parameters_layout(few_digits, tmp_path, run_main, capsys):
    """Transposed, with gaps, in float64 or of one value for all: the fused update would read something else."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    run = tmp_path / "spatialmamba_micro"
    path = tmp_path / "changed.pth"

    def resumed(change) -> dict:
        content = read_checkpoint(run / "default/epoch_1.pth")
        for i, state in content["optimizer"]["state"].items():
            change(i, state)
        torch.save(content, path)
        shutil.rmtree(run / "on", ignore_errors=True)
        run_main("--tag", "on", "--resume", path, *arguments, "2")
        return read_checkpoint(run / "on/latest.pth")

    def stride(i, state):
        value = state["exp_avg"]
        state["exp_avg"] = value.movedim(0, -1).contiguous().movedim(-1, 0)
        gaps = torch.full((*value.shape, 3), 7.0)
        gaps[..., 1] = state["exp_avg_sq"]
        state["exp_avg_sq"] = gaps[..., 1]
        state["step"] = state["step"].double().reshape(1)

    assert differences(resumed(stride)["model"], resumed(lambda *_: None)["model"]) == []
    single = lambda i, s: s.update(exp_avg=torch.zeros(1).expand(s["exp_avg"].shape))  # noqa: E731
    zeros = lambda i, s: s.update(exp_avg=torch.zeros(s["exp_avg"].shape))  # noqa: E731
    assert differences(resumed(single)["model"], resumed(zeros)["model"]) == []

    whole = lambda i, s: s.update(step=int(s["step"]))  # noqa: E731, as PyTorch before 1.12 has counted
    assert differences(resumed(whole), resumed(lambda *_: None)) == []

    for message, change in {
        "of tensors, plain dense ones are read": lambda s: s.update(exp_avg=s["exp_avg"].to_sparse()),
        "exp_avg of parameter 3 is of type str": lambda s: s.update(exp_avg="x"),
        "exp_avg_sq of parameter 3 is not finite": lambda s: s["exp_avg_sq"].fill_(torch.nan),
        "exp_avg of parameter 3 is of dtype complex64": lambda s: s.update(exp_avg=s["exp_avg"] + 0j),
        "exp_avg of parameter 3 is of dtype int64": lambda s: s.update(exp_avg=s["exp_avg"].long()),
        "exp_avg_sq of parameter 3 is of dtype float16, which loses small numbers of float32": lambda s: s.update(
            exp_avg_sq=s["exp_avg_sq"].half()
        ),
        "(exp_avg_sq) is 0, but that of gradients (exp_avg) is not": lambda s: s["exp_avg_sq"].mul_(1e-60),
        "plain dense ones are read": lambda s: s.update(exp_avg=torch.nested.nested_tensor([s["step"]])),
        "step of parameter 3 is of type str": lambda s: s.update(step="4"),
        "a step count is -1, not 0 to 16777216": lambda s: s["step"].fill_(-1),
        "a step count is 1e+30, not 0 to 16777216": lambda s: s["step"].fill_(1e30),
        "a step count is 0, but there are moments": lambda s: s["step"].fill_(0),
        "a mean of squared gradients (exp_avg_sq) is negative": lambda s: s["exp_avg_sq"].fill_(-1),
        "step of parameter 3 is not finite": lambda s: s.update(step=float("nan")),
        "exp_avg of parameter 3 is a tensor without values": lambda s: s.update(exp_avg=s["exp_avg"].to("meta")),
    }.items():
        with pytest.raises(SystemExit) as stop:
            resumed(lambda i, s, c=change: c(s) if i == 3 else None)
        assert message in stop.value.code or "moments of parameter 3" in stop.value.code
        assert not (run / "on").exists()
    content = read_checkpoint(run / "default/epoch_1.pth")
    content["optimizer"]["param_groups"][0]["params"][1] = content["optimizer"]["param_groups"][0]["params"][0]
    torch.save(content, path)
    with pytest.raises(SystemExit, match="its groups list parameter 0 twice"):
        run_main("--tag", "on", "--resume", path, *arguments, "2")
    capsys.readouterr()


FLOAT4 = hasattr(torch, "float4_e2m1fn_x2")  # from PyTorch 2.8 on
NO_WEIGHTS = {
    "int64": lambda w: w.long(),
    "bool": lambda w: w > 0,
    "complex": lambda w: w + 0j,
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor([w, w[:3]]),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "infinite": lambda w: w + torch.inf,
    **({"float4": lambda w: w.to(torch.uint8).view(torch.float4_e2m1fn_x2)} if FLOAT4 else {}),
    "float count": None,
    "count beyond": None,
    "huge count": None,
}
COUNTS = {
    "float count": torch.tensor(0.5),
    "count beyond": torch.tensor(375_000).half(),
    "huge count": torch.tensor(1e30),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_weights_are_dense_floating_and_finite(kind, tmp_path):
    """Or an error, wherever they go: into a model, or another file."""
    model = spatialmamba_micro(num_classes=4)
    state = dict(model.state_dict())
    name = "patch_embed.conv1.norm.num_batches_tracked" if kind in COUNTS else "norm.weight"
    state[name] = COUNTS[kind] if kind in COUNTS else NO_WEIGHTS[kind](state[name])
    path = tmp_path / "w.pth"
    torch.save({"model": state}, path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = rf"w\.pth: .*{re.escape(name)}|w\.pth: holds pickled objects|w\.pth: .*Float4"  # deterministic PyTorch's
    with pytest.raises(UserError, match=message):
        load_weights(model, state_dicts(read_checkpoint(path), path)["model"], path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if kind not in ("float count", "huge count"):
        with pytest.raises(UserError, match=r"w\.pth: "):
            convert(path, tmp_path / "out.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e5m2])
def test_all_tensors_may_be_of_one_dtype(dtype, tmp_path):
    """Even the counts of batch norms, as `{name: value.half() for name, value in state.items()}` has them."""
    model, path = spatialmamba_micro(num_classes=4), tmp_path / "w.pth"
    count = "patch_embed.conv1.norm.num_batches_tracked"
    state = {**model.state_dict(), count: torch.tensor(1024)}
    torch.save({"model": {name: value.to(dtype) for name, value in state.items()}}, path)
    load_weights(model, state_dicts(read_checkpoint(path), path)["model"], path)
    assert model.state_dict()[count].equal(torch.tensor(1024))
    assert differences(model.state_dict(), state) == []


# ----- safetensors


def test_weights_go_to_safetensors_and_back(tmp_path, few_digits, run_main):
    torch.manual_seed(0)
    content = {"model": spatialmamba_micro(num_classes=10), "model_ema": spatialmamba_micro(num_classes=10)}
    config = "DATA: {IMG_SIZE: 40, DATA_PATH: /mine}"
    save_checkpoint({k: m.state_dict() for k, m in content.items()} | {"config": config}, tmp_path / "ckpt.pth")
    convert = ["python", "-m", "classification.convert"]
    steps = [("ckpt.pth", "w.safetensors", "model_ema"), ("w.safetensors", "back.pth", "model")]
    for source, target, weights in steps:
        done = run_command(*convert, tmp_path / source, tmp_path / target, "--weights", weights, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    expected = {k: v.clone() for k, v in content["model_ema"].state_dict().items()}
    assert differences(dict(read_checkpoint(tmp_path / "back.pth")["model"]), expected) == []
    assert differences(dict(read_checkpoint(tmp_path / "w.safetensors")["model"]), expected) == []
    assert "/mine" not in read_checkpoint(tmp_path / "back.pth")["config"]
    printed = run_main("--data-path", few_digits, "--output", tmp_path, "--pretrained", tmp_path / "back.pth")
    assert "back.pth: is evaluated differently than in training: DATA.IMG_SIZE 40 -> 32" in printed
    assert "model: top-1" in printed
    altered = (tmp_path / "w.safetensors").read_bytes().replace(b"IMG_SIZE: 40", b"IMG_SIZE: 41")
    (tmp_path / "w.safetensors").write_bytes(altered)
    with pytest.raises(DamagedCheckpointError, match="its tensors, classes or config do not match its digest"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_bounds_of_training_do_not_bind_weights():
    """Weights of a run whose average stood still are good weights: only resuming asks for all of its config."""
    config = default_config()
    text = re.sub(r"DECAY: 0\.9+\b", "DECAY: 1.0", config.dump())
    assert "DECAY: 1.0" in text
    assert trained_with({"config": text}, "a.pth").DATA.IMG_SIZE == config.DATA.IMG_SIZE
    assert changed_evaluation_keys({"config": text}, config, "a.pth") == []
    for others in ("mine.yaml", "3", "[1, 2]", ""):  # another project's text
        assert trained_with({"config": others}, "a.pth") == default_config()
        assert changed_evaluation_keys({"config": others}, config, "a.pth") == []
    with pytest.raises(UserError, match=r"a\.pth: its config: not a YAML file"):
        trained_with({"config": "DATA: {"}, "a.pth")
    with pytest.raises(UserError, match=r"TRAIN\.EMA\.DECAY must be at most"):
        changed_keys(text, config, "a.pth")


def test_conversions_that_are_refused(tmp_path, monkeypatch):
    save_checkpoint({"model": spatialmamba_micro(num_classes=4).state_dict()}, tmp_path / "ckpt.pth")
    (tmp_path / "there.pth").write_text("mine")
    for arguments, message in (
        (["ckpt.pth", "there.pth"], "exists; remove it"),
        (["ckpt.pth", "out.bin"], "must end in .safetensors or .pth"),
        (["ckpt.pth", "caf\udce9.safetensors"], r"udce9\.safetensors: its name is no UTF-8; name another"),
        (["none.pth", "out.pth"], "no such checkpoint file"),
        (["ckpt.pth", "out.pth", "--weights", "model_ema"], "holds no model_ema, only model"),
    ):
        files = sorted(f.name for f in tmp_path.iterdir())
        words = [str(tmp_path / a) if "." in a else a for a in arguments]
        monkeypatch.setattr(sys, "argv", ["convert", *words])
        with pytest.raises(SystemExit, match=message):
            convert_main()
        assert sorted(f.name for f in tmp_path.iterdir()) == files
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_damaged_safetensors(tmp_path):
    save_checkpoint({"model": spatialmamba_micro(num_classes=4).state_dict()}, tmp_path / "ckpt.pth")
    path = tmp_path / "w.safetensors"
    convert(tmp_path / "ckpt.pth", path)
    whole = path.read_bytes()
    one = b'"w":{"dtype":"F32","shape":[1],"data_offsets":['
    header = b"{" + one + b"0,4]}," + one + b"0,4]}}"
    twice = len(header).to_bytes(8, "little") + header + bytes(4)
    for damaged in (b"", whole[:100], whole[:-10], whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], twice):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}: is "):
            read_checkpoint(path)


def test_names_of_classes_are_in_the_digest_of_safetensors(tmp_path):
    """And a file of the first version, which had them outside of it, is read as it was."""
    path, names = tmp_path / "w.safetensors", ["cat", "dog", "owl", "emu"]
    save_checkpoint({"model": spatialmamba_micro(num_classes=4).state_dict(), "classes": names}, tmp_path / "ckpt.pth")
    convert(tmp_path / "ckpt.pth", path)
    content = read_checkpoint(path)
    assert content["classes"] == names
    whole = path.read_bytes()
    for old, new in ((b"dog", b"dig"), (b'"classes"', b'"clasbes"')):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(UserError, match=r"w\.safetensors: is damaged: its tensors, classes or config do not match"):
            read_checkpoint(path)
    metadata = {"classes": json.dumps(names), "sha256": tensors_digest(content["model"])}
    save_file(content["model"], path, metadata)
    assert read_checkpoint(path)["classes"] == names


# ----- not finite


def test_nan_in_one_layer_from_step_seven(few_digits, tmp_path, run_main, monkeypatch):
    """The run names the layer, skips, and stops after TRAIN.MAX_SKIPPED; what it logs and saves stays finite."""
    calls = []
    original = Mlp.forward

    def spoilt(self, x):
        out = original(self, x)
        if self.training and self is training[0].model.layers[1].blocks[0].mlp:
            calls.append(x)
            if len(calls) >= 7:
                out[0, 0, 0, 0] = torch.nan
        return out

    training = []
    build = Training.__init__

    def noted(self, *args, **kwargs):
        training.append(self)
        build(self, *args, **kwargs)

    monkeypatch.setattr(Mlp, "forward", spoilt)
    monkeypatch.setattr(Training, "__init__", noted)
    opts = [*QUICK, "TRAIN.EPOCHS", "6", "TRAIN.MAX_SKIPPED", "6", "PRINT_FREQ", "1", "TRAIN.MESA.WEIGHT", "0.0"]
    opts += ["SAVE_STEPS", "1"]
    with pytest.raises(SystemExit) as stop:
        run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *opts)
    assert "epoch 2, step 2: gradients are not finite" in stop.value.code  # steps 7 to 12, five in an epoch
    assert "6 in a row and 6 in all; the first output that is not finite is that of layers.1.blocks.0.mlp" in (
        stop.value.code
    )
    run = tmp_path / "spatialmamba_micro/default"
    log = (run / "log.txt").read_text()
    assert "epoch 1, step 2: gradients are not finite, so 1 update(s) were skipped, 1 in a row and 1 in all" in log
    assert "no checkpoint is saved, because the last 1 update(s) were skipped" in log
    steps = [int(path.stem.rpartition("_")[2]) for path in run.glob("epoch_1_step_*.pth")]
    assert max(steps, default=1) == 1  # later ones would have replaced these
    assert " nan" not in log
    assert "NaN" not in (run / "steps.jsonl").read_text() + (run / "metrics.jsonl").read_text()
    saved = read_checkpoint(run / "latest.pth")
    assert saved["epoch"] == 1
    for weights in ("model", "model_ema"):
        assert all(v.isfinite().all() for v in saved[weights].values())
