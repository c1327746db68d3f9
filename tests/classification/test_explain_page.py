"""What the page shows of an image, by function call; and the page as a user starts it, over HTTP and in a browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from running import ROOT

from classification import explain
from classification.checkpoint import save_checkpoint
from classification.data.images import read_image
from classification.errors import UserError
from classification.explain import image_transform, load
from classification.explain import page as page_module
from classification.explain.page import Viewer, serve
from classification.models import spatialmamba_micro

LAST = (0, 0, 1, 0)  # blocks of the four stages
NAMES = [f"digit {i}" for i in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = spatialmamba_micro(num_classes=10)
    torch.nn.init.normal_(model.get_classifier().weight)  # so that classes differ
    path = tmp_path_factory.mktemp("page") / "<micro>.pth"
    save_checkpoint({"model": model.state_dict(), "classes": NAMES, "config": "DATA: {IMG_SIZE: 48}"}, path)
    return path


@pytest.fixture
def image(few_digits) -> str:
    return str(next((few_digits / "val/3").iterdir()))


def expected_of(checkpoint: Path, image: str) -> dict[str, float]:
    """The five most likely classes, by the model alone."""
    loaded = load(str(checkpoint))
    with torch.no_grad():
        probabilities = loaded.model(image_transform(loaded.config)(read_image(image))[None]).softmax(1)[0]
    return {NAMES[i]: probabilities[i].item() for i in probabilities.argsort(descending=True)[:5].tolist()}


def looks_drawn(picture: np.ndarray, wide: float) -> bool:
    height, width = picture.shape[:2]
    return picture.dtype == np.uint8 and width > wide * height and len(np.unique(picture)) > 100


# ----- by function call


def test_what_is_shown(checkpoint, image):
    viewer = Viewer(load(str(checkpoint)))
    assert viewer.blocks == [1, 1, 2, 1]
    seen = viewer.look(image, LAST)
    assert seen.classes == pytest.approx(expected_of(checkpoint, image), rel=1e-4)
    assert len(seen.states) == 4
    assert all(looks_drawn(picture, 3) for picture in seen.states)
    if not viewer.no_activation:
        assert looks_drawn(seen.activation, 1.5)
    np.testing.assert_array_equal(viewer.look_at_stage(image, 2, LAST[2]), seen.states[2])
    other = viewer.look_at_stage(image, 2, 0)
    assert other.shape == seen.states[2].shape
    assert (other != seen.states[2]).mean() > 0.01
    components = viewer.look_at_stage(image, 2, 0, "pca")
    assert looks_drawn(components, 3)
    colourful = np.ptp(components.astype(int), axis=2) > 50
    assert colourful.mean() > 0.1
    assert not any(module._forward_hooks for module in viewer.model.modules())
    assert all(parameter.grad is None for parameter in viewer.model.parameters())


def test_without_what_is_optional(checkpoint, image, monkeypatch):
    monkeypatch.setattr(page_module, "no_class_activation", lambda model: "a package is missing")
    seen = Viewer(load(str(checkpoint)), size=32).look(image, LAST[:1])
    assert seen.activation is None
    assert len(seen.classes) == 5
    assert len(seen.states) == 1
    headless = load("spatialmamba_micro")
    headless = headless._replace(model=spatialmamba_micro(num_classes=0).eval())
    seen = Viewer(headless, size="own").look(image, LAST[:1])
    assert (seen.classes, seen.activation) == (None, None)


def test_bad_images_and_blocks(checkpoint, image, tmp_path):
    viewer = Viewer(load(str(checkpoint)))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"^text\.png: cannot be read as an image") as raised:
        viewer.look(str(tmp_path / "text.png"), LAST)
    assert str(tmp_path) not in str(raised.value)
    with pytest.raises(UserError, match="no block 2: stage 2 has blocks 0 to 1"):
        viewer.look(image, (0, 0, 2, 0))


# ----- the command


@pytest.fixture
def settings_put_back(monkeypatch):
    """Those that `serve` makes for gradio."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")


def said(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        explain.main()
    return capsys.readouterr().err if isinstance(ended.value.code, int) else ended.value.code


@pytest.mark.usefixtures("settings_put_back")
def test_bad_arguments(checkpoint, image, tmp_path, monkeypatch, capsys):
    assert "takes no images and no --out" in said(monkeypatch, capsys, checkpoint, image, "--serve")
    assert "takes no images and no --out" in said(monkeypatch, capsys, checkpoint, "--serve", "--out", tmp_path)
    assert "--out DIR is needed" in said(monkeypatch, capsys, checkpoint, image)
    assert "--port goes with --serve" in said(monkeypatch, capsys, checkpoint, "--out", tmp_path, "--port", 1)
    assert "must be a number up to 65535" in said(monkeypatch, capsys, checkpoint, "--serve", "--port", 65536)
    monkeypatch.setitem(sys.modules, "gradio", None)
    missing = said(monkeypatch, capsys, checkpoint, "--serve")
    assert re.fullmatch(
        r"error: --serve: needs the package gradio, which .* \(.*\): pip install -e \"\.\[page\]\"", missing
    )
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    assert "no such checkpoint" in said(monkeypatch, capsys, tmp_path / "none.pth", "--serve")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    assert "other.pth: is of none of the sizes" in said(monkeypatch, capsys, tmp_path / "other.pth", "--serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"error: --port {port}: cannot be opened on 127.0.0.1 (Address already in use)" in said(
            monkeypatch, capsys, checkpoint, "--serve", "--port", port
        )


# ----- the page itself


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory) -> Iterator[str]:
    """The address of a page that was started as a user does; it is interrupted in the end."""
    pytest.importorskip("gradio", reason='pip install -e ".[page]"')
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "classification.explain", checkpoint, "--serve", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    errors = temporary / "stderr.txt"
    with (
        errors.open("w") as err,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        first = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert address, first + errors.read_text()
        yield address.group()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, errors.read_text()
    raised = re.findall(r"^[\w.]*Error: .*", errors.read_text(), re.MULTILINE)
    expected = ("not uploaded by a user", "Could not preprocess input component")
    assert all(any(part in one for part in expected) for one in raised), raised
    assert not list(temporary.glob("explain-*"))  # of images that were dropped


def test_over_http(page, checkpoint, image, tmp_path):
    from gradio_client import Client, handle_file  # comes with gradio

    with urllib.request.urlopen(page) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a name of another site that leads here
        urllib.request.urlopen(urllib.request.Request(page, headers={"Host": "example.org"}))
    port = int(page.rpartition(":")[2])
    with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", port))  # this machine's too, but not where it listens

    client = Client(page, verbose=False, download_files=str(tmp_path / "found"))
    problem, prediction, activation, *states = client.predict(
        handle_file(image), "mean over channels", *LAST, api_name="/look"
    )
    assert problem == ""
    found = {entry["label"]: entry["confidence"] for entry in prediction["confidences"]}
    assert found == pytest.approx(expected_of(checkpoint, image), rel=1e-4)
    assert all(looks_drawn(np.asarray(read_image(path)), 3) for path in states)
    assert activation is None or looks_drawn(np.asarray(read_image(activation)), 1.5)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(image).read_bytes()[:200])
    problem, *nothing = client.predict(handle_file(broken), "mean over channels", *LAST, api_name="/look")
    assert problem.startswith("broken.png: cannot be read as an image")
    assert not any(nothing)

    # A path in place of an upload: Gradio would copy the file for whoever asks, also for other users of the machine.
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for session, payload in (
        ("a", {"path": str(secret), "meta": {"_type": "gradio.FileData"}}),
        ("b", {"path": str(secret)}),
        ("c", {"path": image}),
    ):
        question = {"data": [payload, "mean over channels", *LAST], "session_hash": session, "fn_index": 0}
        request = urllib.request.Request(
            f"{page}/gradio_api/queue/join", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        with urllib.request.urlopen(f"{page}/gradio_api/queue/data?session_hash={session}", timeout=30) as answer:
            assert '"success":false' in answer.read().decode().replace(" ", "")


@pytest.mark.long
def test_in_a_browser(page, checkpoint, image, tmp_path):
    """An image is dropped, and its prediction read; then one that cannot be read. Nothing comes from other hosts."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,2000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    (likeliest, share), *_ = expected_of(checkpoint, image).items()
    with webdriver.Chrome(options=options, service=Service(paths[1])) as browser:
        wait = WebDriverWait(browser, 120)
        browser.get(page)
        wait.until(lambda b: b.find_elements("css selector", "input[type=file]"))[0].send_keys(image)
        text = wait.until(lambda b: (shown := b.find_element("tag name", "body").text).count("%") >= 5 and shown)
        assert f"{likeliest}\n{share:.0%}" in text
        assert "<micro>.pth" in text
        drawn = "return [...document.images].filter(i => i.naturalWidth > 600).length"  # figures, not the digit
        wait.until(lambda b: b.execute_script(drawn) >= 4)
        browser.save_screenshot(str(tmp_path / "page.png"))

        (tmp_path / "broken.png").write_bytes(Path(image).read_bytes()[:200])
        browser.get(page)
        wait.until(lambda b: b.find_elements("css selector", "input[type=file]"))[0].send_keys(
            str(tmp_path / "broken.png")
        )
        wait.until(lambda b: "broken.png: cannot be read" in b.find_element("tag name", "body").text)
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert all(url.startswith((f"{page}/", "data:", "blob:")) for url in asked)


@pytest.mark.usefixtures("settings_put_back")
def test_the_port_is_free_again_when_gradio_cannot_be_used(monkeypatch):
    """An error while the page is built closes what listens."""
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def fails(viewer, title):
        raise ImportError("gradio is broken")

    monkeypatch.setattr(page_module, "build", fails)
    with pytest.raises(ImportError):
        serve(None, "", port)
    socket.create_server(("127.0.0.1", port)).close()
