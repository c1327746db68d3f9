"""`python -m selective_scan` and `python -m dwconv2d` print what each installation has.

selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
"""

import importlib

package = importlib.import_module(__package__)
for name, state in package.backends().items():
    print(f"{name:10} {state}")
