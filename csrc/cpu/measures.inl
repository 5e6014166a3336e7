// The loops that measure, included by kernels.inl within its namespace: gram, norms, and those of a selection.

// A float64 sum over SUM_LANES interleaved lanes, which are added up in one fixed order; its D are in the order in
// which lines of `dtype` come.
template <DType dtype>
struct Sum {
  static constexpr int width = L::width == 1 ? 1 : L::width / 2;  // of a D
  static constexpr int count = SUM_LANES / width;
  static constexpr bool sorted = L::vectors<dtype> == 1 || L::element<dtype>(1, 0) != 1;
  D parts[count];

  Sum() {
    for (D& part : parts) part = L::no_sum();
  }
  // The part of half a vector, from the place of its line among the lanes.
  static constexpr int part_of(int line, int vector, int half) {
    const int first = (line + L::element<dtype>(vector, half * width)) % SUM_LANES;
    return sorted ? first / width : first % 2 * (count / 2) + first / (2 * width);
  }
  // Products of float32 are exact in float64, so fused or not the bits are the same.
  void add(int part, D a, D b) { parts[part] = L::multiply_add(a, b, parts[part]); }
  double total() const {
    double each[SUM_LANES], stored[width];
    for (int part = 0; part < count; ++part) {
      L::store(stored, parts[part]);
      for (int i = 0; i < width; ++i) {
        each[sorted ? part * width + i : part / (count / 2) + 2 * (part % (count / 2) * width + i)] = stored[i];
      }
    }
    for (int step = SUM_LANES / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) each[lane] += each[lane + step];
    }
    return each[0];
  }
};

constexpr int HALVES = L::width == 1 ? 1 : 2;  // float64 lanes are half as many

template <class L>
typename L::D half_of(typename L::F value, int half) {
  if constexpr (HALVES == 2) {
    if (half == 1) return L::high(value);
  }
  return L::low(value);
}

// All inner products of a few models, in one read. What is not finite counts as 0 where it is `looked` for; else
// nothing is added then, and the answer is no.
template <DType dtype, int models, bool has_base, bool looked>
bool gram_run(const char* const* inputs, int count, double* sums) {
  constexpr int size = dtype == DType::F32 ? 4 : 2, vectors = L::vectors<dtype>, line = vectors * L::width;
  constexpr int step = line < SUM_LANES ? SUM_LANES : line;
  const U largest = L::word(INFINITE - 1);
  Sum<dtype> products[models * (models + 1) / 2];
  for (int start = 0; start < count; start += step) {
    for (int at = 0; at < step; at += line) {
      F deltas[models][vectors], bases[vectors];
      const int place = (start + at) * size;
      if (has_base) L::read_line<dtype>(inputs[models] + place, bases);
      for (int model = 0; model < models; ++model) {
        __builtin_prefetch(inputs[model] + place + AHEAD);
        L::read_line<dtype>(inputs[model] + place, deltas[model]);
        for (int v = 0; v < vectors; ++v) {
          if (has_base) deltas[model][v] = deltas[model][v] - bases[v];
          if (looked)
            deltas[model][v] = L::where(L::at_least(largest, L::magnitude(deltas[model][v])), deltas[model][v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        for (int half = 0; half < HALVES; ++half) {
          D wide[models];
          for (int model = 0; model < models; ++model) wide[model] = half_of<L>(deltas[model][v], half);
          Sum<dtype>* product = products;
          for (int row = 0; row < models; ++row) {
            for (int column = row; column < models; ++column) {
              (product++)->add(Sum<dtype>::part_of(at, v, half), wide[row], wide[column]);
            }
          }
        }
      }
    }
  }
  double totals[models * (models + 1) / 2];
  bool finite = true;
  for (int i = 0; i < models * (models + 1) / 2; ++i) {
    totals[i] = products[i].total();
    finite &= totals[i] * 0.0 == 0.0;
  }
  if (!finite) return false;
  const double* total = totals;
  for (int row = 0; row < models; ++row) {
    for (int column = row; column < models; ++column) sums[row * models + column] += *total++;
  }
  return true;
}

template <DType dtype, int models, bool has_base>
void gram_run(const char* const* inputs, int count, double* sums) {
  if (gram_run<dtype, models, has_base, false>(inputs, count, sums)) return;
  gram_run<dtype, models, has_base, true>(inputs, count, sums);
}

template <DType dtype, int models>
void gram_run(const char* const* inputs, bool has_base, int count, double* sums) {
  return has_base ? gram_run<dtype, models, true>(inputs, count, sums)
                  : gram_run<dtype, models, false>(inputs, count, sums);
}

template <DType dtype>
void gram_run(const char* const* inputs, int models, bool has_base, int count, double* sums) {
  switch (models) {
    case 1: return gram_run<dtype, 1>(inputs, has_base, count, sums);
    case 2: return gram_run<dtype, 2>(inputs, has_base, count, sums);
    case 3: return gram_run<dtype, 3>(inputs, has_base, count, sums);
    case 4: return gram_run<dtype, 4>(inputs, has_base, count, sums);
  }
}

// More models than registers: pair after pair, from float32 deltas that lie in the first cache.
void gram_of_many(int models, int count, const Scratch& scratch, double* sums) {
  for (int row = 0; row < models; ++row) {
    for (int column = row; column < models; ++column) {
      const float *a = scratch.wide + row * CHUNK, *b = scratch.wide + column * CHUNK;
      Sum<DType::F32> sum;
      for (int start = 0; start < padded(count); start += SUM_LANES) {
        for (int at = 0; at < SUM_LANES; at += L::width) {
          const F x = L::load(a + start + at), y = L::load(b + start + at);
          for (int half = 0; half < HALVES; ++half) {
            sum.add(Sum<DType::F32>::part_of(at, 0, half), half_of<L>(x, half), half_of<L>(y, half));
          }
        }
      }
      sums[row * models + column] += sum.total();
    }
  }
}

void gram(const Tensor& tensor, int64_t begin, int count, Scratch& scratch, double* sums) {
  if (tensor.models > 4) {
    deltas(tensor, begin, count, false, scratch);
    return gram_of_many(tensor.models, count, scratch, sums);
  }
  const bool in_place = point(tensor, begin, count, true, scratch), has_base = base_of(tensor) != nullptr;
  const int whole = padded(count);
  switch (in_place ? dtype_of(tensor.views[0]) : DType::F32) {
    case DType::F32: return gram_run<DType::F32>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::F16: return gram_run<DType::F16>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::BF16: return gram_run<DType::BF16>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::U8: return;
  }
}

// Adds L1 and the square of L2, and takes the maximum of Linf, of `values` to sums[3].
void add_norms(const float* values, int count, double* sums) {
  Sum<DType::F32> l1, squares;
  U largest = L::word(0);
  for (int start = 0; start < padded(count); start += SUM_LANES) {
    for (int at = 0; at < SUM_LANES; at += L::width) {
      const F value = L::load(values + start + at);
      for (int half = 0; half < HALVES; ++half) {
        const int part = Sum<DType::F32>::part_of(at, 0, half);
        const D wide = half_of<L>(value, half);
        l1.add(part, half_of<L>(L::absolute(value), half), half_of<L>(L::set(1.0f), half));
        squares.add(part, wide, wide);
      }
      largest = L::max(largest, L::magnitude(value));
    }
  }
  sums[0] += l1.total();
  sums[1] += squares.total();
  const double linf = from_bits(largest_of(largest));
  sums[2] = linf > sums[2] ? linf : sums[2];
}

void norms(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, Scratch& scratch,
           double* sums) {
  const auto keep = static_cast<Keep>(sweep.keep);
  for (int model = 0; model < tensor.models; ++model) {
    float* values = scratch.wide + model * CHUNK;
    add_norms(values, count, sums + model * 6);
    if (keep == Keep::ABOVE) {
      each_threshold<DType::F32>(parts + model, 1, false, tensor.begin + begin, count, scratch, [&](int from, int to) {
        for (int at = from; at < to; at += L::width) {
          const F delta = L::load(values + at);
          L::store(values + at, L::where(L::at_least(L::magnitude(delta), L::load(scratch.thresholds)), delta));
        }
      });
    } else if (keep == Keep::BAND) {
      each_threshold<DType::F32>(parts + model, 1, true, tensor.begin + begin, count, scratch, [&](int from, int to) {
        for (int at = from; at < to; at += L::width) {
          L::store(values + at, in_band(L::load(values + at), scratch.thresholds, scratch.tops));
        }
      });
    } else if (keep == Keep::CLIP) {
      for (int at = 0; at < padded(count); at += L::width) {
        L::store(values + at, clipped(L::load(values + at), parts[model]));
      }
    } else if (keep == Keep::BERNOULLI) {
      draw(parts[model], tensor.begin + begin, count, scratch.kept);
      for (int at = 0; at < padded(count); at += L::width) {
        L::store(values + at, L::where(L::mask_at(scratch.kept, at), L::load(values + at)));
      }
    }
    add_norms(values, count, sums + model * 6 + 3);
  }
}

void census(const float* deltas, int count, Census& census) {
  const U low = L::word(census.low), beyond = L::word(census.high + 1);
  uint32_t magnitudes[L::width];
  for (int at = 0; at < padded(count); at += L::width) {
    const U magnitude = L::magnitude(L::load(deltas + at));
    const uint32_t over = L::bits(L::at_least(magnitude, beyond));
    uint32_t inside = L::bits(L::at_least(magnitude, low)) & ~over;
    census.above += __builtin_popcount(over);
    if (!inside) continue;
    L::store(magnitudes, magnitude);
    for (; inside; inside &= inside - 1) {
      ++census.bins[(magnitudes[__builtin_ctz(inside)] - census.low) >> census.shift];
    }
  }
  if (census.low == 0) census.bins[0] -= padded(count) - count;
}

void tally(const float* deltas, int count, Tally& tally) {
  for (int i = 0; i < tally.values; ++i) {
    const U value = L::word(tally.value[i]), beyond = L::word(tally.value[i] + 1);
    int64_t above = 0, equal = 0;
    for (int at = 0; at < padded(count); at += L::width) {
      const U magnitude = L::magnitude(L::load(deltas + at));
      above += __builtin_popcount(L::bits(L::at_least(magnitude, beyond)));
      equal += __builtin_popcount(L::bits(L::equal(magnitude, value)));
    }
    tally.above[i] += above;
    tally.equal[i] += tally.value[i] == 0 ? equal - (padded(count) - count) : equal;
  }
}

// Counts in float32, which holds every whole number up to 2^24.
int64_t count_at_least(uint32_t least, const uint32_t* magnitudes, int64_t count) {
  constexpr int abreast = 4;
  const U value = L::word(least);
  F sums[abreast];
  for (F& sum : sums) sum = L::zero();
  int64_t at = 0;
  for (; at + abreast * L::width <= count; at += abreast * L::width) {
    for (int i = 0; i < abreast; ++i) {
      sums[i] = L::add_where(sums[i], L::at_least(L::load(magnitudes + at + i * L::width), value), L::set(1.0f));
    }
  }
  int64_t many = 0;
  for (; at < count; ++at) many += magnitudes[at] >= least;
  float lanes[L::width];
  L::store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (const float lane : lanes) many += static_cast<int64_t>(lane);
  return many;
}

// Bit by bit from above; bits that no magnitude has, which are most where weights are of 16 bits, need no look.
Kth kth(const uint32_t* magnitudes, int64_t count, int64_t k) {
  uint32_t ever = 0, found = 0;
  for (int64_t at = 0; at < count; ++at) ever |= magnitudes[at];
  int64_t not_below = count;
  for (uint32_t bit = 1u << 30; bit > 0; bit >>= 1) {
    if (!(ever & bit)) continue;
    const int64_t many = count_at_least(found | bit, magnitudes, count);
    if (many < k) continue;
    found |= bit;
    not_below = many;
  }
  const int64_t above = count_at_least(found + 1, magnitudes, count);
  return {found, above, not_below - above};
}
