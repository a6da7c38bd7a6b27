// Runs the kernels of one emulated .cu file: a cluster at a time, most often of one block, each of its threads a fiber
// that runs until it waits.
// Compiled without the instrumentation of device code, whose every access of memory is a call of __tsan_* below: only
// the call's buffers may be accessed, and shared memory by two threads only with a barrier in between where one writes.
#include <ai3_emulation/order.h>
#include <ai3_emulation/runtime.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace ai3_emulation {

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostBlocks = 8;                // of a block; of a cluster
constexpr size_t kStack = 256 * 1024, kArena = 512 * 1024, kGap = 1024, kUnit = 2;  // kUnit: of the shadow
constexpr unsigned char kPoison = 0xff;                                             // a NaN of any type

enum class State { kReady, kAtBlockBarrier, kAtWarp, kAsleep, kDone };

struct Copy {
  uint32_t to;
  const void* from;
  unsigned bytes, from_bytes;
};

struct Fiber {
  bool started;
  State state;
  jmp_buf at;
  ucontext_t context;
  std::vector<Copy> copies;              // not committed
  std::deque<std::vector<Copy>> groups;  // not waited for
};

struct Warp {
  const char* instruction;  // that its threads meet at
  unsigned arrived;
  void* lanes[kWarp];
};

struct Buffer {
  const char* name;
  uintptr_t begin, end;
  bool writable;
};

struct Declaration {
  const void* key;  // null: the dynamic memory
  size_t begin, end;
};

struct Shadow {
  uint32_t write_epoch, read_epoch;
  uint16_t writer, reader;  // kMany readers
};
constexpr uint16_t kMany = 0xffff;

alignas(1024) unsigned char arena[kMostBlocks * kArena];  // each block of a cluster has its own
Shadow shadow[kArena / kUnit];
alignas(128) unsigned char parameters[4096];

struct Machine {
  std::vector<Kernel> kernels;
  std::vector<Buffer> buffers;
  std::vector<Declaration> declarations;
  std::vector<Fiber> fibers;
  Warp warps[kMostBlocks * kMostThreads / kWarp];
  unsigned char* stacks = nullptr;
  jmp_buf scheduler;
  const Kernel* kernel = nullptr;
  unsigned current = 0, threads = 0;  // threads of a block; `current` counts those of a cluster
  unsigned cluster[3] = {1, 1, 1}, blocks = 1;
  uint3 first_block{};  // of the cluster
  uint32_t epoch = 0;   // of barriers, over all launches
  uintptr_t image_begin = 0, image_end = 0;
  std::string error;
  int order = 0;       // 0: threads in ascending order, 1: descending, others shuffled
  bool early = false;  // copies are done at once, not when they are waited for
  bool has_progressed = false;
};

// Within the library's image, and never destroyed.
Machine& machine() {
  alignas(Machine) static unsigned char storage[sizeof(Machine)];
  static Machine* const m = new (storage) Machine();
  return *m;
}

// The library's own variables and constants.
int find_image(dl_phdr_info* info, size_t, void*) {
  Machine& m = machine();
  const uintptr_t here = reinterpret_cast<uintptr_t>(arena);
  uintptr_t begin = ~uintptr_t{0}, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  }
  if (here < begin || here >= end) return 0;
  m.image_begin = begin, m.image_end = end;
  return 1;
}

void leave() {
  Machine& m = machine();
  if (_setjmp(m.fibers[m.current].at) == 0) _longjmp(m.scheduler, 1);
}

void wait(State state) {
  Machine& m = machine();
  m.fibers[m.current].state = state;
  leave();
}

void complete(const Copy& copy) {
  unsigned char* const to = static_cast<unsigned char*>(shared_pointer(copy.to));
  check(to, copy.bytes, true, true);
  std::memset(to, 0, copy.bytes);
  std::memcpy(to, copy.from, copy.from_bytes);
}

void complete_groups(size_t but) {
  Fiber& fiber = machine().fibers[machine().current];
  while (fiber.groups.size() > but) {
    for (const Copy& copy : fiber.groups.front()) complete(copy);
    fiber.groups.pop_front();
  }
}

void enter() {
  Machine& m = machine();
  for (;;) {
    m.kernel->body(parameters);
    commit_copies();
    complete_groups(0);
    wait(State::kDone);
  }
}

void resume(unsigned i) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[i];
  m.current = i;
  const unsigned block = i / m.threads;
  threadIdx = {i % m.threads, 0, 0};
  blockIdx = {m.first_block.x + block % m.cluster[0], m.first_block.y,
              m.first_block.z + block / m.cluster[0] % m.cluster[2]};
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = m.stacks + i * kStack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

void use_shared(size_t begin, size_t end, const void* key) {
  Machine& m = machine();
  m.declarations.push_back({key, begin, end});
  for (unsigned block = 0; block < m.blocks; ++block) std::memset(arena + block * kArena + begin, kPoison, end - begin);
}

size_t own_arena() { return machine().current / machine().threads * kArena; }

std::string thread_name(unsigned thread) { return "thread " + std::to_string(thread); }

// Whether this memory of the arena, counted from its begin, is some block's.
bool is_shared(size_t begin, size_t bytes) {
  const Machine& m = machine();
  const size_t of_block = begin % kArena;
  return std::any_of(m.declarations.begin(), m.declarations.end(),
                     [&](const Declaration& d) { return of_block >= d.begin && of_block + bytes <= d.end; });
}

void check_shared(size_t begin, size_t bytes, bool writes) {
  Machine& m = machine();
  const bool inside = is_shared(begin, bytes);
  const char* verb = writes ? "writes " : "reads ";
  if (!inside) fail(verb + std::to_string(bytes) + " bytes of shared memory that is not its own");
  if (writes) {
    note_written(begin, bytes);
  } else {
    check_landed(begin, bytes);
  }
  if (has_barriers() || m.blocks > 1) return check_order(begin, bytes, writes);
  const uint16_t self = uint16_t(m.current);
  for (size_t i = begin / kUnit; i < (begin + bytes + kUnit - 1) / kUnit; ++i) {
    Shadow& s = shadow[i];
    if (s.write_epoch == m.epoch && s.writer != self)
      fail(verb + std::string("shared memory that ") + thread_name(s.writer) +
           " writes, without a barrier between them");
    if (writes) {
      if (s.read_epoch == m.epoch && s.reader != self)
        fail("writes shared memory that another thread reads, without a barrier between them");
      s.write_epoch = m.epoch, s.writer = self;
    } else if (s.read_epoch == m.epoch && s.reader != self) {
      s.reader = kMany;
    } else {
      s.read_epoch = m.epoch, s.reader = self;
    }
  }
}

void add_buffer(const char* name, const void* data, int64_t bytes, bool writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (data != nullptr && bytes > 0) machine().buffers.push_back({name, begin, begin + uintptr_t(bytes), writable});
}

void add_tensor(const char* name, const ai3_tensor& t, int64_t element, bool writable) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) last += (t.size[d] - 1) * t.stride[d];
  add_buffer(name, t.data, (last + 1) * element, writable);
}

void find_buffers(const ai3_args* a, const ai3_kernel* table) {
  machine().buffers.clear();
  const int64_t element = a->dtype == AI3_FLOAT64 ? 8 : a->dtype == AI3_FLOAT32 ? 4 : 2;
  // A launch of pack() has the weight, and one of run() what was packed of it.
  const bool packs = table->packed_bytes != nullptr && a->weight.data != nullptr;
  add_tensor("output", a->output, element, true);
  add_tensor("input", a->input, element, false);
  add_tensor("weight", a->weight, element, false);
  add_tensor("residual", a->residual, element, false);
  add_tensor("key", a->key, element, false);
  add_tensor("value", a->value, element, false);
  add_tensor("score_bias", a->score_bias, element, false);
  add_tensor("score_mask", a->score_mask, element, false);
  if (a->has_bias) add_buffer("bias", a->bias, a->output.size[1] * element, false);
  if (a->has_prologue) {
    const int64_t bytes = a->input.size[1] * std::max<int64_t>(element, 4);
    add_buffer("prologue_scale", a->prologue_scale, bytes, false);
    add_buffer("prologue_shift", a->prologue_shift, bytes, false);
  }
  if (table->packed_bytes != nullptr) add_buffer("packed", a->packed, int64_t(table->packed_bytes(a)), packs);
  if (table->workspace_bytes != nullptr)
    add_buffer("workspace", a->workspace, int64_t(table->workspace_bytes(a)), true);
}

void run_cluster() {
  Machine& m = machine();
  ++m.epoch;
  start_cluster();
  static uint32_t random = 1;
  for (Warp& warp : m.warps) warp.arrived = 0;
  const unsigned threads = m.blocks * m.threads;
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    order[i] = m.order == 1 ? threads - 1 - i : i;
    m.fibers[i].state = State::kReady;
  }
  for (;;) {
    for (unsigned i = threads; m.order > 1 && i > 1; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(order[i - 1], order[(random >> 8) % i]);
    }
    m.has_progressed = false;
    for (const unsigned i : order) {
      if (m.fibers[i].state == State::kReady) resume(i);
      if (!m.error.empty()) return;
    }
    unsigned done = 0;
    bool is_ready = false, is_released = false;
    for (unsigned block = 0; block < m.blocks; ++block) {
      unsigned ended = 0, waiting = 0;
      const auto each = [&](const auto& of) {
        for (unsigned i = block * m.threads; i < (block + 1) * m.threads; ++i) of(m.fibers[i].state);
      };
      each([&](State& state) {
        ended += state == State::kDone;
        waiting += state == State::kAtBlockBarrier;
        is_ready |= state == State::kReady;
      });
      done += ended;
      if (waiting == 0 || ended + waiting < m.threads || waiting % kWarp != 0) continue;
      each([](State& state) { state = state == State::kAtBlockBarrier ? State::kReady : state; });
      is_released = true;
      std::vector<unsigned> all(m.threads);
      std::iota(all.begin(), all.end(), block * m.threads);
      meet_in_order(all);
    }
    if (done == threads) {
      m.error = end_cluster();
      return;
    }
    if (is_released) ++m.epoch;
    if (is_released || m.has_progressed) continue;
    if (const size_t count = copies_under_way(); count > 0) {
      random = random * 1664525u + 1013904223u;
      if (_setjmp(m.scheduler) != 0) return;  // it fails
      land_copy(m.order == 0 ? 0 : m.order == 1 ? count - 1 : (random >> 8) % count);
      continue;
    }
    m.error = is_ready ? "threads wait for a barrier that nothing arrives at"
                       : "some threads of a warp are at a barrier or at an instruction of the whole warp, and others "
                         "are not";
    return;
  }
}

std::string run(const int64_t (&grid)[3], unsigned shared) {
  Machine& m = machine();
  const int64_t counts[3] = {grid[0] / m.cluster[0], grid[1], grid[2] / m.cluster[2]};
  const int64_t clusters = counts[0] * counts[1] * counts[2];
  for (int64_t i = 0; i < clusters; ++i) {
    const int64_t cluster = m.order == 1 ? clusters - 1 - i : i;
    m.first_block = {unsigned(cluster % counts[0]) * m.cluster[0], unsigned(cluster / counts[0] % counts[1]),
                     unsigned(cluster / counts[0] / counts[1]) * m.cluster[2]};
    m.declarations.clear();
    if (shared > 0) use_shared(0, shared, nullptr);
    run_cluster();
    if (m.error.empty()) continue;
    // What the fibers hold is given up: they start again.
    for (Fiber& fiber : m.fibers) fiber.started = false, fiber.copies.clear(), fiber.groups.clear();
    return std::string(m.kernel->name) + ", block " + std::to_string(blockIdx.x) + " " + std::to_string(blockIdx.y) +
           " " + std::to_string(blockIdx.z) + " of " + std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + "x" +
           std::to_string(grid[2]) + ": " + std::exchange(m.error, "");
  }
  return "";
}

}  // namespace

Registered::Registered(Kernel kernel) { machine().kernels.push_back(kernel); }

std::string launch(const ai3_args* args, const ai3_kernel* table, const char* name, const int64_t (&grid)[3],
                   unsigned threads, unsigned shared, const void* params, size_t params_bytes,
                   const unsigned (&cluster)[3]) {
  Machine& m = machine();
  const auto kernel =
      std::find_if(m.kernels.begin(), m.kernels.end(), [&](const Kernel& k) { return std::strcmp(k.name, name) == 0; });
  if (kernel == m.kernels.end()) return std::string("there is no kernel ") + name;
  const auto refused = [&](const std::string& what) { return std::string(name) + " is launched with " + what; };
  if (params_bytes != kernel->params || params_bytes > sizeof parameters)
    return refused("other parameters than it has");
  if (threads == 0 || threads > kernel->threads || threads > kMostThreads || threads % kWarp != 0)
    return refused(std::to_string(threads) + " threads, and is compiled for " + std::to_string(kernel->threads));
  const int64_t limits[] = {(int64_t{1} << 31) - 1, 65535, 65535};
  for (int d = 0; d < 3; ++d) {
    if (grid[d] < 1 || grid[d] > limits[d]) return refused("a grid of " + std::to_string(grid[d]) + " blocks");
  }
  // In KiB, of a block; one more is the system's.
  const int sm = args->sm;
  const unsigned most = sm == 75 ? 64 : sm == 80 || sm == 87 ? 163 : sm == 90 ? 227 : 99;
  if (shared > most * 1024) return refused(std::to_string(shared) + " bytes of shared memory");
  if (m.stacks == nullptr) {
    dl_iterate_phdr(find_image, nullptr);
    m.stacks = static_cast<unsigned char*>(mmap(nullptr, kMostBlocks * kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    m.fibers.resize(kMostBlocks * kMostThreads);
  }
  m.kernel = &*kernel, m.threads = threads;
  std::copy(cluster, cluster + 3, m.cluster);
  m.blocks = cluster[0] * cluster[1] * cluster[2];
  if (cluster[1] != 1 || m.blocks > kMostBlocks || grid[0] % cluster[0] != 0 || grid[2] % cluster[2] != 0)
    return refused("clusters that its grid is not of");
  std::memcpy(parameters, params, params_bytes);
  find_buffers(args, table);
  gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])}, blockDim = {threads, 1, 1};
  ++kernel->launches;
  return run(grid, shared);
}

std::string launch_error;

int launch_named(void* kernel, const int64_t (&grid)[3], const unsigned (&cluster)[3], unsigned threads,
                 unsigned shared, const void* params) {
  const auto& launched = *static_cast<const Launched*>(kernel);
  const auto& kernels = machine().kernels;
  const auto found =
      std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) { return k.name == launched.name; });
  const size_t bytes = found == kernels.end() ? 0 : found->params;
  launch_error =
      launch(launched.args, launched.table, launched.name.c_str(), grid, threads, shared, params, bytes, cluster);
  return launch_error.empty() ? 0 : 1;
}

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = thread_name(m.current) + " " + what;
  _longjmp(m.scheduler, 1);
}

void check(const void* address, size_t bytes, bool writes, bool aligned) {
  Machine& m = machine();
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at - reinterpret_cast<uintptr_t>(m.stacks) < kMostBlocks * kMostThreads * kStack) return;
  const char* verb = writes ? "writes " : "reads ";
  if (const uintptr_t offset = at - reinterpret_cast<uintptr_t>(arena); offset < sizeof arena) {
    if (aligned && at % bytes != 0) fail(verb + std::to_string(bytes) + " bytes of shared memory that are not aligned");
    return check_shared(offset, bytes, writes);
  }
  if (at >= m.image_begin && at < m.image_end) return;
  const Buffer* nearest = nullptr;
  for (const Buffer& b : m.buffers) {
    if (at >= b.begin && at + bytes <= b.end && (b.writable || !writes)) {
      if (aligned && at % bytes != 0)
        fail(verb + std::to_string(bytes) + " bytes of " + b.name + " that are not aligned");
      return;
    }
    if (nearest == nullptr || at + 4096 >= b.begin) nearest = at < b.end + 4096 ? &b : nearest;
  }
  std::string where = "an address that is no buffer's";
  if (nearest != nullptr) {
    const auto offset = static_cast<long long>(at - nearest->begin);
    where = "offset " + std::to_string(offset) + " of " + nearest->name + ", which has " +
            std::to_string(nearest->end - nearest->begin);
  }
  fail(verb + std::to_string(bytes) + " bytes at " + where);
}

void block_barrier() {
  machine().has_progressed = true;
  wait(State::kAtBlockBarrier);
}

unsigned current_thread() { return machine().current; }
void yield() { leave(); }
void wait_to_be_woken() {
  machine().has_progressed = true;
  wait(State::kAsleep);
}
void wake(unsigned thread) {
  machine().fibers[thread].state = State::kReady;
  machine().has_progressed = true;
}
void note_progress() { machine().has_progressed = true; }
bool copies_are_early() { return machine().early; }
unsigned current_block() { return machine().current / machine().threads; }
unsigned current_warp() { return threadIdx.x / kWarp; }
unsigned threads_of_cluster() { return machine().blocks * machine().threads; }
void check_arena(uint32_t begin, uint32_t bytes) {
  if (!is_shared(begin, bytes)) fail("has " + std::to_string(bytes) + " bytes of shared memory that is not its own");
}

void warp_barrier() {
  meet("__syncwarp", nullptr, [](void**) {});
}

void meet(const char* instruction, void* own, void (*compute)(void**)) {
  Machine& m = machine();
  Warp& warp = m.warps[m.current / kWarp];
  if (warp.arrived > 0 && std::strcmp(warp.instruction, instruction) != 0)
    fail(std::string("is at ") + instruction + ", and others of its warp are at " + warp.instruction);
  warp.instruction = instruction;
  warp.lanes[m.current % kWarp] = own;
  m.has_progressed = true;
  if (++warp.arrived < kWarp) return wait(State::kAtWarp);
  warp.arrived = 0;
  compute(warp.lanes);
  const unsigned first = m.current / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i) m.fibers[first + i].state = State::kReady;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Machine& m = machine();
  size_t end = 0;
  for (const Declaration& d : m.declarations) {
    if (d.key == key) return arena + own_arena() + d.begin;
    end = d.end + kGap;
  }
  const size_t begin = (end + alignment - 1) / alignment * alignment;
  if (begin + bytes > kArena || bytes > 48 * 1024) fail("has more than 48 KiB of static shared memory");
  use_shared(begin, begin + bytes, key);
  return arena + own_arena() + begin;
}

void* dynamic_shared(size_t) { return arena + own_arena(); }

uint32_t shared_address(const void* p) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(arena) - own_arena();
  if (offset >= kArena) fail("takes the shared address of memory that is not its block's");
  return uint32_t(offset);
}

uint32_t in_arena(uint32_t address) {
  if (address < kArena) return uint32_t(own_arena()) + address;
  const Machine& m = machine();
  const unsigned block = address / kOfBlock - 1, offset = address % kOfBlock;
  if (address < kOfBlock || block >= m.blocks || offset >= kArena)
    fail("has a shared address behind all shared memory");
  const auto first = m.fibers.begin() + std::ptrdiff_t(block * m.threads);
  if (std::all_of(first, first + std::ptrdiff_t(m.threads), [](const Fiber& f) { return f.state == State::kDone; }))
    fail("reaches into a block of its cluster that has ended");
  return block * uint32_t(kArena) + offset;
}

void* shared_pointer(uint32_t address) { return arena + in_arena(address); }
void* arena_pointer(uint32_t offset) { return arena + offset; }

void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes) {
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0 || to % bytes != 0) fail("copies 16 bytes that are not aligned");
  if (from_bytes > 0) check(from, from_bytes, false, false);
  const Copy copy{to, from, bytes, from_bytes};
  if (m.early) return complete(copy);
  m.fibers[m.current].copies.push_back(copy);
}

void commit_copies() {
  Fiber& fiber = machine().fibers[machine().current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void wait_copies(unsigned pending) { complete_groups(pending); }

}  // namespace ai3_emulation

extern "C" {

AI3_EXPORT void ai3_emulation_order(int order, int early) {
  ai3_emulation::machine().order = order;
  ai3_emulation::machine().early = early != 0;
}
// How often the i-th kernel has been launched, and its name; null behind the last.
AI3_EXPORT const char* ai3_emulation_kernel(int i, int64_t* launches) {
  const auto& kernels = ai3_emulation::machine().kernels;
  if (size_t(i) >= kernels.size()) return nullptr;
  *launches = kernels[i].launches;
  return kernels[i].name;
}

// What the compiler calls before every access (-fsanitize=thread).
#define AI3_ACCESSES(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { ai3_emulation::check(p, bytes, false, true); }           \
  void __tsan_write##bytes(void* p) { ai3_emulation::check(p, bytes, true, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { ai3_emulation::check(p, bytes, false, true); } \
  void __tsan_unaligned_write##bytes(void* p) { ai3_emulation::check(p, bytes, true, true); }
AI3_ACCESSES(1)
AI3_ACCESSES(2)
AI3_ACCESSES(4)
AI3_ACCESSES(8)
AI3_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { ai3_emulation::check(p, bytes, false, false); }
void __tsan_write_range(void* p, size_t bytes) { ai3_emulation::check(p, bytes, true, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
