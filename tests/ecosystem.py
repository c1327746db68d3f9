"""What tools of the ecosystem make of the model, a line each, for the table in docs/deploy.md:

    pip install accelerate peft torchao captum grad-cam thop ptflops torchinfo
    python tests/ecosystem.py

Not part of the tests: none of these packages is needed for anything else.
"""

import warnings
from collections.abc import Callable

import ptflops
import thop
import torch
import torchinfo
from accelerate import Accelerator, debug_launcher
from captum.attr import IntegratedGradients
from peft import LoraConfig, get_peft_model
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from classification.flops import count_flops
from classification.models import SpatialMamba, spatialmamba_micro, spatialmamba_tiny

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
ONE = (1, 3, 224, 224)
LORA = r".*(in_proj|out_proj|fc1|fc2|conv2d|cpe1|cpe2|\d\.conv)"  # linear, depthwise and 1x1 layers


def micro() -> SpatialMamba:
    torch.manual_seed(0)
    return spatialmamba_micro(num_classes=10).eval()


def difference(model: Callable[[Tensor], Tensor]) -> str:
    expected = micro()(IMAGES)
    return (
        f"logits differ by {((model(IMAGES) - expected).abs().max() / expected.abs().max()).item():.1e} of the largest"
    )


def lora() -> str:
    model = micro()
    # PEFT wants a rank for each group of a depthwise layer, and merges no such layers.
    ranks = {name: m.groups for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    model = get_peft_model(model, LoraConfig(target_modules=LORA, r=2, rank_pattern=ranks)).train()
    model(IMAGES).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return f"{sum('lora_A' in name for name in trained)} layers train"


def dynamic() -> str:
    model = torch.ao.quantization.quantize_dynamic(micro(), {nn.Linear}, dtype=torch.qint8)
    left = sum(type(m) is nn.Linear for m in model.modules())
    return f"{left} linear layers are left; {difference(model)}"


def int8() -> str:
    model = micro()
    quantize_(model, Int8WeightOnlyConfig())
    return difference(model)


def grad_cam() -> str:
    model = micro()
    cam = GradCAM(model, [model.layers[-1].blocks[-1]], reshape_transform=lambda tokens: tokens.permute(0, 3, 1, 2))
    return f"maps {cam(IMAGES, None).shape}"


def integrated_gradients() -> str:
    return f"attributions {tuple(IntegratedGradients(micro()).attribute(IMAGES, target=3, n_steps=8).shape)}"


def train_one_step() -> None:
    accelerator = Accelerator(cpu=True)
    model = micro().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    loss = model(IMAGES[accelerator.process_index :][:1]).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    sums = accelerator.gather(sum(p.detach().double().sum() for p in model.parameters()))
    assert accelerator.num_processes == 2
    assert (sums == sums[0]).all()


def accelerated() -> str:
    debug_launcher(train_one_step, num_processes=2)
    return "a step in two processes leaves both with the same weights"


def flop_counter() -> str:
    model = spatialmamba_tiny().eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(ONE))
    return f"{counter.get_total_flops() / 2e9:.3f} G multiply-adds"


def of_fvcore() -> str:
    return f"{count_flops(spatialmamba_tiny().eval()).total() / 1e9:.3f} G"


def of_thop() -> str:
    macs, parameters = thop.profile(spatialmamba_tiny(), (torch.zeros(ONE),), verbose=False)
    return f"{macs / 1e9:.3f} G, {parameters / 1e6:.2f} M parameters"


def of_ptflops() -> str:
    macs, parameters = ptflops.get_model_complexity_info(
        spatialmamba_tiny(), ONE[1:], as_strings=False, print_per_layer_stat=False
    )
    return f"{macs / 1e9:.3f} G, {parameters / 1e6:.2f} M parameters"


def of_torchinfo() -> str:
    found = torchinfo.summary(spatialmamba_tiny(), ONE, verbose=0)
    return f"{found.total_mult_adds / 1e9:.3f} G, {found.total_params / 1e6:.2f} M parameters"


TOOLS = {
    "accelerate, two processes": accelerated,
    "PEFT, LoRA": lora,
    "quantize_dynamic": dynamic,
    "torchao, int8 weights": int8,
    "pytorch-grad-cam": grad_cam,
    "captum, integrated gradients": integrated_gradients,
    "FlopCounterMode": flop_counter,
    "fvcore with our handles": of_fvcore,
    "thop": of_thop,
    "ptflops": of_ptflops,
    "torchinfo": of_torchinfo,
}


def main() -> None:
    warnings.simplefilter("ignore")
    print("| tool | what it gives |\n|---|---|")
    for name, run in TOOLS.items():
        print(f"| {name} | {run()} |", flush=True)


if __name__ == "__main__":
    main()
