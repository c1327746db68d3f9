"""main.py as its users run it, on real images."""

import json
import socket

import pytest
import torch
from running import MICRO, QUICK, run_command

from classification import main as main_module
from classification.checkpoint import read_checkpoint


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluation_of(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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


@pytest.mark.parametrize("launcher", ["torchrun", "distributed.launch"])
def test_two_processes_train_and_evaluate(launcher, few_digits, tmp_path, run_main):
    """33 images over two processes in batches of 8: unequal shares, a last batch of one; each counts once."""
    main = [*launchers(2)[launcher], "main.py", "--cfg", MICRO, "--data-path", few_digits, "--output", tmp_path]
    trained = run_command(*main, "--opts", *QUICK)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "spatialmamba_micro" / "default"
    assert trained.stdout.count("epoch 1: train loss") == 1  # only the first process speaks
    last = metrics_of(run)[-1]

    evaluated = run_command(*main, "--pretrained", run / "latest.pth", "--batch-size", 8)
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
    """Without random augmentation nothing but what `_save` keeps is carried from epoch to epoch."""
    still = ["AUG.MIXUP", "0.0", "AUG.SCALE", "[1.0, 1.0]", "AUG.RATIO", "[1.0, 1.0]"]
    arguments = ["--data-path", few_digits, "--opts", *QUICK, *still, "TRAIN.EPOCHS", "3", "OUTPUT"]
    run_main(*arguments, tmp_path / "whole")

    calls = []
    original = main_module.train_one_epoch

    def stops_in_the_third_epoch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(main_module, "train_one_epoch", stops_in_the_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            run_main(*arguments, tmp_path / "halves")
    assert "resuming from" in run_main(*arguments, tmp_path / "halves")

    name = "spatialmamba_micro/default/latest.pth"
    whole, halves = read_checkpoint(tmp_path / "whole" / name), read_checkpoint(tmp_path / "halves" / name)
    for key in ("model", "model_ema"):
        assert all(torch.equal(v, halves[key][k]) for k, v in whole[key].items())
    assert whole["max_accuracy"] == halves["max_accuracy"]
    assert "all 3 epochs are done" in run_main(*arguments, tmp_path / "halves")


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
    assert "images/s per process, batch 2, 32x32 (1 process(es), CPU" in printed


def test_flops_prints_the_table(run_main, capsys):
    printed = run_main("--flops")
    assert "self_attention" in printed
    assert "| model" in printed


def test_mesa_starts_at_its_fraction_of_the_epochs(few_digits, tmp_path, run_main, monkeypatch):
    weights = []
    original = main_module.train_one_epoch

    def spy(trainer, *args):
        weights.append(trainer.mesa_weight)
        return original(trainer, *args)

    monkeypatch.setattr(main_module, "train_one_epoch", spy)
    opts = [*QUICK, "TRAIN.EPOCHS", "4", "TRAIN.MESA.WEIGHT", "1.5"]
    run_main("--data-path", few_digits, "--output", tmp_path, "--opts", *opts)
    assert weights == [0.0, 1.5, 1.5, 1.5]
