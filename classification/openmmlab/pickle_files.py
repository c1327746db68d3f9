"""No pickles: mmengine unpickles any file whose name ends so, wherever a config names one, and a pickle runs code."""

from mmengine.fileio import PickleHandler, register_handler

from classification.errors import UserError

PICKLES = ["pkl", "pickle"]


@register_handler(PICKLES)
class NoPickleHandler(PickleHandler):
    """mmengine's handler of these files, from when this module is imported on: it writes, and does not read."""

    def load_from_fileobj(self, file, **_: object) -> object:
        raise UserError(
            f"{getattr(file, 'name', 'a file')}: the config has a pickle loaded, which can run code; write it as JSON"
        )
