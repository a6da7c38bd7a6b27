// The C ABI between ai3's core library and an algorithm: everything an algorithm is given and everything it answers.
// Plain C structs and function pointers; an algorithm needs no PyTorch header, allocates nothing and keeps no state.
#ifndef AI3_KERNEL_H
#define AI3_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a struct below changes; the core library refuses a module built for another value.
#define AI3_ABI_VERSION 7
#define AI3_MAX_DIMS 8

typedef enum ai3_dtype { AI3_FLOAT32 = 0, AI3_FLOAT64 = 1, AI3_FLOAT16 = 2, AI3_BFLOAT16 = 3, AI3_OTHER = 4 } ai3_dtype;
// As the functions of torch.nn.functional; AI3_GELU is by erf, AI3_GELU_TANH its approximation by tanh.
typedef enum ai3_activation {
  AI3_IDENTITY = 0,
  AI3_RELU = 1,
  AI3_RELU6 = 2,
  AI3_HARDSWISH = 3,
  AI3_HARDSIGMOID = 4,
  AI3_SIGMOID = 5,
  AI3_SILU = 6,
  AI3_GELU = 7,
  AI3_GELU_TANH = 8,
} ai3_activation;

// What an algorithm can be handed, as bits of ai3_kernel::flags; an operation on images names at least one layout.
enum {
  AI3_NCHW = 1,  // 4-d input and output contiguous
  AI3_NHWC = 2,  // 4-d input and output channels_last; preferred where both bits are set
  // Applies the residual and every activation itself (ai3::activate in activation.h does, for vectors and scalars);
  // otherwise the core library applies them after run().
  AI3_EPILOGUE = 4,
  AI3_DEFAULT = 8,  // what `default` takes first for this operation, where it fits
  // May be handed a channels_last output that is some channels of a larger image: its pixels are output.stride[3] >= C
  // elements apart, and the elements between are not its own. Never with a residual; a convolution that sets this sets
  // AI3_EPILOGUE too.
  AI3_STRIDED_OUTPUT = 16,
  // May be handed a residual that is the output's own memory, channels_last and dense: it reads each element of it
  // before it writes that element of the output, once. It sets AI3_NHWC and AI3_EPILOGUE too.
  AI3_RESIDUAL_IN_PLACE = 32,
  // A convolution that may be handed an input that is some channels of a larger channels_last image, its pixels
  // input.stride[3] >= C elements apart; sets AI3_NHWC too.
  AI3_STRIDED_INPUT = 64,
  // A convolution that may be handed a prologue, which comes with 1x1 kernels without padding only.
  AI3_PROLOGUE = 128,
  // With AI3_PROLOGUE: its activation may be ReLU or none.
  AI3_PROLOGUE_RELU = 256,
};

// Sizes and strides (in elements) are in the logical order of PyTorch: N, C, H, W for images.
typedef struct ai3_tensor {
  void* data;  // null for an absent tensor, and for every tensor while only shapes are known (supports, cost, *_bytes)
  int32_t ndim;
  int64_t size[AI3_MAX_DIMS];
  int64_t stride[AI3_MAX_DIMS];
} ai3_tensor;

typedef void (*ai3_range_fn)(void* arg, int64_t begin, int64_t end);
typedef struct ai3_runtime {
  int32_t num_threads;
  // Runs body(arg, begin, end) over a partition of [0, count) on PyTorch's thread pool; ranges are disjoint and cover
  // all.
  void (*parallel_for)(int64_t count, ai3_range_fn body, void* arg);
  // Says that the call failed, from any thread; the message is copied, and raised in Python once run() returns.
  void (*fail)(const struct ai3_runtime* runtime, const char* message);
} ai3_runtime;

// clang-format off
// The arguments of one call. An operation reads the fields it names below; the others are zero.
//   conv2d             input [N,C,H,W], weight [K,C/groups,R,S], output [N,K,P,Q], bias [K], residual as output; window, groups;
//                      prologue_scale and prologue_shift [C]
//   conv2d.grad_input  input the gradient of the output [N,K,P,Q], weight [K,C/groups,R,S], output that of the image
//                      [N,C,H,W]; window, groups
//   conv2d.grad_weight input the image [N,C,H,W], key the gradient of the output [N,K,P,Q], output that of the weight
//                      [K,C/groups,R,S]; window, groups
//   linear             input [M,I], weight [O,I], output [M,O], bias [O], residual as output; all contiguous
//   maxpool2d          input [N,C,H,W], output [N,C,P,Q]; window, ceil_mode
//   avgpool2d          input [N,C,H,W], output [N,C,P,Q]; window, ceil_mode, count_include_pad, divisor_override
//   adaptiveavgpool2d  input [N,C,H,W], output [N,C,P,Q]
//   relu               input and output [numel], contiguous
//   flatten            input of any dimension and any strides, output [numel], contiguous
//   attention          input (the queries) [...,L,E], key [...,S,E], value [...,S,F], output [...,L,F], score_bias and
//                      score_mask [...,L,S] or absent, all of the same leading sizes and of any strides but 1 for the last
//                      dimension: softmax(scale * input key^T + score_bias + score_mask) value; is_causal, masked_is_zero
// clang-format on
typedef struct ai3_args {
  ai3_dtype dtype;  // of input, weight, bias, residual and output alike
  ai3_tensor input, weight, output, residual;
  const void* bias;                // null without one
  int32_t has_bias, has_residual;  // set even while the pointers are null
  ai3_activation activation;       // applied last: output = activation(op(input) + bias + residual)
  // The window. Output row p reads input rows p*stride_h - pad_top + r*dilation_h for r in [0, kernel_h).
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t groups;
  int32_t ceil_mode, count_include_pad;
  int64_t divisor_override;                       // 0: none
  ai3_tensor key, value, score_bias, score_mask;  // score_*: of no dimensions where absent; strides of 0 broadcast
  double scale;
  int32_t is_causal;       // row i of the scores keeps its first i + 1 columns
  int32_t masked_is_zero;  // a row of scores that are all -inf gives zeros, else NaN
  const void* packed;      // what pack() wrote, 64-byte aligned
  const void* plan;        // what make_plan() wrote, 64-byte aligned
  void* workspace;         // workspace_bytes() of scratch, 64-byte aligned, contents undefined
  const ai3_runtime* runtime;
  void* stream;  // the device's current stream; null on the CPU
  // With has_prologue, set even while the pointers are null, each element x of the input's channel c counts as
  // prologue_activation(prologue_scale[c] * x + prologue_shift[c]).
  // The two are of float64 if the input is, else of float32.
  const void *prologue_scale, *prologue_shift;
  int32_t has_prologue;
  ai3_activation prologue_activation;
  // On a GPU every pointer but `plan` and `runtime` is the device's, and run() and pack() only put work on `stream`.
  int32_t device;         // its index; 0 on the CPU
  int32_t sm;             // its compute capability, 10 * major + minor; 0 on the CPU
  int32_t allow_tf32;     // products of float32 may be rounded to TF32, as PyTorch's settings say
  int32_t deterministic;  // the same bits at every call
  int64_t max_workspace;  // of bytes that an algorithm may choose its ways by; negative: any
  // A convolution writes the largest of each 2x2 pixels of its output, NaN where one is: output.data is of an image
  // [N,K,P/2,Q/2], channels_last and dense, whatever else `output` says. Without a residual.
  int32_t pools;
} ai3_args;

// One algorithm on one platform. Optional functions may be null.
typedef struct ai3_kernel {
  uint32_t abi_version;   // AI3_ABI_VERSION
  const char* operation;  // "conv2d"
  const char* algorithm;  // "implicit gemm"
  uint32_t version;       // raised when results or packed layouts change
  uint32_t flags;
  // Null where the algorithm can compute these shapes, else the reason in a few words ("needs a 3x3 kernel"). Sizes may
  // be zero. An operation on images may then be called for some images of a batch at a time: it must support any number
  // of them that it supports at all. The core library has checked that the shapes fit each other, and the layout,
  // before it asks.
  const char* (*supports)(const ai3_args* args);
  // Optional: estimated nanoseconds on a core with 100 GFLOP/s of fused multiply-adds and 20 GB/s; only ratios matter.
  double (*cost)(const ai3_args* args);
  // Optional: why it runs only where a user names it ("has 4 times the rounding error"); `default`, `guess` and `auto`
  // pass over it. Null where they may choose it.
  const char* only_by_name;
  // Optional: scratch for one call.
  size_t (*workspace_bytes)(const ai3_args* args);
  // Optional: weights transformed once a weight. pack() reads args->weight (contiguous) and writes packed_bytes() at
  // dst. pack_variant() tells packed layouts of one weight apart (null: there is one).
  size_t (*packed_bytes)(const ai3_args* args);
  void (*pack)(const ai3_args* args, void* dst);
  int64_t (*pack_variant)(const ai3_args* args);
  // Optional: offsets and tables computed once a shape (sizes and window, not pointers).
  size_t (*plan_bytes)(const ai3_args* args);
  void (*make_plan)(const ai3_args* args, void* dst);
  // Optional, with AI3_EPILOGUE: 1 where run() applies the residual and the activation of these arguments, 0 where it
  // is to be handed neither, and the core library applies them. Null: it applies all.
  int32_t (*fuses)(const ai3_args* args);
  // Optional, of a convolution with AI3_NHWC and AI3_EPILOGUE: 1 where run() takes these arguments with `pools` set,
  // and takes less time than without and a pooling behind; fuses() is not asked then. Null: it never does.
  int32_t (*pools)(const ai3_args* args);
  // Computes the output: every element of it, nothing around it. Never called with an empty output; called from several
  // threads at once, each with a workspace of its own, where each has images of its own to compute.
  void (*run)(const ai3_args* args);
} ai3_kernel;

// The one symbol a module exports.
#if defined(_WIN32)
#define AI3_EXPORT __declspec(dllexport)
#else
#define AI3_EXPORT __attribute__((visibility("default")))
#endif
AI3_EXPORT const ai3_kernel* ai3_get_kernel(void);

#ifdef __cplusplus
}
#endif
#endif
