// Defines the launch of one kernel with tiles. Each has its own file, so that they compile in parallel.
#pragma once

#include "instances.cuh"
#include "kernels.h"
#include "launch.cuh"

#define DEFINE_TILED_LAUNCH(name, with_instance, kernel)                                                              \
  cudaError_t dwconv2d::name(const Params& p, cudaStream_t stream) {                                                  \
    return with_instance(p, [&](auto instance) {                                                                      \
      using I = decltype(instance);                                                                                   \
      return launch(kernel<typename I::Taps, typename I::Input, typename I::Activation, I::kOutputEquation>,          \
                    p.blocks(), p.plan.threads, p.plan.shared, stream, p);                                            \
    });                                                                                                               \
  }
