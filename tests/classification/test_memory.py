"""What becomes of memory that is freed, in processes of their own: the C library is set for all that a process does."""

import json
import sys

import pytest
from running import ROOT, run_command

from classification.memory import OFF

FAULTS = """
import ctypes, json, resource, torch
from classification.memory import keep_freed_memory, release_freed_memory

def faults():  # pages that the system maps while 40 MiB are written, which glibc alone would map anew each time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

found = {"alone": [faults() for _ in range(3)][-1], "set": keep_freed_memory()}
# memalign leaves a small chunk behind each tensor, so that the next finds no room, until glibc has kept seven of them.
found |= {"kept": [faults() for _ in range(12)][-1], "before": resident()}
if found["set"]:
    # By malloc itself, which leaves no chunk behind what it gives.
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = libc.malloc(2100 * 2**20)
        ctypes.memset(memory, 1, 2100 * 2**20)
        libc.free(memory)
        found["kept above 2 GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found |= {"released": release_freed_memory(), "after": resident(), "again": faults()}
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("off", ["0", "1"])
def test_freed_memory_is_kept_at_every_size(off):
    done = run_command(sys.executable, "-c", FAULTS, cwd=ROOT, **{OFF: off})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["set"] == (off == "0")
    assert found["alone"] > 15  # of huge pages; more of others
    if off == "1":
        assert found["kept"] == pytest.approx(found["alone"], rel=0.5)
        return
    assert found["kept"] < found["alone"] / 10
    assert found["kept above 2 GiB"] < found["alone"] / 10  # a threshold of 2**31 - 1 bytes is a threshold
    assert found["released"]
    assert found["before"] - found["after"] > 35 * 2**20 / 2**12
    assert found["again"] > found["alone"] / 2
