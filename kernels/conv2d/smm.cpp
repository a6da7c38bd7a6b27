// SMM-Conv: scalar-matrix multiplications accumulated over shifted slices of the packed input, without im2col.
// Source: Ofir and Ben-Artzi, "SMM-Conv: Scalar Matrix Multiplication with Zero Packing for Accelerated Convolution",
// CVPR Workshops 2022, arXiv 2411.15659. Extended to strides, dilation and groups, and blocked for registers.
//
// For an input channel and a horizontal offset s the columns that the outputs need are copied once, with the padding's
// zeros. The vertical offset r costs nothing: its slice is the same copy, begun some rows later. With stride_h > 1 the
// copied rows are ordered by row % stride_h, which keeps each slice contiguous. Then each weight times its slice is
// added to the output plane; a block of output channels and pixels stays in registers over a block of input channels,
// whose sum is then added to the output: the partial sums also keep the rounding error small.
#include <algorithm>
#include <cassert>

#include "ai3/conv2d.h"

namespace {

using ai3::ceil_div;
using ai3::Vec;

// Rows of the register block (output channels) and its vectors: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kRows = ai3::kVectorBytes == 64 ? 8 : 4, kVectors = 3;
constexpr int64_t kTaps = 128, kBufferBytes = 384 * 1024;

struct Shape {
  int64_t channels, filters, block, blocks;  // of one group; output channels come in `blocks` blocks of `block`
  int64_t channel_block, band_rows, bands;   // input channels and output rows of one buffer
  int64_t phases, phase_rows, plane;         // plane: elements of one (channel, s) copy
  int64_t items, slots, slot_bytes;          // (image, band, group, block) items are shared out to the slots
};

Shape shape_of(const ai3_args* a) {
  const int64_t rows = std::max<int64_t>(1, a->output.size[2]), columns = std::max<int64_t>(1, a->output.size[3]);
  const int64_t groups = std::max<int64_t>(1, a->groups), bytes = a->dtype == AI3_FLOAT64 ? 8 : 4;
  Shape s{};
  s.channels = a->weight.size[1];
  s.filters = a->weight.size[0] / groups;
  s.block = s.filters >= kRows / 2 ? kRows : 1;
  s.blocks = ceil_div(s.filters, s.block);
  s.channel_block = std::max<int64_t>(1, std::min(s.channels, kTaps / std::max<int64_t>(1, a->kernel_h * a->kernel_w)));
  const int64_t reach = std::max<int64_t>(0, (a->kernel_h - 1) * a->dilation_h),
                stride = std::max<int64_t>(1, a->stride_h);
  s.phases = std::min(stride, reach + 1);
  const int64_t row_bytes = s.channel_block * a->kernel_w * s.phases * columns * bytes;
  const int64_t fit = kBufferBytes / std::max<int64_t>(1, row_bytes) - reach / stride;
  s.bands = ceil_div(rows, std::max<int64_t>(1, std::min(rows, fit)));
  s.band_rows = ceil_div(rows, s.bands);
  s.phase_rows = s.band_rows + reach / stride;
  s.plane = s.phases * s.phase_rows * columns;
  s.items = a->output.size[0] * s.bands * groups * s.blocks;
  s.slots = std::min<int64_t>(a->runtime ? a->runtime->num_threads : 1, s.items);
  // The table of the slices' offsets, the copies, and what the last vector reads beyond them.
  s.slot_bytes = a->kernel_h * 8 + s.channel_block * a->kernel_w * s.plane * bytes + kVectors * ai3::kVectorBytes;
  s.slot_bytes = ceil_div(s.slot_bytes, 64) * 64;
  return s;
}

// Copies the columns that offset s needs of the padded input rows first, first + 1, ... of one channel.
template <typename T>
void pack_slice(const ai3_args* a, const Shape& shape, const T* image, int64_t s, int64_t first, T* dst) {
  const int64_t height = a->input.size[2], width = a->input.size[3], columns = a->output.size[3], step = a->stride_w;
  const int64_t shift = s * a->dilation_w - a->pad_left;
  const int64_t begin = std::min(columns, shift < 0 ? ceil_div(-shift, step) : 0);
  const int64_t end = std::max(begin, width > shift ? std::min(columns, ceil_div(width - shift, step)) : 0);
  for (int64_t phase = 0; phase < shape.phases; ++phase) {
    for (int64_t i = 0; i < shape.phase_rows; ++i, dst += columns) {
      const int64_t h = first + i * a->stride_h + phase;
      if (h < 0 || h >= height) {
        std::fill(dst, dst + columns, T(0));
        continue;
      }
      const T* row = image + h * width + shift;
      std::fill(dst, dst + begin, T(0));
      if (step == 1) {
        for (int64_t q = begin; q < end; ++q) dst[q] = row[q];
      } else {
        for (int64_t q = begin; q < end; ++q) dst[q] = row[q * step];
      }
      std::fill(dst + end, dst + columns, T(0));
    }
  }
}

// The work of one register block: `rows` output channels (of at most Rows) and `count` pixels.
template <typename T>
struct Tile {
  const T *slices, *weights, *bias, *residual;
  T* out;
  const int64_t* offsets;
  int64_t slice_count, kernel_h, plane, out_stride, rows, count;
  bool first, last, relu;  // first and last block of input channels
};

template <int Rows, int N, typename T>
void accumulate(const Tile<T>& t) {
  using V = Vec<T>;
  constexpr int lanes = ai3::kLanes<T>;
  V acc[Rows][N] = {};
  const T *slice = t.slices, *w = t.weights;
  for (int64_t i = 0; i < t.slice_count; ++i, slice += t.plane) {
    for (int64_t r = 0; r < t.kernel_h; ++r, w += Rows) {
      V x[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) x[n] = ai3::load<V>(slice + t.offsets[r] + n * lanes);
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) {
        const V weight = ai3::broadcast<V>(w[k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[k][n] += weight * x[n];
      }
    }
  }
  V sums[Rows][N];
#pragma GCC unroll 8
  for (int k = 0; k < Rows; ++k) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[k][n] = acc[k][n];
  }
  for (int64_t k = 0; k < t.rows; ++k) {
    for (int64_t done = 0; done < t.count; done += lanes) {
      const int64_t at = k * t.out_stride + done, count = t.count - done;
      V sum = sums[k][done / lanes];
      if (!t.first)
        sum += ai3::load_part<V>(t.out + at, count);
      else if (t.bias)
        sum += ai3::broadcast<V>(t.bias[k]);
      if (t.last && t.residual) sum += ai3::load_part<V>(t.residual + at, count);
      ai3::store_part(t.out + at, t.last && t.relu ? ai3::relu(sum) : sum, count);
    }
  }
}

// Output channel blocks [block_begin, block_end) of one (image, band, group).
template <int Rows, typename T>
void run_unit(const ai3_args* a, const Shape& s, int64_t unit, int64_t block_begin, int64_t block_end, void* scratch) {
  const int64_t *in = a->input.size, *size = a->output.size, columns = size[3], out_plane = size[2] * columns;
  const int64_t group = unit % a->groups, band = unit / a->groups % s.bands, image = unit / a->groups / s.bands;
  const int64_t row = band * s.band_rows, pixels = std::min(s.band_rows, size[2] - row) * columns;
  const auto* offsets = static_cast<const int64_t*>(scratch);
  T* slices = reinterpret_cast<T*>(static_cast<char*>(scratch) + a->kernel_h * 8);
  const T* input = static_cast<const T*>(a->input.data) + (image * in[1] + group * s.channels) * in[2] * in[3];
  for (int64_t c = 0; c < s.channels; c += s.channel_block) {
    const int64_t channels = std::min(s.channel_block, s.channels - c), slice_count = channels * a->kernel_w;
    for (int64_t i = 0; i < slice_count; ++i)
      pack_slice(a, s, input + (c + i / a->kernel_w) * in[2] * in[3], i % a->kernel_w, row * a->stride_h - a->pad_top,
                 slices + i * s.plane);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t filter = group * s.filters + block * Rows;
      const int64_t at = (image * size[1] + filter) * out_plane + row * columns;
      const int64_t weights = ((group * s.blocks + block) * s.channels + c) * a->kernel_w * a->kernel_h * Rows;
      Tile<T> t{slices,
                static_cast<const T*>(a->packed) + weights,
                a->bias ? static_cast<const T*>(a->bias) + filter : nullptr,
                a->residual.data ? static_cast<const T*>(a->residual.data) + at : nullptr,
                static_cast<T*>(a->output.data) + at,
                offsets,
                slice_count,
                a->kernel_h,
                s.plane,
                out_plane,
                std::min<int64_t>(Rows, s.filters - block * Rows),
                0,
                c == 0,
                c + channels == s.channels,
                a->activation == AI3_RELU};
      for (int64_t left = pixels; left > 0; left -= t.count) {
        const bool wide = left > (kVectors - 1) * ai3::kLanes<T>;
        t.count = std::min<int64_t>(left, (wide ? kVectors : 1) * ai3::kLanes<T>);
        if (wide)
          accumulate<Rows, kVectors>(t);
        else
          accumulate<Rows, 1>(t);
        t.slices += t.count, t.out += t.count;
        if (t.residual) t.residual += t.count;
      }
    }
  }
}

template <typename T>
void run_slots(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const Shape s = shape_of(a);
  for (int64_t slot = begin; slot < end; ++slot) {
    char* scratch = static_cast<char*>(a->workspace) + slot * s.slot_bytes;
    for (int64_t r = 0; r < a->kernel_h; ++r) {
      const int64_t h = r * a->dilation_h;
      reinterpret_cast<int64_t*>(scratch)[r] = (h % a->stride_h * s.phase_rows + h / a->stride_h) * a->output.size[3];
    }
    const int64_t last = (slot + 1) * s.items / s.slots;
    for (int64_t item = slot * s.items / s.slots; item < last;) {
      const int64_t unit = item / s.blocks, block = item % s.blocks;
      const int64_t block_end = std::min(s.blocks, block + last - item);
      (s.block == kRows ? run_unit<kRows, T> : run_unit<1, T>)(a, s, unit, block, block_end, scratch);
      item += block_end - block;
    }
  }
}

// [group][block][channel][s][r][output channel of the block], zero where a block has fewer.
template <typename T>
void pack_weights(const ai3_args* a, T* dst) {
  const Shape s = shape_of(a);
  const int64_t window = a->kernel_h * a->kernel_w, filter_size = s.channels * window;
  for (int64_t block = 0; block < a->groups * s.blocks; ++block) {
    const int64_t first = block % s.blocks * s.block, rows = std::min(s.block, s.filters - first);
    const T* filter = static_cast<const T*>(a->weight.data) + (block / s.blocks * s.filters + first) * filter_size;
    for (int64_t i = 0; i < filter_size; ++i) {
      const int64_t column = i % window / a->kernel_h, row = i % a->kernel_h;
      const int64_t from = i / window * window + row * a->kernel_w + column;
      for (int64_t k = 0; k < s.block; ++k) *dst++ = k < rows ? filter[k * filter_size + from] : T(0);
    }
  }
}

double cost(const ai3_args* a) {
  const int64_t *out = a->output.size, *w = a->weight.size;
  const double taps = double(w[1]) * double(a->kernel_h) * double(a->kernel_w);
  const double flops = 2.0 * double(out[0]) * double(out[1]) * double(out[2]) * double(out[3]) * taps;
  const Shape s = shape_of(a);
  // A register block of one output channel waits for its loads, the others for the multiply-adds.
  const double bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, rate = (s.block == 1 ? 25 : 60) * 4 / bytes;
  const double copies = double(a->input.size[0]) * double(a->input.size[1]) * double(a->kernel_w) * double(s.bands);
  return flops / rate * double(s.blocks * s.block) / double(std::max<int64_t>(1, s.filters)) +
         copies * double(s.plane) * bytes / 10 + double(out[1]) * taps * bytes / 20;
}

size_t workspace_bytes(const ai3_args* a) {
  const Shape s = shape_of(a);
  return size_t(s.slots * s.slot_bytes);
}

size_t packed_bytes(const ai3_args* a) {
  const Shape s = shape_of(a);
  const int64_t filters = a->groups * s.blocks * s.block;
  return size_t(filters * s.channels * a->kernel_h * a->kernel_w * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

void pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && !ai3::conv_supports(a));
  if (a->dtype == AI3_FLOAT64)
    pack_weights(a, static_cast<double*>(dst));
  else
    pack_weights(a, static_cast<float*>(dst));
}

void run(const ai3_args* a) {
  assert(a->input.data && a->output.data && a->packed && a->workspace && a->runtime && !ai3::conv_supports(a));
  assert(a->weight.size[1] > 0 && a->groups > 0 && a->stride_h > 0 && a->stride_w > 0);
  assert(!a->has_bias == !a->bias && !a->has_residual == !a->residual.data);
  const auto body = a->dtype == AI3_FLOAT64 ? run_slots<double> : run_slots<float>;
  a->runtime->parallel_for(shape_of(a).slots, body, const_cast<ai3_args*>(a));
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "smm",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_EPILOGUE,
                           .supports = ai3::conv_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
