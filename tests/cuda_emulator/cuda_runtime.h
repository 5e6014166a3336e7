// A CUDA device for tests, in plain C++: the part of CUDA that csrc/cuda uses, so that g++ compiles the same kernels.
//
// A thread is a fiber that runs until it waits: at a barrier of its block, in a collective of its warp, or asleep. Who
// runs next is drawn anew every round, the blocks of a cooperative grid are all alive at once and those of another one
// after another, memory starts as 0xFF, and what is queued on a stream runs when somebody waits for it and not before:
// so what lacks a barrier or a synchronisation reads garbage here too. What cannot be right (a lane that misses a
// collective, a wait that never ends, a write past shared memory) fails with a sentence, and so does all that follows.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x) : x(x) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned LANES = 32;
constexpr size_t STACK = 128 << 10, GUARD = 256, SHARED_LIMIT = 99 << 10;
constexpr unsigned PROCESSORS = 3, BLOCKS_EACH = 2;
constexpr int DEVICES = 2;
constexpr unsigned PATIENCE = 100'000;  // rounds in which only sleepers ran

// What a thread waits for: a count to move on from what it was.
struct Wait {
  const unsigned* count = nullptr;
  unsigned was = 0;
  bool over() const { return !count || *count != was; }
};

struct Warp {
  unsigned arrived = 0, generation = 0;
  int collective = 0;
  uint64_t values[2][LANES];  // of this collective and the one before, which slow lanes still read
};

struct Block {
  unsigned index = 0, arrived = 0, generation = 0, votes = 0, left = 0;
  unsigned voted[2] = {};
  std::vector<Warp> warps;
  std::vector<char> shared;
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Thread {
  jmp_buf place;
  std::vector<Copy> copies;  // not yet waited for
  int groups = 0;            // closed
  Wait wait;
  bool started = false, asleep = false, done = false;
  unsigned index = 0;
  Block* block = nullptr;
  char* stack = nullptr;
};

struct Grid {
  std::function<void()> body;
  std::string fault;
};

inline std::recursive_mutex mutex;
inline jmp_buf scheduler;
inline Thread* current;
inline Grid* grid;
inline uint64_t random_state = 0x9E3779B97F4A7C15;
inline unsigned long long launches = 0, copies = 0, stored = 0;

inline unsigned draw(unsigned below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<unsigned>((random_state >> 33) % below);
}

// --- what a fiber does ---

[[gnu::noinline]] inline void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void wait(const unsigned& count, unsigned was) {
  current->wait = {&count, was};
  leave();
}

[[noreturn]] inline void fail(const std::string& what) {
  grid->fault = what;
  _longjmp(scheduler, 1);
}

inline unsigned sync(bool vote) {
  Block& block = *current->block;
  const unsigned was = block.generation;
  block.voted[was & 1] += vote;
  if (++block.arrived == blockDim.x) {
    block.arrived = 0;
    block.voted[(was + 1) & 1] = 0;
    ++block.generation;
  } else {
    wait(block.generation, was);
  }
  return block.voted[was & 1];
}

// Every lane's value, once all have arrived. `collective` tells one kind from another.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int collective) {
  if (mask != 0xffffffff) fail("a collective whose mask is not the whole warp");
  Warp& warp = current->block->warps[current->index / LANES];
  const unsigned was = warp.generation;
  if (warp.arrived++ == 0) warp.collective = collective;
  if (warp.collective != collective) fail("lanes of one warp are in different collectives");
  warp.values[was & 1][current->index % LANES] = value;
  if (warp.arrived == LANES) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(warp.generation, was);
  }
  return warp.values[was & 1];
}

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpacked(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// --- the scheduler ---

inline void entry() {
  grid->body();
  current->done = true;
  ++current->block->left;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = dim3(thread.index);
  blockIdx = dim3(thread.block->index);
  thread.wait = {};
  thread.asleep = false;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

// Every number below `count` once, in an order of its own each time.
class Order {
 public:
  explicit Order(unsigned count) : count_(count), at_(draw(count)), step_(1 + draw(count)) {
    while (std::gcd(step_, count_) != 1) ++step_;
  }
  unsigned next() { return at_ = static_cast<unsigned>((uint64_t{at_} + step_) % count_); }

 private:
  unsigned count_, at_, step_;
};

inline void run_together(std::vector<Block>& blocks, char* stacks) {
  const unsigned threads = blockDim.x;
  std::vector<Thread> all(blocks.size() * threads);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].index = static_cast<unsigned>(i % threads);
    all[i].block = &blocks[i / threads];
    all[i].stack = stacks + i * STACK;
  }
  for (unsigned idle = 0;;) {
    size_t ran = 0, slept = 0;
    Order order(static_cast<unsigned>(blocks.size()));
    for (size_t b = 0; b < blocks.size(); ++b) {
      const size_t block = order.next();
      if (blocks[block].left == threads) continue;
      Order lanes(threads);
      for (unsigned t = 0; t < threads; ++t) {
        Thread& thread = all[block * threads + lanes.next()];
        if (thread.done || !thread.wait.over()) continue;
        resume(thread);
        if (!grid->fault.empty()) throw std::runtime_error(grid->fault);
        ++ran;
        slept += thread.asleep;
      }
    }
    if (ran == 0) break;
    idle = slept == ran ? idle + 1 : 0;
    if (idle > PATIENCE) throw std::runtime_error("a thread waits for what no other thread will do");
  }
  for (const Block& block : blocks) {
    if (block.left != threads) throw std::runtime_error("not every thread of a block or warp reached a barrier");
    for (size_t i = block.shared.size() - GUARD; i < block.shared.size(); ++i) {
      if (block.shared[i] != '\xA5') throw std::runtime_error("a write past the end of shared memory");
    }
  }
}

inline void run(unsigned blocks, unsigned threads, size_t shared_bytes, bool cooperative, std::function<void()> body) {
  Grid here = {std::move(body), {}};
  grid = &here;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  const unsigned together = cooperative ? blocks : 1;
  const size_t bytes = size_t{together} * threads * STACK;
  void* stacks =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  const auto clean = [&](void*) { munmap(stacks, bytes); };
  const std::unique_ptr<void, decltype(clean)> owner(stacks, clean);
  Order order(blocks);
  for (unsigned b = 0; b < blocks; b += together) {
    std::vector<Block> alive(together);
    for (Block& block : alive) {
      block.index = order.next();
      block.warps.resize(threads / LANES);
      block.shared.assign(shared_bytes + GUARD, '\xFF');
      std::fill_n(block.shared.end() - GUARD, GUARD, '\xA5');
    }
    run_together(alive, static_cast<char*>(stacks));
  }
}

}  // namespace emulator

// --- what a kernel calls ---

inline char* emulated_shared_memory() {
  return emulator::current->block->shared.data();
}
inline void __syncthreads() {
  emulator::sync(false);
}
inline int __syncthreads_or(int vote) {
  return emulator::sync(vote != 0) != 0;
}
inline int __syncthreads_count(int vote) {
  return static_cast<int>(emulator::sync(vote != 0));
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {
  emulator::current->asleep = true;
  emulator::leave();
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulator::exchange(mask, 0, 1);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const uint64_t* votes = emulator::exchange(mask, vote != 0, 2);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulator::LANES; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int vote) {
  return __ballot_sync(mask, vote) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
  return __ballot_sync(mask, vote) == 0xffffffff;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::unpacked<T>(emulator::exchange(mask, emulator::packed(value), 3)[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const unsigned from = (threadIdx.x ^ static_cast<unsigned>(lanes)) & 31;
  return emulator::unpacked<T>(emulator::exchange(mask, emulator::packed(value), 4)[from]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x & 31;
  return emulator::unpacked<T>(
      emulator::exchange(mask, emulator::packed(value), 5)[lane >= lanes ? lane - lanes : lane]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x & 31;
  return emulator::unpacked<T>(
      emulator::exchange(mask, emulator::packed(value), 6)[lane + lanes < 32 ? lane + lanes : lane]);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t* values = emulator::exchange(mask, emulator::packed(value), 7);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) same |= unsigned{values[lane] == emulator::packed(value)} << lane;
  return same;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* values = emulator::exchange(mask, value, 8);
  return static_cast<unsigned>(*std::max_element(values, values + 32));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const uint64_t* values = emulator::exchange(mask, value, 9);
  return static_cast<unsigned>(std::accumulate(values, values + 32, uint64_t{0}));
}

template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicOr(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
T __ldca(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  emulator::stored += sizeof value;
  *at = value;
}
// Sixteen bytes that arrive no sooner than they are waited for.
inline void emulated_copy(void* to, const void* from) {
  emulator::Thread& thread = *emulator::current;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    emulator::fail("a copy into shared memory is not aligned");
  }
  ++emulator::copies;
  memset(to, 0xff, 16);
  thread.copies.push_back({to, from, thread.groups});
}
inline void emulated_close_copies() {
  ++emulator::current->groups;
}
inline void emulated_await_copies(int last) {
  emulator::Thread& thread = *emulator::current;
  std::vector<emulator::Copy> left;
  for (const emulator::Copy& copy : thread.copies) {
    if (copy.group < thread.groups - last) {
      memcpy(copy.to, copy.from, 16);
    } else {
      left.push_back(copy);
    }
  }
  thread.copies = std::move(left);
}
// A card's first guess is off by at most one unit in the last place, on either side.
inline float emulated_reciprocal(float of) {
  const float inverse = 1.0f / of;
  uint32_t bits;
  memcpy(&bits, &of, sizeof(bits));
  const unsigned side = (bits * 0x9E3779B1u) >> 30;
  return side == 0 ? inverse : std::nextafter(inverse, side == 1 ? 0.0f : 2 * inverse);
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
inline int __clz(int bits) {
  return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32;
}
inline int __clzll(long long bits) {
  return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64;
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

// --- what the host calls ---

// How many kernels were launched: for tests, by way of ctypes.
extern "C" [[gnu::used, gnu::visibility("default")]] inline unsigned long long emulated_launches() {
  return emulator::launches;
}

// How many copies into shared memory threads have asked for.
extern "C" [[gnu::used, gnu::visibility("default")]] inline unsigned long long emulated_copies() {
  return emulator::copies;
}

// How many bytes whole eights of outputs have taken, written anew or not: likewise.
extern "C" [[gnu::used, gnu::visibility("default")]] inline unsigned long long emulated_stored() {
  return emulator::stored;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaDeviceProp {
  char name[256];
};

namespace emulator {

struct Stream {
  int device = 0;
  std::deque<std::function<void()>> queue;
};

struct Allocation {
  size_t bytes;
  int device;  // -1: pinned memory of the host
};

struct State {
  Stream standard[DEVICES];  // each device's own, that 0 names
  std::map<char*, Allocation> memory;
  size_t used[DEVICES] = {}, pinned = 0, peak = 0;  // the peak is of all together
  std::string fault;                                // once a kernel has failed, so does everything
  State() { standard[1].device = 1; }
};

inline State state;
inline thread_local int device = 0;
inline thread_local cudaError_t last = cudaSuccess;

inline size_t capacity() {
  const char* bytes = getenv("CUDA_EMULATOR_MEMORY");
  return bytes ? strtoull(bytes, nullptr, 10) : size_t{1} << 32;
}

inline cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

inline cudaError_t drain(Stream& stream) {
  while (state.fault.empty() && !stream.queue.empty()) {
    const auto work = std::move(stream.queue.front());
    stream.queue.pop_front();
    try {
      work();
    } catch (const std::exception& error) {
      state.fault = error.what();
      fprintf(stderr, "CUDA emulator: %s\n", error.what());
    }
  }
  return returned(state.fault.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

inline cudaError_t allocate(void** at, size_t bytes, int on) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (on >= 0 && state.used[on] + bytes > capacity()) return returned(cudaErrorMemoryAllocation);
  auto* memory = static_cast<char*>(aligned_alloc(GUARD, (bytes + 2 * GUARD - 1) / GUARD * GUARD));
  if (!memory) return returned(cudaErrorMemoryAllocation);
  memset(memory, 0xFF, bytes);
  memset(memory + bytes, 0xA5, GUARD - bytes % GUARD);
  state.memory[memory] = {bytes, on};
  (on >= 0 ? state.used[on] : state.pinned) += bytes;
  state.peak = std::max(state.peak, std::accumulate(state.used, state.used + DEVICES, state.pinned));
  *at = memory;
  return cudaSuccess;
}

inline cudaError_t release(void* at, bool pinned) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (!at) return cudaSuccess;
  const auto found = state.memory.find(static_cast<char*>(at));
  if (found == state.memory.end() || pinned != (found->second.device < 0)) return returned(cudaErrorInvalidValue);
  const Allocation allocation = found->second;
  if (!pinned) drain(state.standard[allocation.device]);
  for (size_t i = allocation.bytes; i < allocation.bytes + GUARD - allocation.bytes % GUARD; ++i) {
    if (found->first[i] != '\xA5') state.fault = "a write past the end of device memory";
  }
  (pinned ? state.pinned : state.used[allocation.device]) -= allocation.bytes;
  memset(at, 0xFF, allocation.bytes);
  free(at);
  state.memory.erase(found);
  return returned(state.fault.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

inline bool is_pinned(const void* at) {
  auto found = state.memory.upper_bound(static_cast<char*>(const_cast<void*>(at)));
  if (found == state.memory.begin()) return false;
  --found;
  return found->second.device < 0 && at < found->first + found->second.bytes;
}

}  // namespace emulator

// The most memory that was held at a time since it was last asked, of all devices and pinned: likewise for tests.
extern "C" [[gnu::used, gnu::visibility("default")]] inline unsigned long long emulated_peak() {
  const std::lock_guard<std::recursive_mutex> lock(emulator::mutex);
  const size_t held =
      std::accumulate(emulator::state.used, emulator::state.used + emulator::DEVICES, emulator::state.pinned);
  return std::exchange(emulator::state.peak, held);
}

using cudaStream_t = emulator::Stream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

inline cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (stream && stream->device != device) return returned(cudaErrorInvalidResourceHandle);
  (stream ? *stream : state.standard[device]).queue.push_back(std::move(work));
  return cudaSuccess;
}

}  // namespace emulator

template <class P, class Q>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), Q&& params) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  const size_t shared = config->dynamicSmemBytes;
  const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative;
  if (blocks == 0 || threads == 0 || threads % emulator::LANES || threads > 1024 || shared > emulator::SHARED_LIMIT) {
    return emulator::returned(cudaErrorInvalidConfiguration);
  }
  if (cooperative && blocks > emulator::PROCESSORS * emulator::BLOCKS_EACH) {
    return emulator::returned(cudaErrorCooperativeLaunchTooLarge);
  }
  ++emulator::launches;
  const P copied = params;
  return emulator::enqueue(config->stream,
                           [=] { emulator::run(blocks, threads, shared, cooperative, [&] { kernel(copied); }); });
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorLaunchFailure: return emulator::state.fault.c_str();
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    default: return "invalid argument";
  }
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last;
  emulator::last = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::DEVICES;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::DEVICES) return emulator::returned(cudaErrorInvalidDevice);
  emulator::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  snprintf(properties->name, sizeof properties->name, "Emulated device %d", device);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? static_cast<int>(emulator::PROCESSORS)
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emulator::SHARED_LIMIT)
                                                                  : 1;
  return cudaSuccess;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, size_t) {
  *blocks = emulator::BLOCKS_EACH;
  return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard<std::recursive_mutex> lock(emulator::mutex);
  *total = emulator::capacity();
  *free = *total - std::min(*total, emulator::state.used[emulator::device]);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** at, size_t bytes) {
  return emulator::allocate(at, bytes, emulator::device);
}
inline cudaError_t cudaFree(void* at) {
  return emulator::release(at, false);
}
inline cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) {
  return emulator::allocate(at, bytes, -1);
}
inline cudaError_t cudaFreeHost(void* at) {
  return emulator::release(at, true);
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return emulator::enqueue(stream, [=] { memset(at, value, bytes); });
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(emulator::mutex);
  return emulator::drain(stream ? *stream : emulator::state.standard[emulator::device]);
}
// Pageable memory of the host is read before the call returns, and written before it returns; pinned memory is not.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(emulator::mutex);
  if (kind == cudaMemcpyHostToDevice && !emulator::is_pinned(from)) {
    const auto* start = static_cast<const char*>(from);
    const std::vector<char> staged(start, start + bytes);
    return emulator::enqueue(stream, [=] { memcpy(to, staged.data(), bytes); });
  }
  const cudaError_t error = emulator::enqueue(stream, [=] { memmove(to, from, bytes); });
  const bool at_once = kind == cudaMemcpyDeviceToHost && !emulator::is_pinned(to);
  return error == cudaSuccess && at_once ? cudaStreamSynchronize(stream) : error;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new emulator::Stream;
  (*stream)->device = emulator::device;
  return cudaSuccess;
}
// A card goes on with what is under way, perhaps in memory that is given back next: here that is an error.
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(emulator::mutex);
  const bool over = stream->queue.empty();
  delete stream;
  return emulator::returned(over ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
