"""A local page. You drop an image and see the model's prediction, its class activation and the states of each stage.

    python -m classification.explain CHECKPOINT --serve

`classification.explain` starts the page. The page listens only on this machine, and tells the browser to load nothing
from another host. It needs the package gradio. `Viewer`, which computes what the page shows, does not need gradio.
"""

import contextlib
import html
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from classification.data.images import UnreadableImageError, read_image
from classification.errors import UserError, printable
from classification.explain import (
    Loaded,
    class_activation,
    draw_activation,
    draw_states,
    image_transform,
    last_stage,
    no_class_activation,
    picture_of,
    states_at,
)

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
PORT = 7860
INSTALL = 'pip install -e ".[page]"'
MOST_LIKELY = 5  # classes
COLOURS = {"mean over channels": "mean", "principal components": "pca"}
ABOUT_STATES = """## States
For one block in each stage: the input x, the states h after the scan and h' after the fusion, and the output y."""
# An image fills its frame, even a digit of 32 pixels.
STYLE = "#dropped img { width: 100%; height: 100%; object-fit: contain; } #problem { color: firebrick; }"
LARGEST_FILE = "50mb"
# With this policy, the browser refuses what Gradio, or a later version of it, would load from another host.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

Pixels = np.ndarray  # (H, W, 3), uint8


class Seen(NamedTuple):
    """What the page shows of an image.

    Attributes:
        classes: the most likely classes with their probabilities; None for a model without a head.
        activation: Grad-CAM of the most likely class; None if it cannot be made.
        states: a drawing for each stage.
    """

    classes: dict[str, float] | None
    activation: Pixels | None
    states: list[Pixels]


class Viewer:
    """Computes what the page shows of an image.

    Args:
        loaded: a model as `explain.load` gives it.
        size: image size, as for `--size`; by default the checkpoint's evaluation size.
    """

    def __init__(self, loaded: Loaded, size: int | str | None = None):
        self.model = loaded.model
        self.blocks = [len(layer.blocks) for layer in self.model.layers]
        self.no_activation = no_class_activation(self.model)
        self._transform = image_transform(loaded.config, size)
        names = loaded.classes or [f"class {i}" for i in range(self.model.num_classes)]
        self._names = [printable(name) for name in names]
        self._lock = threading.Lock()  # requests share the model's hooks and gradients, so they wait for each other

    def look(self, path: str, blocks: Sequence[int], colour: str = "mean") -> Seen:
        """Compute everything that the page shows of an image.

        Args:
            path: the image file.
            blocks: number of the block to draw, for each stage.
            colour: "mean" or "pca", as for `explain.draw_states`.

        Raises:
            UserError: the image cannot be read, or there is no such block.
        """
        image = self._read(path)
        with self._lock:
            classes, activation = self._classify(image)
            return Seen(classes, activation, self._states(image, list(enumerate(blocks)), colour))

    def look_at_stage(self, path: str, stage: int, block: int, colour: str = "mean") -> Pixels:
        """The drawing of one stage's states, as `look` gives it."""
        image = self._read(path)
        with self._lock:
            return self._states(image, [(stage, block)], colour)[0]

    def _read(self, path: str) -> torch.Tensor:
        try:
            image = read_image(path)
        except UnreadableImageError as error:  # the user knows the file's name, not its path on the server
            raise UnreadableImageError(str(error).replace(path, Path(path).name)) from error
        return self._transform(image).unsqueeze(0)

    def _classify(self, image: torch.Tensor) -> tuple[dict[str, float] | None, Pixels | None]:
        if not self.model.num_classes:
            return None, None
        if self.no_activation:
            with torch.no_grad():
                return self._most_likely(self.model(image).softmax(1)[0]), None
        stage = last_stage(image, len(self.blocks), least=4)
        maps, (found,), (probabilities,) = class_activation(self.model, image, stage=stage)
        label = f"{self._names[found]}: {probabilities[found]:.0%}"
        title = f"Grad-CAM of stage {stage}"
        figure = draw_activation([picture_of(image[0])], maps.numpy(), [label], title, [""])
        return self._most_likely(probabilities), _pixels(figure)

    def _most_likely(self, probabilities: torch.Tensor) -> dict[str, float]:
        values, indices = probabilities.topk(min(MOST_LIKELY, len(probabilities)))
        return {self._names[i]: p for i, p in zip(indices.tolist(), values.tolist(), strict=True)}

    def _states(self, image: torch.Tensor, places: list[tuple[int, int]], colour: str) -> list[Pixels]:
        drawings = []
        for (stage, block), found in zip(places, states_at(self.model, image, places), strict=True):
            channels, height, width = found.y.shape[1:]
            title = f"stage {stage}, block {block}: {height}x{width} positions, {channels} channels"
            drawings.append(_pixels(draw_states([picture_of(image[0])], found, title, [""], colour)))
        return drawings


def _pixels(figure: Figure) -> Pixels:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ----- the page


def _import_gradio() -> None:
    """Import gradio with telemetry off. gradio and huggingface_hub read these variables when they are imported.

    Raises:
        UserError: gradio, or a package that it needs, cannot be imported.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"--serve: needs the package gradio, which cannot be imported ({error}): {INSTALL}") from error


def build(viewer: Viewer, title: str) -> "Blocks":
    """Build the page. Its handler has the API name `look`, which gradio_client can call."""
    import gradio as gr  # optional

    def said(work: Callable, outputs: int) -> Callable:
        """Make a handler that shows a `UserError` in the page's first output, and then leaves the others empty."""

        def handler(path: str | None, colour: str, *blocks: int) -> list:
            if path is None:
                return ["", *[None] * outputs]
            try:
                return ["", *work(path, COLOURS[colour], *blocks)]
            except UserError as error:
                return [html.escape(printable(str(error))), *[None] * outputs]

        return handler

    def look(path: str, colour: str, *blocks: int) -> list:
        seen = viewer.look(path, blocks, colour)
        return [seen.classes, seen.activation, *seen.states]

    def look_at(stage: int) -> Callable:
        return lambda path, colour, block: [viewer.look_at_stage(path, stage, block, colour)]

    shown = dict(show_label=False, interactive=False, buttons=["download", "fullscreen"], format="png")
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {html.escape(printable(title))}")
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                image = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=300, elem_id="dropped"
                )
                # Pass on the dropped file: `read_image` reads it, or says why it cannot. (For a subclass of a
                # component, Gradio would write a file beside this one.)
                image.preprocess = _dropped_path
                problem = gr.HTML(elem_id="problem")
                prediction = gr.Label(
                    label="Prediction", num_top_classes=MOST_LIKELY, visible=viewer.model.num_classes > 0
                )
            with gr.Column(scale=3, min_width=320):
                activation = gr.Image(label="Class activation (Grad-CAM)", visible=not viewer.no_activation, **shown)
                if viewer.no_activation:
                    gr.Markdown(f"**No class activation**: {html.escape(viewer.no_activation)}")
        gr.Markdown(ABOUT_STATES)
        colour = gr.Radio(list(COLOURS), value=next(iter(COLOURS)), label="Colours")
        blocks, drawings = [], []
        for stage, count in enumerate(viewer.blocks):
            choices = dict(choices=list(range(count)), value=count - 1, visible=count > 1)
            blocks.append(gr.Radio(label=f"Block of stage {stage}", **choices))
            drawings.append(gr.Image(label=f"Stage {stage}", **shown))
        given, all_drawn = [image, colour, *blocks], [problem, prediction, activation, *drawings]
        looked = said(look, len(all_drawn) - 1)
        image.change(looked, given, all_drawn, api_name="look")
        colour.change(looked, given, all_drawn, api_visibility="private")
        for stage, (block, drawing) in enumerate(zip(blocks, drawings, strict=True)):
            block.change(said(look_at(stage), 1), [image, colour, block], [problem, drawing], api_visibility="private")
    return page


def _dropped_path(payload: object) -> str | None:
    """Return the path of a dropped image. A request could name any other file, which Gradio does not look at."""
    if payload is None:
        return None
    folder = os.path.realpath(os.environ["GRADIO_TEMP_DIR"])
    if not os.path.realpath(payload.path).startswith(folder + os.sep):
        raise ValueError("the image was not uploaded by a user")
    return payload.path


def serve(viewer: Viewer, title: str, port: int = PORT) -> None:
    """Serve the page until the process is interrupted.

    Args:
        viewer: computes what the page shows.
        title: the heading of the page.
        port: 0 takes any free port.

    Raises:
        UserError: gradio is missing, or the port is in use.
    """
    _import_gradio()
    with _listening(port) as listener, tempfile.TemporaryDirectory(prefix="explain-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # dropped images are kept here until the page ends
        server = _server(build(viewer, title))
        print(f"the page is at http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        for ended in (signal.SIGTERM, signal.SIGHUP):  # so that the folder is then deleted, too
            signal.signal(ended, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot be opened on {HOST} ({os.strerror(error.errno)}); name another"
        ) from error


def _server(page: "Blocks") -> object:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def nothing_from_elsewhere(request: Request, answer: Callable):
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    # Without this, another site could point its own host name here and read what the page shows.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    page.has_launched = True  # or Gradio serves any file that a request names, as if it had been uploaded
    app = gr.mount_gradio_app(
        app,
        page,
        "/",
        HOST,
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        pwa=False,
        css=STYLE,
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
