// Just enough of CUDA for a host compiler to run a kernel, block by block: what kernels call by CUDA's names, and by
// the names of csrc/cuda/device.cuh.
//
// The threads of a block are fibers. One runs until it meets others at a barrier or a shuffle, and which goes on is a
// matter of the chosen order: in ascending and descending order a warp runs as far ahead of the rest as its barriers
// let it. A race is then a result that depends on the order. Shared memory holds NaNs when a block starts, and copies
// that nobody waits for never arrive (in ascending order; they arrive at once in the others).
#pragma once

#include <math.h>  // the C++ one: overloads for float, as in CUDA
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulation::block().meet(emulation::kBlockwide, __LINE__)
#define __syncwarp() emulation::block().meet(emulation::kWarpwide, __LINE__)

using std::max;
using std::min;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulation {

enum Order { kAscending, kDescending, kRandom };
enum Scope { kWarpwide, kBlockwide };

constexpr size_t kStack = 128 * 1024, kGuard = 1024;
constexpr int kWarpSize = 32;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format

class Block {
 public:
  void run(unsigned index, int threads, size_t shared, Order order, std::mt19937& random,
           const std::function<void()>& kernel) {
    kernel_ = &kernel;
    order_ = order;
    fibers_.resize(std::max<size_t>(fibers_.size(), threads));
    threads_ = threads;
    shared_.assign(shared + 2 * kGuard, kPoison);
    blockIdx.x = index;
    blockDim.x = threads;
    for (int i = 0; i < threads; ++i) start(i);
    while (finished() < threads) resume(choose(random));
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory()[-1 - long(i)] != kPoison || memory()[shared + i] != kPoison) {
        throw std::runtime_error("write beyond the block's shared memory");
      }
    }
  }

  // Returns once all threads in scope have come here.
  void meet(Scope scope, int line) {
    fibers_[current_].scope = scope;
    fibers_[current_].line = line;
    fibers_[current_].state = kWaiting;
    if (swapcontext(&fibers_[current_].context, &scheduler_) != 0) std::abort();
  }

  // The value of another lane of the warp. Slots alternate: the next meeting but one is the first to reuse them.
  template <typename T>
  T exchange(T value, int lane, int line) {
    Fiber& self = fibers_[current_];
    const int slot = self.exchanges++ % 2, warp = current_ / kWarpSize * kWarpSize;
    std::memcpy(self.slots[slot], &value, sizeof(T));
    meet(kWarpwide, line);
    T result;
    std::memcpy(&result, fibers_[warp + lane].slots[slot], sizeof(T));
    return result;
  }

  void copy_later(void* to, const void* from, size_t bytes) {
    fibers_[current_].copies.push_back({to, from, bytes});
    if (order_ != kAscending) copy_now();
  }
  void copy_now() {
    for (const Copy& copy : fibers_[current_].copies) std::memcpy(copy.to, copy.from, copy.bytes);
    fibers_[current_].copies.clear();
  }

  // An error of the running thread: exceptions do not leave a fiber.
  void fail(const std::string& what) { failure_ = what; }

  unsigned char* memory() { return shared_.data() + kGuard; }

 private:
  enum State { kReady, kWaiting, kDone };

  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };

  struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(kStack);
    State state;
    Scope scope;
    int line, exchanges;
    unsigned char slots[2][8];
    std::vector<Copy> copies;
  };

  static void enter(unsigned high, unsigned low) {
    auto* block = reinterpret_cast<Block*>(uint64_t(high) << 32 | low);
    (*block->kernel_)();
    block->fibers_[block->current_].state = kDone;
  }

  void start(int i) {
    Fiber& fiber = fibers_[i];
    fiber.state = kReady;
    fiber.exchanges = 0;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<uint64_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(self >> 32), unsigned(self));
  }

  int finished() const {
    return std::count_if(fibers_.begin(), fibers_.begin() + threads_, [](const Fiber& f) { return f.state == kDone; });
  }

  int choose(std::mt19937& random) const {
    ready_.clear();
    for (int i = 0; i < threads_; ++i) {
      if (fibers_[i].state == kReady) ready_.push_back(i);
    }
    if (ready_.empty()) throw std::runtime_error("threads wait for others that never come: a divergent barrier");
    if (order_ == kAscending) return ready_.front();
    if (order_ == kDescending) return ready_.back();
    return ready_[random() % ready_.size()];
  }

  void resume(int i) {
    current_ = i;
    threadIdx.x = i;
    if (swapcontext(&scheduler_, &fibers_[i].context) != 0) std::abort();
    if (!failure_.empty()) throw std::runtime_error(std::exchange(failure_, ""));
    const Fiber& fiber = fibers_[i];
    if (fiber.state != kWaiting) return;
    const int begin = fiber.scope == kBlockwide ? 0 : i / kWarpSize * kWarpSize;
    const int end = fiber.scope == kBlockwide ? threads_ : begin + kWarpSize;
    for (int k = begin; k < end; ++k) {
      const Fiber& other = fibers_[k];
      if (other.state == kDone) throw std::runtime_error("a thread has left before a barrier of the others");
      if (other.state == kReady) return;
      if (other.scope != fiber.scope) return;
      if (other.line != fiber.line) throw std::runtime_error("threads meet at different barriers");
    }
    for (int k = begin; k < end; ++k) fibers_[k].state = kReady;
  }

  const std::function<void()>* kernel_;
  Order order_;
  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned char> shared_;
  std::string failure_;
  mutable std::vector<int> ready_;
  int threads_ = 0, current_ = 0;
};

inline Block& block() {
  static Block the_block;
  return the_block;
}

// A launch: its blocks one after the other, in an order like that of the threads.
inline void launch(int64_t blocks, int threads, size_t shared, Order order, const std::function<void()>& kernel) {
  if (threads % kWarpSize) throw std::runtime_error("warps of fewer than 32 threads are not emulated");
  std::mt19937 random(1);
  std::vector<unsigned> indices(blocks);
  for (int64_t i = 0; i < blocks; ++i) indices[i] = order == kDescending ? blocks - 1 - i : i;
  if (order == kRandom) std::shuffle(indices.begin(), indices.end(), random);
  for (unsigned index : indices) block().run(index, threads, shared, order, random, kernel);
}

// Memory that starts as NaN and whose surroundings are looked after.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kMargin, kPoison) {}
  void* data() { return memory_.data() + kMargin; }
  void check() const {
    for (size_t i = 0; i < kMargin; ++i) {
      if (memory_[i] != kPoison || memory_[kMargin + bytes_ + i] != kPoison) {
        throw std::runtime_error("write out of bounds");
      }
    }
  }

 private:
  static constexpr size_t kMargin = 4096;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

// Runs a function; an error's message or null.
template <typename Function>
const char* guarded(Function function) {
  static std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace emulation

namespace gpu {

// As coarse as the GPU's may be at worst: rounded towards zero, so that errors add up, and without denormals.
inline float exp2_approx(float x) {
  const double exact = std::exp2(double(x));
  float y = float(exact);
  if (double(y) > exact) y = std::nextafter(y, 0.0f);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

template <typename T>
T max_or_nan(T x, T y) {
  return x < y ? y : x;
}

template <typename T>
T reciprocal(T x) {
  return 1 / x;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                           : std::ldexp(float(fraction), -24);
  return sign ? -x : x;
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  const int exponent = std::max(std::ilogb(size == 0 ? 0x1p-14f : size), -14);
  const int fraction = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 and more: normal
  return sign | uint16_t(fraction < 1024 ? fraction : ((exponent + 15) << 10) + (fraction - 1024));
}

inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of_float(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t to_halves(float first, float second) {
  return float_to_half(first) | uint32_t(float_to_half(second)) << 16;
}
inline uint32_t to_bfloat16s(float first, float second) {
  return float_to_bfloat16(first) | uint32_t(float_to_bfloat16(second)) << 16;
}

inline int opaque(int x) { return x; }

template <bool kUp, typename T>
T shuffle(T value, int distance) {
  const int lane = threadIdx.x % emulation::kWarpSize;
  const int other = kUp ? lane - distance : lane + distance;
  const bool there = 0 <= other && other < emulation::kWarpSize;
  return emulation::block().exchange(value, there ? other : lane, __LINE__);
}

inline unsigned char* shared_memory() { return emulation::block().memory(); }

inline void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    emulation::block().fail("misaligned copy of " + std::to_string(bytes) + " bytes");
  } else {
    emulation::block().copy_later(to, from, bytes);
  }
}
inline void copy_16_bytes_async(void* to, const void* from) { copy_async(to, from, 16); }
inline void copy_4_bytes_async(void* to, const void* from) { copy_async(to, from, 4); }
inline void wait_for_copies() { emulation::block().copy_now(); }

}  // namespace gpu
