"""What exported programs of Spatial-Mamba-T differ from the model by, a line a shape of images:

    python tests/export_shapes.py

One program of torch.export for all shapes, traced strictly and not, in a process that cannot import this repository's
packages; and one ONNX file in onnxruntime. tests/classification/test_export.py does the same for a small model.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from classification.export import export, write
from classification.models import VARIANTS, SpatialMamba

SHAPES = [
    *((1, 33, 33), (64, 33, 35), (3, 40, 95), (2, 129, 64), (5, 97, 101), (2, 224, 224), (1, 225, 223), (1, 640, 333)),
    *((1, 1024, 1024), (1, 800, 1333)),
]
OF_ONNX = [SHAPES[i] for i in (0, 2, 5, 7, 9)]
ELSEWHERE = """
import sys
for name in ("classification", "dwconv2d", "selective_scan", "timm"):
    sys.modules[name] = None
import torch
run = torch.export.load(sys.argv[1]).module()
with torch.inference_mode():  # its activations for gradients would take tens of GiB at 1024x1024
    results = [run(images) for images in torch.load(sys.argv[2], weights_only=True)]
torch.save(results, sys.argv[3])
"""


def run_elsewhere(program: Path, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results of a .pt2 file in a process where none of our packages can be imported."""
    given, results = program.with_name("images.pt"), program.with_name("results.pt")
    torch.save(images, given)
    subprocess.run([sys.executable, "-c", ELSEWHERE, program, given, results], check=True, capture_output=True)
    return torch.load(results, weights_only=True)


def of_largest(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{((found - expected).abs().max() / expected.abs().max()).item():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VARIANTS, default="spatialmamba_tiny")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = SpatialMamba(**VARIANTS[args.model]).eval()
    images = [torch.randn(batch, 3, height, width) for batch, height, width in SHAPES]
    with torch.inference_mode():
        expected = [model(one) for one in images]
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        for strict in (True, False):
            program, target = export(model, 64, ("batch", "size"), strict), Path(folder, f"{strict}.pt2")
            write(program, target)
            found = run_elsewhere(target, images)
            columns["strict" if strict else "not strict"] = [
                of_largest(*pair) for pair in zip(found, expected, strict=True)
            ]
        run = write(program, Path(folder, "model.onnx"))
        columns["ONNX"] = [
            of_largest(run(one), result) if shape in OF_ONNX else ""
            for shape, one, result in zip(SHAPES, images, expected, strict=True)
        ]
    print(f"| images | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for shape, *row in zip(SHAPES, *columns.values(), strict=True):
        print(f"| {shape[0]} of {shape[1]}x{shape[2]} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
