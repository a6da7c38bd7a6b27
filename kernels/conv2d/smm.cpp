// SMM-Conv: scalar-matrix multiplications accumulated over shifted slices of the packed input, without im2col.
// Source: Ofir and Ben-Artzi, "SMM-Conv: Scalar Matrix Multiplication with Zero Packing for Accelerated Convolution",
// CVPR Workshops 2022, arXiv 2411.15659. Extended to strides, dilation and groups, and blocked for registers.
//
// For an input channel and a horizontal offset s the columns that the outputs need are copied once, with the padding's
// zeros. The vertical offset r costs nothing: its slice is the same copy, begun some rows later. With stride_h > 1 the
// copied rows are ordered by row % stride_h, which keeps each slice contiguous. Then each weight times its slice is
// added to the output plane; a block of output channels and pixels stays in registers over a block of input channels,
// whose sum is then added to the output: the partial sums also keep the rounding error small.
#include "ai3/smm.h"

#include <algorithm>
#include <cassert>

#include "ai3/conv2d.h"

namespace {

using ai3::ceil_div;
using ai3::kSmmRows;
using ai3::kSmmVectors;
using ai3::SmmShape;

constexpr int64_t kTaps = 128, kBufferBytes = 384 * 1024;

SmmShape shape_of(const ai3_args* a) {
  const int64_t rows = std::max<int64_t>(1, a->output.size[2]), columns = std::max<int64_t>(1, a->output.size[3]);
  const int64_t groups = std::max<int64_t>(1, a->groups), bytes = a->dtype == AI3_FLOAT64 ? 8 : 4;
  SmmShape s{};
  s.channels = a->weight.size[1];
  s.filters = a->weight.size[0] / groups;
  s.block = s.filters >= kSmmRows / 2 ? kSmmRows : 1;
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
  s.slot_bytes = a->kernel_h * 8 + s.channel_block * a->kernel_w * s.plane * bytes + kSmmVectors * ai3::kVectorBytes;
  s.slot_bytes = ceil_div(s.slot_bytes, 64) * 64;
  return s;
}

// Output channel blocks [block_begin, block_end) of one (image, band, group).
template <int Rows, typename T>
void run_unit(const ai3_args* a, const SmmShape& s, int64_t unit, int64_t block_begin, int64_t block_end,
              void* scratch) {
  const int64_t *in = a->input.size, *size = a->output.size, columns = size[3], out_plane = size[2] * columns;
  const int64_t group = unit % a->groups, band = unit / a->groups % s.bands, image = unit / a->groups / s.bands;
  const int64_t row = band * s.band_rows, pixels = std::min(s.band_rows, size[2] - row) * columns;
  const auto* offsets = static_cast<const int64_t*>(scratch);
  T* slices = reinterpret_cast<T*>(static_cast<char*>(scratch) + a->kernel_h * 8);
  const T* input = static_cast<const T*>(a->input.data) + (image * in[1] + group * s.channels) * in[2] * in[3];
  for (int64_t c = 0; c < s.channels; c += s.channel_block) {
    const int64_t channels = std::min(s.channel_block, s.channels - c), slice_count = channels * a->kernel_w;
    for (int64_t i = 0; i < slice_count; ++i)
      ai3::smm_pack_slice(a, s, input + (c + i / a->kernel_w) * in[2] * in[3], i % a->kernel_w,
                          row * a->stride_h - a->pad_top, slices + i * s.plane);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t filter = group * s.filters + block * Rows;
      const int64_t at = (image * size[1] + filter) * out_plane + row * columns;
      const int64_t weights = ((group * s.blocks + block) * s.channels + c) * a->kernel_w * a->kernel_h * Rows;
      ai3::SmmTile<T> t{slices,
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
                        a->activation};
      for (int64_t left = pixels; left > 0; left -= t.count) {
        const bool wide = left > (kSmmVectors - 1) * ai3::kLanes<T>;
        t.count = std::min<int64_t>(left, (wide ? kSmmVectors : 1) * ai3::kLanes<T>);
        if (wide)
          ai3::smm_accumulate<Rows, kSmmVectors>(t);
        else
          ai3::smm_accumulate<Rows, 1>(t);
        t.slices += t.count, t.out += t.count;
        if (t.residual) t.residual += t.count;
      }
    }
  }
}

template <typename T>
void run_slots(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const SmmShape s = shape_of(a);
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
      (s.block == kSmmRows ? run_unit<kSmmRows, T> : run_unit<1, T>)(a, s, unit, block, block_end, scratch);
      item += block_end - block;
    }
  }
}

double cost(const ai3_args* a) {
  const int64_t *out = a->output.size, *w = a->weight.size;
  const double taps = double(w[1]) * double(a->kernel_h) * double(a->kernel_w);
  const double flops = 2.0 * double(out[0]) * double(out[1]) * double(out[2]) * double(out[3]) * taps;
  const SmmShape s = shape_of(a);
  // A register block of one output channel waits for its loads, the others for the multiply-adds.
  const double bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, rate = (s.block == 1 ? 25 : 60) * 4 / bytes;
  const double copies = double(a->input.size[0]) * double(a->input.size[1]) * double(a->kernel_w) * double(s.bands);
  return flops / rate * double(s.blocks * s.block) / double(std::max<int64_t>(1, s.filters)) +
         copies * double(s.plane) * bytes / 10 + double(out[1]) * taps * bytes / 20;
}

size_t workspace_bytes(const ai3_args* a) {
  const SmmShape s = shape_of(a);
  return size_t(s.slots * s.slot_bytes);
}

size_t packed_bytes(const ai3_args* a) {
  const SmmShape s = shape_of(a);
  const int64_t filters = a->groups * s.blocks * s.block;
  return size_t(filters * s.channels * a->kernel_h * a->kernel_w * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

void pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && !ai3::conv_supports(a));
  if (a->dtype == AI3_FLOAT64)
    ai3::smm_pack_weights(a, shape_of(a), static_cast<double*>(dst));
  else
    ai3::smm_pack_weights(a, shape_of(a), static_cast<float*>(dst));
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
