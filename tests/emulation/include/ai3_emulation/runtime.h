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
                   unsigned threads, unsigned shared, const void* params, size_t params_bytes,
                   const unsigned (&cluster)[3] = {1, 1, 1});

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

// For the model of sm_90a (hopper.cpp): a thread that goes on later, or when it is woken; what has happened since,
// which tells a wait that will end from one that will not.
unsigned current_thread();
void yield();
void wait_to_be_woken();
void wake(unsigned thread);
void note_progress();
bool copies_are_early();
unsigned current_block();
unsigned current_warp();  // of its block
unsigned threads_of_cluster();
// All shared memory of a cluster is an arena. A shared address is of the thread's own block, or, from kOfBlock times
// the block's rank and one more on, of another's.
constexpr uint32_t kOfBlock = 1 << 24;
uint32_t in_arena(uint32_t address);
void* arena_pointer(uint32_t offset);
void check_arena(uint32_t begin, uint32_t bytes);
// A kernel by its name, and the call that it is launched for; what was wrong with the last one.
struct Launched {
  const ai3_args* args;
  const ai3_kernel* table;
  std::string name;
};
extern std::string launch_error;
int launch_named(void* kernel, const int64_t (&grid)[3], const unsigned (&cluster)[3], unsigned threads,
                 unsigned shared, const void* params);
void start_cluster();
std::string end_cluster();
bool has_barriers();
size_t copies_under_way();
void land_copy(size_t number);
void check_landed(size_t begin, size_t bytes);
void note_written(size_t begin, size_t bytes);
// Of the driver, by its name; null of what is not emulated.
void* driver_function(const char* name);

void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes);
void commit_copies();
void wait_copies(unsigned pending);

}  // namespace ai3_emulation
