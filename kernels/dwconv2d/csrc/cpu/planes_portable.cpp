#define VECTOR_BYTES 16
#include "planes_kernel.h"

namespace dwconv2d {
const Kernels kPortable = kKernels;
}
