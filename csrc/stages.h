// The element maths of a sweep, once for every instruction set and for CUDA.
//
// `L` is a set of lanes: the types F (floats), M (a mask) and the few operations named below. Every operation is a
// single IEEE float32 operation, rounded to nearest even: the build turns contraction off, so the bits are the same
// everywhere.
#pragma once
#include "sweep.h"

namespace fastmerge {
namespace {

// What the models of one element have said so far, kept apart by the sign of what they say: once the vote is known the
// side that won is the answer, so no delta is held or read twice.
template <class L>
struct Ballot {
  using F = typename L::F;
  F sum = L::zero();       // of what votes
  F positive = L::zero();  // sum of D_i where not (q_i <= 0): a NaN stands on both sides and is never lost
  F negative = L::zero();
  F mass_positive = L::zero();
  F mass_negative = L::zero();
};

template <class L, Elect elect, bool contributors>
FASTMERGE_INLINE void vote(Ballot<L>& ballot, typename L::F delta, typename L::F weighted, typename L::F mass) {
  const auto voice = elect == Elect::WEIGHTED ? weighted : delta;
  const auto up = L::not_le(voice, L::zero());
  const auto down = L::not_ge(voice, L::zero());
  if constexpr (elect == Elect::COUNT) {
    ballot.sum = (ballot.sum + L::where(up, L::set(1.0f))) - L::where(down, L::set(1.0f));
  } else {
    ballot.sum = ballot.sum + voice;
  }
  ballot.positive = ballot.positive + L::where(up, weighted);
  ballot.negative = ballot.negative + L::where(down, weighted);
  const auto some = L::either(up, down);
  ballot.mass_positive = ballot.mass_positive + L::where(contributors ? some : up, mass);
  ballot.mass_negative = ballot.mass_negative + L::where(contributors ? some : down, mass);
}

// The mean of those who agree with the vote. `least_positive` is 0 where a vote of zero elects +, else the smallest
// denormal: then zero elects nobody and the mean is 0.
template <class L>
FASTMERGE_INLINE typename L::F elected(const Ballot<L>& ballot, typename L::F least_positive, bool by_mass,
                                       typename L::F divisor) {
  const auto positive = L::ge(ballot.sum, least_positive);
  const auto negative = L::not_ge(ballot.sum, L::zero());
  const auto agreed = L::pick(positive, ballot.positive, L::where(negative, ballot.negative));
  auto mass = by_mass ? L::pick(positive, ballot.mass_positive, L::where(negative, ballot.mass_negative)) : divisor;
  mass = L::pick(L::eq(mass, L::zero()), L::set(1.0f), mass);
  return agreed / mass;
}

// base + mean * lambda: base's own bits where the merged delta is zero, and one NaN for all NaNs.
template <class L, bool has_base>
FASTMERGE_INLINE typename L::F combine(typename L::F base, typename L::F mean, typename L::F lambda) {
  const auto merged = mean * lambda;
  const auto out = has_base ? L::pick(L::eq(merged, L::zero()), base, base + merged) : merged;
  return L::pick(L::eq(out, out), out, L::set(from_bits(0x7fc00000)));
}

}  // namespace
}  // namespace fastmerge
