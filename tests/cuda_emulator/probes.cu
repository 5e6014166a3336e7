// Kernels that are right, and the same with a mistake in them: what the emulator must tell apart.
#include "device.h"

using namespace fastmerge;

namespace {

constexpr int THREADS = 64, BLOCKS = 3;

struct Params {
  bool mistaken;
  int* out;
  Barrier* barrier;
};

// Each thread reads what its neighbour wrote.
void neighbours(Params params) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread;
  if (!params.mistaken) sync_block();
  params.out[thread] = shared[(thread + 1) % THREADS];
}

// A shared word that is written again before everybody has read it.
void rounds(Params params) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  int sum = 0;
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x == 0) *shared = round;
    sync_block();
    sum += *shared;
    if (!params.mistaken) sync_block();
  }
  params.out[threadIdx.x] = sum;
}

void lanes(Params params) {
  if (params.mistaken && threadIdx.x == 7) return;
  params.out[threadIdx.x] = warp_sum(1);
}

void everybody(Params params) {
  if (!params.mistaken || threadIdx.x < 40) sync_block();
  params.out[threadIdx.x] = 1;
}

void grid(Params params) {
  if (threadIdx.x == 0) params.out[blockIdx.x] = 1;
  if (!params.mistaken || blockIdx.x > 0) sync_grid(params.barrier);
  if (threadIdx.x > 0) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += params.out[block];
  params.out[gridDim.x + blockIdx.x] = sum;
}

void bounds(Params params) {
  shared_memory()[threadIdx.x * 4 + (params.mistaken ? 4 : 0)] = 1;
}

}  // namespace

// Runs a probe; what it wrote is in out[THREADS], and what went wrong in the text.
extern "C" [[gnu::visibility("default")]] const char* probe(int number, bool mistaken, int* out) {
  static std::string fault;
  fault.clear();
  void (*const kernels[])(Params) = {neighbours, rounds, lanes, everybody, grid, bounds};
  Barrier barrier = {};
  const Params params = {mistaken, out, &barrier};
  try {
    emulator::run(number == 4 ? BLOCKS : 1, THREADS, THREADS * 4, number == 4, [&] { kernels[number](params); });
  } catch (const std::exception& error) {
    fault = error.what();
  }
  return fault.c_str();
}
