"""`python -m selective_scan` prints which kernels this installation has."""

from selective_scan import backends

for name, state in backends().items():
    print(f"{name:10} {state}")
