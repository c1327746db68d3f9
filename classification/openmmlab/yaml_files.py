"""YAML configs as data. mmengine's own reader calls the functions that tags name."""

import yaml
from mmengine.fileio import BaseFileHandler, register_handler

from classification.config import StrictYaml


class _Loader(StrictYaml, yaml.SafeLoader):
    pass


@register_handler(["yaml", "yml"])
class SafeYamlHandler(BaseFileHandler):
    """mmengine's handler of these files from the import of this module on."""

    def load_from_fileobj(self, file, **_: object) -> object:
        return yaml.load(file, _Loader)

    def dump_to_fileobj(self, obj: object, file, **options: object) -> None:
        yaml.safe_dump(obj, file, **options)

    def dump_to_str(self, obj: object, **options: object) -> str:
        return yaml.safe_dump(obj, **options)
