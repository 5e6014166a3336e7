// Outputs hashed while they are hot: piece by piece, in any order, by a function of xxHash that comes from outside.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastmerge {

// As xxHash's XXH3_128bits: what its C library returns, and how it is called.
struct Hash128 {
  uint64_t low, high;
};
using Hash = Hash128 (*)(const void* bytes, size_t count);

// Of each output, in bytes; the last may be shorter. A format: see fastmerge/checkpoint/hashing.py.
constexpr int64_t PIECE = 1 << 15;

// The hash of every piece of an output, each 16 bytes, the most significant first.
class PieceHashes {
 public:
  explicit PieceHashes(int64_t bytes) : all_(static_cast<size_t>((bytes + PIECE - 1) / PIECE * SIZE)) {}

  // `at` is where the bytes begin in the output: at a piece.
  void note(Hash hash, int64_t at, const char* from, int64_t bytes) {
    for (int64_t begin = 0; begin < bytes; begin += PIECE) {
      const int64_t count = bytes - begin < PIECE ? bytes - begin : PIECE;
      write(hash(from + begin, static_cast<size_t>(count)), all_.data() + (at + begin) / PIECE * SIZE);
    }
  }

  // That of the whole output: of the hashes of its pieces.
  void whole(Hash hash, char* to) const { write(hash(all_.data(), all_.size()), to); }

  static constexpr int64_t SIZE = 16;

 private:
  static void write(Hash128 hash, char* to) {
    for (int i = 0; i < 8; ++i) {
      to[i] = static_cast<char>(hash.high >> (56 - 8 * i));
      to[i + 8] = static_cast<char>(hash.low >> (56 - 8 * i));
    }
  }

  std::vector<char> all_;
};

}  // namespace fastmerge
