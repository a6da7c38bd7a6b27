// Winograd's minimal filtering F(4x4, 3x3), and F(2x2, 3x3) where its smaller weights or tiles pay.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308; a block of
// tiles goes through all stages while in cache, after Gelashvili et al., "L3 Fusion", arXiv 1912.02165.
//
// A tile is an MxM square of outputs. Stages for a block of tiles: the input transform writes V
// [frequency][tile][channel]; for each panel of output channels (M+2)^2 matrix products give [frequency][tile][channel
// of the panel], which the output transform turns into pixels. Threads own blocks of tiles, or, where blocks are few or
// the weights large, share one block's V and split the panels. Weights are packed
// [group][panel][frequency][channel][channel of the panel].
#include "ai3/winograd.h"

#include <algorithm>
#include <cassert>

#include "ai3/kernel.h"

namespace {

using ai3::ceil_div;
using ai3::Vec;
using ai3::Winograd;

constexpr int64_t kChannels = 64;             // channels transformed at once, so that a tile stays in L1
constexpr int64_t kBlockBytes = 1000 * 1024;  // of V and the products, which stay in L2
constexpr int64_t kMaxBlock = 96;             // tiles
constexpr double kStreamedBytes = 12e6;       // of weights that are better read once by all threads together

template <typename T>
constexpr int64_t kPanel = ai3::kPanelVectors * ai3::kLanes<T>;

struct Shape {
  int64_t m, frequencies;
  int64_t channels, filters;  // of one group
  int64_t panels, width;      // of one group; width of all panels, of which the last may be half as wide as the others
  int64_t tile_rows, tile_columns, tiles;
  int64_t block, blocks;  // tiles of a block
  int64_t row, plane;     // strides of V between tiles and frequencies
  int64_t result_plane;   // stride of a panel's products between frequencies
  int64_t v_elements, result_elements, slots;
  bool share;  // threads share V and split the panels
};

// The faster of F(4x4) and F(2x2) for one image, as the packed weights should not depend on the batch. F(4x4) computes
// less but has 36 / 16 the weights, which it must read even for few tiles.
int64_t tile_size(const ai3_args* a) {
  int64_t best = 4;
  double best_time = 0;
  for (const int64_t m : {4, 2}) {
    const double tiles = double(ceil_div(a->output.size[2], m)) * double(ceil_div(a->output.size[3], m));
    const double time = double((m + 2) * (m + 2)) * std::max(2 * tiles / 100, 4.0 / 20);
    if (m == 4 || time < best_time) best = m, best_time = time;
  }
  return best;
}

Shape shape_of(const ai3_args* a) {
  const int64_t bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, lanes = ai3::kVectorBytes / bytes;
  const int64_t panel = ai3::kPanelVectors * lanes;
  const int64_t threads = a->runtime ? std::max(1, a->runtime->num_threads) : 1;
  Shape s{};
  s.m = tile_size(a);
  s.frequencies = (s.m + 2) * (s.m + 2);
  s.channels = a->weight.size[1];
  s.filters = a->weight.size[0] / std::max<int64_t>(1, a->groups);
  s.panels = ceil_div(s.filters, panel);
  s.width = ceil_div(s.filters, panel / 2) * (panel / 2);
  s.tile_rows = ceil_div(a->output.size[2], s.m);
  s.tile_columns = ceil_div(a->output.size[3], s.m);
  s.tiles = a->output.size[0] * s.tile_rows * s.tile_columns;
  // Rows are padded and planes are an odd number of cache lines apart, as powers of two would share cache sets.
  s.row = ceil_div(s.channels, lanes) * lanes + lanes;
  const int64_t tile_bytes = s.frequencies * (s.row + panel) * bytes;
  const int64_t fit = std::max<int64_t>(2 * ai3::kBlockRows, std::min(kBlockBytes / tile_bytes, kMaxBlock));
  const double weight_bytes = double(s.frequencies) * double(s.channels) * double(s.filters) * double(bytes);
  s.share = threads > 1 && a->groups == 1 && s.panels >= threads &&
            (s.tiles < threads * ai3::kBlockRows || weight_bytes > kStreamedBytes);
  s.blocks =
      s.share ? ceil_div(s.tiles, kMaxBlock) : std::min(s.tiles, ceil_div(ceil_div(s.tiles, fit), threads) * threads);
  s.block = ceil_div(s.tiles, std::max<int64_t>(1, s.blocks));
  s.blocks = ceil_div(s.tiles, std::max<int64_t>(1, s.block));
  s.plane = (s.block * s.row / lanes | 1) * lanes;
  s.result_plane = s.block * panel + lanes;
  s.v_elements = s.frequencies * s.plane;
  s.result_elements = s.frequencies * s.result_plane;
  s.slots = std::min(threads, s.share ? s.panels : s.blocks);
  return s;
}

// What one parallel_for works on.
struct Work {
  const ai3_args* args;
  Shape shape;
  int64_t block;  // with a shared V
};

template <typename T>
T* shared_v(const Work& w) {
  return static_cast<T*>(w.args->workspace);
}

template <typename T>
T* slot_results(const Work& w, int64_t slot) {
  const Shape& s = w.shape;
  return static_cast<T*>(w.args->workspace) + (s.share ? s.v_elements : s.slots * s.v_elements) +
         slot * s.result_elements;
}

// The image and the first output pixel of a tile.
struct Place {
  int64_t image, row, column;
};
Place place_of(const Shape& s, int64_t tile) {
  const int64_t in_image = tile % (s.tile_rows * s.tile_columns);
  return {tile / (s.tile_rows * s.tile_columns), in_image / s.tile_columns * s.m, in_image % s.tile_columns * s.m};
}

template <int M, typename T>
void transform_input(const Work& w, int64_t group, int64_t tile, T* v) {
  constexpr int size = M + 2;
  using V = Vec<T>;
  alignas(64) static constexpr T zeros[kChannels] = {};
  alignas(64) T half[size][size][kChannels], padded[size][kChannels] = {};
  const ai3_args* a = w.args;
  const Shape& s = w.shape;
  const int64_t pixel = a->input.size[1], height = a->input.size[2], width = a->input.size[3];
  const Place place = place_of(s, tile);
  const int64_t row = place.row - a->pad_top, column = place.column - a->pad_left;
  const T* image = static_cast<const T*>(a->input.data) + place.image * height * width * pixel + group * s.channels;
  for (int64_t first = 0; first < s.channels; first += kChannels) {
    const int64_t count = std::min(kChannels, s.channels - first);
    for (int64_t j = 0; j < size; ++j) {
      const T* from[size];
      for (int64_t i = 0; i < size; ++i) {
        const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
        from[i] = inside ? image + ((row + i) * width + column + j) * pixel + first : zeros;
        // Whole vectors must not read beyond the last channel.
        if (count % ai3::kLanes<T>) from[i] = std::copy(from[i], from[i] + count, padded[i]) - count;
      }
      for (int64_t c = 0; c < count; c += ai3::kLanes<T>) {
        V d[size], out[size];
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) d[i] = ai3::load<V>(from[i] + c);
        Winograd<M>::template input<T>(d, out);
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) ai3::store(&half[i][j][c], out[i]);
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      T* to = v + i * size * s.plane + first;
      for (int64_t c = 0; c < count; c += ai3::kLanes<T>) {
        V d[size], out[size];
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) d[j] = ai3::load<V>(&half[i][j][c]);
        Winograd<M>::template input<T>(d, out);
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) ai3::store(to + j * s.plane + c, out[j]);
      }
    }
  }
}

template <int M, typename T>
void transform_output(const Work& w, int64_t filter, int64_t filters, int64_t width, int64_t tile, const T* results) {
  constexpr int size = M + 2;
  using V = Vec<T>;
  constexpr int64_t lanes = ai3::kLanes<T>;
  alignas(64) T half[M][size][kPanel<T>];
  const ai3_args* a = w.args;
  const int64_t* out_size = a->output.size;
  const Place place = place_of(w.shape, tile);
  const T* bias = a->bias ? static_cast<const T*>(a->bias) + filter : nullptr;
  for (int64_t j = 0; j < size; ++j) {
    const T* from = results + j * w.shape.result_plane;
    for (int64_t c = 0; c < width; c += lanes) {
      V m[size], out[M];
#pragma GCC unroll 8
      for (int i = 0; i < size; ++i) m[i] = ai3::load<V>(from + i * size * w.shape.result_plane + c);
      Winograd<M>::template output<T>(m, out);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) ai3::store(&half[i][j][c], out[i]);
    }
  }
  const int64_t rows = std::min<int64_t>(M, out_size[2] - place.row);
  const int64_t columns = std::min<int64_t>(M, out_size[3] - place.column);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pixel = (place.image * out_size[2] + place.row + i) * out_size[3] + place.column;
    for (int64_t c = 0; c < filters; c += lanes) {
      const int64_t count = std::min(lanes, filters - c);
      V m[size], out[M];
#pragma GCC unroll 8
      for (int j = 0; j < size; ++j) m[j] = ai3::load<V>(&half[i][j][c]);
      Winograd<M>::template output<T>(m, out);
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) {
        if (j >= columns) continue;
        const int64_t at = (pixel + j) * out_size[1] + filter + c;
        V y = out[j];
        if (bias) y += ai3::load_part<V>(bias + c, count);
        if (a->residual.data) y += ai3::load_part<V>(static_cast<const T*>(a->residual.data) + at, count);
        ai3::store_part(static_cast<T*>(a->output.data) + at, a->activation == AI3_RELU ? ai3::relu(y) : y, count);
      }
    }
  }
}

// One panel of output channels for a block of tiles, from V to pixels.
template <int M, typename T>
void run_panel(const Work& w, int64_t group, int64_t panel, int64_t first, int64_t tiles, const T* v, T* results) {
  const Shape& s = w.shape;
  const int64_t filter = panel * kPanel<T>, width = std::min(kPanel<T>, s.width - filter), step = s.channels * width;
  const T* weights = static_cast<const T*>(w.args->packed) + s.frequencies * s.channels * (group * s.width + filter);
  for (int64_t f = 0; f < s.frequencies; ++f, weights += step) {
    T* products = results + f * s.result_plane;
    if (width == kPanel<T>)
      ai3::multiply_tiles<ai3::kPanelVectors>(v + f * s.plane, s.row, weights, s.channels, tiles, products, kPanel<T>);
    else
      ai3::multiply_tiles<ai3::kPanelVectors / 2>(v + f * s.plane, s.row, weights, s.channels, tiles, products,
                                                  kPanel<T>);
  }
  const int64_t filters = std::min(kPanel<T>, s.filters - filter);
  for (int64_t t = 0; t < tiles; ++t)
    transform_output<M>(w, group * s.filters + filter, filters, width, first + t, results + t * kPanel<T>);
}

template <int M, typename T>
void run_blocks(void* arg, int64_t begin, int64_t end) {
  const Work& w = *static_cast<const Work*>(arg);
  const Shape& s = w.shape;
  for (int64_t slot = begin; slot < end; ++slot) {
    T *v = shared_v<T>(w) + slot * s.v_elements, *results = slot_results<T>(w, slot);
    for (int64_t block = slot * s.blocks / s.slots; block < (slot + 1) * s.blocks / s.slots; ++block) {
      const int64_t first = block * s.block, tiles = std::min(s.block, s.tiles - first);
      for (int64_t group = 0; group < w.args->groups; ++group) {
        for (int64_t t = 0; t < tiles; ++t) transform_input<M>(w, group, first + t, v + t * s.row);
        for (int64_t panel = 0; panel < s.panels; ++panel) run_panel<M>(w, group, panel, first, tiles, v, results);
      }
    }
  }
}

template <int M, typename T>
void share_input(void* arg, int64_t begin, int64_t end) {
  const Work& w = *static_cast<const Work*>(arg);
  for (int64_t t = begin; t < end; ++t)
    transform_input<M>(w, 0, w.block * w.shape.block + t, shared_v<T>(w) + t * w.shape.row);
}

template <int M, typename T>
void share_panels(void* arg, int64_t begin, int64_t end) {
  const Work& w = *static_cast<const Work*>(arg);
  const Shape& s = w.shape;
  const int64_t first = w.block * s.block, tiles = std::min(s.block, s.tiles - first);
  for (int64_t slot = begin; slot < end; ++slot)
    for (int64_t panel = slot * s.panels / s.slots; panel < (slot + 1) * s.panels / s.slots; ++panel)
      run_panel<M>(w, 0, panel, first, tiles, shared_v<T>(w), slot_results<T>(w, slot));
}

template <int M, typename T>
void run_tiles(const ai3_args* a) {
  Work w{a, shape_of(a), 0};
  if (!w.shape.share) return a->runtime->parallel_for(w.shape.slots, run_blocks<M, T>, &w);
  for (; w.block < w.shape.blocks; ++w.block) {
    a->runtime->parallel_for(std::min(w.shape.block, w.shape.tiles - w.block * w.shape.block), share_input<M, T>, &w);
    a->runtime->parallel_for(w.shape.slots, share_panels<M, T>, &w);
  }
}

// G g G^T in double precision, zero for the output channels that fill up the last panel.
template <int M, typename T>
void pack_tiles(const ai3_args* a, T* dst) {
  constexpr int size = M + 2;
  constexpr auto& g = Winograd<M>::kMatrices.g;
  const Shape s = shape_of(a);
  for (int64_t item = 0; item < a->groups * s.panels; ++item) {
    const int64_t filter = item % s.panels * kPanel<T>, width = std::min(kPanel<T>, s.width - filter);
    const int64_t filters = std::min(width, s.filters - filter), step = s.channels * width;
    const T* weight = static_cast<const T*>(a->weight.data) + (item / s.panels * s.filters + filter) * s.channels * 9;
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t k = 0; k < width; ++k) {
        double half[size][3] = {};
        for (int i = 0; i < size && k < filters; ++i)
          for (int j = 0; j < 3; ++j)
            for (int r = 0; r < 3; ++r) half[i][j] += g[i][r] * double(weight[(k * s.channels + c) * 9 + r * 3 + j]);
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < size; ++j)
            dst[(i * size + j) * step + c * width + k] =
                T(half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2]);
      }
    }
    dst += s.frequencies * step;
  }
}

const char* supports(const ai3_args* a) {
  if (a->kernel_h != 3 || a->kernel_w != 3) return "needs a 3x3 kernel";
  if (a->stride_h != 1 || a->stride_w != 1) return "needs stride 1";
  if (a->dilation_h != 1 || a->dilation_w != 1) return "needs dilation 1";
  return ai3::conv_supports(a);
}

double cost(const ai3_args* a) {
  const Shape s = shape_of(a);
  const double bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, f = double(s.frequencies) * double(a->groups);
  const double channels = double(s.channels), width = double(s.width), tiles = double(s.tiles);
  // A register block of products costs 8 steps to begin and store; the transforms do more than move their elements.
  const double products = 2 * f * tiles * (channels + 8) * width / 80 * bytes / 4;
  return products + f * channels * width * bytes / 20 + f * tiles * (double(s.row) + width) * bytes / 15;
}

size_t workspace_bytes(const ai3_args* a) {
  const Shape s = shape_of(a);
  const int64_t elements = (s.share ? 1 : s.slots) * s.v_elements + s.slots * s.result_elements;
  return size_t(elements * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

size_t packed_bytes(const ai3_args* a) {
  const Shape s = shape_of(a);
  return size_t(a->groups * s.frequencies * s.channels * s.width * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

int64_t pack_variant(const ai3_args* a) { return tile_size(a); }

void pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && !supports(a));
  const bool four = tile_size(a) == 4;
  if (a->dtype == AI3_FLOAT64)
    (four ? pack_tiles<4, double> : pack_tiles<2, double>)(a, static_cast<double*>(dst));
  else
    (four ? pack_tiles<4, float> : pack_tiles<2, float>)(a, static_cast<float*>(dst));
}

void run(const ai3_args* a) {
  assert(a->input.data && a->output.data && a->packed && a->workspace && a->runtime && !supports(a));
  assert(a->weight.size[1] > 0 && a->groups > 0 && a->input.size[1] == a->weight.size[1] * a->groups);
  assert(!a->has_bias == !a->bias && !a->has_residual == !a->residual.data);
  const bool four = tile_size(a) == 4;
  if (a->dtype == AI3_FLOAT64)
    (four ? run_tiles<4, double> : run_tiles<2, double>)(a);
  else
    (four ? run_tiles<4, float> : run_tiles<2, float>)(a);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "winograd",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .pack_variant = pack_variant,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
