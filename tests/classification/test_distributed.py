"""What several processes must agree on: batch norm, validation, signals; and how they are launched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kill_and_resume
import pytest
import torch
from kill_and_resume import differences
from running import CLASSIFICATION, MICRO, QUICK, free_port, run_command
from torch import nn

from classification.checkpoint import read_checkpoint, save_checkpoint
from classification.errors import UserError
from classification.models import spatialmamba_micro
from classification.sync_bn import average_batch_norm, running_statistics
from classification.training import Training

RUN = "spatialmamba_micro/default"
AVERAGED = """
import sys
import torch, torch.distributed as dist
from timm.utils import distribute_bn
from classification.config import load_config
from classification.models import spatialmamba_micro
from classification.run import Run
from classification.training import wrap

run = Run(load_config(sys.argv[1], {}))
for kind in ("averaged", "synchronised"):
    config = load_config(sys.argv[1], {"TRAIN.SYNC_BN": kind == "synchronised"})
    torch.manual_seed(0)
    model = spatialmamba_micro(num_classes=4)
    wrapped = wrap(model, config, run).train()
    for step in range(3):
        wrapped(torch.full((2, 3, 64, 64), float(run.rank)) + torch.randn(2, 3, 64, 64)).sum().backward()
    bn = model.patch_embed.conv1.norm
    own = [torch.zeros_like(bn.running_mean) for _ in range(2)]
    dist.all_gather(own, bn.running_mean)
    distribute_bn(model, run.world_size, reduce=True)
    if run.is_main:
        torch.save({"own": own, "mean": bn.running_mean}, sys.argv[2] + kind)
del wrapped  # while it lives so do gloo's threads, and one of them in Python when that ends is an abort
dist.destroy_process_group()
"""
SYNCHRONISED = """
import sys
import torch, torch.distributed as dist
from classification.sync_bn import SyncBatchNorm2d

dist.init_process_group("gloo")
rank = dist.get_rank()
inputs = torch.load(sys.argv[1], weights_only=True)
for backend in (None, "aot_eager"):
    bn = SyncBatchNorm2d(5).double()
    bn.load_state_dict(inputs["state"])
    if backend:
        bn.compile(backend=backend, dynamic=False)
    x = inputs["x"].split(inputs["shares"])[rank].clone().requires_grad_()
    weight = inputs["weight"].split(inputs["shares"])[rank]
    y = bn(x)
    (y * weight).sum().backward()
    y = bn(x.detach() + 1)  # the second update of the running statistics
    found = {"y": y.detach(), "x": x.grad, "state": bn.state_dict(), "weight": bn.weight.grad}
    torch.save(found, f"{sys.argv[2]}{backend}{rank}")
dist.destroy_process_group()
"""


OTHER_ARGUMENTS = """
import os, sys
sys.argv += {arguments}[int(os.environ["RANK"])]
from classification.main import main
main()
"""


def spawn(script, processes, tmp_path, *arguments):
    (tmp_path / "script.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = run_command(*launcher, tmp_path / "script.py", *arguments)
    assert done.returncode == 0, done.stderr


# ----- batch norm


def test_batch_norm_statistics_of_two_processes(tmp_path):
    """The processes see images of mean 0 and 1. Synchronised, they have the same statistics, to the bit."""
    spawn(AVERAGED, 2, tmp_path, MICRO, tmp_path / "bn.")
    for kind in ("averaged", "synchronised"):
        result = torch.load(tmp_path / f"bn.{kind}", weights_only=True)
        first, second = result["own"]
        if kind == "synchronised":
            assert torch.equal(first, second)
        else:
            assert (first - second).abs().max() > 0.1
        torch.testing.assert_close(result["mean"], (first + second) / 2)


def test_averaging_equal_statistics_leaves_every_bit(monkeypatch):
    """A run that is interrupted between averaging and its checkpoint averages twice."""
    norms = nn.Sequential(nn.BatchNorm2d(500))
    norms[0].running_mean.normal_()
    before = norms[0].running_mean.clone()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(total + total))
    average_batch_norm(norms)
    assert torch.equal(norms[0].running_mean, before)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path):
    """Three processes with 2, 3 and 1 images, in double precision: values, gradients and running statistics.

    Compiled likewise: Dynamo would lose the gradients through the statistics.
    """
    torch.manual_seed(0)
    shares = [2, 3, 1]
    x, weight = torch.randn(6, 5, 3, 4).double() * 3 + 7, torch.randn(6, 5, 3, 4).double()
    bn = nn.BatchNorm2d(5).double()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    inputs = {"x": x, "weight": weight, "state": bn.state_dict(), "shares": shares}
    torch.save(inputs, tmp_path / "inputs.pt")
    spawn(SYNCHRONISED, 3, tmp_path, tmp_path / "inputs.pt", tmp_path / "part")

    leaf = x.clone().requires_grad_()
    (bn(leaf) * weight).sum().backward()
    y = bn(x + 1)
    for backend in (None, "aot_eager"):
        parts = [torch.load(tmp_path / f"part{backend}{rank}", weights_only=True) for rank in range(3)]
        torch.testing.assert_close(torch.cat([p["y"] for p in parts]), y.detach())
        torch.testing.assert_close(torch.cat([p["x"] for p in parts]), leaf.grad)
        torch.testing.assert_close(sum(p["weight"] for p in parts), bn.weight.grad)
        for part in parts:
            torch.testing.assert_close(part["state"], bn.state_dict())


# ----- validation


def test_accuracy_is_the_same_on_one_and_three_processes(digits, tmp_path, run_main):
    """145 images in batches of 24, which three processes do not divide; two are test_main.py's."""
    data = tmp_path / "data"
    for label in range(10):
        (data / "val" / str(label)).mkdir(parents=True)
        for file in sorted((digits / "val" / str(label)).iterdir())[: 15 if label < 4 else 14]:
            (data / "val" / str(label) / file.name).symlink_to(file)
    (data / "val/3/one_more.png").symlink_to(next((digits / "train/3").iterdir()))
    torch.manual_seed(0)
    models = {name: spatialmamba_micro(num_classes=10).state_dict() for name in ("model", "model_ema")}
    save_checkpoint(models, tmp_path / "weights.pth")
    arguments = ["--data-path", data, "--pretrained", tmp_path / "weights.pth", "--batch-size", 24, "--output"]
    run_main(*arguments, tmp_path / "one")
    command = ["torchrun", "--standalone", "--nproc_per_node=3", "main.py", "--cfg", MICRO, *arguments]
    done = run_command(*command, tmp_path / "three")
    assert done.returncode == 0, done.stderr
    one, three = (json.loads((tmp_path / name / RUN / "evaluation.json").read_text()) for name in ("one", "three"))
    for name in models:
        assert one[name]["images"] == three[name]["images"] == 145
        assert (one[name]["top1"], one[name]["top5"]) == (three[name]["top1"], three[name]["top5"])
        assert one[name]["loss"] == pytest.approx(three[name]["loss"], rel=1e-6)
    assert one["model"]["top1"] != one["model_ema"]["top1"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("renamed", "process 1 has other classes than process 0: '4', not '3'; give all processes the same data"),
        (
            "evaluated",
            "process 1 has other --eval or --finetune than process 0: True, not False; give all processes the",
        ),
        pytest.param(
            *("fewer", r"process 1 has other images for training than process 0: \d+, not \d+; give all processes the"),
            marks=pytest.mark.long,
        ),
        pytest.param("empty", "no such folder; --data-path must hold", marks=pytest.mark.long),
    ],
)
def test_processes_with_other_arguments_stop(few_digits, tmp_path, part, message):
    """One message, of the process that differs, whatever it is that does; nothing is written."""
    (tmp_path / "empty").mkdir()
    if part in ("renamed", "fewer"):
        shutil.copytree(few_digits, tmp_path / part)
    for split in ("train", "val") if part == "renamed" else ():
        (tmp_path / part / split / "3").rename(tmp_path / part / split / "drei")
    if part == "fewer":
        next((tmp_path / "fewer/train/3").iterdir()).unlink()
    others = ["--data-path", str(tmp_path / part)]
    if part == "evaluated":
        others = ["--data-path", str(few_digits), "--pretrained", "checkpoint.pth"]
    script = tmp_path / "start.py"
    script.write_text(OTHER_ARGUMENTS.format(arguments=[["--data-path", str(few_digits)], others]))
    arguments = ["--cfg", MICRO, "--output", tmp_path / "run", "--opts", *QUICK]
    done = run_command("torchrun", "--standalone", "--nproc_per_node=2", script, *arguments)
    assert done.returncode != 0
    assert re.search(f"error: .*{message}", done.stderr), done.stderr
    assert "in _main" not in done.stderr  # as in a traceback of ours
    assert not list((tmp_path / "run").rglob("*.pth"))


# ----- launching and surviving


def test_two_launchers_are_two_nodes(few_digits, tmp_path):
    """Each of two nodes on the loopback starts one process, whose LOCAL_RANK is 0; together they are as two of one."""
    port = free_port()
    options = ["--cfg", MICRO, "--data-path", few_digits, "--opts", *QUICK]
    nodes = []
    for node in (0, 1):
        # A disk of its own: only the first process writes, and reads for all.
        launcher = ["torchrun", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        launcher += [
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
            "main.py",
            "--output",
            tmp_path / f"node{node}",
        ]
        nodes.append([*launcher, *options])
    for epochs in ("1", "2"):  # the second time it is resumed, on the node that has nothing too
        processes = [_start([*node, "TRAIN.EPOCHS", epochs]) for node in nodes]
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    assert not list((tmp_path / "node1").rglob("*.pth"))

    done = run_command(
        "torchrun", "--standalone", "--nproc_per_node=2", "main.py", "--output", tmp_path / "one", *options
    )
    assert done.returncode == 0, done.stderr
    contents = [read_checkpoint(tmp_path / root / RUN / "latest.pth") for root in ("node0", "one")]
    for content in contents:
        del content["config"]
    assert differences(*contents) == []  # both updates of the first epoch are made with the schedule's first rate


def _start(command) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        list(map(str, command)), cwd=CLASSIFICATION, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_signal_saves_and_the_same_command_goes_on(few_digits, tmp_path):
    """SIGTERM to torchrun, which passes it on; then SIGUSR1 to one process, of which the other must hear."""
    epochs = ["TRAIN.EPOCHS", "4", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.MESA.START", "0.0", "DATA.BATCH_SIZE", "2"]
    options = ["--cfg", MICRO, "--data-path", few_digits, "--opts", *epochs, "PRINT_FREQ", "1"]

    def command(name):
        return [*("torchrun", "--standalone", "--nproc_per_node=2", "main.py", "--output", tmp_path / name), *options]

    done = run_command(*command("whole"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "stopped" / RUN
    saved = _stop(command("stopped"), folder, signal.SIGTERM, 0)
    content = read_checkpoint(folder / "latest.pth")
    for i, name in enumerate(("model", "model_ema")):
        first, second = (statistics[i] for statistics in content["batch_norm"])
        for key, of_first in first.items():  # what is evaluated is neither's own
            torch.testing.assert_close(content[name][key], (of_first + second[key]) / 2)
        assert any(not torch.equal(content[name][key], of_first) for key, of_first in first.items())
    saved = _stop(command("stopped"), folder, signal.SIGUSR1, 1, saved)
    done = run_command(*command("stopped"))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder / 'latest.pth'}, {saved}" in (folder / "log.txt").read_text()
    assert kill_and_resume.compare(tmp_path / "whole", tmp_path / "stopped") == []


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([[]], "holds 0 sets of them for process 0"),
        ([{}], "holds 0 sets of them for process 0"),
        ([[{"norm.running_mean": torch.zeros(2), "norm.running_var": -torch.ones(2)}]], "norm.running_var is negative"),
        ([], "list index out of range"),
    ],
)
def test_statistics_of_a_process_that_are_none(saved, message):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(2)})
    own = [running_statistics(model), running_statistics(nn.ModuleDict({"norm": nn.BatchNorm2d(2)}))]
    training = SimpleNamespace(_own_statistics=lambda: own, run=SimpleNamespace(rank=0), notes=[])
    with pytest.raises(UserError, match=rf"its batch norm statistics are not of this model \(.*{message}"):
        Training._load_own_statistics(training, saved, Path("a.pth"))
    whole = [{name: value + 3 for name, value in own[0].items()}]  # of a run that had no EMA
    Training._load_own_statistics(training, [whole], Path("a.pth"))
    assert (model["norm"].running_mean == 3).all()


def _stop(command, folder, number, starts, resumed="") -> str:
    """Runs until it has trained, after `starts` runs before it, and is stopped; returns where it was."""
    process = _start(command)
    log, deadline = folder / "log.txt", time.monotonic() + 120

    def has_trained() -> bool:
        return log.exists() and "step 3/" in "".join(log.read_text().split("2 process(es)")[starts + 1 :])

    while not has_trained():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(process.pid if number == signal.SIGTERM else int(children[-1]), number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    said = log.read_text()
    assert f"{number.name}: saved" in said, output
    assert not resumed or f"resuming from {folder / 'latest.pth'}, {resumed}" in said
    epoch, step = max(tuple(map(int, re.findall(r"\d+", p.stem))) for p in folder.glob("epoch_*_step_*.pth"))
    return f"epoch {epoch}, step {step}"


@pytest.mark.parametrize(
    ("processes", "kills", "epochs", "most"),
    [
        (1, 3, 4, 20),  # several that are stopped and go on: the test above
        pytest.param(2, 3, 4, 40, marks=pytest.mark.long),
        pytest.param(3, 4, 4, None, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_killed_again_and_again(processes, kills, epochs, most, tmp_path, capsys):
    """tests/kill_and_resume.py, shortened."""
    assert kill_and_resume.run(kills=kills, epochs=epochs, root=tmp_path, processes=processes, most=most) == []
    assert f"{kills} kills, {kills} times resumed" in capsys.readouterr().out


def test_slurm_script_starts_a_task_for_each_gpu(few_digits, tmp_path):
    """With an srun that starts the tasks here, as Slurm would: two nodes of two GPUs each, and no launcher."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "scontrol").write_text("#!/bin/bash\n[ $1 = show ] && echo 127.0.0.1 && echo other\n")
    (bin_folder / "srun").write_text(
        f"""#!/bin/bash
printf '%s\\n' "$@" > {tmp_path / "srun.txt"}
export SLURM_JOB_ID={free_port()} SLURM_JOB_NODELIST=nodes SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2
while [ "${{1#--}}" != "$1" ]; do shift; done
for task in 1 0; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & jobs+=" $!"; done
for job in $jobs; do wait $job || exit 1; done
"""
    )
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    command = ["env", f"PATH={path}", "GPUS=2", "GPUS_PER_NODE=1", "SRUN_ARGS=--time=1:00:00 --exclusive"]
    arguments = ["partition", "job name", MICRO, few_digits, "--output", tmp_path / "out", "--opts", *QUICK]
    done = run_command(*command, "bash", "tools/slurm_train.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert (tmp_path / "out" / RUN / "epoch_2.pth").exists()
    flags = (tmp_path / "srun.txt").read_text().splitlines()
    assert flags[:5] == [
        "--partition=partition",
        "--job-name=job name",
        "--gres=gpu:1",
        "--ntasks=2",
        "--ntasks-per-node=1",
    ]
    assert {"--time=1:00:00", "--exclusive", "--signal=USR1@120"} <= set(flags)

    assert run_command("bash", "tools/slurm_train.sh", "partition").returncode == 2
