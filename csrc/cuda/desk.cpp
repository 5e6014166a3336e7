// The memory behind desks: kept per GPU for the process, handed from one op to the next.
#include "desk.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "launch.h"
#include "ops.h"

namespace fastmerge {

struct Desk::Memory {
  int device;
  char* host = nullptr;  // pinned
  size_t host_bytes = 0;
  char* card = nullptr;
  size_t card_bytes = 0;

  void release() {
    check(cudaFreeHost(std::exchange(host, nullptr)), "release pinned memory");
    check(cudaFree(std::exchange(card, nullptr)), "release memory");
    host_bytes = card_bytes = 0;
  }
  void reserve(size_t host_wanted, size_t card_wanted) {
    if (host_wanted > host_bytes) {
      check(cudaFreeHost(std::exchange(host, nullptr)), "release pinned memory");
      host_bytes = 0;
      void* memory = nullptr;
      check(cudaHostAlloc(&memory, 2 * host_wanted, cudaHostAllocDefault), "pin memory for tables");
      host = static_cast<char*>(memory);
      host_bytes = 2 * host_wanted;
    }
    if (card_wanted > card_bytes) {
      check(cudaFree(std::exchange(card, nullptr)), "release memory");
      card_bytes = 0;
      void* memory = nullptr;
      check(cudaMalloc(&memory, card_wanted), "allocate memory for tables");
      card = static_cast<char*>(memory);
      card_bytes = card_wanted;
    }
  }
};

namespace {

// Never destroyed: when a process ends, the driver may be gone before it.
struct Shelf {
  std::mutex mutex;
  std::vector<Desk::Memory*> free;
};

Shelf& shelf() {
  static Shelf* const kept = new Shelf;
  return *kept;
}

}  // namespace

void release_kept() {
  int device = 0;
  check(cudaGetDevice(&device), "say which one it is");
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  std::vector<Desk::Memory*>& free = shelf().free;
  const auto mine =
      std::partition(free.begin(), free.end(), [&](Desk::Memory* each) { return each->device != device; });
  for (auto each = mine; each != free.end(); ++each) {
    (*each)->release();
    delete *each;
  }
  free.erase(mine, free.end());
}

Desk::Desk(cudaStream_t stream) : stream_(stream) {
  int device = 0;
  check(cudaGetDevice(&device), "say which one it is");
  {
    const std::lock_guard<std::mutex> lock(shelf().mutex);
    std::vector<Memory*>& free = shelf().free;
    const auto found = std::find_if(free.begin(), free.end(), [&](Memory* each) { return each->device == device; });
    if (found != free.end()) {
      memory_ = *found;
      free.erase(found);
    }
  }
  if (!memory_) memory_ = new Memory{device};
}

Desk::~Desk() {
  if (waiting_) static_cast<void>(cudaStreamSynchronize(stream_));  // an error is on its way already
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  shelf().free.push_back(memory_);
}

size_t Desk::append(const void* from, size_t bytes) {
  const size_t place = (table_.size() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  table_.resize(place + bytes);
  if (bytes) memcpy(table_.data() + place, from, bytes);
  return place;
}

void Desk::send(size_t scratch_bytes) {
  scratch_ = (table_.size() + 255) / 256 * 256;
  memory_->reserve(table_.size(), scratch_ + scratch_bytes);
  memcpy(memory_->host, table_.data(), table_.size());
  waiting_ = true;
  check(cudaMemcpyAsync(memory_->card, memory_->host, table_.size(), cudaMemcpyHostToDevice, stream_), "take tables");
}

char* Desk::on_card() const {
  return memory_->card;
}

const char* Desk::bring(size_t place, size_t bytes) {
  check(cudaMemcpyAsync(memory_->host + place, memory_->card + place, bytes, cudaMemcpyDeviceToHost, stream_),
        "give numbers back");
  check(cudaStreamSynchronize(stream_), "finish its work");
  waiting_ = false;
  return memory_->host + place;
}

}  // namespace fastmerge
