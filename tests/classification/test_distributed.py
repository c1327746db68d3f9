"""What two gloo processes must agree on."""

import sys

import torch
from running import MICRO, run_command

SCRIPT = """
import sys
import torch, torch.distributed as dist
from timm.utils import distribute_bn
from classification.config import load_config
from classification.main import Run, _wrap
from classification.models import spatialmamba_micro

config = load_config(sys.argv[1], {})
run = Run(config)
torch.manual_seed(0)
model = spatialmamba_micro(num_classes=4)
wrapped = _wrap(config, run, model).train()
for step in range(3):
    wrapped(torch.full((2, 3, 64, 64), float(run.rank)) + torch.randn(2, 3, 64, 64)).sum().backward()
bn = model.patch_embed.conv1.norm
own = [torch.zeros_like(bn.running_mean) for _ in range(2)]
dist.all_gather(own, bn.running_mean)
distribute_bn(model, run.world_size, reduce=True)
if run.is_main:
    torch.save({"own": own, "mean": bn.running_mean}, sys.argv[2])
del wrapped  # while it lives so do gloo's threads, and one of them in Python when that ends is an abort
dist.destroy_process_group()
"""


def test_batch_norm_averages_the_statistics_of_all_processes(tmp_path):
    """The processes see images of mean 0 and 1; without synchronised batch norm their statistics must differ first."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_command(*launcher, tmp_path / "script.py", MICRO, tmp_path / "bn.pt")
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "bn.pt", weights_only=True)
    first, second = result["own"]
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(result["mean"], (first + second) / 2)
