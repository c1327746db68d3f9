// Preloaded, puts every block of PyTorch's CPU allocator between two pages that may not be touched, and never hands out
// the same memory twice: what reads or writes beyond a tensor, or a tensor that is gone, ends the process. Blocks begin
// or, with FENCE=end, end at such a page, up to what their alignment takes. They are filled with NaN. Those of less than
// a vector are left alone: there are thousands, more than the kernel keeps apart.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kVector = 64 };
static const size_t kReserved = (size_t)1 << 44;
static char *reserved, *next;
static int at_end;
static int (*allocate_elsewhere)(void **, size_t, size_t);
static void (*free_elsewhere)(void *);

__attribute__((constructor)) static void reserve(void) {
  const char *fence = getenv("FENCE");
  at_end = fence && !strcmp(fence, "end");
  allocate_elsewhere = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  free_elsewhere = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  void *memory = mmap(NULL, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  reserved = next = memory;
}

// Pages: one with the size in it, a fence, the block, a fence.
int posix_memalign(void **out, size_t alignment, size_t size) {
  if (!reserved || size < kVector) return allocate_elsewhere ? allocate_elsewhere(out, alignment, size) : ENOMEM;
  if (alignment > kPage) return EINVAL;
  const size_t pages = (size + kPage - 1) / kPage * kPage;
  char *header = __atomic_fetch_add(&next, pages + 3 * kPage, __ATOMIC_RELAXED), *block = header + 2 * kPage;
  if (header + pages + 3 * kPage > reserved + kReserved) return ENOMEM;
  if (mprotect(header, kPage, PROT_READ | PROT_WRITE) || mprotect(block, pages, PROT_READ | PROT_WRITE)) return ENOMEM;
  *(size_t *)header = pages;
  memset(block, 0xff, pages);
  *out = at_end ? block + (pages - size) / alignment * alignment : block;
  return 0;
}

void free(void *pointer) {
  char *block = (char *)((uintptr_t)pointer & ~(uintptr_t)(kPage - 1)), *header = block - 2 * kPage;
  if (!reserved || block < reserved || block >= reserved + kReserved) {
    if (free_elsewhere) free_elsewhere(pointer);
    return;
  }
  // Mapped anew, not only protected: then the kernel counts it as one with what is around it, and it counts up to 65530.
  mmap(header, *(size_t *)header + 2 * kPage, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
