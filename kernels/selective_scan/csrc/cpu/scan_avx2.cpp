#define VECTOR_BYTES 32
#include "scan_kernel.h"

namespace selective_scan {
const Kernels kAvx2 = kKernels;
}
