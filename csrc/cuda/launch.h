// Calls of the CUDA runtime, each checked, and launches of kernels that take one struct.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastmerge {

struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : DeviceError {
  using DeviceError::DeviceError;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // else the next check would find it again
  const std::string sentence = std::string("the GPU failed to ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(sentence);
  throw DeviceError(sentence);
}

// A block asks for more than 48 KB of dynamic shared memory by name.
template <class P>
void allow_shared(void (*kernel)(P), size_t shared_bytes) {
  if (shared_bytes <= 48 << 10) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "give a kernel its shared memory");
}

// How many blocks of a kernel the current device holds at once: the size of a persistent or cooperative grid.
template <class P>
int resident_blocks(void (*kernel)(P), int threads, size_t shared_bytes) {
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), "say which one it is");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "count its processors");
  allow_shared(kernel, shared_bytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes), "plan a kernel");
  return processors * each;
}

template <class P>
void launch(void (*kernel)(P), int blocks, int threads, size_t shared_bytes, cudaStream_t stream, const P& params,
            bool cooperative = false) {
  static_assert(sizeof(P) <= 4096, "a kernel's parameters are at most 4 KB");
  allow_shared(kernel, shared_bytes);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch a kernel");
}

}  // namespace fastmerge
