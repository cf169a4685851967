#include <cuda_runtime.h>

#include "rnn_cuda.h"

extern "C" const char* charrnn_fast_cuda_limits(int device,
                                                charrnn_fast::cuda::DeviceLimits* limits) {
  int major = 0, minor = 0, cooperative = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_block},
      {cudaDevAttrMaxRegistersPerMultiprocessor, &limits->registers_per_sm},
      {cudaDevAttrCooperativeLaunch, &cooperative},
  };
  for (const auto& [attribute, value] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  limits->compute_capability = 10 * major + minor;
  limits->cooperative = cooperative != 0;
  return nullptr;
}
