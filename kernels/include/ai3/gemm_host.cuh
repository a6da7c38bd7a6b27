// The host's side of gemm_tile.cuh: packs the weights and launches what gemm_choice.cuh chooses.
#pragma once

#include <ai3/graph_edges.h>

#include <ai3/gemm_choice.cuh>

namespace ai3 {

inline size_t gemm_packed_bytes(const GemmShape& s) {
  if (s.args->dtype == AI3_FLOAT64) return 0;
  const int64_t parts = gemm_is_strict(s.args) ? 2 : 1;
  return size_t(s.groups * gemm_blocks(s) * parts * gemm_packed_columns(s) * 128);
}

inline int64_t gemm_pack_variant(const ai3_args* a) { return gemm_is_strict(a) ? 1 : 0; }

inline void gemm_pack(const GemmShape& s, void* dst) {
  const int64_t total = s.groups * gemm_blocks(s) * gemm_packed_columns(s) * 8;
  const GemmPackParams p{s.args->weight.data,
                         dst,
                         total,
                         int(s.columns),
                         int(s.channels),
                         int(s.kernel_h),
                         int(s.kernel_w),
                         int(gemm_packed_columns(s)),
                         int(gemm_blocks(s)),
                         gemm_one_tap(s),
                         int(gemm_tap_blocks(s)),
                         int(s.joined)};
  const char* name = gemm_element_bytes(s.args) == 2 ? "gemm_pack_float16"
                     : gemm_is_strict(s.args)        ? "gemm_pack_float32"
                                                     : "gemm_pack_tf32";
  cuda::launch(s.args, name, {cuda::ceil_div(total, 256)}, 256, 0, p);
}

// The driver's functions that say where the tensor memory accelerator finds a tensor.
struct TensorMaps {
  using Windows = int (*)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const int*, const int*,
                          uint32_t, uint32_t, const uint32_t*, int, int, int, int);
  using Tiled = int (*)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*,
                        int, int, int, int);
  static constexpr int kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3, kZeros = 0;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  Windows windows = reinterpret_cast<Windows>(dlsym(driver, "cuTensorMapEncodeIm2col"));
  Tiled tiled = reinterpret_cast<Tiled>(dlsym(driver, "cuTensorMapEncodeTiled"));

  // None with a driver older than CUDA 12.
  static const TensorMaps* get() {
    static const TensorMaps maps;
    return maps.windows == nullptr || maps.tiled == nullptr ? nullptr : &maps;
  }
  static int type_of(const ai3_args* a) {  // CUtensorMapDataType
    return a->dtype == AI3_FLOAT16 ? 6 : a->dtype == AI3_BFLOAT16 ? 9 : 7;
  }
};

// A matrix with `pixel` elements from a row to the next, of which `box_rows` rows of 128 bytes are copied at once.
inline bool encode_matrix(const ai3_args* a, const void* data, int64_t columns, int64_t rows, int64_t pixel,
                          int box_rows, void* map) {
  const TensorMaps* maps = TensorMaps::get();
  if (maps == nullptr) return false;
  const int64_t bytes = gemm_element_bytes(a);
  const uint64_t sizes[] = {uint64_t(columns), uint64_t(rows)}, stride = uint64_t(pixel * bytes);
  const uint32_t box[] = {uint32_t(128 / bytes), uint32_t(box_rows)}, ones[] = {1, 1};
  return maps->tiled(map, TensorMaps::type_of(a), 2, const_cast<void*>(data), sizes, &stride, box, ones,
                     TensorMaps::kNoInterleave, TensorMaps::kSwizzle128, TensorMaps::kPromote256,
                     TensorMaps::kZeros) == 0;
}

// The input: pixels, the windows of output pixels, or an image.
inline bool encode_input(const GemmShape& s, const GemmTile& tile, void* map) {
  const ai3_args* a = s.args;
  const int64_t bytes = gemm_element_bytes(a), channels = s.groups * s.channels;
  if (!s.has_window) return encode_matrix(a, a->input.data, channels, s.rows, s.in_pixel, tile.rows, map);
  const TensorMaps* maps = TensorMaps::get();
  if (maps == nullptr) return false;
  const auto block = uint32_t(128 / bytes);
  const auto pixel = uint64_t(s.in_pixel * bytes);
  const int64_t* in = a->input.size;
  const uint64_t sizes[] = {uint64_t(channels), uint64_t(in[3]), uint64_t(in[2]), uint64_t(in[0])};
  const uint64_t strides[] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
  if (tile.down > 0) {
    const GemmHalo halo = gemm_halo(s, tile);
    const uint32_t box[] = {block, uint32_t(halo.width), uint32_t(halo.height), 1}, ones[] = {1, 1, 1, 1};
    return maps->tiled(map, TensorMaps::type_of(a), 4, a->input.data, sizes, strides, box, ones,
                       TensorMaps::kNoInterleave, TensorMaps::kSwizzle128, TensorMaps::kPromote256,
                       TensorMaps::kZeros) == 0;
  }
  const int lower[] = {-int(a->pad_left), -int(a->pad_top)};
  const int upper[] = {int((a->output.size[3] - 1) * a->stride_w - a->pad_left - in[3] + 1),
                       int((a->output.size[2] - 1) * a->stride_h - a->pad_top - in[2] + 1)};
  const uint32_t steps[] = {1, uint32_t(a->stride_w), uint32_t(a->stride_h), 1};
  return maps->windows(map, TensorMaps::type_of(a), 4, a->input.data, sizes, strides, lower, upper, block,
                       uint32_t(tile.rows), steps, TensorMaps::kNoInterleave, TensorMaps::kSwizzle128,
                       TensorMaps::kPromote256, TensorMaps::kZeros) == 0;
}

inline int multiprocessors(int device) {
  using Ask = int (*)(int* value, int attribute, int device);
  static const auto ask = reinterpret_cast<Ask>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuDeviceGetAttribute"));
  constexpr int kMultiprocessorCount = 16, kOfAnH100 = 132;
  int count = 0;
  return ask != nullptr && ask(&count, kMultiprocessorCount, device) == 0 ? count : kOfAnH100;
}

// As cuda::launch, with the blocks along z as one cluster, which exchanges its sums, and begun while the kernel before
// it still runs: in a captured graph as soon as all blocks of that one have begun, in a stream when they end.
template <typename Params>
void launch_gemm(const ai3_args* args, const std::string& name, const cuda::Grid& grid, unsigned threads,
                 unsigned shared, const Params& params) {
  struct Attribute {
    int id, padding;
    unsigned value[16];
  } attributes[2] = {{6, 0, {1}}, {4, 0, {1, 1, unsigned(grid.z)}}};  // programmatic serialization, cluster dimension
  struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    unsigned count;
  } config{{unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)},
           {threads, 1, 1},
           shared,
           args->stream,
           attributes,
           grid.z > 1 ? 2u : 1u};

  using Launch = int (*)(const Config*, void* function, void** params, void** extra);
  static const Launch launch = reinterpret_cast<Launch>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuLaunchKernelEx"));
  std::string error;
  if (void* kernel = cuda::Code::get().kernel(args, name.c_str(), shared, error)) {
    void* values[] = {const_cast<Params*>(&params)};
    cuda::EdgesInto edges(args->stream);
    if (!cuda::Code::failed(launch(&config, kernel, values, nullptr), name.c_str(), error) &&
        !cuda::Code::failed(edges.become(cuda::kAfterTheStart), "changing a graph", error))
      return;
  }
  args->runtime->fail(args->runtime, error.c_str());
}

inline GemmParams gemm_params(const GemmShape& s) {
  const ai3_args* a = s.args;
  const int64_t part = 16 / gemm_element_bytes(a), block = part * 8;
  GemmParams p{};
  p.input = a->input.data, p.packed = a->packed, p.bias = a->bias, p.residual = a->residual.data;
  p.output = a->output.data;
  p.in_pixel = s.in_pixel, p.out_pixel = s.out_pixel;
  p.packed_group = int64_t(gemm_packed_bytes(s)) / s.groups;
  p.rows = int(s.rows), p.columns = int(s.columns), p.channels = int(s.channels);
  p.packed_columns = int(gemm_packed_columns(s)), p.blocks = int(gemm_blocks(s));
  p.groups = int(s.groups);
  p.height = p.width = p.out_pixels = p.out_width = p.out_height = 1;
  p.kernel_h = p.kernel_w = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  if (s.has_window) {
    p.height = int(a->input.size[2]), p.width = int(a->input.size[3]);
    p.out_width = int(a->output.size[3]), p.out_height = int(a->output.size[2]);
    p.out_pixels = p.out_height * p.out_width;
    p.kernel_h = int(a->kernel_h), p.kernel_w = int(a->kernel_w);
    p.stride_h = int(a->stride_h), p.stride_w = int(a->stride_w);
    p.dilation_h = int(a->dilation_h), p.dilation_w = int(a->dilation_w);
    p.pad_top = int(a->pad_top), p.pad_left = int(a->pad_left);
  }
  const int64_t taps = block / s.channels;
  p.one_tap = gemm_one_tap(s), p.tap_blocks = int(gemm_tap_blocks(s));
  p.channel_step = int(block % s.channels);
  p.column_step = int(taps % p.kernel_w), p.row_step = int(taps / p.kernel_w);
  p.activation = a->activation;
  p.is_clamp = a->activation <= AI3_RELU6;
  p.low = a->activation == AI3_IDENTITY ? -INFINITY : 0;
  p.high = a->activation == AI3_RELU6 ? 6 : INFINITY;
  p.pools = a->pools;
  p.prologue_scale = a->prologue_scale, p.prologue_shift = a->prologue_shift;
  p.prologue_low = a->prologue_activation == AI3_RELU ? 0 : -INFINITY;
  p.aligned = s.columns % part == 0 && s.out_pixel % part == 0 && is_aligned(p.output) && is_aligned(p.residual) &&
              is_aligned(p.bias);
  return p;
}

inline void run_gemm(const GemmShape& s, GemmChoice choice) {
  const ai3_args* a = s.args;
  GemmStreamParams p{gemm_params(s), {}, {}};
  const int64_t part = 16 / gemm_element_bytes(a);
  std::string name = std::string("gemm_") + gemm_math(a) + "_";
  const bool bulk = choice.tile->threads % 64 != 0, whole = s.channels % part == 0 && s.in_pixel % part == 0;
  if (!whole || !is_aligned(p.input)) {
    static constexpr GemmTile kGather{64, 64, 128, 3, "64x64_gather"};
    const int splits = choice.splits;
    choice = {};
    for (int resident = kGather.most_resident; choice.tile == nullptr; --resident) {
      choice = gemm_choice(s, kGather, splits, resident);
    }
  } else if (bulk) {
    p.is_matrix = !s.has_window;
    const bool streams = choice.tile->kind == GemmKind::kStream;
    const auto encode = [&](const void* data, void* map) {
      return encode_matrix(a, data, s.columns, s.rows, s.out_pixel, choice.tile->rows, map);
    };
    if (!encode_input(s, *choice.tile, p.tensor_map) || (streams && !encode(p.output, p.output_map)) ||
        (streams && p.residual != nullptr && !encode(p.residual, p.residual_map)))
      return a->runtime->fail(a->runtime, "encoding the tensor map failed");
    if (choice.tile->down > 0) {
      const GemmHalo halo = gemm_halo(s, *choice.tile);
      p.tiles_down = int(gemm_tiles_down(s, *choice.tile)), p.tiles_right = int(gemm_tiles_right(s, *choice.tile));
      p.halo_height = int(halo.height), p.halo_width = int(halo.width), p.halo_bytes = int(halo.bytes);
      p.halo_slots = choice.halos;
    }
  }
  name += choice.tile->name;
  p.stages = choice.stages, p.slots = choice.slots, p.ahead = choice.ahead, p.barriers = choice.barriers;
  p.column_tiles = int(cuda::ceil_div(s.columns, choice.tile->columns));
  int64_t row_tiles = gemm_row_tiles(s, *choice.tile);
  if (choice.tile->kind == GemmKind::kResident || choice.tile->kind == GemmKind::kStream) {
    p.tiles = int(row_tiles);
    const int64_t columns = int64_t(p.column_tiles) * s.groups;
    row_tiles = std::min(row_tiles, std::max<int64_t>(1, multiprocessors(a->device) / columns));
  }
  const cuda::Grid grid{row_tiles * p.column_tiles * s.groups, 1, choice.splits};
  const auto threads = unsigned(choice.tile->threads), shared = unsigned(choice.shared);
  const GemmParams& of_most = p;
  if (a->sm != 90) {
    cuda::launch(a, name.c_str(), grid, threads, shared, of_most);
  } else if (choice.tile->kind != GemmKind::kStream) {
    launch_gemm(a, name, grid, threads, shared, of_most);
  } else {
    launch_gemm(a, name, grid, threads, shared, p);
  }
}

inline void run_gemm(const GemmShape& s) {
  const ai3_args* a = s.args;
  if (a->dtype != AI3_FLOAT64) return run_gemm(s, choose_gemm(s));
  GemmParams p = gemm_params(s);
  constexpr int kTile = 64;
  p.packed = a->weight.data;
  p.column_tiles = int(cuda::ceil_div(s.columns, kTile));
  cuda::launch(a, "gemm_float64", {cuda::ceil_div(s.rows, kTile) * p.column_tiles * s.groups}, 256, 0, p);
}

// Nanoseconds, by rates measured on an H100 and an H200.
inline double gemm_cost(const GemmShape& s) {
  if (s.args->dtype != AI3_FLOAT64) return choose_gemm(s).time;
  return 3000 +
         2.0 * double(s.rows) * double(s.columns * s.groups) * double(s.channels * s.kernel_h * s.kernel_w) / 1e4;
}

}  // namespace ai3
