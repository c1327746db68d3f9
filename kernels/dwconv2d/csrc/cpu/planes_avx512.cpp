#define VECTOR_BYTES 64
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false for GCC's own intrinsics: GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "fusion_rows.h"

namespace dwconv2d {
constexpr Kernels with_rows(Kernels kernels) {
  kernels.fusion_rows = rows::kForward;
  return kernels;
}
const Kernels kAvx512 = with_rows(kKernels);
}
