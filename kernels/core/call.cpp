// One call of an algorithm: layout, output, workspace, the profiler's label, and the epilogue it leaves to us.
#include <ai3/activation.h>

#include <atomic>
#include <mutex>

#include "device.h"

namespace ai3 {
namespace {

using torch::headeronly::MemoryFormat;

thread_local bool is_alone = false;

void split_ranges(int64_t count, ai3_range_fn body, void* arg) {
  if (is_alone) {
    if (count > 0) body(arg, 0, count);
    return;
  }
  struct Task {
    ai3_range_fn body;
    void* arg;
  } task{body, arg};
  AI3_CALL(torch_parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* ctx) {
        const Task* t = static_cast<const Task*>(ctx);
        t->body(t->arg, begin, end);
      },
      &task));
}

// Kept between calls: fresh pages for every call would cost more than many a layer.
void* workspace(size_t bytes) {
  thread_local Buffer buffer;
  thread_local size_t held = 0;
  if (bytes > held) {
    buffer.reset();
    buffer = allocate(bytes);
    held = bytes;
  }
  return buffer.get();
}

// What an algorithm runs on, and what it says if it fails.
struct Runtime : ai3_runtime {
  explicit Runtime(int32_t threads) : ai3_runtime{threads, split_ranges, set_failure} {}

  static void set_failure(const ai3_runtime* self, const char* message) {
    Runtime* runtime = const_cast<Runtime*>(static_cast<const Runtime*>(self));
    const std::lock_guard lock(runtime->mutex);
    if (!runtime->failed) runtime->failure = message;
    runtime->failed = true;
  }

  std::mutex mutex;
  bool failed = false;
  std::string failure;
};

class ProfilerLabel {
 public:
  explicit ProfilerLabel(const char* name) { AI3_CALL(aoti_record_function_start(name, nullptr, nullptr, 0, &guard_)); }
  ~ProfilerLabel() { aoti_record_function_end(guard_); }
  ProfilerLabel(const ProfilerLabel&) = delete;
  ProfilerLabel& operator=(const ProfilerLabel&) = delete;

 private:
  AtenRecordFunctionHandle guard_;
};

// An image is [N,C,H,W]; a 3-d tensor is an image of batch 1.
std::array<int64_t, 4> image_sizes(const Tensor& t) {
  const auto s = t.sizes();
  if (s.size() == 3) return {1, s[0], s[1], s[2]};
  return {s[0], s[1], s[2], s[3]};
}

std::array<int64_t, 4> image_strides(const std::array<int64_t, 4>& s, bool channels_last) {
  if (channels_last) return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
  // As ATen: a size of 0 counts as 1.
  auto n = [](int64_t v) { return v > 0 ? v : 1; };
  return {n(s[1]) * n(s[2]) * n(s[3]), n(s[2]) * n(s[3]), n(s[3]), 1};
}

}  // namespace

bool image_is(const Tensor& t, bool channels_last) {
  const auto sizes = image_sizes(t);
  const auto expected = image_strides(sizes, channels_last);
  const auto strides = t.strides();
  const int shift = static_cast<int>(4 - strides.size());
  for (int d = shift; d < 4; ++d) {
    if (sizes[d] != 1 && strides[d - shift] != expected[d]) return false;
  }
  return true;
}

Tensor image_as(const Tensor& t, bool channels_last) {
  if (image_is(t, channels_last)) return t;
  if (!channels_last) return torch::stable::contiguous(t);
  const Tensor batched = t.dim() == 3 ? torch::stable::unsqueeze(t, 0) : t;
  return torch::stable::contiguous(batched, MemoryFormat::ChannelsLast);
}

ai3_tensor image_view(const Tensor& t, bool channels_last, bool writable) {
  ai3_tensor view{};
  view.data = writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  view.ndim = 4;
  const auto sizes = image_sizes(t);
  const auto strides = image_strides(sizes, channels_last);
  for (int d = 0; d < 4; ++d) {
    view.size[d] = sizes[d];
    view.stride[d] = strides[d];
  }
  return view;
}

namespace {

// Elements between the pixels of an image that is some of the channels of a larger channels_last one; 0 for another.
int64_t pixel_stride(const Tensor& t) {
  if (t.dim() != 4 || t.numel() == 0) return 0;
  const auto sizes = image_sizes(t), within = std::array<int64_t, 4>{sizes[0], 1, sizes[2], sizes[3]};
  const auto pixels = image_strides(within, true);
  for (const int d : {3, 2, 0}) {
    if (sizes[d] == 1) continue;
    const int64_t stride = t.stride(d) / pixels[d];
    const auto expected = image_strides({sizes[0], stride, sizes[2], sizes[3]}, true);
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] != 1 && t.stride(i) != expected[i]) return 0;
    }
    return stride >= sizes[1] ? stride : 0;
  }
  return 0;
}

// Fills in the input, which is copied where the algorithm does not take it as it lies; gives what holds its memory.
Tensor set_input(ai3_args& args, const LoadedKernel& kernel, const Tensor& input, bool channels_last) {
  AI3_CHECK(args.has_prologue == 0 || (kernel.table->flags & AI3_PROLOGUE) != 0, kernel.label,
            " cannot apply a batch norm to its input");
  set_device(args, kernel, input);
  const bool takes_slices = channels_last && (kernel.table->flags & AI3_STRIDED_INPUT) != 0;
  if (const int64_t stride = takes_slices ? pixel_stride(input) : 0; stride > 0) {
    args.input = image_view(input, true, false);
    const auto sizes = image_sizes(input);
    const auto strides = image_strides({sizes[0], stride, sizes[2], sizes[3]}, true);
    std::copy(strides.begin(), strides.end(), args.input.stride);
    return input;
  }
  const Tensor in = image_as(input, channels_last);
  args.input = image_view(in, channels_last, false);
  return in;
}

// Gives what keeps the weight alive.
PreparedWeight set_weight(ai3_args& args, const LoadedKernel& kernel, int64_t id, const WeightSource* source) {
  if (source == nullptr) return {};
  PreparedWeight prepared = prepare_weight(kernel, id, args, *source);
  args.weight.data = const_cast<void*>(prepared.weight);
  args.bias = prepared.bias;
  args.packed = prepared.packed;
  args.prologue_scale = prepared.prologue_scale;
  args.prologue_shift = prepared.prologue_shift;
  return prepared;
}

template <typename T>
void add_and_activate(int64_t count, void* out, const void* residual, ai3_activation activation) {
  struct Task {
    T* out;
    const T* residual;
    ai3_activation activation;
  } task{static_cast<T*>(out), static_cast<const T*>(residual), activation};
  AI3_CALL(torch_parallel_for(
      0, count, 16384,
      [](int64_t begin, int64_t end, void* ctx) {
        const Task& t = *static_cast<const Task*>(ctx);
        for (int64_t i = begin; i < end; i += kLanes<T>) {
          Vec<T> value = load_part<Vec<T>>(t.out + i, end - i);
          if (t.residual != nullptr) value += load_part<Vec<T>>(t.residual + i, end - i);
          store_part(t.out + i, activate(value, t.activation), end - i);
        }
      },
      &task));
}

std::atomic<int64_t> epilogue_of_device{0};

// Adds the residual and applies the activation behind an algorithm on a GPU that does not.
void add_and_activate_on_device(const ai3_args& args, int64_t elements) {
  const LoadedKernel& kernel = find_kernel(epilogue_of_device);
  ai3_args flat = args;
  // Rows of channels, where the output is some of an image's; else one.
  const bool sliced =
      args.output.ndim == 4 && args.output.stride[1] == 1 && args.output.stride[3] > args.output.size[1];
  const int64_t columns = sliced ? args.output.size[1] : elements;
  for (ai3_tensor* t : {&flat.output, &flat.residual}) {
    if (t->data == nullptr) continue;
    *t = {t->data, 2, {elements / columns, columns}, {sliced ? t->stride[3] : columns, 1}};
  }
  kernel.table->run(&flat);
}

void run_kernel(const LoadedKernel& kernel, int64_t id, ai3_args& args, int64_t elements) {
  const ai3_kernel* table = kernel.table;
  const OnDevice guard(args);
  const std::shared_ptr<void> plan = prepare_plan(kernel, id, args);
  args.plan = plan.get();
  Runtime runtime(is_alone ? 1 : static_cast<int32_t>(torch::stable::get_num_threads()));
  args.runtime = &runtime;
  // An activation comes before a pooling, so that what pools applies it, whatever else it leaves to others.
  const bool applies = args.pools != 0 || table->fuses == nullptr || table->fuses(&args) != 0;
  const bool has_epilogue = (table->flags & AI3_EPILOGUE) != 0 && applies;
  ai3_args plain = args;
  if (!has_epilogue) {
    plain.residual = ai3_tensor{};
    plain.has_residual = 0;
    plain.activation = AI3_IDENTITY;
  }
  OptionalTensor scratch;  // of a GPU; on the CPU the thread keeps it
  if (table->workspace_bytes != nullptr) {
    const size_t bytes = table->workspace_bytes(&plain);
    if (!kernel.is_cuda) {
      plain.workspace = workspace(bytes);
    } else if (bytes > 0) {
      scratch = device_bytes(args, bytes);
      plain.workspace = scratch->mutable_data_ptr();
    }
  }
  table->run(&plain);
  AI3_CHECK(!runtime.failed, kernel.label, ": ", runtime.failure);
  if (has_epilogue || (args.has_residual == 0 && args.activation == AI3_IDENTITY)) return;
  if (kernel.is_cuda) {
    add_and_activate_on_device(args, elements);
    AI3_CHECK(!runtime.failed, kernel.label, ": its epilogue: ", runtime.failure);
  } else {
    (args.dtype == AI3_FLOAT64 ? add_and_activate<double> : add_and_activate<float>)(elements, args.output.data,
                                                                                     args.residual.data,
                                                                                     args.activation);
  }
}

}  // namespace

OneThread::OneThread() : alone_before_(is_alone), gradients_before_(aoti_torch_grad_mode_is_enabled()) {
  is_alone = true;
  aoti_torch_grad_mode_set_enabled(false);
}

OneThread::~OneThread() {
  is_alone = alone_before_;
  aoti_torch_grad_mode_set_enabled(gradients_before_);
}

Tensor empty_image(const Tensor& like, const std::array<int64_t, 4>& sizes, bool channels_last) {
  const bool batched = like.dim() == 4;
  const std::array<int64_t, 4> strides = image_strides(sizes, batched && channels_last);
  const size_t skipped = batched ? 0 : 1;
  int32_t dtype = 0;
  AI3_CALL(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(place_of(like), dtype, std::span(sizes).subspan(skipped), std::span(strides).subspan(skipped));
}

ai3_dtype dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return AI3_FLOAT32;
    case ScalarType::Double:
      return AI3_FLOAT64;
    case ScalarType::Half:
      return AI3_FLOAT16;
    case ScalarType::BFloat16:
      return AI3_BFLOAT16;
    default:
      return AI3_OTHER;
  }
}

void check_supported(const LoadedKernel& kernel, const ai3_args& args) {
  const char* reason = kernel.table->supports(&args);
  AI3_CHECK(reason == nullptr, kernel.label, " cannot run here: ", reason);
}

Tensor run_image(int64_t id, ai3_args args, const Tensor& input, int64_t out_channels, int64_t out_h, int64_t out_w,
                 bool channels_last, const WeightSource* weight, const OptionalTensor& residual) {
  const LoadedKernel& kernel = find_kernel(id);
  const ProfilerLabel label(kernel.label.c_str());
  const uint32_t flags = kernel.table->flags;
  AI3_CHECK((flags & (AI3_NCHW | AI3_NHWC)) != 0, kernel.label, ": its table names no layout");
  // NHWC where the algorithm takes both and the caller wants that, or where it takes nothing else.
  const bool nhwc = (flags & AI3_NHWC) != 0 && (channels_last || (flags & AI3_NCHW) == 0);
  const std::array<int64_t, 4> sizes = {image_sizes(input)[0], out_channels, out_h, out_w};
  Tensor result = empty_image(input, sizes, channels_last);

  const Tensor in = set_input(args, kernel, input, nhwc);
  const bool direct_output = image_is(result, nhwc);
  Tensor out = direct_output ? result : empty_image(in, sizes, nhwc);
  if (!direct_output && !image_is(out, nhwc)) {
    // A 3-d result asked of a channels_last algorithm: compute it as a batch of one.
    out = empty_image(torch::stable::unsqueeze(in, 0), sizes, nhwc);
  }
  args.output = image_view(out, nhwc, true);
  OptionalTensor extra;
  if (residual) {
    extra = image_as(*residual, nhwc);
    args.residual = image_view(*extra, nhwc, false);
    args.has_residual = 1;
  }
  check_supported(kernel, args);
  if (result.numel() == 0) return result;
  const PreparedWeight prepared = set_weight(args, kernel, id, weight);
  run_kernel(kernel, id, args, result.numel());
  if (!direct_output) torch::stable::copy_(result, out.dim() == result.dim() ? out : torch::stable::squeeze(out, 0));
  return result;
}

void run_image_into(const char* op, int64_t id, ai3_args args, const Tensor& input, const Tensor& image,
                    int64_t channel, int64_t out_channels, int64_t out_h, int64_t out_w, const WeightSource* weight,
                    bool adds) {
  const LoadedKernel& kernel = find_kernel(id);
  const ProfilerLabel label(kernel.label.c_str());
  if (adds) {
    AI3_CHECK((kernel.table->flags & AI3_RESIDUAL_IN_PLACE) != 0, op, ": ", kernel.label,
              " cannot add to what is there");
    AI3_CHECK(image.size(1) == out_channels, op, ": adds to a whole image only, and this one has ", image.size(1),
              " channels, not ", out_channels);
  } else {
    AI3_CHECK((kernel.table->flags & AI3_STRIDED_OUTPUT) != 0, op, ": ", kernel.label,
              " cannot write into some channels of a larger image");
  }
  AI3_CHECK(input.dim() == 4 && image.dim() == 4, op, ": expected an input and an output of 4 dimensions, got ",
            input.dim(), " and ", image.dim());
  AI3_CHECK(image.scalar_type() == input.scalar_type(), op, ": output and input have different dtypes");
  const Place there = place_of(image), here = place_of(input);
  AI3_CHECK(there == here, op, ": the output is on ", name_of(there), ", and the input on ", name_of(here));
  AI3_CHECK(image.size(0) == input.size(0) && image.size(2) == out_h && image.size(3) == out_w, op, ": an output of ",
            image.size(0), " images of ", image.size(2), "x", image.size(3), " does not fit a result of ",
            input.size(0), " images of ", out_h, "x", out_w);
  AI3_CHECK(channel >= 0 && channel <= image.size(1) - out_channels, op, ": channels ", channel, " to ",
            channel + out_channels, " are not among the output's ", image.size(1));
  AI3_CHECK(image_is(image, true), op, ": the output is not dense in channels_last");

  const Tensor in = set_input(args, kernel, input, true);
  args.output = image_view(image, true, true);
  args.output.size[1] = out_channels;
  if (adds) {
    args.residual = args.output;
    args.has_residual = 1;
  }
  check_supported(kernel, args);
  const int64_t elements = image.size(0) * out_channels * out_h * out_w;
  if (elements == 0) return;
  args.output.data = static_cast<char*>(args.output.data) + channel * static_cast<int64_t>(image.element_size());
  const PreparedWeight prepared = set_weight(args, kernel, id, weight);
  run_kernel(kernel, id, args, elements);
}

Tensor run_pooled(int64_t id, int64_t pool, ai3_args args, const Tensor& input, int64_t out_channels, int64_t out_h,
                  int64_t out_w, const WeightSource& weight) {
  const LoadedKernel& kernel = find_kernel(id);
  if (kernel.table->pools != nullptr && input.dim() == 4 && input.numel() > 0) {
    const std::array<int64_t, 4> sizes = {input.size(0), out_channels, out_h, out_w};
    const auto strides = image_strides(sizes, true);
    ai3_args whole = args;
    const Tensor in = set_input(whole, kernel, input, true);
    whole.output.ndim = 4;
    std::copy(sizes.begin(), sizes.end(), whole.output.size);
    std::copy(strides.begin(), strides.end(), whole.output.stride);
    check_supported(kernel, whole);
    whole.pools = 1;
    if (kernel.table->pools(&whole) != 0) {
      const ProfilerLabel label(kernel.label.c_str());
      Tensor result = empty_image(input, {sizes[0], out_channels, out_h / 2, out_w / 2}, true);
      whole.output.data = result.mutable_data_ptr();
      const PreparedWeight prepared = set_weight(whole, kernel, id, &weight);
      run_kernel(kernel, id, whole, result.numel());
      return result;
    }
  }
  const Tensor image = run_image(id, args, input, out_channels, out_h, out_w, true, &weight, std::nullopt);
  return max_pool2d(image, 2, 2, 2, 2, 0, 0, 1, 1, false, pool, true);
}

void run_ready(const LoadedKernel& kernel, int64_t id, ai3_args args) {
  const ProfilerLabel label(kernel.label.c_str());
  int64_t elements = 1;
  for (int d = 0; d < args.output.ndim; ++d) elements *= args.output.size[d];
  run_kernel(kernel, id, args, elements);
}

}  // namespace ai3

extern "C" {

// The id of what adds residuals and applies activations on GPUs.
AI3_EXPORT void ai3_core_set_epilogue(int64_t id) { ai3::epilogue_of_device = id; }
}
