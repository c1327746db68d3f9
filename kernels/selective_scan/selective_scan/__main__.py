"""`python -m selective_scan` and `python -m dwconv2d` print what each installation has."""

import importlib

package = importlib.import_module(__package__)
for name, state in package.backends().items():
    print(f"{name:10} {state}")
