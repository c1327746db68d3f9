// The interface between scan.cpp, which sees tensors, and the kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace selective_scan {

// The number of tokens of a chunk, which stays in the L1 cache. It is a multiple of every vector length.
constexpr int64_t kChunk = 64;

enum ElementType { kFloat32, kFloat64, kFloat16, kBFloat16, kElementTypes };

// Pointers, and strides in elements. Members that a pass does not use stay null.
struct Params {
  int64_t batch, channels, states, length, groups;
  bool softplus, A_is_log;  // if A_is_log, the rates are -exp(A)
  const void *u, *delta, *A, *B, *bias, *grad;
  int64_t u_strides[3], delta_strides[3], A_strides[2], B_strides[4], bias_stride, grad_strides[4];

  void* h;                     // (B, D, N, L)
  void *grad_u, *grad_delta;   // (B, D, L)
  int64_t grad_u_strides[3], grad_delta_strides[3];
  double *grad_A, *grad_bias;  // (B, D, N) and (B, D), still to be summed over the batch
  void* grad_B;                // (B, G, channel blocks, N, L) of the states' dtype, still to be summed over blocks

  // One lane of a vector is one channel. A block is as many consecutive channels of one group as fit in a vector.
  int64_t channel_blocks(int64_t lanes) const { return (channels / groups + lanes - 1) / lanes; }
  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
};

// A task is one image and one block of channels. Its results do not depend on the thread that runs it.
struct Kernel {
  int64_t lanes;
  int64_t (*scratch_bytes)(const Params&);
  void (*run)(const Params&, int64_t task, void* scratch);
};

struct Kernels {
  Kernel forward[kElementTypes], backward[kElementTypes];
};

extern const Kernels kPortable;
#ifdef KERNELS_X86
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace selective_scan
