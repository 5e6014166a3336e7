// Weights to which the product of two thin matrices is added: a low-rank adapter, applied row by row.
#pragma once
#include <cstdint>

#include "../dtype.h"

namespace fastmerge {

// Columns of a block of `right`. Blocks follow one another, [ceil(width / BLOCK)][rank][BLOCK], padded with zeros:
// a few rows of the output are made from one walk through them.
constexpr int LOWRANK_BLOCK = 32;

// out[row][column] = weights[row][column] + scaling * sum over k of left[row][k] * right[k][column], in float32: the
// sum starts from 0 and runs in the order of k, then it is scaled, then the weight is added; nothing is fused.
struct LowRank {
  const char* weights;  // [rows][width] in dtype, not necessarily aligned to it
  DType dtype;
  int rank;
  int64_t width;
  const float* left;   // [rows][rank]
  const float* right;  // in blocks
  float scaling;
  float* out;  // [rows][width]
};

}  // namespace fastmerge
