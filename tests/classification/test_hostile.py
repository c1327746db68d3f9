"""Hundreds of damaged and hostile files, images, configs and environments, drawn from a seed: each is refused by one
message, or what comes of it is right. No code runs, and no good file is renamed.

    pytest tests/classification/test_hostile.py --hostile-cases 500

draws 500 checkpoints and 100 each of the others; by default there are fewer.
"""

import copy
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import BOMBS, before_1_6, pickled, storage_of, tensor_of, weights_of, with_second_directory
from kill_and_resume import differences
from PIL import Image

from classification.checkpoint import load_weights, save_checkpoint, state_dicts
from classification.checkpoint_folder import CheckpointFolder
from classification.config import RANGES, _flatten, default_config, load_config
from classification.data.build import eval_transform
from classification.data.images import UnreadableImageError, read_image
from classification.errors import UserError, printable
from classification.models import spatialmamba_micro
from classification.optim import build_optimizer, load_moments
from classification.run import WHOLE_NUMBERS, check_environment
from classification.training import _check_resumable


@pytest.fixture(scope="module")
def cases(request) -> int:
    return request.config.getoption("--hostile-cases")


# ----- checkpoints


class Code:
    """Unpickled, it would leave a folder behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def trained() -> tuple[dict, torch.nn.Module, torch.optim.Optimizer]:
    """What a run saves, and what it is loaded into."""
    torch.manual_seed(0)
    model = spatialmamba_micro(num_classes=4)
    optimizer = build_optimizer(default_config(), model, 512)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "model_ema": spatialmamba_micro(num_classes=4).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "config": default_config().dump(),
        "classes": ["a", "b", "c", "d"],
        "shares": {"processes": 1, "batch": 8, "accumulation": 1, "batches": 5, "seed": 0},
        "progress": {"step": 3, "loss": 1.5, "finite": 3, "seconds": 0.5},
        "epoch": 2,
        "max_accuracy": 50.0,
        "max_accuracy_ema": 40.0,
    }
    other = spatialmamba_micro(num_classes=4)
    return copy.deepcopy(content), other, build_optimizer(default_config(), other, 512)


ODD_TENSORS = (
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.long(),
    lambda t: t > 0,
    lambda t: t + 0j,
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.float() * torch.nan,
    lambda t: t.new_zeros(1).expand(t.shape) if t.ndim else t,
    lambda t: t.new_zeros(1).expand(4096, 4096),
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t,
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda t: t.float().requires_grad_(),
    lambda t: torch.nn.Parameter(t.float()),
)
ODD_VALUES = (None, "", "x\x1b[2J", -1, 2**70, 1.5, float("nan"), float("inf"), True, [], {}, (), [[]], {"a": {}}, b"x")


def changed(content: dict, rng: random.Random) -> tuple[dict, list]:
    """With something odd somewhere in it; returns where."""
    content = {key: value if isinstance(value, str) else copy.deepcopy(value) for key, value in content.items()}
    place, where = content, []
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        where.append(key)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.1:
            break
        place = place[key]
    kind = rng.random()
    if isinstance(place[key], torch.Tensor) and kind < 0.8:
        place[key] = rng.choice(ODD_TENSORS)(place[key])
    elif kind < 0.9 or not isinstance(place, dict):
        place[key] = rng.choice(ODD_VALUES)
    else:
        del place[key]
    return content, where


def damaged(whole: bytes, rng: random.Random) -> bytes:
    content, kind = bytearray(whole), rng.randrange(6)
    at = rng.choice([rng.randrange(len(whole)), len(whole) - rng.randrange(1, 60_000), rng.randrange(4096)])
    at = max(0, min(at, len(whole) - 1))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[at : at + 512] = rng.randbytes(len(content[at : at + 512]))
    elif kind == 3:
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == 4:
        del content[at : at + rng.randrange(1, 64)]
    else:
        content[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(content)


def repacked(path: Path, rng: random.Random) -> bool:
    """The archive with its pickle changed here and there, checksums right; or deflated, which is no damage.

    Returns whether it is the latter.
    """
    with zipfile.ZipFile(path) as source:
        records = [(item.filename, source.read(item)) for item in source.infolist()]
    kind = rng.randrange(4)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == 0 else zipfile.ZIP_STORED) as target:
        for name, content in records:
            if name.endswith("data.pkl") and kind == 1:
                content = bytearray(content)
                for _ in range(rng.randrange(1, 4)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
            elif "/data/" in name and kind == 2 and rng.random() < 0.1:
                content = content[: len(content) // 2]
            elif "/data/" in name and kind == 3 and rng.random() < 0.05:
                continue
            target.writestr(name, bytes(content))
    return kind == 0


def test_checkpoints(cases, tmp_path):
    rng = random.Random(17)
    content, model, optimizer = trained()
    marker = tmp_path / "code_ran"
    good = tmp_path / "run/epoch_1.pth"
    good.parent.mkdir()
    save_checkpoint(content, good)
    whole = good.read_bytes()
    refused = resumed = 0
    for case in range(cases):
        path = good.with_name("latest.pth")
        kind, where, deflated = ("damaged", "changed", "changed", "repacked", "hostile")[case % 5], [], False
        if kind == "damaged":
            path.write_bytes(damaged(whole, rng))
        elif kind == "changed":
            odd, where = changed(content, rng)
            torch.save(odd, path)
        elif kind == "repacked":
            path.write_bytes(whole)
            deflated = repacked(path, rng)
        elif rng.random() < 0.3:
            old = rng.random() < 0.5
            torch.save({**content, "extra": Code(marker)}, path, _use_new_zipfile_serialization=not old)
        elif rng.random() < 0.3:
            path.write_bytes(pickle.dumps(rng.choice([Code(marker), [Code(marker)], content]), rng.randrange(6)))
        elif rng.random() < 0.3:
            pickled(path, rng.choice(list(BOMBS.values())), {rng.choice(["data/0", "DATA/0", "data.PKL"]): bytes(16)})
        elif rng.random() < 0.4:
            programs = [*BOMBS.values(), weights_of(tensor_of(4, rng.choice([4, 5, 2**28]), old=True))]
            before_1_6(path, *rng.choices(programs, k=2))
        elif rng.random() < 0.4:
            other = pickled(good.with_name("other"), rng.choice(list(BOMBS.values())).ljust(2**17, b"."))
            with_second_directory(pickled(path, storage_of(4).ljust(2**17, b".")), other)
        else:
            pickled(path, storage_of(rng.choice([-1, 3, 5, 2**30])), {"data/0": bytes(16)})
        before = path.read_bytes()

        folder = CheckpointFolder(good.parent, keep=3)
        shown = f"case {case}, {kind} {where}"
        loaded = source = message = None
        try:
            read, source = folder.read_last(_check_resumable)
            weights = state_dicts(read, source)
            load_weights(model, weights["model"], source)
            load_moments(optimizer, read["optimizer"])
            loaded = model.state_dict(), optimizer.state_dict()
            resumed += 1
        except UserError as error:
            message = str(error)
        except ValueError as error:  # of the optimizer, whose file Training names
            message = f"{source}: {error}"
        assert message is None or message.startswith(str(good.parent)), shown
        refused += source != path or loaded is None
        assert not marker.exists(), shown
        assert good.read_bytes() == whole, shown  # it is there, as it was, under its name
        aside = list(good.parent.glob("*.damaged*"))
        if kind == "changed" or deflated:
            assert not aside, shown  # what was written is no damage, however odd
        for file in aside:
            assert file.read_bytes() == before, shown
            file.unlink()
        if loaded is not None:
            assert all(v.isfinite().all() for v in loaded[0].values()), shown
            same = [d for d in differences(dict(loaded[0]), dict(content["model"])) if d.lstrip("/") not in where]
            if source == good or kind != "changed" or where[0] == "model":
                assert same == [], shown
            if source == good:
                assert differences(loaded[1]["state"], content["optimizer"]["state"]) == [], shown
    assert refused > cases / 2
    assert resumed > cases / 10


# ----- images


def test_images(cases, tmp_path):
    rng = random.Random(18)
    transform = eval_transform(load_config(str(Path(__file__).parents[2] / MICRO), {}))
    unread = 0
    for case in range(cases // 5):
        mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
        kinds = [kind for kind, modes in WRITTEN.items() if mode in modes]
        size = rng.choice([(1, 1), (1, 3000), (3000, 1), (7, 5), (64, 48), (255, 3)])
        dtype, high = {"I;16": (np.uint16, 65535), "I": (np.int32, 10**6), "F": (np.float32, 1)}.get(
            mode, (np.uint8, 255)
        )
        numbers = np.random.default_rng(case).random((size[1], size[0], 3)) * high
        image = Image.fromarray(numbers[..., 0].astype(dtype))
        if mode not in ("I;16", "I", "F"):
            image = Image.fromarray(numbers.astype(np.uint8)).convert("RGB")
            image = image.convert(mode) if mode != "LAB" else Image.new("LAB", size)
        path = tmp_path / f"{case}{rng.choice(['.png', '.jpg', '.tif', '.gif'])}"  # whatever is in it
        image.save(path, format=rng.choice(kinds))
        broken = rng.random() < 0.4
        if broken:
            path.write_bytes(damaged(path.read_bytes(), rng))
        found = message = None
        try:
            found = read_image(str(path))
        except UnreadableImageError as error:
            message = str(error)
        if found is None:
            assert message.startswith(f"{path}: cannot be read as an image")
            assert broken or mode in ("I", "F", "LAB"), (case, mode, message)
            unread += 1
            continue
        tensor = transform(found)
        assert found.mode == "RGB"
        assert tensor.shape == (3, 32, 32)
        assert tensor.isfinite().all()
        if not broken:
            assert mode not in ("I", "F", "LAB"), case
            with Image.open(path) as stored:
                if mode == "I;16":
                    expected = np.round(np.asarray(stored, dtype=np.float64) / 257)[..., None].repeat(3, -1)
                else:
                    expected = np.asarray(stored.convert("RGB"), dtype=np.float64)
            assert np.abs(np.asarray(found) - expected).max() == 0, (case, mode)
    assert 0 < unread < cases // 5


MICRO = "classification/configs/spatialmamba/spatialmamba_micro_digits.yaml"
WRITTEN = {  # formats that hold a mode as it is
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
    "WEBP": ("RGB", "RGBA", "HSV"),
}


# ----- configs and environments

WORDS = (
    *(
        "1",
        "-1",
        "0",
        "3.5",
        "1e400",
        "-1e400",
        "nan",
        ".nan",
        ".inf",
        "~",
        "null",
        "true",
        "no",
        "2024-99-99",
        "12:30",
    ),
    *(
        "9" * 5000,
        "1e5",
        "0x10",
        "010",
        "[1, 2]",
        "[2, 1]",
        "[[]]",
        "{}",
        "{a: 1}",
        "[0.1, .inf]",
        "!!python/name:os.system",
    ),
    *(
        "&a x",
        "*a",
        "\x1b[31m",
        "{[]: 1}",
        "spatialmamba_micro",
        "off",
        "''",
        "(" * 2000,
        "1_000",
        "1j",
        "\0",
        "\ud800",
    ),
)


PLACES = ("0", "1", "2", "7", "-1", "", "abc", "1.0", "٣", "127.0.0.1", " 1", "9" * 5000, "tcp://10.0.0.7:29500")


def outcome(call, *arguments) -> tuple[object, str]:
    """What it returns, or its UserError's message."""
    try:
        return call(*arguments), ""
    except UserError as error:
        return None, str(error)


def test_configs_and_environments(cases, tmp_path, monkeypatch):
    rng = random.Random(19)
    keys = [key for key, _ in _flatten(default_config())] + [
        "TRAIN",
        "MODEL.SPATIALMAMBA.DEPTHS",
        "X",
        "TRAIN.MESA",
        "",
    ]
    path = tmp_path / "c.yaml"
    accepted = 0
    for case in range(cases // 5):
        key, word = rng.choice(keys), rng.choice(WORDS)
        *sections, leaf = key.split(".")
        lines = [f"{'  ' * i}{section}:" for i, section in enumerate(sections)] + [
            f"{'  ' * len(sections)}{leaf}: {word}"
        ]
        text = "\n".join(lines)
        if rng.random() < 0.2:
            text = text.replace(rng.choice(text), rng.choice("[]{}:,&*!|>'\"%@`\t\n"), 1)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        opts = (key, word) if rng.random() < 0.5 else ()
        config, message = outcome(load_config, str(path), {}, opts)
        assert printable(message).isprintable(), case
        if config is not None:
            accepted += 1
            for name, (low, high) in RANGES.items():
                value = dict(_flatten(config))[name]
                assert all(low <= v <= high for v in (value if isinstance(value, list) else [value])), (case, name)

        with monkeypatch.context() as patch:
            for name in (*WHOLE_NUMBERS, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
                patch.delenv(name, raising=False)
                if rng.random() < 0.4:
                    patch.setenv(
                        name,
                        rng.choice(["0", "1", "2", "7", "-1", "", "abc", "1.0", "٣", "127.0.0.1", " 1", "9" * 5000]),
                    )
            local_rank, message = outcome(check_environment)
            if local_rank is None:
                assert any(name in message for name in (*WHOLE_NUMBERS, "MASTER_PORT")), case
            elif "WORLD_SIZE" in os.environ:
                assert int(os.environ.get("RANK", 0)) < max(int(os.environ["WORLD_SIZE"]), 1), case
    assert 0 < accepted < cases // 5
