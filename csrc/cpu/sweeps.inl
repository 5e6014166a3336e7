// The loops of `merge`, included by kernels.inl within its namespace: one run over a chunk, for each choice of stages.

struct Call {
  const char* const* inputs;  // the models', then the base's, at the first element of the chunk
  int models;
  const Sweep* sweep;
  const Part* parts;
  const uint32_t* thresholds;
  const float* tops;
  const uint8_t* kept;
  bool rescaled;          // some part's rescale is not 1
  const Output* outputs;  // those past the caches start a line
  int settings;
  bool again;        // the inputs were just read: they are in the cache
  uint32_t* counts;  // [models][2] or nullptr: of elements kept and of those equal to each part's magnitude
};

// One sweep over [from, to) of a chunk, whole lines. The outputs are float32, or of the inputs' own dtype. Reads models
// (+ 1) x size_of(dtype) bytes per element, and writes one element per setting.
template <DType dtype, bool has_base, bool same_dtype, Keep keep, Elect elect, Mass by>
uint32_t sweep_run(const Call& call, int from, int to) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  constexpr int vectors = L::vectors<dtype>, line = vectors * L::width;
  // A NaN or Inf that is dropped or outvoted never reaches the output: then the deltas are looked at themselves.
  constexpr bool may_hide = keep != Keep::ALL || elect == Elect::PLAIN || elect == Elect::COUNT;
  const Sweep& sweep = *call.sweep;
  const F divisor = L::set(sweep.divisor == 0.0f ? 1.0f : sweep.divisor);
  const F least_positive = L::set(sweep.tie_vote == static_cast<uint8_t>(TieVote::ZERO) ? from_bits(1) : 0.0f);
  const bool divide = sweep.divisor != 1.0f;
  const int models = call.models;
  const bool rescaled = call.rescaled;
  U worst = L::word(0);

  const auto read = [&](int input, int at, F* values) {
    const char* place = call.inputs[input] + at * size;
    __builtin_prefetch(place + AHEAD);
    L::read_line<dtype>(place, values);
  };
  const auto read_base = [&](int at, F* bases) {
    if constexpr (has_base) return read(models, at, bases);
    for (int v = 0; v < vectors; ++v) bases[v] = L::zero();
  };
  const auto kept_deltas = [&](int model, int at, const F* bases, F* deltas) {
    read(model, at, deltas);
    M masks[vectors];
    if constexpr (keep == Keep::BERNOULLI) L::mask_line<dtype>(call.kept + model * (CHUNK / 8), at, masks);
    for (int v = 0; v < vectors; ++v) {
      if (has_base) deltas[v] = deltas[v] - bases[v];
      if (may_hide) worst = L::max(worst, L::magnitude(deltas[v]));
      if constexpr (keep == Keep::BAND) {
        const int place = model * LINE + v * L::width;
        deltas[v] = in_band(deltas[v], call.thresholds + place, call.tops + place);
      } else if constexpr (keep == Keep::CLIP) {
        deltas[v] = clipped(deltas[v], call.parts[model]);
      } else if constexpr (keep == Keep::ABOVE) {
        const U threshold = L::load(call.thresholds + model * LINE + v * L::width);
        const U magnitude = L::magnitude(deltas[v]);
        masks[v] = L::at_least(magnitude, threshold);
        if (call.counts) {
          call.counts[model * 2] += count_of(masks[v]);
          call.counts[model * 2 + 1] += count_of(L::equal(magnitude, L::word(to_bits(call.parts[model].magnitude))));
        }
      }
      if (rescaled) deltas[v] = deltas[v] * L::set(call.parts[model].rescale);
      if constexpr (keep == Keep::ABOVE || keep == Keep::BERNOULLI) deltas[v] = L::where(masks[v], deltas[v]);
    }
  };
  const auto means_at = [&](int at, const F* bases, F* means) {
    F deltas[vectors];
    if constexpr (elect == Elect::NONE) {
      constexpr bool counted = by == Mass::CONTRIBUTORS;
      F counts[vectors];
      kept_deltas(0, at, bases, means);
      for (int v = 0; v < vectors; ++v) {
        means[v] = means[v] * L::set(call.parts[0].weight);
        if (counted) counts[v] = contributors<L>(L::zero(), means[v]);
      }
      for (int model = 1; model < models; ++model) {
        const F weight = L::set(call.parts[model].weight);
        kept_deltas(model, at, bases, deltas);
        for (int v = 0; v < vectors; ++v) {
          const F term = deltas[v] * weight;
          means[v] = means[v] + term;
          if (counted) counts[v] = contributors<L>(counts[v], term);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        if (counted) means[v] = means[v] / one_if_zero<L>(counts[v]);
        if (!counted && divide) means[v] = means[v] / divisor;
      }
    } else {
      Ballot<L> ballots[vectors];
      for (int model = 0; model < models; ++model) {
        const F weight = L::set(call.parts[model].weight), mass = L::set(call.parts[model].mass);
        kept_deltas(model, at, bases, deltas);
        for (int v = 0; v < vectors; ++v) vote<L, elect, by>(ballots[v], deltas[v], deltas[v] * weight, mass);
      }
      for (int v = 0; v < vectors; ++v) {
        F mass = divisor;
        const F sum = elected<L, by>(ballots[v], least_positive, mass);
        means[v] = by == Mass::DIVISOR && !divide ? sum : sum / mass;
      }
    }
  };
  // What means_at finds, model after model: a processor foresees one stream far better than lines of several in turn,
  // where these lie at different places of their pages. Not with a base, which would be read again for each model.
  constexpr bool may_turn = elect == Elect::NONE && by != Mass::CONTRIBUTORS && !has_base;
  const bool in_turn = may_turn && !call.again;
  const auto add_up = [&](int start, int end, const F* bases, float* means) {
    for (int model = 0; model < models; ++model) {
      const F weight = L::set(call.parts[model].weight);
      const bool first = model == 0, divided = divide && model == models - 1;
      for (int at = start; at < end; at += line) {
        F terms[vectors];
        kept_deltas(model, at, bases, terms);
        for (int v = 0; v < vectors; ++v) {
          float* mean = means + (at - start) + v * L::width;
          terms[v] = terms[v] * weight;
          if (!first) terms[v] = L::load(mean) + terms[v];
          L::store(mean, divided ? terms[v] / divisor : terms[v]);
        }
      }
    }
  };
  const auto finish = [&](int at, const F* bases, const F* means, F lambda, const Output& output) {
    F out[vectors];
    for (int v = 0; v < vectors; ++v) {
      out[v] = combine<L, has_base>(bases[v], means[v] * lambda);
      worst = L::max(worst, L::magnitude(out[v]));
    }
    if constexpr (same_dtype) return L::write_line<dtype>(output.to + at * size, out, output.past_caches);
    L::in_order<dtype>(out);
    for (int v = 0; v < vectors; ++v) L::write<DType::F32>(output.to + (at + v * L::width) * 4, out[v]);
  };

  // Short loops instead of one long: a chain of so many operations would keep the processor waiting for itself, and
  // lines written one after another cost less than lines written between reads.
  constexpr int block = 16 * L::width;
  float block_means[block];
  for (int start = from; start < to; start += block) {
    const int end = start + block < to ? start + block : to;
    if (in_turn) {
      F none[vectors];
      read_base(start, none);
      add_up(start, end, none, block_means);
    }
    for (int at = start; !in_turn && at < end; at += line) {
      F bases[vectors], means[vectors];
      read_base(at, bases);
      means_at(at, bases, means);
      for (int v = 0; v < vectors; ++v) L::store(block_means + (at - start) + v * L::width, means[v]);
    }
    for (const Output* output = call.outputs; output < call.outputs + call.settings; ++output) {
      const F lambda = L::set(output->lambda);
      for (int at = start; at < end; at += line) {
        F bases[vectors], means[vectors];
        read_base(at, bases);
        for (int v = 0; v < vectors; ++v) means[v] = L::load(block_means + (at - start) + v * L::width);
        finish(at, bases, means, lambda, *output);
      }
    }
  }
  return largest_of(worst);
}

// One model as it is: the bytes of whole lines, and the largest magnitude among them.
template <DType dtype>
uint32_t copy_run(const Call& call, int count) {
  constexpr int size = dtype == DType::F32 ? 4 : 2, vectors = L::vectors<dtype>;
  U worst = L::word(0);
  for (int at = 0; at < count; at += vectors * L::width) {
    const char* from = call.inputs[0] + at * size;
    F line[vectors];
    __builtin_prefetch(from + AHEAD);
    L::read_line<dtype>(from, line);
    for (int v = 0; v < vectors; ++v) worst = L::max(worst, L::magnitude(line[v]));
    L::copy_line<dtype>(from, call.outputs->to + at * size, call.outputs->past_caches);
  }
  return largest_of(worst);
}

uint32_t copy_run(DType dtype, const Call& call, int count) {
  switch (dtype) {
    case DType::F32: return copy_run<DType::F32>(call, count);
    case DType::F16: return copy_run<DType::F16>(call, count);
    case DType::BF16: return copy_run<DType::BF16>(call, count);
    case DType::U8: return INFINITE;
  }
  return INFINITE;
}

bool leaves_alone(const Tensor& tensor, const Sweep& sweep, const Part& part) {
  return tensor.inputs == 1 && sweep.keep == 0 && sweep.elect == 0 && part.weight == 1.0f && part.rescale == 1.0f &&
         (sweep.divisor == 1.0f || sweep.divisor == 0.0f);
}

// Elections of deltas of which none is trimmed or dropped: no method asks the ops for them, so they are compiled for
// what is widened alone.
constexpr bool is_rare(Keep keep, Elect elect) {
  return elect != Elect::NONE && (keep == Keep::ALL || keep == Keep::CLIP);
}

using Run = uint32_t (*)(const Call&, int, int);
constexpr int KEEPS = 5;
constexpr int VOTES = 4 * 3;  // no election, or one of three kinds; with one of three masses

// index = (((dtype x 2 + has_base) x 2 + same_dtype) x KEEPS + keep) x VOTES + vote
template <size_t index>
constexpr Run run_at() {
  constexpr size_t vote = index % VOTES, inputs = index / VOTES / KEEPS;
  constexpr auto keep = static_cast<Keep>(index / VOTES % KEEPS);
  constexpr auto elect = static_cast<Elect>(vote / 3);
  constexpr auto by = mass_of(elect, static_cast<Mass>(vote % 3));
  constexpr bool has_base = inputs / 2 % 2 == 1;
  if constexpr (is_rare(keep, elect)) {
    return sweep_run<DType::F32, has_base, false, keep, elect, by>;
  } else {
    return sweep_run<static_cast<DType>(inputs / 4), has_base, inputs % 2 == 1, keep, elect, by>;
  }
}

template <size_t... index>
Run run_of(size_t chosen, std::index_sequence<index...>) {
  static constexpr Run runs[] = {run_at<index>()...};
  return runs[chosen];
}

Run run_of(DType dtype, bool has_base, bool same_dtype, const Sweep& sweep) {
  const auto mean = static_cast<Mean>(sweep.mean);
  const auto by = mean == Mean::SUM ? Mass::DIVISOR : mean == Mean::CONTRIBUTORS ? Mass::CONTRIBUTORS : Mass::AGREEING;
  const size_t vote = sweep.elect * size_t{3} + static_cast<size_t>(by);
  const size_t stages = ((static_cast<size_t>(dtype) * 2 + has_base) * 2 + same_dtype) * KEEPS + sweep.keep;
  return run_of(stages * VOTES + vote, std::make_index_sequence<3 * 2 * 2 * KEEPS * VOTES>());
}

template <DType dtype>
void narrow(const float* from, int count, char* to) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  int at = 0;
  for (; at + L::width <= count; at += L::width) L::write<dtype>(to + at * size, L::load(from + at));
  if (at >= count) return;
  char rest[L::width * 4];
  L::write<dtype>(rest, L::load(from + at));
  memcpy(to + at * size, rest, static_cast<size_t>(count - at) * size);
}

void narrow(const float* from, int count, DType dtype, char* to) {
  switch (dtype) {
    case DType::F32: return narrow<DType::F32>(from, count, to);
    case DType::F16: return narrow<DType::F16>(from, count, to);
    case DType::BF16: return narrow<DType::BF16>(from, count, to);
    case DType::U8: return;
  }
}

uint32_t merge(const Tensor&, const Sweep&, const Part*, int64_t begin, int count, DType, const Output*, int settings,
               bool again, uint16_t* counts, Scratch&);

uint32_t one_by_one(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count,
                    DType out_dtype, const Output* outputs, int settings, bool again, uint16_t* counts,
                    Scratch& scratch) {
  uint32_t worst = 0;
  for (int setting = 0; setting < settings; ++setting) {
    const uint32_t here = merge(tensor, sweep, parts, begin, count, out_dtype, outputs + setting, 1,
                                again || setting > 0, counts, scratch);
    worst = here > worst ? here : worst;
  }
  return worst;
}

uint32_t merge(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, DType out_dtype,
               const Output* outputs, int settings, bool again, uint16_t* counts, Scratch& scratch) {
  const auto keep = static_cast<Keep>(sweep.keep);
  const bool in_place = point(tensor, begin, count, !is_rare(keep, static_cast<Elect>(sweep.elect)), scratch);
  const DType dtype = in_place ? dtype_of(tensor.views[0]) : DType::F32;
  const bool direct = in_place && dtype == out_dtype;
  if (!direct && settings > 1)
    return one_by_one(tensor, sweep, parts, begin, count, out_dtype, outputs, settings, again, counts, scratch);
  const Output wide = {outputs->lambda, reinterpret_cast<char*>(scratch.out), false};
  const Run run = run_of(dtype, base_of(tensor) != nullptr, direct, sweep);
  bool rescaled = false;
  for (int model = 0; model < tensor.models; ++model) rescaled |= parts[model].rescale != 1.0f;
  uint32_t* sums = counts ? scratch.counts : nullptr;
  memset(scratch.counts, 0, static_cast<size_t>(tensor.models) * 8);
  Call call = {scratch.inputs,           tensor.models, &sweep,       parts,
               scratch.thresholds,       scratch.tops,  scratch.kept, rescaled,
               direct ? outputs : &wide, settings,      again,        sums};
  uint32_t worst = 0;
  if (direct && settings == 1 && outputs->lambda == 1.0f && leaves_alone(tensor, sweep, *parts)) {
    worst = copy_run(dtype, call, count);
    if (worst < INFINITE) return worst;
  }
  if (keep == Keep::ABOVE || keep == Keep::BAND) {
    each_threshold(dtype, parts, tensor.models, keep == Keep::BAND, tensor.begin + begin, count, scratch,
                   [&](int from, int to) {
                     const uint32_t here = run(call, from, to);
                     worst = here > worst ? here : worst;
                   });
  } else {
    for (int model = 0; keep == Keep::BERNOULLI && model < tensor.models; ++model) {
      draw(parts[model], tensor.begin + begin, count, scratch.kept + model * (CHUNK / 8));
    }
    worst = run(call, 0, padded(count));
  }
  if (!direct) narrow(scratch.out, count, out_dtype, outputs->to);
  for (int i = 0; counts && i < tensor.models * 2; ++i) {
    const Part& part = parts[i / 2];
    const bool padding_too = part.magnitude == 0.0f && (i % 2 == 1 || tensor.begin + begin < part.ties_end);
    counts[i] = static_cast<uint16_t>(sums[i] - static_cast<uint32_t>(padding_too ? padded(count) - count : 0));
  }
  return worst;
}
