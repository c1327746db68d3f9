"""No pickles: a pickle can run code, and mmengine unpickles every .pkl or .pickle file that a config names."""

from mmengine.fileio import PickleHandler, register_handler

from classification.errors import UserError

PICKLES = ["pkl", "pickle"]


@register_handler(PICKLES)
class NoPickleHandler(PickleHandler):
    """mmengine's handler of these files from the import of this module on. It writes files, but reads none."""

    def load_from_fileobj(self, file, **_: object) -> object:
        raise UserError(
            f"{getattr(file, 'name', 'a file')}: the config has a pickle loaded, which can run code; write it as JSON"
        )
