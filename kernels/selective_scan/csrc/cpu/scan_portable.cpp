#define VECTOR_BYTES 16
#include "scan_kernel.h"

namespace selective_scan {
const Kernels kPortable = kKernels;
}
