// An op's own memory on the current GPU: tables that travel there in one copy, numbers that come back in one.
//
// The memory is kept and used again, so that an op allocates nothing once a few have run.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

namespace fastmerge {

class Desk {
 public:
  explicit Desk(cudaStream_t stream);
  ~Desk();  // waits for the stream where something is still under way
  Desk(const Desk&) = delete;
  Desk& operator=(const Desk&) = delete;

  // Appends a table; returns its place, in bytes. Numbers that kernels change are tables like any other: they are sent
  // as they start, and fetched as they ended.
  template <class T>
  size_t put(const T* from, size_t count) {
    static_assert(alignof(T) <= ALIGNMENT);
    return append(from, count * sizeof(T));
  }
  template <class T>
  size_t put(const std::vector<T>& table) {
    return put(table.data(), table.size());
  }

  // Once all tables are put: copies them, and has `scratch_bytes` of memory behind them that hold anything.
  void send(size_t scratch_bytes = 0);

  template <class T>
  T* on_device(size_t place) const {
    return reinterpret_cast<T*>(on_card() + place);
  }
  char* scratch() const { return on_card() + scratch_; }  // aligned to 256 bytes

  // Waits for the stream, and returns what a table holds by now.
  template <class T>
  const T* fetch(size_t place, size_t count) {
    return reinterpret_cast<const T*>(bring(place, count * sizeof(T)));
  }

  struct Memory;

 private:
  static constexpr size_t ALIGNMENT = 16;

  size_t append(const void* from, size_t bytes);
  char* on_card() const;
  const char* bring(size_t place, size_t bytes);

  cudaStream_t stream_;
  Memory* memory_ = nullptr;
  std::vector<char> table_;
  size_t scratch_ = 0;
  bool waiting_ = false;
};

}  // namespace fastmerge
