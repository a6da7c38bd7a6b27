// cuDNN's C API and the few functions of the CUDA driver beside it, found at run time: cuDNN is the one that PyTorch
// has loaded, and nothing is linked with it.
#ifndef AI3_CUDNN_API_H
#define AI3_CUDNN_API_H

#include <ai3/graph_edges.h>
#include <cudnn.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ai3::cudnn {

// clang-format off
#define AI3_CUDNN_FUNCTIONS(X) \
  X(GetVersion) X(GetErrorString) X(GetLastErrorString) X(Create) X(SetStream) X(CreateTensorDescriptor) \
  X(SetTensor4dDescriptorEx) X(DestroyTensorDescriptor) X(CreateFilterDescriptor) X(SetFilter4dDescriptor) \
  X(DestroyFilterDescriptor) X(CreateConvolutionDescriptor) X(SetConvolution2dDescriptor) \
  X(SetConvolutionGroupCount) X(SetConvolutionMathType) X(DestroyConvolutionDescriptor) \
  X(CreateActivationDescriptor) X(SetActivationDescriptor) X(DestroyActivationDescriptor) \
  X(GetConvolutionForwardWorkspaceSize) X(ConvolutionForward) X(ConvolutionBiasActivationForward) \
  X(GetConvolutionBackwardDataWorkspaceSize) X(ConvolutionBackwardData) \
  X(GetConvolutionBackwardFilterWorkspaceSize) X(ConvolutionBackwardFilter) X(AddTensor) X(TransformTensor) \
  X(BackendCreateDescriptor) X(BackendDestroyDescriptor) X(BackendSetAttribute) X(BackendGetAttribute) \
  X(BackendFinalize) X(BackendExecute)
// clang-format on

struct Api {
#define AI3_CUDNN_DECLARE(name) decltype(&::cudnn##name) name = nullptr;
  AI3_CUDNN_FUNCTIONS(AI3_CUDNN_DECLARE)
#undef AI3_CUDNN_DECLARE

  // Throws where cuDNN cannot be loaded.
  static const Api& get();
};

// Functions of libcuda.so.1, by the names they have in CUDA 13 (declared here, so that its header is not needed).
struct Driver {
  int (*cuInit)(unsigned flags);
  int (*cuGetErrorName)(int error, const char** name);
  int (*cuDeviceGetName)(char* name, int length, int device);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
  int (*cuCtxGetCurrent)(void** context);
  int (*cuCtxPushCurrent_v2)(void* context);
  int (*cuCtxPopCurrent_v2)(void** context);
  int (*cuCtxSynchronize)();
  int (*cuThreadExchangeStreamCaptureMode)(int* mode);
  int (*cuMemGetInfo_v2)(size_t* free, size_t* total);
  int (*cuMemAlloc_v2)(void** memory, size_t bytes);
  int (*cuMemFree_v2)(void* memory);
  int (*cuStreamCreate)(void** stream, unsigned flags);
  int (*cuStreamDestroy_v2)(void* stream);
  int (*cuStreamSynchronize)(void* stream);
  int (*cuStreamBeginCapture_v2)(void* stream, int mode);
  int (*cuStreamEndCapture)(void* stream, void** graph);
  int (*cuGraphInstantiateWithFlags)(void** executable, void* graph, unsigned long long flags);
  int (*cuGraphLaunch)(void* executable, void* stream);
  int (*cuGraphExecDestroy)(void* executable);
  int (*cuGraphDestroy)(void* graph);
  int (*cuEventCreate)(void** event, unsigned flags);
  int (*cuEventDestroy_v2)(void* event);
  int (*cuEventRecord)(void* event, void* stream);
  int (*cuEventElapsedTime)(float* milliseconds, void* begin, void* end);
  int (*cuModuleLoadData)(void** module, const void* image);
  int (*cuModuleGetFunction)(void** function, void* module, const char* name);
  int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** params, void** extra);

  // Throws where the driver cannot be loaded.
  static const Driver& get();
};

using Failure = std::runtime_error;

// Throw Failure, which says what failed and how, unless the status is success.
void check(cudnnStatus_t status, const char* what);
void check_cuda(int error, const char* what);
// The status' name, with what cuDNN adds to it.
std::string describe(cudnnStatus_t status);

// Has what cuDNN puts on the stream in its scope begin only when all that was on it before has ended. The kernels that
// cuDNN compiles at run time are launched to begin before that (programmatic dependent launch), but do not wait for
// what they read: a ResNet-50 with sixteen of them was off by a fifth, in a CUDA graph and wherever kernels lay ready
// one behind another (cuDNN 9.19, H100 and H200).
class Separated {
 public:
  // `is_compiled`: cuDNN compiles the kernels at run time.
  Separated(void* stream, int device, bool is_compiled);
  // To be called when all is on the stream.
  void end();

 private:
  cuda::EdgesInto edges_;
};

// Makes a device current where it is not, until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  bool pushed_ = false;
};

// Lets a stream be captured while plans are made, which load code and allocate; nothing of that is put on the stream.
class OutsideCapture {
 public:
  OutsideCapture() { exchange(); }
  ~OutsideCapture() { exchange(); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  void exchange() { Driver::get().cuThreadExchangeStreamCaptureMode(&mode_); }
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

// This thread's handle on the device, which must be current.
cudnnHandle_t handle_on(int device);

}  // namespace ai3::cudnn
#endif
