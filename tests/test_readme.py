"""The commands of the README and of docs/, run as they stand but for paths, and with less where a cluster is meant.

Every `bash` and `python` block is either run here or named as run elsewhere; a block that is neither fails.
"""

import importlib.metadata
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from running import ROOT, free_port, run_command
from scenes import write_coco, write_few_scenes

import classification
from classification import main as main_module
from classification.data.digits import write_digits
from classification.models import spatialmamba_micro, spatialmamba_tiny

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) for language in ("bash", "python")}
INSTALL = "pip install -r"  # as `make install` has it, before this run
MAKE_TEST = "make test\n"  # this very run
MAKE_DEMO = "make demo\n"  # test_demo
MAKE_DEMO_DETECTION = "make demo-detection\n"  # test_demo_detection
MAKE_OPENMMLAB = "make install-openmmlab\n"  # before this run, by `make test`
MAKE_DEMO_SEGMENTATION = "make demo-segmentation\n"  # test_demo_segmentation
MAKE = (MAKE_TEST, MAKE_DEMO, MAKE_DEMO_DETECTION, MAKE_DEMO_SEGMENTATION, MAKE_OPENMMLAB)
CD_DETECTION, CD_SEGMENTATION = "cd detection\n", "cd segmentation\n"
TO_MMPRETRAIN, EXPORT, EXPLAIN = "--to mmpretrain", "classification.export", "classification.explain"
DETECTION_CONFIGS = ROOT / "detection/configs/spatialmamba"
# What each block of Python holds, and no other.
EXAMPLE, BACKBONE, ONNX = "import timm", "import classification.models.openmmlab", "onnxruntime"
EXPLAINED = "mixing_matrix"
MINE, DETECTOR, SEGMENTER, CLASSIFIER = "_base_", "mmdet.apis", "mmseg.apis", "import ImageClassificationInferencer"
SLURM = "slurm_train.sh"  # tests/classification/test_distributed.py
GPU = ("bfloat16 --batch", "AMP bfloat16", "dtypes bfloat16")  # kernels/gpu_check.sh, on a GPU
TIMM_TESTS = "pip download"  # by hand: they are timm's, which it downloads
TIMM_TRAIN = "runpy"  # test_scripts_of_timm
SERVE = "--serve"  # tests/classification/test_explain_page.py
TWO_NODES = "--nnodes=2"
NOT_HERE = (INSTALL, SLURM, *GPU, TIMM_TESTS, TIMM_TRAIN, SERVE, TWO_NODES)
LESS = "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DATA.IMG_SIZE 32 TRAIN.MESA.START 0.0"


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """A folder with `imagenet/`, of 16 training and 10 validation images in ten classes."""
    root = tmp_path_factory.mktemp("readme")
    write_digits(root / "digits")
    for split, extra in (("train", 6), ("val", 0)):
        for label in range(10):
            target = root / "imagenet" / split / str(label)
            target.mkdir(parents=True)
            for file in sorted((root / "digits" / split / str(label)).iterdir())[: 2 if label < extra else 1]:
                shutil.copy(file, target)
    return root


def python_block(mark: str) -> str:
    (block,) = (block for block in BLOCKS["python"] if mark in block)
    return block


def reduced(command: str, folder: Path) -> str:
    """Our paths, two processes, batches of eight, and one epoch on small images."""
    command = command.replace("/path/to/checkpoint.pth", f"{folder}/output/spatialmamba_tiny/default/best.pth")
    command = command.replace("/path/to/", f"{folder}/").replace("--nproc_per_node=8", "--nproc_per_node=2")
    command = command.replace("--batch-size 128", "--batch-size 8")
    if "torch.distributed.launch" in command:  # elsewhere, so that it trains too, and does not find its epochs done
        command = command.replace(f"{folder}/output", f"{folder}/output-of-launch")
    if "classification.benchmark" in command:
        command = re.sub(r"--sizes [\d ]+", "--sizes 32 48 ", command)
        command += "" if "--sizes" in command else " --size 32"
        return f"{command} --batch 2 --rounds 1 --model spatialmamba_micro --beside convnext_atto"
    if "main.py" in command and "--flops" not in command:
        command += f" {LESS}" if "--opts" in command else f" --opts {LESS}"
    return command


def test_commands_are_understood(monkeypatch):
    """Each command's flags, config and options; what it then does, the tests below see."""
    pytest.importorskip("mmdet", reason="make install-openmmlab")
    pytest.importorskip("mmseg", reason="make install-openmmlab")
    from classification.openmmlab import tools

    understood = []
    for name in ("_train", "_test", "_get_flops"):
        monkeypatch.setattr(tools, name, lambda args, cfg: understood.append(cfg.model.type))
    monkeypatch.setattr(main_module, "_main", lambda args: understood.append(main_module.config_from(args).MODEL.NAME))
    kinds = {"detection": "mmdet", "segmentation": "mmseg"}
    scripts = {"train.py": tools.train, "dist_train.sh": tools.train, "slurm_train.sh": tools.train}
    scripts |= {"test.py": tools.test, "dist_test.sh": tools.test, "get_flops.py": tools.get_flops}
    commands = 0
    for block in BLOCKS["bash"]:
        first, *lines = block.splitlines()
        folder = first.removeprefix("cd ") if first.startswith("cd ") else "."
        monkeypatch.chdir(ROOT / folder)
        for line in lines if folder in ("classification", *kinds) else ():
            words = shlex.split(line)
            at = next(i for i, word in enumerate(words) if Path(word).name in {*scripts, "main.py", "slurm_train.sh"})
            name, arguments = Path(words[at]).name, words[at + 1 :]
            if "slurm" in name:  # PARTITION JOB_NAME CONFIG FOLDER
                flag = "--work-dir" if folder in kinds else "--data-path"
                config = [arguments[2]] if folder in kinds else ["--cfg", arguments[2]]
                arguments = [*config, flag, *arguments[3:]]
            elif "dist" in name:  # CONFIG [CHECKPOINT] GPUS
                del arguments[1 + ("test" in name)]
            if "configs/spatialmamba/mine.py" in arguments:
                arguments[0] = "configs/spatialmamba/mask_rcnn_spatialmamba_fpn_coco_tiny.py"
            monkeypatch.setattr("sys.argv", [name, *arguments])
            if folder not in kinds:
                main_module.main()
            elif name == "get_flops.py":
                scripts[name](kinds[folder], (1280, 800))
            else:
                scripts[name](kinds[folder])
            commands += 1
    assert len(understood) == commands == 17
    assert set(understood) == {"spatialmamba_tiny", "MaskRCNN", "EncoderDecoder"}


@pytest.mark.parametrize("pages", ["README", pytest.param("README and docs", marks=pytest.mark.long)])
def test_commands_for_imagenet(folder, pages):
    """In the README's order, then docs': what is trained first is evaluated and fine-tuned after."""
    blocks = [block for block in BLOCKS["bash"] if block not in MAKE]
    named = [block for block in blocks if any(mark in block for mark in NOT_HERE)]
    others = (CD_DETECTION, CD_SEGMENTATION, TO_MMPRETRAIN, EXPORT, EXPLAIN)
    elsewhere = [block for block in blocks if any(mark in block for mark in others) and block not in named]
    blocks = [block for block in blocks if block not in named + elsewhere]
    assert (len(blocks), len(elsewhere), len(named)) == (11, 12, 11)
    for block in blocks:
        if pages == "README" and block not in PAGES[0].read_text():
            continue
        script = "\n".join(reduced(line, folder) for line in block.splitlines())
        done = run_command("bash", "-euc", script, cwd=ROOT)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    runs = folder / "output" / "spatialmamba_tiny"
    evaluation = json.loads((runs / "default/evaluation.json").read_text())
    assert evaluation["model"]["images"] == 10
    if pages != "README":
        assert "starting from the weights of" in (runs / "finetune/log.txt").read_text()
        assert (runs / "default/predictions.png").exists()
        assert (folder / "weights.safetensors").exists()
        assert (folder / "output-of-launch/spatialmamba_tiny/default/best.pth").exists()


@pytest.mark.long
def test_commands_for_coco(tmp_path):
    """An epoch of a few small scenes: what is trained first is tested after, and fine-tuned."""
    datasets = pytest.importorskip("mmdet.datasets", reason="make install-openmmlab")
    write_coco(tmp_path / "coco", datasets.CocoDataset.METAINFO["classes"])
    write_coco(tmp_path / "mine", ("cat", "dog"))
    torch.save({"model": spatialmamba_tiny().state_dict()}, tmp_path / "checkpoint.pth")
    mine = python_block(MINE).replace("/path/to/", f"{tmp_path}/").replace('"./', f'"{DETECTION_CONFIGS}/')
    (tmp_path / "mine.py").write_text(mine)
    for block in (block for block in BLOCKS["bash"] if block.startswith(CD_DETECTION) and SLURM not in block):
        script = block.replace("/path/to/", f"{tmp_path}/").replace(".py 8 ", ".py 2 ").strip()
        script = script.replace("configs/spatialmamba/mine.py", f"{tmp_path}/mine.py")
        if "dist_train" in block:
            script += " train_cfg.max_epochs=1 train_dataloader.batch_size=1"
            script += ' train_dataloader.dataset.pipeline.2.scale="(128,128)"'
            script += ' val_dataloader.dataset.pipeline.1.scale="(128,128)"'
        elif "dist_test" in block:
            script += ' test_dataloader.dataset.pipeline.1.scale="(128,128)"'
        done = run_command("bash", "-euc", script, cwd=ROOT, PORT=str(free_port()))
        assert done.returncode == 0, f"{script}\n{done.stderr[-4000:]}"
        if "pretrained" in block:
            shutil.copy(tmp_path / "output/mask_rcnn/epoch_1.pth", tmp_path / "detector.pth")
            assert "'model' in" in done.stdout
    assert (tmp_path / "output/mine/epoch_1.pth").exists()


@pytest.mark.long
def test_commands_for_ade20k(tmp_path):
    """Two iterations on a few small scenes, which are then tested."""
    pytest.importorskip("mmseg", reason="make install-openmmlab")
    write_few_scenes(tmp_path / "ade", train=4, val=1, layout="ade20k")
    for path in (tmp_path / "ade/images").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    torch.save({"model": spatialmamba_tiny().state_dict()}, tmp_path / "checkpoint.pth")
    tested = ""
    for block in (block for block in BLOCKS["bash"] if block.startswith(CD_SEGMENTATION)):
        script = block.replace("/path/to/", f"{tmp_path}/").replace(".py 8 ", ".py 2 ").strip()
        if "dist_train" in block:
            script += " train_cfg.max_iters=2 train_cfg.val_interval=2 default_hooks.checkpoint.interval=2"
            script += " model.data_preprocessor.size=None model.data_preprocessor.size_divisor=32"
            script += ' train_dataloader.dataset.pipeline.4.crop_size="(96,96)"'
            script += ' val_dataloader.dataset.pipeline.1.scale="(128,128)"'
        small = 'test_dataloader.dataset.pipeline.1.scale="(128,128)"'
        small += "".join(f' tta_pipeline.1.transforms.0.{i}.scale="({128 + 32 * i},128)"' for i in range(3))
        script = re.sub(r"(dist_test.*)", rf"\1 {small}", script)
        done = run_command("bash", "-euc", script, cwd=ROOT, PORT=str(free_port()))
        assert done.returncode == 0, f"{script}\n{done.stderr[-4000:]}"
        if "pretrained" in block:
            shutil.copy(tmp_path / "output/upernet/iter_2.pth", tmp_path / "segmenter.pth")
            assert "'model' in" in done.stdout
        if "dist_test" in block:
            tested += done.stdout
    assert tested.count("mIoU: ") == 2


def test_scripts_of_timm(tmp_path):
    """A script in place of timm's `train.py`, which no package has: it knows the model, and gets the arguments."""
    (block,) = (block for block in BLOCKS["bash"] if TIMM_TRAIN in block)
    script = "import sys, timm; print(timm.is_model(sys.argv[sys.argv.index('--model') + 1]))"
    (tmp_path / "train.py").write_text(script)
    done = run_command("bash", "-euc", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_commands_for_mmpretrain(tmp_path):
    pytest.importorskip("mmpretrain", reason="make install-openmmlab")
    torch.save({"model": spatialmamba_tiny().state_dict()}, tmp_path / "checkpoint.pth")
    Image.new("RGB", (300, 260), (10, 200, 90)).save(tmp_path / "image.png")
    (block,) = (block for block in BLOCKS["bash"] if TO_MMPRETRAIN in block)
    done = run_command("bash", "-euc", block.replace("/path/to/", f"{tmp_path}/"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    block = python_block(CLASSIFIER).replace("/path/to/", f"{tmp_path}/")
    done = run_command("python", "-c", block, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    label = re.search(r"\d+$", done.stdout.rstrip())  # behind mmpretrain's progress, which does not always end its line
    assert 0 <= int(label.group()) < 1000


@pytest.mark.long
def test_commands_for_export(tmp_path):
    """A program, and an ONNX file that is then run: of the smallest model, for small images of one size."""

    def small(block: str) -> str:
        return block.replace("224", "64").replace("batch size", "batch").replace("/path/to/", f"{tmp_path}/")

    pytest.importorskip("onnxruntime")
    torch.save({"model": spatialmamba_micro().state_dict()}, tmp_path / "checkpoint.pth")
    for block in (block for block in BLOCKS["bash"] if EXPORT in block):
        done = run_command("bash", "-euc", small(block), cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.pt2").exists()
    scope = {}
    exec(compile(small(python_block(ONNX)), "README.md", "exec"), scope)
    assert scope["logits"].shape == (1, 1000)


@pytest.mark.long
def test_commands_for_explain(tmp_path):
    """Of the smallest model."""
    torch.save({"model": spatialmamba_micro().state_dict()}, tmp_path / "checkpoint.pth")
    Image.effect_noise((300, 260), 60).save(tmp_path / "image.png")
    for block in (block for block in BLOCKS["bash"] if EXPLAIN in block and SERVE not in block):
        script = block.replace("/path/to/", f"{tmp_path}/").replace("spatialmamba_tiny", "spatialmamba_micro")
        done = run_command("bash", "-euc", script, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"figures/{name}.png").exists() for name in ("states", "erf", "matrix"))


def test_python_example_of_explain():
    scope = {}
    exec(compile(python_block(EXPLAINED), "README.md", "exec"), scope)
    assert scope["h"].shape == scope["fused"].shape == (1, 128, 1, 24, 40)
    assert scope["matrix"].shape == (1, 2, 240, 240)
    assert scope["row"].shape == (1, 128, 24, 40)
    assert scope["scores"].shape == (96, 160)
    assert 0 < scope["share"] < 0.5


def test_python_example():
    assert len(BLOCKS["python"]) == 8  # of which python_block finds each by its mark
    scope = {}
    exec(compile(python_block(EXAMPLE), "README.md", "exec"), scope)
    assert scope["logits"].shape == (1, 1000)
    assert [m.shape[1:] for m in scope["maps"]] == [(64, 50, 81), (128, 25, 41), (256, 13, 21), (512, 7, 11)]
    assert scope["c5"].shape == (1, 512, 7, 11)


def test_python_example_of_openmmlab():
    pytest.importorskip("mmengine", reason="make install-openmmlab")
    scope = {}
    exec(compile(python_block(BACKBONE), "README.md", "exec"), scope)
    assert [m.shape[1] for m in scope["backbone"](torch.randn(1, 3, 64, 64))] == [64, 128, 256, 512]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_between_pages():
    """Every relative link leads to a file, every anchor to a heading; the README links every page of docs/."""
    pages = [*PAGES, *ROOT.glob("kernels/*/README.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    found = set()
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in (link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(slug, headings), f"{page}: {link}"
            found.add((page, target))
    assert all((ROOT / "README.md", page) in found for page in PAGES[1:])


def test_installation_is_the_makefiles():
    (block,) = (block for block in BLOCKS["bash"] if INSTALL in block)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"$(BIN)/python -m {line}\n" in makefile for line in block.splitlines())


@pytest.mark.parametrize("package", ["selective_scan", "dwconv2d"])
def test_operators_equal_the_plain_pytorch_of_their_readme(package, capsys):
    text = (ROOT / "kernels" / package / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(compile(block, f"{package}/README.md", "exec"), {})
    differences = [float(d) for d in re.findall(r"tensor\((.*?)\)", capsys.readouterr().out)]
    assert len(differences) == sum(block.count(".max()") for block in blocks) >= len(blocks) > 0
    assert max(differences) < 1e-4


def whole_or(options: str, marks: Sequence[pytest.MarkDecorator] = ()) -> pytest.MarkDecorator:
    """The demo as it is, a long test, or less of it by `options`."""
    whole = pytest.param("", id="whole", marks=pytest.mark.long)
    return pytest.mark.parametrize("options", [pytest.param(options, id="less", marks=marks), whole])


@whole_or("TRAIN.EPOCHS 4 TRAIN.WARMUP_EPOCHS 1 TRAIN.BASE_LR 3e-2 AUG.MIXUP 0.0 AUG.SCALE [0.8,1.0]")
def test_demo(options, tmp_path):
    """`make demo` from the data on; but for `options`, only where it writes is changed."""
    assert MAKE_DEMO in BLOCKS["bash"]
    arguments = [f"DIGITS={tmp_path / 'digits'}", f"OUTPUT={tmp_path / 'output'}", f"DEMO_OPTIONS={options}"]
    done = run_command("make", "demo", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "output/spatialmamba_micro/digits"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = json.loads((run / "evaluation.json").read_text())["model"]
    assert again["images"] == 360
    assert again["top1"] >= 97
    assert again in [m["model"] for m in metrics]
    assert done.stdout.count(f"  {again['top1']:.3f} %") == 2
    assert (run / "learning_curve.png").exists()
    assert (run / "predictions.png").exists()
    assert all((run / f"{name}.{kind}").exists() for name in ("states", "erf", "matrix") for kind in ("png", "npz"))


FEW = "dataloader.dataset.indices=4"  # images of the validation split


def few_compared(split: str) -> str:
    """Those alone: the annotation file's objects of the other images would count as missed."""
    keys = "[img_id,img_path,ori_shape,img_shape,scale_factor,instances]"
    loaded = f"{split}_dataloader.dataset.pipeline.3.meta_keys={keys}"
    return f"{split}_{FEW} {split}_evaluator.ann_file=None {loaded}"


# detection/tools run in tests/detection/test_tools.py each time, and segmentation's in tests/segmentation.
@whole_or(
    f"train_cfg.max_epochs=1 param_scheduler.1.end=1 train_dataloader.dataset.indices=32 {few_compared('val')}",
    [pytest.mark.long],
)
def test_demo_detection(options, tmp_path):
    """`make demo-detection`, and what it has trained by mmdet's own interface in another folder."""
    pytest.importorskip("mmdet", reason="make install-openmmlab")
    assert MAKE_DEMO_DETECTION in BLOCKS["bash"]
    scenes, output = tmp_path / "data/digits_scenes", tmp_path / "output"
    arguments = [f"SCENES={scenes}", f"OUTPUT={output}", f"DEMO_OPTIONS={options}"]
    arguments += [f"DEMO_TEST_OPTIONS={few_compared('test')}"] if options else []
    done = run_command("make", "demo-detection", *arguments, cwd=ROOT, PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in re.findall(r"coco/(\w+_mAP_50): ([\d.]+)", done.stdout)}
    assert found.keys() == {"bbox_mAP_50", "segm_mAP_50"}
    assert options or min(found.values()) >= 0.5
    run = output / "mask_rcnn_spatialmamba_micro_digits"
    assert len(list((run / "predictions").glob("*.png"))) == (4 if options else 96)

    block = python_block(DETECTOR).replace('"detection/configs', f'"{ROOT}/detection/configs')
    assert "/epoch_12.pth" in block
    block = block.replace("epoch_12.pth", Path((run / "last_checkpoint").read_text()).name)
    done = run_command("python", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tensor\(\[\d.*torch\.Size\(\[\d+, 128, 128\]\)", done.stdout, re.DOTALL)


@whole_or(
    "train_cfg.max_iters=6 train_cfg.val_interval=6 default_hooks.checkpoint.interval=6 param_scheduler.0.end=2 "
    f"param_scheduler.1.begin=2 param_scheduler.1.end=6 val_{FEW}",
    [pytest.mark.long],
)
def test_demo_segmentation(options, tmp_path):
    """`make demo-segmentation`, and what it has trained by mmseg's own interface in another folder."""
    pytest.importorskip("mmseg", reason="make install-openmmlab")
    assert MAKE_DEMO_SEGMENTATION in BLOCKS["bash"]
    arguments = [f"SCENES_ADE20K={tmp_path / 'data/digits_scenes_ade20k'}", f"OUTPUT={tmp_path / 'output'}"]
    arguments += [f"DEMO_OPTIONS={options}"]
    arguments += [f"DEMO_TEST_OPTIONS=test_{FEW}"] if options else []
    done = run_command("make", "demo-segmentation", *arguments, cwd=ROOT, PORT=str(free_port()))
    assert done.returncode == 0, done.stderr[-4000:]
    images = 4 if options else 96
    tests = re.findall(rf"Iter\(test\) *\[{images}/{images}\].*mIoU: ([\d.]+)", done.stdout)
    single, multiple = map(float, tests)
    assert options or min(single, multiple) >= 60
    assert len(list((tmp_path / "output/upernet_spatialmamba_micro_digits/predictions").rglob("*.png"))) == images

    block = python_block(SEGMENTER).replace('"segmentation/configs', f'"{ROOT}/segmentation/configs')
    assert "/iter_600.pth" in block
    if options:
        block = block.replace("iter_600.pth", "iter_6.pth")
    done = run_command("python", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "torch.Size([1, 128, 128])" in done.stdout


@pytest.mark.parametrize("name", ["classification", "selective_scan", "dwconv2d"])
def test_versions_are_the_same_everywhere(name):
    written = importlib.import_module(name).__version__
    assert importlib.metadata.version("spatial-mamba" if name == "classification" else name) == written
    assert written == classification.__version__
    assert f"\n## {written}" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_is_the_script_and_nothing_else():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "2410.15091" in citation["preferred-citation"]["url"]


def test_ruff_is_the_same_everywhere():
    pinned = re.search(r"ruff==[\d.]+", (ROOT / "requirements.txt").read_text()).group()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert hooks.count(pinned) == hooks.count("ruff==") == 2
