// A model of what sm_90a has besides (hopper.h), by the PTX ISA. Copies of the tensor memory accelerator and bulk
// copies are done as late as nothing else goes on, in an order of the test's choice, or at once; until then what they
// are to write must not be read.
#include <ai3_emulation/hopper.h>
#include <ai3_emulation/order.h>
#include <ai3_emulation/ptx.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace ai3_emulation {

namespace {

struct Barrier {
  int expected, pending;
  int64_t bytes = 0;  // still to come
  uint32_t phase = 0;
  Clock told, known;  // by those that have arrived, and when the last phase ended
};
constexpr uint64_t kMark = 0x6261727269657221;  // what lies where a barrier is

struct Bulk {
  uint32_t to, bytes, barrier;
  std::function<void(uint32_t to)> land;
  Clock known;
};

struct Hopper {
  std::map<uint32_t, Barrier> barriers;
  std::vector<Bulk> copies;
  std::map<unsigned, std::vector<std::function<void()>>> stores;  // of each thread
  std::map<int, std::vector<unsigned>> at_named;
  // Of each 16 bytes the thread, and one more, that wrote them without a fence since; and where each thread did.
  std::vector<uint16_t> unfenced;
  std::map<unsigned, std::vector<size_t>> written;
};
Hopper& hopper() {
  static Hopper* const h = new Hopper();
  return *h;
}

Barrier& barrier_at(uint32_t address) {
  const uint32_t at = in_arena(address);
  const auto found = hopper().barriers.find(at);
  if (found == hopper().barriers.end()) fail("uses a barrier that has not been initialized");
  if (std::memcmp(arena_pointer(at), &kMark, 8) != 0) fail("uses a barrier whose memory was written");
  return found->second;
}

void advance(Barrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.expected, b.phase ^= 1;
  b.known = b.told;
  note_progress();
}

void arrive(uint32_t address, int64_t bytes) {
  Barrier& b = barrier_at(address);
  if (b.pending == 0) fail("arrives at a barrier more often than is waited for");
  --b.pending, b.bytes += bytes;
  tell(b.told);
  note_progress();
  advance(b);
}

// Hands over a copy of so many bytes.
void start(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(uint32_t to)> land) {
  barrier_at(barrier);
  to = in_arena(to);
  if (to % 128 != 0 && bytes >= 128) fail("copies to shared memory that is not aligned");
  check_arena(to, bytes);
  std::memset(arena_pointer(to), 0xff, bytes);  // from now on anything may be there
  std::vector<uint16_t>& unfenced = hopper().unfenced;
  const size_t first = std::min(size_t(to / 16), unfenced.size());
  std::fill_n(unfenced.begin() + std::ptrdiff_t(first), std::min(size_t(bytes / 16), unfenced.size() - first), 0);
  hopper().copies.push_back({to, bytes, in_arena(barrier), std::move(land), write_by_copy(to, bytes)});
  note_progress();
  if (copies_are_early()) land_copy(0);
}

// Of a tensor, as the driver's encoding of it is.
struct TensorMap {
  char* data;
  int64_t size[4], stride[4];  // elements; bytes
  int box[4], step[4], lower[2], upper[2];
  int rank, element, pixels;  // pixels of a copy of windows; 0 of others
};
// Of the launch to come, by what lies in the kernel's parameters.
std::map<uint64_t, TensorMap>& tensor_maps() {
  static auto* const maps = new std::map<uint64_t, TensorMap>();
  return *maps;
}
uint64_t next_map = 0;

const TensorMap& map_of(const void* map) {
  uint64_t words[2];
  std::memcpy(words, map, 16);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("uses a tensor map that is not aligned");
  const auto found = tensor_maps().find(words[1]);
  if (words[0] != kMark || found == tensor_maps().end()) fail("uses a tensor map that is none");
  return found->second;
}

int encode(void* map, TensorMap m) {
  if (reinterpret_cast<uintptr_t>(m.data) % 16 != 0) return 1;
  for (int d = 1; d < m.rank; ++d) {
    if (m.stride[d] % 16 != 0 || m.size[d] <= 0) return 1;
  }
  const uint64_t words[2] = {kMark, ++next_map};
  std::memset(map, 0, 128);
  std::memcpy(map, words, 16);
  tensor_maps()[next_map] = m;
  return 0;
}

int encode_tiled(void* map, int type, uint32_t rank, void* data, const uint64_t* sizes, const uint64_t* strides,
                 const uint32_t* box, const uint32_t* steps, int, int swizzle, int, int) {
  TensorMap m{};
  m.data = static_cast<char*>(data), m.rank = int(rank), m.element = type == 7 ? 4 : 2;
  if (swizzle != 3) return 1;
  for (int d = 0; d < m.rank; ++d) {
    m.size[d] = int64_t(sizes[d]), m.stride[d] = d == 0 ? m.element : int64_t(strides[d - 1]);
    m.box[d] = int(box[d]);
    if (steps[d] != 1) return 1;
    if (m.box[d] < 1 || m.box[d] > 256) return 1;
  }
  return m.box[0] * m.element == 128 ? encode(map, m) : 1;
}

int encode_windows(void* map, int type, uint32_t rank, void* data, const uint64_t* sizes, const uint64_t* strides,
                   const int* lower, const int* upper, uint32_t channels, uint32_t pixels, const uint32_t* steps, int,
                   int swizzle, int, int) {
  TensorMap m{};
  m.data = static_cast<char*>(data), m.rank = int(rank), m.element = type == 7 ? 4 : 2, m.pixels = int(pixels);
  for (int d = 0; d < m.rank; ++d) {
    m.size[d] = int64_t(sizes[d]), m.stride[d] = d == 0 ? m.element : int64_t(strides[d - 1]);
    m.step[d] = int(steps[d]);
  }
  for (int d = 0; d < 2; ++d) m.lower[d] = lower[d], m.upper[d] = upper[d];
  return swizzle == 3 && int(channels) * m.element == 128 ? encode(map, m) : 1;
}

int device_attribute(int* value, int, int) {
  *value = 3;  // multiprocessors: blocks that compute tile after tile have several each
  return 0;
}

// cuLaunchKernelEx's configuration.
struct Attribute {
  int id, padding;
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};
int launch_ex(const Config* config, void* kernel, void** params, void**) {
  constexpr int kClusterDimension = 4;
  unsigned cluster[3] = {1, 1, 1};
  for (unsigned i = 0; i < config->count; ++i) {
    if (config->attributes[i].id == kClusterDimension) std::copy_n(config->attributes[i].value, 3, cluster);
  }
  const int result = launch_named(kernel, {config->grid[0], config->grid[1], config->grid[2]}, cluster,
                                  config->block[0], config->shared, params[0]);
  tensor_maps().clear();
  return result;
}

// A row of 128 bytes from memory, zeros outside of the tensor; `at` counts rows of the tile.
void land_row(const TensorMap& m, uint32_t to, int at, int64_t channel, int64_t x, int64_t y, int64_t image) {
  const int64_t place[4] = {channel, x, y, image};
  const int count = 128 / m.element;
  bool inside = true;
  for (int d = 1; d < m.rank; ++d) inside &= place[d] >= 0 && place[d] < m.size[d];
  const char* from = m.data;
  for (int d = 1; d < m.rank; ++d) from += place[d] * m.stride[d];
  for (int i = 0; i < count; ++i) {
    char element[4] = {};
    if (inside && channel + i >= 0 && channel + i < m.size[0]) {
      check(from + (channel + i) * m.element, size_t(m.element), false, false);
      std::memcpy(element, from + (channel + i) * m.element, size_t(m.element));
    }
    std::memcpy(arena_pointer(permuted(to + uint32_t(at * 128 + i * m.element))), element, size_t(m.element));
  }
}

}  // namespace

void* driver_function(const char* name) {
  static const std::map<std::string, void*> known = {
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(encode_tiled)},
      {"cuTensorMapEncodeIm2col", reinterpret_cast<void*>(encode_windows)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(device_attribute)},
      {"cuLaunchKernelEx", reinterpret_cast<void*>(launch_ex)}};
  const auto found = known.find(name);
  return found == known.end() ? nullptr : found->second;
}

void start_cluster() {
  hopper() = {};
  forget_products();
  begin_order(threads_of_cluster() / 32);
}

std::string end_cluster() {
  Hopper& h = hopper();
  if (!h.copies.empty()) return "a copy to shared memory is not waited for";
  if (has_products()) return "a product is not waited for";
  for (const auto& [address, barrier] : h.barriers) {
    if (std::memcmp(arena_pointer(address), &kMark, 8) != 0) return "something was written where a barrier is";
  }
  for (const auto& [thread, stores] : h.stores) {
    if (!stores.empty()) return "a copy from shared memory is not waited for";
  }
  return "";
}

bool has_barriers() { return !hopper().barriers.empty(); }
size_t copies_under_way() { return hopper().copies.size(); }

void land_copy(size_t number) {
  Hopper& h = hopper();
  const Bulk copy = h.copies[number];
  h.copies.erase(h.copies.begin() + std::ptrdiff_t(number));
  copy.land(copy.to);
  Barrier& b = h.barriers.at(copy.barrier);
  b.bytes -= copy.bytes;
  join(b.told, copy.known);
  advance(b);
}

// Shared memory that is read.
void check_landed(size_t begin, size_t bytes) {
  for (const Bulk& copy : hopper().copies) {
    if (begin < copy.to + copy.bytes && copy.to < begin + bytes)
      fail("reads shared memory that a copy is still to write");
  }
}

void note_written(size_t begin, size_t bytes) {
  if (!has_barriers()) return;
  Hopper& h = hopper();
  const size_t end = (begin + bytes + 15) / 16;
  if (h.unfenced.size() < end) h.unfenced.resize(end);
  for (size_t i = begin / 16; i < end; ++i) {
    h.unfenced[i] = uint16_t(current_thread() + 1);
    h.written[current_thread()].push_back(i);
  }
}

// Shared memory that wgmma or the tensor memory accelerator reads.
void check_fenced(size_t begin, size_t bytes) {
  const std::vector<uint16_t>& unfenced = hopper().unfenced;
  for (size_t i = begin / 16; i < std::min((begin + bytes + 15) / 16, unfenced.size()); ++i) {
    if (unfenced[i] != 0)
      fail("reads shared memory that thread " + std::to_string(unfenced[i] - 1) +
           " wrote, without a fence between them");
  }
}

namespace ptx {

void griddepcontrol_wait() {}
void fence_proxy_async_shared_cta() {
  Hopper& h = hopper();
  for (const size_t i : std::exchange(h.written[current_thread()], {})) {
    if (h.unfenced[i] == current_thread() + 1) h.unfenced[i] = 0;
  }
}
void fence_mbarrier_init_release_cluster() {}
void wgmma_fence_sync_aligned() {}
void prefetch_tensormap(const void* map) { map_of(map); }
void barrier_cluster_arrive_release() {}

namespace {

void meet_at(int barrier, unsigned threads) {
  std::vector<unsigned>& there = hopper().at_named[barrier];
  there.push_back(current_thread());
  if (there.size() < threads) return wait_to_be_woken();
  meet_in_order(there);
  for (const unsigned thread : std::exchange(there, {})) wake(thread);
}

}  // namespace

void barrier_cluster_wait_acquire() { meet_at(-1, threads_of_cluster()); }
void bar_sync(int barrier, int threads) { meet_at(int(current_block()) * 16 + barrier, unsigned(threads)); }

void mbarrier_init_shared_cta_b64(uint32_t barrier, int arrivals) {
  const uint32_t at = in_arena(barrier);
  check_arena(at, 8);
  if (at % 8 != 0) fail("initializes a barrier that is not aligned");
  std::memcpy(arena_pointer(at), &kMark, 8);
  hopper().barriers[at] = {arrivals, arrivals};
}
void mbarrier_arrive_shared_cta_b64(uint32_t barrier) { arrive(barrier, 0); }
void mbarrier_arrive_expect_tx_shared_cta_b64(uint32_t barrier, int bytes) { arrive(barrier, bytes); }
void mbarrier_try_wait_parity_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  const Barrier& b = barrier_at(barrier);
  done = b.phase != parity;
  if (done) return learn(b.known);
  yield();
}
void selp_u32(uint32_t& to, uint32_t a, uint32_t b, bool first) { to = first ? a : b; }
void ld_shared_v4_b32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t from) {
  const uint32_t* const place = static_cast<uint32_t*>(shared_pointer(from));
  check(place, 16, false, true);
  x = place[0], y = place[1], z = place[2], w = place[3];
}
void mapa_shared_cluster_u32(uint32_t& to, uint32_t address, uint32_t rank) { to = (rank + 1) * kOfBlock + address; }
void ld_shared_cluster_v4_f32(float& x, float& y, float& z, float& w, uint32_t from) {
  uint32_t words[4];
  ld_shared_v4_b32(words[0], words[1], words[2], words[3], from);
  x = std::bit_cast<float>(words[0]), y = std::bit_cast<float>(words[1]);
  z = std::bit_cast<float>(words[2]), w = std::bit_cast<float>(words[3]);
}

void cp_async_bulk_prefetch_L2_global(const void* from, int bytes) { check(from, size_t(bytes), false, false); }
void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t to, const void* from, int bytes,
                                                                    uint32_t barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) fail("copies bytes that are not aligned");
  check(from, size_t(bytes), false, false);
  start(to, uint32_t(bytes), barrier, [=](uint32_t at) { std::memcpy(arena_pointer(at), from, size_t(bytes)); });
}
void cp_async_bulk_tensor_2d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                   int column, int row,
                                                                                   uint32_t barrier) {
  const TensorMap m = map_of(map);
  if (m.rank != 2 || m.pixels != 0) fail("copies a matrix by a tensor map that is of another tensor");
  start(to, uint32_t(m.box[1] * 128), barrier, [=](uint32_t at) {
    for (int i = 0; i < m.box[1]; ++i) land_row(m, at, i, column, row + i, 0, 0);
  });
}
void cp_async_bulk_tensor_4d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                   int channel, int x, int y, int image,
                                                                                   uint32_t barrier) {
  const TensorMap m = map_of(map);
  if (m.rank != 4 || m.pixels != 0 || m.box[3] != 1) fail("copies an image by a tensor map that is of another tensor");
  start(to, uint32_t(m.box[1] * m.box[2] * 128), barrier, [=](uint32_t at) {
    for (int i = 0; i < m.box[2]; ++i) {
      for (int j = 0; j < m.box[1]; ++j) land_row(m, at, i * m.box[1] + j, channel, x + j, y + i, image);
    }
  });
}
void cp_async_bulk_tensor_4d_shared_cluster_global_im2col_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                     int channel, int x, int y,
                                                                                     int image, uint32_t barrier,
                                                                                     unsigned short right,
                                                                                     unsigned short down) {
  const TensorMap m = map_of(map);
  if (m.pixels == 0) fail("copies windows by a tensor map that is of none");
  start(to, uint32_t(m.pixels * 128), barrier, [=](uint32_t at) {
    int64_t left = x, top = y, of = image;
    for (int i = 0; i < m.pixels; ++i) {
      land_row(m, at, i, channel, left + right, top + down, of);
      left += m.step[1];
      if (left <= m.size[1] - 1 + m.upper[0]) continue;
      left = m.lower[0], top += m.step[2];
      if (top <= m.size[2] - 1 + m.upper[1]) continue;
      top = m.lower[1], ++of;
    }
  });
}

void cp_async_bulk_tensor_2d_global_shared_cta_tile_bulk_group(const void* map, int column, int row, uint32_t from) {
  const TensorMap m = map_of(map);
  const uint32_t begin = in_arena(from);
  check_arena(begin, uint32_t(m.box[1] * 128));
  check_fenced(begin, size_t(m.box[1] * 128));
  check_order(begin, size_t(m.box[1] * 128), false);
  hopper().stores[current_thread()].push_back([=] {
    check_order(begin, size_t(m.box[1] * 128), false);
    for (int i = 0; i < m.box[1]; ++i) {
      for (int e = 0; e < m.box[0]; ++e) {
        if (row + i >= m.size[1] || column + e >= m.size[0]) continue;
        char* const to = m.data + (row + i) * m.stride[1] + (column + e) * m.element;
        check(to, size_t(m.element), true, false);
        std::memcpy(to, arena_pointer(permuted(begin + uint32_t(i * 128 + e * m.element))), size_t(m.element));
      }
    }
  });
}
void cp_async_bulk_commit_group() {}
void cp_async_bulk_wait_group_read(int) {
  yield();  // what is written there meanwhile is what goes
  for (const auto& store : std::exchange(hopper().stores[current_thread()], {})) store();
}

}  // namespace ptx
}  // namespace ai3_emulation
