"""The benchmark of models: what it refuses. tests/test_readme.py runs it."""

import re
import sys

import pytest
import torch

from classification import benchmark


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(([flag, number], f"argument {flag}: '{number}' is not a whole number above 0")
          for flag in ("--batch", "--size", "--sizes", "--steps", "--rounds", "--threads", "--rows")
          for number in ("0", "-1", "x")),
        (["--runtime", "onnxruntime", "--device", "cpu", "--dtype", "bfloat16"], "--runtime takes no --dtype, --cast"),
        (["--runtime", "onnxruntime", "--device", "cpu", "--compile"], "--runtime takes no --dtype, --cast, --compile"),
        (["--runtime", "onnxruntime", "--device", "cpu", "--channels-last"], "--runtime takes no --dtype"),
        (["--sizes", "64", "--size", "32"], "--size and --sizes exclude each other"),
        (["--beside", "nosuch"], "nosuch: is neither one of ours (spatialmamba_micro, "),
        (["--model", "nosuch"], "nosuch: is neither one of ours (spatialmamba_micro, "),
        (["--cast"], "--cast goes with --dtype"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no GPU here"),
    ],
)  # fmt: skip
def test_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    with pytest.raises(SystemExit):
        benchmark.parse_arguments()
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_runtime(monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    options = ["--model", "spatialmamba_micro", "--beside", "--size", "48", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--runtime", "onnxruntime", *options])
    benchmark.main()
    assert re.search(r"by onnxruntime\n\n.*\n.*\n\| spatialmamba_micro \| [\d.]+ \|", capsys.readouterr().out)
