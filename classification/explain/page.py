"""A local page: one drops an image and sees what the model takes it for, why, and the states of each stage.

    python -m classification.explain CHECKPOINT --serve

`classification.explain` starts it. It listens on this machine alone, and the browser is told to load nothing from
elsewhere. It needs the package gradio; what the page shows, `Viewer` computes without it.
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
Of one block in each stage: its input x, its states h after the scan and h' after the fusion, its output y."""
# An image fills its frame, even a digit of 32 pixels.
STYLE = "#dropped img { width: 100%; height: 100%; object-fit: contain; } #problem { color: firebrick; }"
LARGEST_FILE = "50mb"
# The browser refuses whatever Gradio or a later version of it would load from another host.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

Pixels = np.ndarray  # (H, W, 3), bytes


class Seen(NamedTuple):
    """What the page shows of an image.

    Attributes:
        classes: the most likely ones with their probabilities; None for a model without a head.
        activation: Grad-CAM of the most likely class; None where it cannot be made.
        states: a drawing for each stage.
    """

    classes: dict[str, float] | None
    activation: Pixels | None
    states: list[Pixels]


class Viewer:
    """What the page does with an image.

    Args:
        loaded: a model as `explain.load` gives it.
        size: of images, as `--size`; by default as the checkpoint is evaluated.
    """

    def __init__(self, loaded: Loaded, size: int | str | None = None):
        self.model = loaded.model
        self.blocks = [len(layer.blocks) for layer in self.model.layers]
        self.no_activation = no_class_activation(self.model)
        self._transform = image_transform(loaded.config, size)
        names = loaded.classes or [f"class {i}" for i in range(self.model.num_classes)]
        self._names = [printable(name) for name in names]
        self._lock = threading.Lock()  # hooks and gradients are the model's: requests wait for each other

    def look(self, path: str, blocks: Sequence[int], colour: str = "mean") -> Seen:
        """
        Args:
            path: of the image.
            blocks: number of the block to draw, for each stage.
            colour: "mean" or "pca", as of `explain.draw_states`.

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
        except UnreadableImageError as error:  # the user knows its name, not where the server has put it
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
    """Import it. Its reports of use, and those of what it brings, are turned off: that counts when it is imported.

    Raises:
        UserError: it, or what it needs, cannot be imported.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"--serve: needs the package gradio, which cannot be imported ({error}): {INSTALL}") from error


def build(viewer: Viewer, title: str) -> "Blocks":
    """The page. Its handler has the name `look`, for gradio_client too."""
    import gradio as gr  # optional

    def said(work: Callable, outputs: int) -> Callable:
        """What goes wrong by the user's hand is said on the page, in the first output; the others are empty then."""

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
                # The file as it was dropped: `read_image` reads it, or says why not. (A subclass of a component would
                # have Gradio write a file beside this one.)
                image.preprocess = lambda payload: None if payload is None else payload.path
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


def serve(viewer: Viewer, title: str, port: int = PORT) -> None:
    """Serve the page until the process is interrupted.

    Args:
        viewer: what it shows.
        title: its heading.
        port: 0 for any that is free.

    Raises:
        UserError: gradio is missing, or the port is in use.
    """
    _import_gradio()
    with _listening(port) as listener, tempfile.TemporaryDirectory(prefix="explain-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of the images that are dropped: they go when the page does
        server = _server(build(viewer, title))
        print(f"the page is at http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes then, too
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

    # A page of another site could else have its own name lead here, and read what is shown.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
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
