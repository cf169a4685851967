#include "launch_recurrence.cuh"

extern "C" const char* charrnn_fast_cuda_backward(const charrnn_fast::cuda::LaunchPlan* plan,
                                                  const charrnn_fast::cuda::RecurrenceArgs* args,
                                                  void* stream) {
  return charrnn_fast::cuda::launch_recurrence<true>(*plan, *args, stream);
}
