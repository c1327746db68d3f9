#define VECTOR_BYTES 64
#include "planes_kernel.h"

namespace dwconv2d {
const Kernels kAvx512 = kKernels;
}
