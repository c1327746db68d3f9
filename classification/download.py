"""Download a file once, to torch.hub's folder.

torch.hub itself keeps a file by the last part of its address, so that `/two/best.pth` would give what has come from
`/one/best.pth`; and it keeps half a file if the server does not tell how much is to come.
"""

import hashlib
import os
import shutil
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlparse
from urllib.request import urlopen

import torch

from classification.errors import UserError

SCHEMES = ("http://", "https://")


def is_address(text: str) -> bool:
    """Whether `text` is an address that `download` takes."""
    return text.lower().startswith((*SCHEMES, "ftp://"))


def place_of(address: str) -> Path:
    """Return the file in which a download is kept. Its name depends on the whole address."""
    name = os.path.basename(urlparse(address).path)[-100:]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"


def download(address: str) -> Path:
    """Download a file to its place, unless it is there, and return the place. Only a complete download gets there.

    Raises:
        UserError: the file cannot be downloaded.
    """
    try:
        path = place_of(address)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            response = stack.enter_context(urlopen(address))
            partial = stack.enter_context(NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False))
            stack.callback(Path(partial.name).unlink, missing_ok=True)
            shutil.copyfileobj(response, partial)
            partial.flush()
            expected, found = response.headers.get("Content-Length"), partial.tell()
            if expected is not None and int(expected) != found:
                raise OSError(f"{found} of {expected} bytes have come")
            os.chmod(partial.name, 0o644)  # for all who share the folder
            os.replace(partial.name, path)  # whichever process is last: the file is the same
    except (HTTPException, OSError, ValueError) as error:
        raise UserError(f"{address}: cannot be downloaded ({error}); try again, or name a file") from error
    return path


def discard(address: str, error: UserError) -> UserError:
    """Remove what has come from an address, as a login page, and return the error that says so."""
    place_of(address).unlink(missing_ok=True)
    return UserError(f"{address}: what has come is of no use, and is not kept ({error})")
