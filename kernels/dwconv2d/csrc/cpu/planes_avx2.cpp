#define VECTOR_BYTES 32
#include "planes_kernel.h"

namespace dwconv2d {
const Kernels kAvx2 = kKernels;
}
