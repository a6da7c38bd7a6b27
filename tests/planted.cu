// A relu with an error for each tool of compute-sanitizer, which tests/sanitize.py asks for before it believes one: a
// write behind the output, and a read of shared memory that no barrier parts from another warp's write.
#include <ai3/cuda.h>

namespace {

struct Params {
  const float* in;
  float* out;
  long long count;
};

constexpr int kThreads = 64;

}  // namespace

#ifdef __CUDACC__

AI3_KERNEL(kThreads, planted, Params) {
  __shared__ float shared[kThreads];
  const int thread = threadIdx.x;
  shared[thread] = thread < p.count ? p.in[thread] : 0;
  const float other = shared[(thread + 32) % kThreads];
  if (thread <= p.count) p.out[thread] = other;
}

#else

namespace {

const char* supports(const ai3_args* args) {
  return args->input.size[0] < kThreads ? nullptr : "needs less than 64 elements";
}

void run(const ai3_args* args) {
  const Params params{static_cast<const float*>(args->input.data), static_cast<float*>(args->output.data),
                      args->input.size[0]};
  ai3::cuda::launch(args, "planted", {1}, kThreads, 0, params);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "relu",
                           .algorithm = "planted",
                           .version = 1,
                           .flags = 0,
                           .supports = supports,
                           .cost = nullptr,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
