#define VECTOR_BYTES 64
#include "scan_kernel.h"

namespace selective_scan {
const Kernels kAvx512 = kKernels;
}
