"""Bad input ends in one message that names the thing and says what to do, with nothing written."""

import os
import pickle
import re
import shutil
import signal
import socket
import sys
from itertools import pairwise

import pytest
import torch
from running import MICRO, QUICK, run_command

from classification.checkpoint import state_dicts
from classification.config import LEAST, OFF_OR_MORE, default_config, load_config, settings_without_effect
from classification.convert import convert
from classification.data import build_mixup
from classification.data.build import _train_transform
from classification.errors import UserError
from classification.metrics import MetricsLog
from classification.models import SpatialMamba, spatialmamba_micro
from classification.optim import build_optimizer


def refused(run_main, capsys, *arguments, **options) -> str:
    """The message main.py ends with."""
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments, **options)
    if stop.value.code == 2:  # argparse prints its own
        return capsys.readouterr().err
    assert isinstance(stop.value.code, str), "a message makes the exit status 1"
    assert "Traceback" not in stop.value.code
    return stop.value.code


@pytest.fixture
def refuse(run_main, capsys, tmp_path):
    """Run main.py on arguments that must be refused, check that nothing was written, and return the message."""

    def run(*arguments, **options) -> str:
        output = tmp_path / "output"
        message = refused(run_main, capsys, "--output", output, *arguments, **options)
        assert not output.exists()
        return message

    return run


@pytest.fixture
def copy(few_digits, tmp_path):
    """A data folder to damage."""
    return shutil.copytree(few_digits, tmp_path / "copy")


def saved(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ----- data


def test_no_data_path(refuse):
    assert "--data-path DIR" in refuse()


@pytest.mark.parametrize(
    ("opts", "without_effect"),
    [
        (["AUG.COLOR_JITTER", "0.3", "AUG.AUTO_AUGMENT", "rand-m9"], ["AUG.COLOR_JITTER"]),
        (["AUG.COLOR_JITTER", "0.3", "AUG.AUTO_AUGMENT", ""], []),
        (["AUG.COLOR_JITTER", "0.3", "AUG.AUTO_AUGMENT", "3a"], []),
        (["AUG.REPROB", "0.0", "AUG.REMODE", "const", "AUG.RECOUNT", "2"], ["AUG.REMODE", "AUG.RECOUNT"]),
        (["AUG.REPROB", "0.1", "AUG.REMODE", "const", "AUG.RECOUNT", "2"], []),
        (["AUG.CUTMIX", "0.0", "AUG.MIXUP", "0.8", "AUG.MIXUP_SWITCH_PROB", "0.1"], ["AUG.MIXUP_SWITCH_PROB"]),
        (["AUG.CUTMIX", "0.0", "AUG.MIXUP", "0.0", "AUG.MIXUP_MODE", "elem"], ["AUG.MIXUP_MODE"]),
        (["AUG.CUTMIX", "0.0", "AUG.MIXUP", "0.0", "AUG.MIXUP_SWITCH_PROB", "0.1"], ["AUG.MIXUP_SWITCH_PROB"]),
        (["AUG.MIXUP_PROB", "0.0", "AUG.MIXUP", "0.3", "AUG.MIXUP_MODE", "elem"], ["AUG.MIXUP", "AUG.MIXUP_MODE"]),
        (["DATA.NUM_WORKERS", "0", "DATA.PREFETCH_FACTOR", "7"], ["DATA.PREFETCH_FACTOR"]),
        (["TRAIN.EMA.ENABLE", "False", "TRAIN.EMA.DECAY", "0.9", "TRAIN.MESA.WEIGHT", "0.0"], ["TRAIN.EMA.DECAY"]),
        (["TRAIN.MESA.WEIGHT", "0.0", "TRAIN.MESA.START", "0.5"], ["TRAIN.MESA.START"]),
    ],
    ids=" ".join,
)
def test_settings_without_effect(opts, without_effect):
    tiny = MICRO.with_name("spatialmamba_tiny.yaml")
    found = settings_without_effect(load_config(str(tiny), {}, opts))
    assert [message.split()[0] for message in found] == without_effect


@pytest.mark.parametrize("missing", ["", "train", "val"])
def test_missing_folder(missing, refuse, copy):
    shutil.rmtree(copy / missing)
    message = refuse("--data-path", copy)
    assert f"{copy / missing}: no such folder" in message


def test_folder_without_classes(refuse, copy):
    shutil.rmtree(copy / "train")
    (copy / "train").mkdir()
    assert f"{copy / 'train'}: no class folders" in refuse("--data-path", copy)
    os.mkdir(os.fsencode(copy / "train") + b"/a\xff")  # no UTF-8
    (copy / "train" / "a\\udcff").mkdir()
    assert "two class folders are both called 'a\\\\udcff' in a checkpoint" in refuse("--data-path", copy)


def test_class_folder_without_images(refuse, copy):
    shutil.rmtree(copy / "train" / "7")
    (copy / "train" / "7").mkdir()
    (copy / "train" / "7" / "notes.txt").write_text("not an image")
    assert f"{copy / 'train' / '7'}: no images in 1 class folder" in refuse("--data-path", copy)


def test_train_and_val_with_other_classes(refuse, copy):
    (copy / "val" / "3").rename(copy / "val" / "three")
    assert "only in one of them: 3, three" in refuse("--data-path", copy)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"not an image", b"", None], ids=["text", "empty", "truncated"])
def test_unreadable_images_beyond_the_limit(content, workers, copy, run_main, capsys, tmp_path):
    victim = next((copy / "train" / "4").iterdir())
    victim.write_bytes(victim.read_bytes()[:60] if content is None else content)
    limit = ["DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", 0]
    message = refused(run_main, capsys, "--data-path", copy, "--output", tmp_path, "--opts", *QUICK, *limit)
    assert message.startswith(f"error: {victim}: cannot be read as an image")
    assert "replace or remove the images" in message
    assert not list(tmp_path.rglob("*.pth"))


def test_folder_of_unreadable_images(copy, run_main, capsys, tmp_path):
    for file in copy.glob("train/*/*"):
        file.write_bytes(b"")
    message = refused(run_main, capsys, "--data-path", copy, "--output", tmp_path, "--opts", *QUICK)
    assert "nor can the 20 images before it" in message


def test_fewer_images_than_a_batch(refuse, few_digits):
    message = refuse("--data-path", few_digits, "--batch-size", 64)
    assert "40 images make 40 for each of 1 process(es), less than one batch of 64; lower --batch-size" in message


def test_odd_batch_for_mixup(refuse, few_digits):
    assert "must be even, got 7" in refuse("--data-path", few_digits, "--batch-size", 7)


def test_more_processes_than_images(few_digits, tmp_path):
    few = tmp_path / "data"
    for label in "01":
        (few / "val" / label).mkdir(parents=True)
    shutil.copy(next((few_digits / "val/0").iterdir()), few / "val/0/a.png")
    shutil.copy(next((few_digits / "val/1").iterdir()), few / "val/1/b.png")
    weights = saved(tmp_path, {"model": spatialmamba_micro(num_classes=2).state_dict()})
    main = ["main.py", "--cfg", MICRO, "--data-path", few, "--pretrained", weights, "--output", tmp_path / "output"]
    done = run_command("torchrun", "--standalone", "--nproc_per_node=3", *main)
    assert done.returncode != 0
    assert f"error: {few / 'val'}: 2 image(s) for 3 processes; start at most 2" in done.stderr
    assert done.stderr.count("start at most 2") == 1
    assert not (tmp_path / "output").exists()


# ----- config and flags


def test_unknown_key_in_opts(refuse):
    assert "no config key TRAIN.EPOCH; did you mean TRAIN.EPOCHS?" in refuse("--opts", "TRAIN.EPOCH", "3")


def test_unknown_key_in_file(refuse, tmp_path):
    (tmp_path / "my.yaml").write_text("MODEL:\n  NAME: spatialmamba_tiny\n  D_INNER: 3\n")
    message = refuse(cfg=tmp_path / "my.yaml")
    assert f"{tmp_path / 'my.yaml'}: no config key MODEL.D_INNER" in message


def test_missing_config_file(refuse, tmp_path):
    assert f"--cfg {tmp_path / 'none.yaml'}: no such file" in refuse(cfg=tmp_path / "none.yaml")


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghijk"))
NO_CONFIGS = {
    "broken": ("a: [", "not a YAML file"),
    "scalar": ("just words", "expected sections such as DATA and TRAIN, got str"),
    "aliases": (LAUGHS, "anchors and aliases are not read"),
    "code": ("TAG: !!python/object/apply:os.system ['touch ran']", "tags are not read"),
    "twice": ("TAG: a\nSEED: 1\nTAG: b\n", "a key stands there twice"),
    "twice by its whole name": ("TRAIN: {EPOCHS: 1}\nTRAIN.EPOCHS: 2\n", "sets TRAIN.EPOCHS twice, in a section and"),
    "depth": ("[" * 5000, "nested too deeply"),
    "key": ("? [1, 2]\n: 3\n", "not a YAML file"),
    "date": ("SEED: 2024-01-01", "SEED must be of type int, got '2024-01-01'"),
    "no date": ("SEED: 2024-99-99", "SEED must be of type int, got '2024-99-99'"),
    "bytes": (b"\xff\xfe\x00", "not a YAML file"),
    "escapes": ('"TAG\\e[31m": 1', "no config key TAG\\x1b[31m"),
}


@pytest.mark.parametrize("kind", NO_CONFIGS)
def test_config_file_that_is_none(kind, refuse, tmp_path):
    content, message = NO_CONFIGS[kind]
    (tmp_path / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refuse(cfg=tmp_path / "my.yaml")
    assert f"{tmp_path / 'my.yaml'}: " in found
    assert message in found
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", OFF_OR_MORE)
def test_the_least_value_that_is_not_off_works(key, few_digits):
    config = load_config(str(MICRO), {}, [key, str(LEAST), "TRAIN.OPTIMIZER.BETAS", "[0.9, 0]"])
    mixup = build_mixup(config, 4)
    for _ in range(200 if "AUG" in key else 1):
        images, targets = mixup(torch.randn(4, 3, 8, 8), torch.arange(4))
        assert images.isfinite().all()
        assert targets.isfinite().all()
    model = torch.nn.Linear(3, 3, bias=False)
    optimizer = build_optimizer(config, model, 512)
    model.weight.grad = torch.tensor([[1.0, 2.0, 0.0]] * 3)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
    optimizer.step()
    assert model.weight.isfinite().all()
    assert optimizer.state[model.weight]["exp_avg"].abs().sum() > 0


def test_yaml_says_what_stands_there(tmp_path, monkeypatch):
    """Not what YAML 1.1 makes of it: octal numbers, minutes, dates and truth values. A home folder is the user's."""
    (tmp_path / "my.yaml").write_text(
        "TAG: 010\nOUTPUT: 2024-01-01\nTRAIN:\n  AMP: off\n  EMA: {ENABLE: no}\n  MESA: {WEIGHT: 0}\n"
    )
    found = load_config(str(tmp_path / "my.yaml"), {})
    assert (found.TAG, found.OUTPUT, found.TRAIN.AMP, found.TRAIN.EMA.ENABLE) == ("010", "2024-01-01", "off", False)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "my.yaml").write_text("OUTPUT: ~/runs\nDATA: {DATA_PATH: ~/images}\nMODEL: {RESUME: ./~}\n")
    found = load_config(str(tmp_path / "my.yaml"), {"MODEL.PRETRAINED": "~/a.pth"})
    paths = (found.OUTPUT, found.DATA.DATA_PATH, found.MODEL.PRETRAINED, found.MODEL.RESUME)
    assert paths == ("/home/me/runs", "/home/me/images", "/home/me/a.pth", "./~")


ENVIRONMENTS = {
    "no rank": (dict(WORLD_SIZE="2"), "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
    "no number": (dict(LOCAL_RANK="abc"), "LOCAL_RANK is 'abc', not a whole number"),
    "no number as RANK": (dict(RANK="abc", WORLD_SIZE="2"), "RANK is 'abc', not a whole number"),
    "negative": (dict(RANK="-1"), "RANK is '-1', not a whole number"),
    "empty": (dict(WORLD_SIZE=""), "WORLD_SIZE is '', not a whole number"),
    "beyond": (
        dict(WORLD_SIZE="2", RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
        "RANK is 2, but WORLD_SIZE is 2: ranks are 0 to 1",
    ),
    "no process": (dict(WORLD_SIZE="0", RANK="0"), "WORLD_SIZE is 0: it is the number of processes, at least 1"),
    "rank alone": (dict(RANK="1"), "RANK is 1, but WORLD_SIZE is not set"),
    "port": (
        dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="70000"),
        "MASTER_PORT is 70000, but ports end at 65535",
    ),
    "kubernetes": (
        dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="tcp://10.0.0.7:29500"),
        "MASTER_PORT is 'tcp://10.0.0.7:29500', which Kubernetes sets for a service called master: set it to the port",
    ),
    "mpirun": (dict(OMPI_COMM_WORLD_SIZE="2"), "OMPI_COMM_WORLD_SIZE is 2: mpirun is not known here"),
    "no srun": (dict(SLURM_NTASKS="4", SLURM_PROCID="0"), "SLURM_NTASKS is 4, but srun has not started this process"),
    "no port": (
        dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"),
        "MASTER_PORT is 'x', not a whole number",
    ),
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_environments_that_name_no_place(kind, refuse, few_digits, monkeypatch):
    """Which hang, or end in a traceback, where nobody looks at them."""
    variables, message = ENVIRONMENTS[kind]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr("classification.errors.time.sleep", waits.append)
    assert message in refuse("--data-path", few_digits, "--batch-size", 8)
    assert waits == ([20] if variables.get("RANK", "0") != "0" else [])  # for process 0 to say it


def test_the_port_of_others_is_not_looked_at_by_a_single_process(few_digits, tmp_path, run_main, monkeypatch):
    """Kubernetes sets it for a service of that name."""
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.7:29500")
    weights = saved(tmp_path, {"model": spatialmamba_micro(num_classes=10).state_dict()})
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--pretrained", weights]
    assert "model: top-1" in run_main(*arguments)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "model: top-1" in run_main(*arguments)


def test_port_in_use(few_digits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        done = run_command("python", "main.py", "--cfg", MICRO, "--data-path", few_digits, **place)
    assert done.returncode == 1
    assert "the port is in use, choose another --master_port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_command_prints_one_line():
    command = "from classification.errors import prepare_console; prepare_console(); raise {}"
    done = run_command("python", "-c", command.format("KeyboardInterrupt"))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
    assert "Traceback" in run_command("python", "-c", command.format("ValueError")).stderr


def test_names_that_the_console_lacks(few_digits, tmp_path):
    """A name in Unicode on a console in ASCII, and one that would colour the terminal."""
    name = "ä\x1b[31mé"
    data = shutil.copytree(few_digits, tmp_path / name)
    shutil.copy(next((data / "val/0").iterdir()), data / "val/0/x.txt")
    arguments = ["main.py", "--cfg", MICRO, "--data-path", data, "--output", tmp_path / "out", "--opts", *QUICK]
    done = run_command("python", *arguments, "TRAIN.EPOCHS", "1", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out/spatialmamba_micro/default/log.txt").read_text(encoding="utf-8")
    assert "\x1b" not in done.stdout + done.stderr + log
    assert "ä\\x1b[31mé/val: left out: 1 file(s) ending in .txt" in log
    assert "UnicodeEncodeError" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sise", "3"], "unrecognized arguments: --batch-sise 3"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--batch-size", "0"], "DATA.BATCH_SIZE (--batch-size) must be at least 1, got 0"),
        (["--batch-size", "-4"], "must be at least 1, got -4"),
        (["--accumulation-steps", "0"], "TRAIN.ACCUMULATION_STEPS (--accumulation-steps) must be at least 1"),
        (["--opts", "TRAIN.EPOCHS"], "pairs of KEY VALUE"),
        (["--opts", "TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS must be of type int, got 'many'"),
        (["--opts", "TRAIN", "3"], "TRAIN is a section of keys; set one of them, such as TRAIN.EPOCHS, or leave"),
        (["--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "2"], "TRAIN.WARMUP_EPOCHS must be in"),
        (["--opts", "TRAIN.BASE_LR", "5e-5"], "TRAIN.MIN_LR is 0.0001, above TRAIN.BASE_LR, 5e-05: the rate would run"),
        (["--opts", "TRAIN.WARMUP_LR", "0.1"], "TRAIN.WARMUP_LR is 0.1, above TRAIN.BASE_LR, 0.02: the rate would run"),
        (["--opts", "TRAIN.MESA.START", "1"], "with TRAIN.MESA.START 1 MESA would never begin"),
        (["--opts", "MODEL.NAME", "swin_tiny"], "MODEL.NAME must be one of spatialmamba_micro"),
        (["--opts", "TRAIN.AMP", "fp8"], "TRAIN.AMP must be one of float16, bfloat16, off, got 'fp8'"),
        (["--opts", "DATA.INTERPOLATION", "cubic"], "DATA.INTERPOLATION must be one of bilinear"),
        (["--opts", "AUG.MIXUP_MODE", "foo"], "AUG.MIXUP_MODE must be one of batch"),
        (["--opts", "AUG.SCALE", "[1]"], "AUG.SCALE must be two ascending numbers in"),
        (["--opts", "AUG.RATIO", "['a', 2]"], "AUG.RATIO must be two ascending numbers in"),
        (["--opts", "TRAIN.OPTIMIZER.BETAS", "[0.9, 2]"], "TRAIN.OPTIMIZER.BETAS must be two numbers in"),
        (["--opts", "TRAIN.BASE_LR", "-1"], "TRAIN.BASE_LR must be at least 0, got -1.0"),
        (["--opts", "TRAIN.CLIP_GRAD", "-1"], "TRAIN.CLIP_GRAD must be at least 0"),
        (["--opts", "MODEL.DROP_PATH_RATE", "1.0"], "MODEL.DROP_PATH_RATE must be at most 0.999, got 1.0"),
        (["--opts", "TRAIN.USE_CHECKPOINT", "3"], "TRAIN.USE_CHECKPOINT must be of type bool, got 3"),
        (["--seed", "-1"], "SEED (--seed) must be at least 0, got -1"),
        (["--opts", "TRAIN.EMA.ENABLE", "False"], "MESA distils from the EMA model"),
        (["--channels-last"], "--channels-last goes with --throughput"),
        (["--compile", "--flops"], "--compile has no part in --flops"),
        (["--throughput", "--flops"], "--flops and --throughput are different tasks: pass one of them"),
        (
            ["--compile", "reduce-overhead", "--accumulation-steps", "2"],
            "--compile reduce-overhead replays CUDA graphs, which write each batch's gradients over those of the last",
        ),
        (["--opts", "KEEP_LAST", "0"], "KEEP_LAST must be at least 1, got 0"),
        (["--opts", "DATA.MAX_UNREADABLE", "-1"], "DATA.MAX_UNREADABLE must be at least 0, got -1"),
        (["--finetune"], "--finetune needs --pretrained"),
        (["--eval"], "--eval needs --pretrained CKPT or --resume CKPT"),
        (["--pretrained", "a", "--resume", "b"], "pass one of them"),
        (["--flop"], "unrecognized arguments: --flop"),
        (["--pretrained", ""], "pretrained is empty, as from a variable that is not set"),
        (["--opts", "AUG.CUTMIX", "1e400"], "AUG.CUTMIX must be at most 1000.0, got inf"),
        (["--opts", "AUG.CUTMIX", "1e-320"], "AUG.CUTMIX must be 0, which is off, or at least 1e-06, got 1e-320"),
        (["--opts", "AUG.MIXUP", "9e-7"], "AUG.MIXUP must be 0, which is off, or at least 1e-06, got 9e-07"),
        (["--opts", "TRAIN.CLIP_GRAD", "1e-320"], "TRAIN.CLIP_GRAD must be 0, which is off, or at least 1e-06"),
        (["--opts", "TRAIN.OPTIMIZER.EPS", "1e-320"], "TRAIN.OPTIMIZER.EPS must be at least 1e-30, got 1e-320"),
        (["--opts", "TRAIN.OPTIMIZER.EPS", "0"], "TRAIN.OPTIMIZER.EPS must be at least 1e-30, got 0.0"),
        (["--opts", "TRAIN.EPOCHS", "0x" + "f" * 5000], "TRAIN.EPOCHS must be of type int, got '0xff"),
        (["--opts", "AUG.SCALE", "[1, 0x" + "f" * 5000 + "]"], "AUG.SCALE must be of type list, got '[1, 0xff"),
        (["--opts", "AUG.SCALE", "[1, " + "9" * 500 + "]"], "AUG.SCALE must be two ascending numbers in"),
        (["--opts", "TRAIN.OPTIMIZER.EPS", "1e400"], "TRAIN.OPTIMIZER.EPS must be at most 1, got inf"),
        (["--opts", "TRAIN.BASE_LR", "1" + "0" * 400], "TRAIN.BASE_LR must be of type float, got 1000000"),
        (["--opts", "TRAIN.EPOCHS", "9" * 5000], "TRAIN.EPOCHS must be of type int, got '99999"),
        (["--opts", "TRAIN.EPOCHS", "{[]:1}"], "TRAIN.EPOCHS must be of type int, got '{[]:1}'"),
        (["--opts", "TRAIN.EPOCHS", "(" * 3000], "TRAIN.EPOCHS must be of type int, got '(((("),
        (["--opts", "AUG.SCALE", "[0.1, 1e999]"], "AUG.SCALE must be two ascending numbers in"),
        (["--opts", "MODEL.NAME", "tiny"], "got 'tiny'; spatialmamba_tiny is that size"),
        (["--opts", "TRAIN.MESA", "1.0"], "is of the authors' repository: set TRAIN.MESA.WEIGHT"),
        (["--opts", "MODEL.SPATIALMAMBA.EMBED_DIM", "64"], "authors' repository: the sizes follow from MODEL.NAME"),
        (["--opts", "AMP_ENABLE", "True"], "authors' repository: set TRAIN.AMP to float16, bfloat16 or off"),
        (["--opts", "TEST.CROP", "False"], "keeps the whole short side, and cuts the long one to a square"),
        (["--model_ema", "True"], "--model_ema is of the authors' repository: set --opts TRAIN.EMA.ENABLE"),
        (["--model_ema_decay=0.9"], "--model_ema_decay is of the authors' repository: set --opts TRAIN.EMA.DECAY"),
        (["--zip"], "--zip is of the authors' repository: leave it out; the data is an image folder"),
        (["--cache-mode", "part"], "--cache-mode is of the authors' repository: leave it out"),
        (["--fused_layernorm"], "--fused_layernorm is of the authors' repository"),
        (["--optim", "adamw"], "--optim is of the authors' repository: leave it out; the optimizer is AdamW"),
        (["--memory_limit_rate", "1"], "--memory_limit_rate is of the authors' repository"),
        (["--enable_persistance"], "--enable_persistance is of the authors' repository"),
        (["--data-path", "x" * 300], "cannot be looked at (File name too long)"),
        (["--data-path", "a\0b"], "DATA.DATA_PATH holds a character that no name can have: 'a\\x00b'"),
        (["--pretrained", "y" * 300, "--data-path", "."], "cannot be looked at (File name too long)"),
    ],
    ids=lambda v: " ".join(v)[:60].replace("\0", "0") if isinstance(v, list) else "",
)
def test_flags(arguments, message, refuse):
    assert message in refuse(*arguments)


def test_class_count_that_is_not_the_folders(refuse, few_digits):
    message = refuse("--data-path", few_digits, "--opts", "MODEL.NUM_CLASSES", "11")
    assert "MODEL.NUM_CLASSES is 11" in message
    assert "10 class folders" in message


def test_output_that_cannot_be_written(run_main, capsys, few_digits, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = ["--data-path", few_digits, "--output", tmp_path / "file", "--opts", *QUICK]
    message = refused(run_main, capsys, *arguments)
    assert f"{tmp_path / 'file'}/spatialmamba_micro/default: cannot be written to" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_augmentation_policy(refuse, few_digits):
    message = refuse("--data-path", few_digits, "--batch-size", 8, "--opts", "AUG.AUTO_AUGMENT", "foo")
    assert "AUG.AUTO_AUGMENT is not a policy that timm knows: 'foo'" in message


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("rand-m9-mstd0.5-inc1", None),
        ("rand-m9-t3aw-p0.3", None),
        ("augmix-m5-w4-d2", None),
        ("original-mstd0.5", None),
        ("v0", None),
        ("", None),
        ("rand-m-mstd-inc", "its part 'm' has no number"),
        ("rand-m9-mstdinf", "its part 'mstdinf' has no number"),
        ("rand-m9-tweight", "its part 'tweight' is none of t3a, t3aw, tweights"),
        ("rand-m9-m5", "its part 'm' is there more than once"),
        ("augmix-m-w4", "its part 'm' has no number"),
        ("original-", "its part '' has no number"),
    ],
)
def test_parts_of_augmentation_policies(policy, message):
    """timm passes over what it does not understand."""
    config = default_config()
    config.AUG.AUTO_AUGMENT = policy
    if message is None:
        _train_transform(config)
    else:
        with pytest.raises(UserError, match=re.escape(f"knows: {policy!r} ({message}")):
            _train_transform(config)


# ----- checkpoints


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_missing_checkpoint(refuse, few_digits, tmp_path):
    for flags in (["--pretrained"], ["--resume"], ["--finetune", "--pretrained"]):
        message = refuse("--data-path", few_digits, "--batch-size", 8, *flags, tmp_path / "none.pth")
        assert f"{tmp_path / 'none.pth'}: no such checkpoint file" in message
    message = refuse("--data-path", few_digits, "--eval", "--pretrained", "https://host/c.pth")
    assert "c.pth: no such checkpoint file; download it first" in message


@pytest.mark.parametrize("content", [b"", b"text, not tensors", b"PK\x03\x04 half a zip", pickle.dumps([1])])
def test_file_that_is_no_checkpoint(content, refuse, few_digits, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    message = refuse("--data-path", few_digits, "--pretrained", tmp_path / "weights.pth")
    assert f"{tmp_path / 'weights.pth'}: " in message
    assert "not a checkpoint" in message


def test_truncated_checkpoint(refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"model": spatialmamba_micro(num_classes=10).state_dict()})
    path.write_bytes(path.read_bytes()[:-5000])
    assert f"{path}: is not a checkpoint saved by torch.save, or is damaged" in refuse(
        "--data-path", few_digits, "--pretrained", path
    )


def test_pickled_code_is_named_and_not_run(refuse, few_digits, tmp_path, capsys):
    path = saved(tmp_path, {"model": {}, "extra": Payload()})
    message = refuse("--data-path", few_digits, "--pretrained", path)
    assert "holds pickled objects, which are not loaded for safety: builtins.print" in message
    assert "must not run" not in capsys.readouterr().out


def test_checkpoint_without_weights(refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"epoch": 3, "optimizer": {}})
    assert "holds no weights under 'model'" in refuse("--data-path", few_digits, "--pretrained", path)
    with pytest.raises(UserError, match="its 'model' holds no weights"):
        convert(saved(tmp_path, {"model": {}}), tmp_path / "weights.safetensors")
    assert state_dicts({"model": {"w": torch.ones(1)}, "model_ema": {}}, path).keys() == {"model"}


def test_checkpoint_of_another_model(refuse, few_digits, tmp_path):
    deeper = SpatialMamba(num_classes=10, dims=16, depths=(1, 1, 3, 1))
    path = saved(tmp_path, {"model": deeper.state_dict()})
    message = refuse("--data-path", few_digits, "--pretrained", path)
    assert f"{path}: its weights are of another model" in message
    assert "unexpected (layers.2.blocks.2.cpe1.weight" in message


def test_checkpoint_of_another_size_is_recognised(refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"model": spatialmamba_micro(num_classes=10).state_dict()})
    tiny = MICRO.with_name("spatialmamba_tiny.yaml")
    message = refuse("--data-path", few_digits, "--pretrained", path, cfg=tiny)
    assert "it is a spatialmamba_micro, pass that model's --cfg" in message


def test_checkpoint_with_another_class_count(refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"model": spatialmamba_micro(num_classes=1000).state_dict()})
    message = refuse("--data-path", few_digits, "--pretrained", path)
    assert f"{path}: its head has 1000 classes, but 10 are wanted" in message
    assert "--finetune" in message


def test_checkpoint_with_another_channel_count(refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"model": spatialmamba_micro(num_classes=10, in_chans=1).state_dict()})
    message = refuse("--data-path", few_digits, "--pretrained", path)
    assert "patch_embed.conv1.conv.weight is (8, 1, 3, 3), not (8, 3, 3, 3)" in message


def test_weights_alone_cannot_be_resumed(refuse, few_digits, tmp_path):
    path = saved(tmp_path, spatialmamba_micro(num_classes=10).state_dict())
    message = refuse("--data-path", few_digits, "--batch-size", 8, "--resume", path)
    assert "has no optimizer, epoch" in message
    assert "--pretrained and --finetune" in message


def test_run_that_is_there_is_not_overwritten(few_digits, tmp_path, run_main, capsys):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK]
    run_main(*arguments)
    latest = tmp_path / "spatialmamba_micro/default/latest.pth"
    before = latest.read_bytes()
    message = refused(run_main, capsys, *arguments, "TRAIN.AUTO_RESUME", "False")
    assert "holds a run already; pass another --tag" in message
    assert latest.read_bytes() == before


def huge(model) -> dict:
    """Weights that are finite, but whose outputs are not."""
    return {k: torch.full_like(v, 1e38) if v.is_floating_point() else v for k, v in model.state_dict().items()}


def test_loss_that_is_not_finite_stops_the_run(few_digits, tmp_path, run_main, capsys):
    path = saved(tmp_path, huge(spatialmamba_micro(num_classes=10)))
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--pretrained", path, "--finetune"]
    message = refused(run_main, capsys, *arguments, "--opts", *QUICK)
    assert "no loss of epoch 0 was finite" in message


@pytest.mark.parametrize("value", ["abc", [1.0], torch.eye(3).to_sparse()], ids=["text", "list", "sparse"])
def test_weights_that_are_no_tensors(value, refuse, few_digits, tmp_path):
    path = saved(tmp_path, {"model": spatialmamba_micro(num_classes=10).state_dict() | {"norm.weight": value}})
    sparse = "_rebuild_sparse_tensor; of tensors, plain dense ones are read"
    message = sparse if isinstance(value, torch.Tensor) else "its weights hold 'norm.weight'"
    assert message in refuse("--data-path", few_digits, "--pretrained", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epoch="3"), "its epoch is '3'"),
        (dict(epoch=-5), "its epoch is -5"),
        (dict(progress=[3]), "its progress is [3]"),
        (dict(progress={"step": 3}), "its progress is {'step': 3}"),
        (dict(progress={"step": 3, "loss": float("nan"), "finite": 3, "seconds": 1.0}), "its progress is {"),
        (dict(progress={"step": "3", "loss": 1.0, "finite": 3, "seconds": 1.0}), "its progress is {"),
        (dict(progress={"step": 3, "loss": 1.0, "finite": 4, "seconds": 1.0}), "its progress is {"),
        (dict(epoch=True), "its epoch is True"),
        (dict(shares={}, max_accuracy="99"), "its max_accuracy is '99', not an accuracy"),
        (dict(shares={}, max_accuracy_ema=float("inf")), "its max_accuracy_ema is inf, not an accuracy"),
        (dict(scaler={"scale": float("nan")}), "its scaler is {'scale': nan}"),
        (dict(scaler=torch.zeros(2)), "its scaler is tensor([0., 0.])"),
        (dict(model_ema=[1]), "its 'model_ema' is of type list, not weights"),
        (dict(classes="0123456789"), "its 'classes' is not a list of names"),
        (dict(classes=["a"] * 10), "its 'classes' is not a list of names, each of its own"),
        (dict(classes=[*"012345678"]), "its 'classes' has 9 names, but its head has 10 classes"),
        (dict(optimizer={"state": [], "param_groups": []}), "its optimizer state is not of this model"),
        (dict(optimizer={"state": {}, "param_groups": [{"params": [[]]}, 3]}), "its optimizer state is not of this"),
        (dict(optimizer={"a": 1}), "its optimizer state is not of this model"),
        (dict(optimizer={"state": {}, "param_groups": []}), "its optimizer state is not of this model"),
        (dict(optimizer=[1]), "its optimizer state is not of this model"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_resume_from_what_cannot_be_resumed(change, message, refuse, few_digits, tmp_path):
    whole = {"model": spatialmamba_micro(num_classes=10).state_dict(), "epoch": 3, "optimizer": {}}
    path = saved(tmp_path, whole | change)
    assert message in refuse("--data-path", few_digits, "--batch-size", 8, "--resume", path)


def test_weights_whose_loss_is_not_finite_are_not_evaluated(run_main, capsys, few_digits, tmp_path):
    path = saved(tmp_path, huge(spatialmamba_micro(num_classes=10)))
    message = refused(run_main, capsys, "--data-path", few_digits, "--output", tmp_path, "--pretrained", path)
    assert f"{path}: its model weights give a loss of nan" in message
    assert not list(tmp_path.rglob("evaluation.json"))


# ----- as a user sees it


def test_no_traceback_and_status_one(tmp_path):
    done = run_command(sys.executable, "main.py", "--cfg", MICRO, "--data-path", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'nothing'}: no such folder; --data-path must hold train/ with one " + (
        "folder a class\n"
    )


@pytest.mark.parametrize("module", ["digits", "report"])
def test_other_commands_refuse_too(module, tmp_path):
    (tmp_path / "other.txt").write_text("")
    commands = {
        "digits": ["classification.data.digits", tmp_path],
        "report": ["classification.report", tmp_path, "--data-path", tmp_path],
    }
    done = run_command(sys.executable, "-m", *commands[module])
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}")
    assert "Traceback" not in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["other.txt"]


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    """TensorBoard does not take it."""
    folder = tmp_path / "\udcff"
    folder.mkdir()
    with pytest.raises(UserError, match=r"\\udcff: metrics cannot be written"):
        MetricsLog(folder, 0)
