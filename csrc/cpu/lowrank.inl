// The loop of lowrank.h over rows, included by kernels.inl within its namespace.
//
// Reads each weight once and writes each output once; 2 rank operations an element. `right` comes from the second cache
// once for every few rows, and a block of it stays in the first.

// Rows and vectors whose sums are held in registers together.
constexpr int LOWRANK_VECTORS = L::width >= 8 ? 2 : 4;
constexpr int LOWRANK_ROWS = L::width == 16 ? 8 : 4;
static_assert(LOWRANK_BLOCK % (LOWRANK_VECTORS * L::width) == 0);

template <DType dtype, int rows>
void lowrank_rows(const LowRank& product, int64_t row) {
  constexpr int size = dtype == DType::F32 ? 4 : 2, columns = LOWRANK_VECTORS * L::width;
  const F scaling = L::set(product.scaling);
  const float* left = product.left + row * product.rank;
  for (int64_t at = 0; at < product.width; at += columns) {
    const float* right = product.right + at / LOWRANK_BLOCK * LOWRANK_BLOCK * product.rank + at % LOWRANK_BLOCK;
    F sums[rows][LOWRANK_VECTORS];
    for (auto& sum : sums) {
      for (F& each : sum) each = L::zero();
    }
    for (int k = 0; k < product.rank; ++k) {
      F factors[LOWRANK_VECTORS];
      for (int v = 0; v < LOWRANK_VECTORS; ++v) factors[v] = L::load(right + k * LOWRANK_BLOCK + v * L::width);
      for (int r = 0; r < rows; ++r) {
        const F factor = L::set(left[r * product.rank + k]);
        for (int v = 0; v < LOWRANK_VECTORS; ++v) sums[r][v] = sums[r][v] + factor * factors[v];
      }
    }
    const int64_t left_over = product.width - at;
    const int count = left_over < columns ? static_cast<int>(left_over) : columns;
    for (int r = 0; r < rows; ++r) {
      const int64_t first = (row + r) * product.width + at;
      const char* weights = product.weights + first * size;
      const auto add = [&](const char* from, float* to) {
        for (int v = 0; v < LOWRANK_VECTORS; ++v) {
          L::store(to + v * L::width, sums[r][v] * scaling + L::read<dtype>(from + v * L::width * size));
        }
      };
      if (count == columns) {
        add(weights, product.out + first);
        continue;
      }
      char few[columns * size] = {};
      float made[columns];
      memcpy(few, weights, static_cast<size_t>(count * size));
      add(few, made);
      memcpy(product.out + first, made, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

template <DType dtype>
void lowrank(const LowRank& product, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + LOWRANK_ROWS <= end; row += LOWRANK_ROWS) lowrank_rows<dtype, LOWRANK_ROWS>(product, row);
  for (; row < end; ++row) lowrank_rows<dtype, 1>(product, row);
}

void lowrank(const LowRank& product, int64_t begin, int64_t end) {
  switch (product.dtype) {
    case DType::F32: return lowrank<DType::F32>(product, begin, end);
    case DType::F16: return lowrank<DType::F16>(product, begin, end);
    case DType::BF16: return lowrank<DType::BF16>(product, begin, end);
    case DType::U8: return;
  }
}
