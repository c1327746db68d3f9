"""main.py as its users run it, on real images."""

import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from kill_and_resume import differences
from running import CLASSIFICATION, MICRO, QUICK, free_port, run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from classification import engine as engine_module
from classification import main as main_module
from classification import training as training_module
from classification.checkpoint import read_checkpoint, save_checkpoint
from classification.checkpoint_folder import CheckpointFolder
from classification.errors import UserError
from classification.metrics import read_lines
from classification.report import report
from classification.run import Preemption


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluation_of(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def launchers(processes: int) -> dict[str, list]:
    port = free_port()
    return {
        "torchrun": ["torchrun", f"--nproc_per_node={processes}", f"--master_port={port}"],
        "distributed.launch": [
            *("python", "-m", "torch.distributed.launch", "--nnodes=1", "--node_rank=0"),
            *(f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={port}"),
        ],
    }


def test_train_then_evaluate_in_a_second_process(few_digits, tmp_path):
    common = ["--cfg", "configs/spatialmamba/spatialmamba_micro_digits.yaml", "--output", tmp_path]
    trained = run_command("python", "main.py", *common, "--data-path", few_digits, "--opts", *QUICK)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "spatialmamba_micro" / "default"
    assert {f.name for f in run.iterdir()} >= {"best.pth", "latest.pth", "log.txt", "metrics.jsonl"}
    assert "epoch 1 step 5/5 loss" in trained.stdout  # plain lines where there is no terminal
    assert "epoch 1 step 5/5 loss" in (run / "log.txt").read_text()

    val_only = tmp_path / "val_only"
    val_only.mkdir()
    (val_only / "val").symlink_to(few_digits / "val")
    weights = run / "best.pth"
    modified = weights.stat().st_mtime_ns
    evaluated = run_command(
        "python", "main.py", *common, "--data-path", val_only, "--pretrained", weights, "--batch-size", 8
    )
    assert evaluated.returncode == 0, evaluated.stderr
    epoch = metrics_of(run)[read_checkpoint(weights)["epoch"]]
    again = evaluation_of(run)
    assert again["model"] == epoch["model"]
    assert again["model_ema"] == epoch["model_ema"]
    assert again["model"]["images"] == 33
    assert weights.stat().st_mtime_ns == modified  # it did not go on to train


def test_compiled(few_digits, tmp_path, run_main, monkeypatch):
    """--compile gives what eager execution gives, from two graphs without a break, the short last batch included."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_in_place(model, mode):
        assert mode == "default"
        model.compile(backend=backend, fullgraph=True, dynamic=False)

    for module in (main_module, training_module):
        monkeypatch.setattr(module, "compile_in_place", compile_in_place)
    mesa = ["--opts", *QUICK, "TRAIN.MESA.WEIGHT", "1.0", "TRAIN.EMA.DECAY", "0.5"]
    common = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*common, "--tag", "eager", *mesa)
    printed = run_main(*common, "--tag", "compiled", "--compile", *mesa)
    assert "compiled (default)" in printed
    assert len(graphs) == 2  # of training and of evaluation, which model and EMA share
    eager, compiled = (metrics_of(tmp_path / "spatialmamba_micro" / tag) for tag in ("eager", "compiled"))
    for before, after in zip(eager, compiled, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        for name in ("model", "model_ema"):
            assert after[name] == pytest.approx(before[name], rel=1e-3)
    assert "--compile default -> off" in run_main(*common, "--tag", "compiled", *mesa, "TRAIN.EPOCHS", "3")
    weights = tmp_path / "spatialmamba_micro" / "compiled" / "epoch_2.pth"
    run_main(*common, "--tag", "again", "--compile", "--eval", "--pretrained", weights, "--batch-size", 8)
    assert len(graphs) == 2
    again = evaluation_of(tmp_path / "spatialmamba_micro" / "again")
    assert again["model"]["images"] == 33
    assert again["model"] == pytest.approx(compiled[-1]["model"], rel=1e-6)


def test_two_processes_train_and_evaluate(few_digits, tmp_path, run_main):
    """By either launcher. 33 images in batches of 8: unequal shares, a last batch of one; each counts once."""
    main = ["main.py", "--cfg", MICRO, "--data-path", few_digits, "--output", tmp_path]
    trained = run_command(*launchers(2)["torchrun"], *main, "--opts", *QUICK)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "spatialmamba_micro" / "default"
    assert trained.stdout.count("epoch 1: train loss") == 1  # only the first process speaks
    last = metrics_of(run)[-1]

    evaluated = run_command(
        *launchers(2)["distributed.launch"], *main, "--pretrained", run / "latest.pth", "--batch-size", 8
    )
    assert evaluated.returncode == 0, evaluated.stderr
    by_two = evaluation_of(run)
    run_main("--data-path", few_digits, "--output", tmp_path, "--pretrained", run / "latest.pth", "--batch-size", 15)
    by_one = evaluation_of(run)
    for name in ("model", "model_ema"):
        # Trained, evaluated by two, and by one in batches of 15, 15 and 3.
        for other in (last[name], by_two[name]):
            assert other["images"] == by_one[name]["images"] == 33
            assert (other["top1"], other["top5"]) == (by_one[name]["top1"], by_one[name]["top5"])
            assert other["loss"] == pytest.approx(by_one[name]["loss"], rel=1e-5)


def test_resumed_run_equals_the_undisturbed_one(few_digits, tmp_path, run_main, monkeypatch):
    """With everything random that there is; stopped within an epoch, between epochs, and during validation."""
    random = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.REPROB", "0.5", "MODEL.DROP_PATH_RATE", "0.3"]
    arguments = ["--data-path", few_digits, "--opts", *QUICK, *random, "TRAIN.EPOCHS", "4", "OUTPUT"]
    run_main(*arguments, tmp_path / "whole")

    def stop_at(module, name, call):
        """SIGTERM at the given call, counted from 1."""
        original, calls = getattr(module, name), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, counted)
            with pytest.raises(SystemExit) as stop:
                run_main(*arguments, tmp_path / "parts")
        assert stop.value.code == 128 + signal.SIGTERM

    run = tmp_path / "parts/spatialmamba_micro/default"
    handler = signal.getsignal(signal.SIGTERM)
    stop_at(engine_module, "_forward_backward", 3)
    assert (run / "epoch_0_step_3.pth").exists()
    stop_at(engine_module, "_forward_backward", 2 + 3)  # on from step 3: two, then three of the next epoch
    assert (run / "epoch_1_step_3.pth").exists()
    stop_at(training_module, "evaluate", 1)
    assert (run / "epoch_1_step_5.pth").exists()
    stop_at(engine_module, "_evaluate_batch", 1)  # in the same validation, further on
    assert signal.getsignal(signal.SIGTERM) is handler
    printed = run_main(*arguments, tmp_path / "parts")
    assert "resuming from" in printed
    assert "the same command goes on from there" in (run / "log.txt").read_text()

    name = "spatialmamba_micro/default/latest.pth"
    whole, parts = (read_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
    for content in (whole, parts):
        del content["config"]  # names the folder
    assert differences(whole, parts) == []
    untimed = [{k: v for k, v in m.items() if k != "seconds"} for m in metrics_of(tmp_path / name_of("whole"))]
    assert [{k: v for k, v in m.items() if k != "seconds"} for m in metrics_of(run)] == untimed
    assert "all 4 epochs are done" in run_main(*arguments, tmp_path / "parts")


def name_of(root: str) -> str:
    return f"{root}/spatialmamba_micro/default"


def test_the_last_checkpoints_are_kept_under_their_names(few_digits, tmp_path, run_main):
    opts = [*QUICK, "TRAIN.EPOCHS", "4", "SAVE_STEPS", "3", "KEEP_LAST", "2", "TRAIN.WARMUP_LR", "1e-6"]
    printed = run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *opts)
    assert "TRAIN.WARMUP_LR 1e-06 has no effect, because TRAIN.WARMUP_EPOCHS is 0" in printed
    run = tmp_path / name_of(".")
    # 20 updates: within epochs at 3, 6, 9, 12, 18 and after each epoch at 5, 10, 15, 20, where 15 is both.
    assert sorted(f.name for f in run.glob("epoch_*.pth")) == ["epoch_3_step_3.pth", "epoch_4.pth"]
    assert {f.name for f in run.glob("*.pth")} >= {"latest.pth", "best.pth", "best_ema.pth"}
    latest, last = (read_checkpoint(run / name) for name in ("latest.pth", "epoch_4.pth"))
    assert differences(latest, last) == []
    best = read_checkpoint(run / "best.pth")
    assert best["max_accuracy"] == max(m["model"]["top1"] for m in metrics_of(run))
    assert not list(run.glob(".*.partial"))


def test_latest_is_the_newest_whatever_it_was_saved_for(few_digits, tmp_path, run_main, monkeypatch):
    """Every tenth epoch, and whenever the accuracy is the best so far: after the first and the third."""
    accuracies = iter([10.0, 5.0, 20.0, 15.0])
    monkeypatch.setattr(
        training_module, "evaluate", lambda *_: {"images": 33, "top1": next(accuracies), "top5": 50.0, "loss": 1.0}
    )
    opts = [*QUICK, "SAVE_FREQ", "10", "TRAIN.EPOCHS", "5", "TRAIN.EMA.ENABLE", "False", "TRAIN.MESA.WEIGHT", "0.0"]
    with pytest.raises(StopIteration):  # the run is cut off in its fifth validation
        run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *opts)
    run = tmp_path / name_of(".")
    assert sorted(f.name for f in run.glob("epoch_*.pth")) == ["epoch_1.pth", "epoch_3.pth"]
    files = {f.name: f.stat().st_ino for f in run.glob("*.pth")}
    assert files["latest.pth"] == files["epoch_3.pth"] == files["best.pth"]


OTHER_RUN = """
import sys, time
from pathlib import Path
from classification.checkpoint_folder import CheckpointFolder
from classification.errors import UserError
folder = CheckpointFolder(Path(sys.argv[1]), keep=3)
folder.lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_classes_are_matched_by_name(few_digits, tmp_path, run_main, capsys):
    """Evaluating, resuming, fine-tuning and the report: in another order they are mapped, other names are an error."""
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    epochs = [*QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "--opts", *epochs, "1")
    run = tmp_path / name_of(".")
    content = read_checkpoint(run / "best.pth")
    assert content["classes"] == [str(i) for i in range(10)]
    run_main(*arguments, "--pretrained", run / "best.pth")
    expected = evaluation_of(run)

    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    shuffled = {**content, "classes": [str(i) for i in order]}
    for name in ("model", "model_ema"):
        shuffled[name] = {k: v[order] if k.startswith("head.") else v for k, v in content[name].items()}
    save_checkpoint(shuffled, tmp_path / "shuffled.pth")
    printed = run_main(*arguments, "--tag", "shuffled", "--pretrained", tmp_path / "shuffled.pth")
    again = evaluation_of(run.with_name("shuffled"))
    for name in ("model", "model_ema"):
        assert again[name] == pytest.approx(expected[name])
    assert "order of the folders" not in printed
    del content["classes"]
    save_checkpoint(content, tmp_path / "nameless.pth")
    printed = run_main(*arguments, "--tag", "nameless", "--pretrained", tmp_path / "nameless.pth")
    assert printed.count("nameless.pth: holds no names of classes; they are taken in the order of the folders") == 1

    words = tmp_path / "words"
    for split in ("train", "val"):
        (words / split).mkdir(parents=True)
        for i, name in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]):
            (words / split / name).symlink_to(few_digits / split / str(i))
    arguments[1] = words
    for flags in (["--pretrained", run / "best.pth"], [], ["--tag", "other", "--resume", run / "best.pth"]):
        with pytest.raises(SystemExit) as stop:
            run_main(*arguments, *flags, "--opts", *epochs, "2")
        assert "its classes are not those of" in stop.value.code
        assert "it has '0', the folder has 'eight' (10 and 10 classes)" in stop.value.code
    done = run_command("python", "-m", "classification.report", run, "--data-path", words, cwd=CLASSIFICATION)
    assert done.returncode == 1
    assert "it has '0', the folder has 'eight'" in done.stderr
    tune = ["--pretrained", run / "best.pth", "--finetune", "--tag", "tuned", "--opts", *epochs, "1"]
    assert "its head is for other classes, a new one has 10 classes" in run_main(*arguments, *tune)
    assert read_checkpoint(run.with_name("tuned") / "best.pth")["classes"][0] == "eight"
    (words / "val" / "eight").unlink()
    with pytest.raises(UserError, match=r"it has '0', the folder has 'five' \(10 and 9 classes\)"):
        report(run, words)


def test_one_class_is_said_to_say_nothing(few_digits, tmp_path, run_main, capsys):
    for split in ("train", "val"):
        (tmp_path / "one" / split).mkdir(parents=True)
        (tmp_path / "one" / split / "3").symlink_to(few_digits / split / "3")
    arguments = ["--data-path", tmp_path / "one", "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS", "1"]
    said = "there is one class, so every prediction is right: accuracy says nothing"
    printed = run_main(*arguments, "DATA.BATCH_SIZE", "4", "TRAIN.ACCUMULATION_STEPS", "9")
    assert said in printed
    assert "fewer than TRAIN.ACCUMULATION_STEPS 9: an update has 4 images, but the learning rate of 36; set" in printed
    report(tmp_path / "spatialmamba_micro/default", tmp_path / "one")
    assert said in capsys.readouterr().out


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:50567: Connection reset by peer"
)


def test_what_another_process_leaves_behind_is_one_line(run_main, monkeypatch):
    def failing(error: RuntimeError):
        def work(*_):
            raise error

        monkeypatch.setattr(main_module, "_main", work)
        return error

    failing(RuntimeError(GLOO))
    with pytest.raises(SystemExit) as stop:
        run_main()
    line = (
        "error: another process has ended or does not answer (Read error [127.0.0.1]:50567: Connection reset by peer); "
    )
    assert stop.value.code.startswith(line)
    failing(RuntimeError("of another kind"))
    with pytest.raises(RuntimeError, match="of another kind"):
        run_main()


def test_a_second_ctrl_c_ends_at_once(few_digits, tmp_path, run_main, monkeypatch, request):
    """The first one saves; a launcher's copy of it, in the same second, changes nothing."""
    received = []

    def interrupt(*arguments, **options):
        received.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        if len(received) == 2:
            time.sleep(Preemption.SAME_SECOND + 0.1)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    original = engine_module._forward_backward
    monkeypatch.setattr(engine_module, "_forward_backward", interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK]
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments)
    assert stop.value.code == 128 + signal.SIGINT
    run = tmp_path / name_of(".")
    assert [f.name for f in run.glob("epoch_*.pth")] == ["epoch_0_step_1.pth"]
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments, "DATA.NUM_WORKERS", "0")
    assert stop.value.code == 128 + signal.SIGINT
    assert [f.name for f in run.glob("epoch_*.pth")] == ["epoch_0_step_1.pth"]


def test_a_console_or_log_that_breaks_is_one_line(few_digits, tmp_path, run_main, monkeypatch):
    """As after `main.py | head`, and with a full disk. The run goes on."""

    def broken(handler, real=logging.StreamHandler.flush):
        if type(handler) not in (logging.StreamHandler, logging.FileHandler):  # but pytest's
            return real(handler)
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(logging.StreamHandler, "flush", broken)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS", "1")
    log = tmp_path / name_of(".") / "log.txt"
    assert [line for line in said.getvalue().splitlines() if "Broken pipe" in line] == [
        f"{place}: cannot be written to (Broken pipe)" for place in ("the standard output", log)
    ]
    assert (log.parent / "latest.pth").exists()


@pytest.mark.parametrize("place", ["metrics.SummaryWriter", "metrics.MetricsLog._write"])
def test_a_disk_full_of_metrics_is_one_line(place, few_digits, tmp_path, run_main, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"classification.{place}", full)
    with pytest.raises(SystemExit) as stop:
        run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK)
    assert "metrics cannot be written ([Errno 28] No space left on device)" in stop.value.code


def test_two_runs_do_not_share_a_folder(few_digits, tmp_path, run_main):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    run = tmp_path / name_of(".")
    before = {f: f.stat().st_mtime_ns for f in run.glob("*")}
    with subprocess.Popen([sys.executable, "-c", OTHER_RUN, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(SystemExit) as stop:
            run_main(*arguments, "2")
        other.kill()
    assert f"{run}: another process is training in it" in stop.value.code
    assert {f: f.stat().st_mtime_ns for f in run.glob("*")} == before
    assert "epoch 1 step 5/5" in run_main(*arguments, "2")


def test_a_run_that_is_refused_has_written_nothing(few_digits, tmp_path, run_main):
    """It finds no checkpoint to go on from, for the other run has just begun."""
    run = tmp_path / name_of(".")
    first = CheckpointFolder(run, keep=3)
    with subprocess.Popen([sys.executable, "-c", OTHER_RUN, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(SystemExit) as stop:
            run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK)
        other.kill()
    assert "another process is training in it" in stop.value.code
    assert [f.name for f in run.iterdir()] == [".lock"]
    first.lock()
    first.lock()  # once more is no other process, and must not give it back


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(few_digits, tmp_path, run_main, capsys):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "2")
    run = tmp_path / name_of(".")
    for name in ("latest.pth", "epoch_2.pth"):
        content = bytearray((run / name).read_bytes())
        (run / name).unlink()
        content[len(content) // 2] ^= 16
        (run / name).write_bytes(content)
    (run / ".epoch_3.pth.partial").write_bytes(b"half")
    (run / ".mine.partial").mkdir()
    printed = run_main(*arguments, "3")
    assert f"{run / 'latest.pth'}: is damaged" in printed
    assert "set aside as epoch_2.pth.damaged" in printed
    assert f"resuming from {run / 'epoch_1.pth'}, epoch 1, step 0" in printed
    assert read_checkpoint(run / "latest.pth")["epoch"] == 2
    assert [path.name for path in run.glob(".*.partial")] == [".mine.partial"]

    for path in run.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:5000])
    damaged = len(list(run.glob("epoch_*.pth"))) + 1 + len(list(run.glob("*.damaged")))
    for _ in range(2):  # it does not start over the second time either
        with pytest.raises(SystemExit) as stop:
            run_main(*arguments, "4")
        assert "no checkpoint is whole, so training cannot go on; pass another --tag" in stop.value.code
        assert "latest.pth.damaged1" in stop.value.code
    assert {f.name for f in run.glob("*.pth")} == {"best.pth", "best_ema.pth"}
    assert len(list(run.glob("*.damaged*"))) == damaged  # none lost


def test_an_interrupted_resume_goes_on_with_the_same_command(few_digits, tmp_path, run_main):
    """--resume into a folder of its own: the second time that folder's checkpoint is the one to go on from."""
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*arguments, "--opts", *QUICK, "TRAIN.EPOCHS", "1")
    first = tmp_path / name_of(".") / "latest.pth"
    resume = [*arguments, "--tag", "more", "--resume", first, "--opts", *QUICK, "TRAIN.WEIGHT_DECAY", "0.5"]
    assert f"resuming from {first}, epoch 1, step 0\n" in run_main(*resume, "TRAIN.EPOCHS", "2")
    printed = run_main(*resume, "TRAIN.EPOCHS", "3")
    more = tmp_path / "spatialmamba_micro/more"
    assert f"resuming from {more / 'latest.pth'}, epoch 2, step 0; --resume is not read, for the run goes on" in printed
    assert "is not read: " not in printed  # this is the run that began from it
    groups = read_checkpoint(more / "latest.pth")["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.5}  # the config's
    events = EventAccumulator(str(more / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/model/top1")] == [10, 15]

    for flags in (["--pretrained", more / "latest.pth", "--finetune"], ["--resume", tmp_path / "nowhere.pth"]):
        printed = run_main(*arguments, *flags, "--opts", *QUICK, "TRAIN.EPOCHS", "1")
        expected = f"{flags[0]} {flags[1]} is not read: {first.parent} holds a run, which goes on; pass another --tag"
        assert expected in printed

    back = [*arguments, "--tag", "more", "--resume", more / "epoch_2.pth", "--opts", *QUICK, "TRAIN.EPOCHS", "3"]
    printed = run_main(*back)
    assert f"resuming from {more / 'epoch_2.pth'}, epoch 2, step 0" in printed
    expected = f"{more}: the run goes back to epoch_2.pth. As it goes on, it writes over latest.pth and the checkpoints"
    assert expected in printed
    assert "removes all but the last 3 (epoch_3.pth beside it now); best.pth stays until" in printed
    printed = run_main(*back)
    assert "the run goes back" not in printed
    assert "latest.pth: the run has gone back to epoch_2.pth before, and goes on from here" in printed
    assert "all 3 epochs are done" in printed
    latest = [more / "latest.pth" if one == more / "epoch_2.pth" else one for one in back[:-1]] + ["4"]
    assert f"resuming from {more / 'latest.pth'}, epoch 3" in run_main(*latest)
    assert "has gone back to epoch_2.pth before, and goes on" in run_main(*back)  # which --resume latest.pth keeps
    copied = shutil.copytree(more, more.with_name("copied"))  # where latest.pth is a file of its own
    newest = [*arguments, "--tag", "copied", "--resume", copied / "epoch_4.pth", "--opts", *QUICK, "TRAIN.EPOCHS", "4"]
    printed = run_main(*newest)
    assert f"resuming from {copied / 'epoch_4.pth'}, epoch 4" in printed
    assert "the run goes back" not in printed


def test_another_config_is_named_in_one_line(few_digits, tmp_path, run_main):
    """Key by key, where it changes numbers, for example another number of epochs by the schedule; not other paths."""
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*arguments, "--opts", *QUICK, "TRAIN.EPOCHS", "1")
    path = tmp_path / name_of(".") / "latest.pth"
    content = read_checkpoint(path)
    content["shares"].update(processes=4, images=41)
    content["validation_images"] = 34
    content["config"] = content["config"].replace("  SYNC_BN: false\n", "")  # of an earlier version
    save_checkpoint(content, tmp_path / "earlier.pth")
    free = [*QUICK, "TRAIN.EPOCHS", "1", "DATA.NUM_WORKERS", "1", "KEEP_LAST", "2", "PRINT_FREQ", "1"]
    changed = ["TRAIN.EPOCHS", "2", "AUG.MIXUP", "0.5", "TRAIN.SYNC_BN", "True", "TRAIN.OPTIMIZER.EPS", "1e-6"]
    printed = run_main(*arguments, "--tag", "a", "--resume", path, "--opts", *free)
    assert "another config" not in printed
    printed = run_main(*arguments, "--tag", "b", "--resume", tmp_path / "earlier.pth", "--opts", *free, *changed)
    line = (
        "earlier.pth: training goes on with another config: TRAIN.EPOCHS 1 -> 2, TRAIN.OPTIMIZER.EPS 1e-08 -> 1e-06, "
        "AUG.MIXUP 0.2 -> 0.5, "
    )
    assert printed.count(f"{line}processes 4 -> 1, images 41 -> 40, validation_images 34 -> 33\n") == 1
    content["config"] = "TRAIN: {EPOCHS: many}"
    content["compile"] = torch.ones(2)  # altered
    save_checkpoint(content, tmp_path / "earlier.pth")
    printed = run_main(*arguments, "--tag", "c", "--resume", tmp_path / "earlier.pth", "--opts", *free)
    assert "earlier.pth: its config: TRAIN.EPOCHS must be of type int, got 'many'" in printed
    assert "--compile tensor([1., 1.]) -> off" in printed


def test_optimizer_state_that_was_not_fused_is_resumed(few_digits, tmp_path, run_main):
    """And weights that were shrunk, which is said."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    path = tmp_path / name_of(".") / "latest.pth"
    content = read_checkpoint(path)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None
    content["model"] = {name: value.half() for name, value in content["model"].items()}
    save_checkpoint(content, path)
    printed = run_main(*arguments, "2")
    assert "epoch 1 step 5/5" in printed
    assert "latest.pth: its weights are rounded to float16, so training does not go on as it would have" in printed


def test_moments_of_another_shape_are_refused(few_digits, tmp_path, run_main):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    path = tmp_path / name_of(".") / "latest.pth"
    content = read_checkpoint(path)
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    save_checkpoint(content, path)
    with pytest.raises(SystemExit) as stop:
        run_main(*arguments, "2")
    assert "moments of parameter 0 are not of its shape" in stop.value.code


def test_workers_end_with_the_run(few_digits, tmp_path, run_main, monkeypatch):
    """Before the garbage collector is run, which takes five seconds for each."""
    alive = []
    monkeypatch.setattr(main_module.gc, "collect", lambda: alive.append(multiprocessing.active_children()))
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "DATA.NUM_WORKERS", "2")
    assert alive == [[]]


def test_place_of_an_earlier_version_is_kept(few_digits, tmp_path, run_main):
    """It has not noted the number of images."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "SAVE_STEPS", "1", "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    path = tmp_path / name_of(".") / "epoch_0_step_4.pth"
    content = read_checkpoint(path)
    digest = content["shares"].pop("image names")
    del content["shares"]["images"]
    save_checkpoint(content, path)
    assert "begun anew" not in run_main("--resume", path, "--tag", "other", *arguments, "1")
    content["shares"].update(images=40, **{"image names": digest[::-1]})
    save_checkpoint(content, path)
    printed = run_main("--resume", path, "--tag", "of other images", *arguments, "1")
    assert "goes on with another config: other training images" in printed
    assert "its image names are others than now; its epoch is begun anew" in printed


def test_best_outlives_an_earlier_checkpoint(few_digits, tmp_path, run_main):
    """Resumed from before it, a run that does worse leaves it; also where all are links to another disk."""
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    folder = tmp_path / name_of(".")
    content = read_checkpoint(folder / "best.pth")
    content["max_accuracy"] = content["max_accuracy_ema"] = 100.0
    for name in ("best.pth", "best_ema.pth"):
        (folder / name).unlink()
        save_checkpoint(content, folder / name)
    save_checkpoint(content | {"max_accuracy_ema": "abc"}, folder / "best_ema.pth")  # which is as if there were none
    (tmp_path / "disk").mkdir()
    for path in folder.glob("*.pth"):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    before = (folder / "best.pth").read_bytes()
    run_main("--resume", folder / "epoch_1.pth", *arguments, "2")
    assert (folder / "best.pth").read_bytes() == before


def test_the_best_epoch_is_that_of_todays_validation(few_digits, tmp_path, run_main):
    """Of other images or another crop 100 % says nothing; that checkpoint is set aside, and so is a damaged one."""
    arguments = ["--output", tmp_path / "runs", "--opts", *QUICK, "TRAIN.EPOCHS"]
    run_main("--data-path", few_digits, *arguments, "1")
    folder = tmp_path / "runs" / name_of(".")
    content = read_checkpoint(folder / "latest.pth") | {"max_accuracy": 100.0, "max_accuracy_ema": 100.0}
    for name in ("latest.pth", "best.pth"):
        (folder / name).unlink()
        save_checkpoint(content, folder / name)
    damaged = (folder / "best_ema.pth").read_bytes()[:-100]
    (folder / "best_ema.pth").unlink()
    (folder / "best_ema.pth").write_bytes(damaged)
    best = (folder / "best.pth").read_bytes()
    shutil.copytree(few_digits, tmp_path / "data")
    image = next((tmp_path / "data/val/0").iterdir())
    image.rename(image.with_name(f"other-{image.name}"))
    printed = run_main("--data-path", tmp_path / "data", *arguments, "2", "TEST.CROP_PCT", "0.9")
    assert printed.count("best.pth: was validated differently (TEST.CROP_PCT 1.0 -> 0.9, other images): the best ") == 1
    assert read_checkpoint(folder / "best.pth")["max_accuracy"] < 100
    assert (folder / "best.pth.replaced").read_bytes() == best
    assert (folder / "best_ema.pth.replaced").read_bytes() == damaged
    printed = run_main("--data-path", tmp_path / "data", *arguments, "3", "TEST.CROP_PCT", "0.9")
    assert "validated differently" not in printed


def test_an_epoch_as_good_as_the_best_one_does_not_take_its_place():
    training = object.__new__(training_module.Training)
    training.state = training_module.RunState()
    measured = {"loss": 1.0, "seconds": 1.0, "model": {"images": 4, "top1": 50.0, "top5": 75.0, "loss": 1.0}}
    assert [training._note_best({"epoch": epoch, **measured}) for epoch in (0, 1)] == [["best.pth"], []]


def test_other_batches_begin_the_epoch_anew(few_digits, tmp_path, run_main):
    arguments = ["--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK, "SAVE_STEPS", "1", "TRAIN.EPOCHS"]
    run_main(*arguments, "1")
    run = tmp_path / name_of(".")
    resume = ["--resume", run / "epoch_0_step_4.pth", "--tag", "other", "--batch-size", "4"]
    printed = run_main(*resume, *arguments, "1", "DATA.BATCH_SIZE", "4")
    assert "epoch_0_step_4.pth: its batch, batches are others than now; its epoch is begun anew" in printed
    assert "its epoch is begun anew" in (tmp_path / "spatialmamba_micro/other/log.txt").read_text()
    assert "epoch 0 step 10/10" in printed


def test_scalars_of_steps_and_epochs(few_digits, tmp_path, run_main):
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK)
    run = tmp_path / name_of(".")
    steps = read_lines(run / "steps.jsonl", "epoch", "step")
    assert [(s["epoch"], s["step"], s["update"]) for s in steps] == [
        *((0, 2, 2), (0, 4, 4), (0, 5, 5)),
        *((1, 2, 7), (1, 4, 9), (1, 5, 10)),
    ]
    assert {s["steps"] for s in steps} == {5}
    assert set(steps[0]) == {
        *("epoch", "step", "steps", "update", "loss", "lr", "grad_norm", "images_per_second", "memory_mib", "skipped")
    }
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/memory_mib"}
    assert tags | {"val/model/top1", "val/model_ema/top1", "epoch/loss"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 5, 7, 9, 10]
    top1 = [e.value for e in events.Scalars("val/model/top1")]
    assert top1 == pytest.approx([m["model"]["top1"] for m in metrics_of(run)])


def test_more_epochs_follow_the_new_schedule_in_another_folder(few_digits, tmp_path, run_main):
    """Two epochs, then four more in a new folder: the learning rate is that of six from the start."""
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*arguments, "--tag", "two", "--opts", *QUICK)
    six = [*QUICK, "TRAIN.EPOCHS", "6"]
    run_main(*arguments, "--tag", "whole", "--opts", *six)
    run = tmp_path / "spatialmamba_micro"
    run_main(*arguments, "--tag", "more", "--resume", run / "two/latest.pth", "--opts", *six)
    whole, more = metrics_of(run / "whole"), metrics_of(run / "more")
    assert [m["epoch"] for m in more] == [2, 3, 4, 5]
    assert [m["lr"] for m in more] == pytest.approx([m["lr"] for m in whole[2:]])
    assert whole[-1]["lr"] < whole[2]["lr"]
    # Its best is one of its own, not the other folder's, so the checkpoint that holds it is there.
    best = read_checkpoint(run / "more/best.pth")
    assert best["max_accuracy"] == max(m["model"]["top1"] for m in more)


def test_names_that_look_like_numbers_are_names(tmp_path, few_digits, run_main):
    run_main("--data-path", few_digits, "--output", tmp_path, "--tag", "2024", "--opts", *QUICK, "TRAIN.EPOCHS", "1")
    assert (tmp_path / "spatialmamba_micro/2024/best.pth").exists()


def test_finetune_starts_from_the_weights_with_a_new_head(few_digits, tmp_path, run_main):
    """From ten classes to two; the learning rate is nothing, so all but the head must come out as it went in."""
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *QUICK)
    weights = tmp_path / "spatialmamba_micro/default/latest.pth"
    two = tmp_path / "two"
    for split in ("train", "val"):
        (two / split).mkdir(parents=True)
        for label in "01":
            (two / split / label).symlink_to(few_digits / split / label)
    frozen = ["TRAIN.BASE_LR", "0.0", "TRAIN.WARMUP_LR", "0.0", "TRAIN.MIN_LR", "0.0", "DATA.BATCH_SIZE", "4"]
    arguments = ["--data-path", two, "--output", tmp_path, "--tag", "tuned", "--pretrained", weights, "--finetune"]
    printed = run_main(*arguments, "--opts", *QUICK, *frozen)
    assert "a new one has 2 classes" in printed
    assert "latest.pth: training starts from its model, not from its model_ema" in printed
    before, after = (read_checkpoint(p)["model"] for p in (weights, weights.parents[1] / "tuned/latest.pth"))
    assert after["head.weight"].shape == (2, 128)
    for key, value in before.items():
        if not key.startswith("head") and "running" not in key and "num_batches" not in key:
            assert torch.equal(value, after[key]), key


def test_eval_flag_evaluates_a_run_to_resume(few_digits, tmp_path, run_main):
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*arguments, "--opts", *QUICK)
    run = tmp_path / "spatialmamba_micro/default"
    lines = len(metrics_of(run))
    run_main(*arguments, "--eval", "--resume", run / "latest.pth")
    assert evaluation_of(run)["model"]["top1"] == metrics_of(run)[-1]["model"]["top1"]
    assert len(metrics_of(run)) == lines


def test_throughput_needs_no_data(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(main_module, "THROUGHPUT_SECONDS", 0.1)
    printed = run_main("--throughput", "--batch-size", 2, "--output", tmp_path)
    assert not list(tmp_path.iterdir())
    assert "images/s per process, batch 2, 32x32, NCHW images, compile off, TF32 does not apply (1 process" in printed
    printed = run_main("--throughput", "--batch-size", 2, "--output", tmp_path, "--channels-last")
    assert "32x32, NHWC images, compile off" in printed


def test_flops_prints_the_table(run_main, capsys):
    printed = run_main("--flops")
    assert "self_attention" in printed
    assert "| model" in printed


def test_mesa_starts_at_its_fraction_of_the_epochs(few_digits, tmp_path, run_main, monkeypatch):
    """And labels are smoothed as the config says where no mixup does it."""
    weights = []
    original = training_module.train_one_epoch

    def spy(trainer, *args):
        weights.append(trainer.mesa_weight)
        assert trainer.criterion.smoothing == 0.3
        return original(trainer, *args)

    monkeypatch.setattr(training_module, "train_one_epoch", spy)
    opts = [*QUICK, "TRAIN.EPOCHS", "4", "TRAIN.MESA.WEIGHT", "1.5", "MODEL.LABEL_SMOOTHING", "0.3", "AUG.MIXUP", "0"]
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *opts)
    assert weights == [0.0, 1.5, 1.5, 1.5]
