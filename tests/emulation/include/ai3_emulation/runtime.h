// What the two halves of an emulated .cu file share: the kernels, by name, and the machine that runs them.
#pragma once

#include <ai3/kernel.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace ai3_emulation {

struct Kernel {
  const char* name;
  unsigned threads;  // that it may be launched with
  size_t params;     // bytes
  void (*body)(const void* params);
  int64_t launches = 0;
};

struct Registered {
  Registered(Kernel kernel);
};

// Runs a grid on the calling thread. Empty, or what was wrong. `table` tells how large the call's buffers are.
std::string launch(const ai3_args* args, const ai3_kernel* table, const char* name, const int64_t (&grid)[3],
                   unsigned threads, unsigned shared, const void* params, size_t params_bytes);

// Of the thread that is running. Nothing below returns where the launch has failed.
[[noreturn]] void fail(const std::string& what);
void check(const void* address, size_t bytes, bool writes, bool aligned);
void block_barrier();
void warp_barrier();

// All threads of a warp meet at the same instruction: compute(lanes) is called once, with what each of them handed
// over.
void meet(const char* instruction, void* own, void (*compute)(void** lanes));

// The memory of a declaration, poisoned at the start of every block.
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared(size_t alignment);
uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address);

void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes);
void commit_copies();
void wait_copies(unsigned pending);

}  // namespace ai3_emulation
