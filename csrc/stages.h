// The element maths of a sweep, once for every instruction set and for CUDA.
//
// `L` is a set of lanes: the types F (floats), M (a mask) and the few operations named below. Every operation is a
// single IEEE float32 operation, rounded to nearest even: the build turns contraction off, so the bits are the same
// everywhere.
#pragma once
#include "sweep.h"

namespace fastmerge {
namespace {

// What the agreeing sum is divided by.
enum class Mass { DIVISOR, AGREEING, CONTRIBUTORS };

// Without an election nobody agrees or does not.
constexpr Mass mass_of(Elect elect, Mass by) {
  return elect == Elect::NONE && by == Mass::AGREEING ? Mass::DIVISOR : by;
}

// What the models of one element have said so far, kept apart by the sign of what they say: once the vote is known the
// side that won is the answer, so no delta is held or read twice. The sums start at +0 and so are never -0: leaving a
// term out and adding a zero are the same.
template <class L>
struct Ballot {
  using F = typename L::F;
  F sum = L::zero();       // of what votes
  F positive = L::zero();  // sum of D_i where not (q_i <= 0): a NaN stands on both sides and is never lost
  F negative = L::zero();
  F mass_positive = L::zero();
  F mass_negative = L::zero();
};

// One more where a term is not zero; a NaN is not.
template <class L>
FASTMERGE_INLINE typename L::F contributors(typename L::F count, typename L::F term) {
  const auto some = L::either(L::not_le(term, L::zero()), L::not_ge(term, L::zero()));
  return L::add_where(count, some, L::set(1.0f));
}

template <class L>
FASTMERGE_INLINE typename L::F one_if_zero(typename L::F mass) {
  return L::pick(L::eq(mass, L::zero()), L::set(1.0f), mass);
}

template <class L, Elect elect, Mass by>
FASTMERGE_INLINE void vote(Ballot<L>& ballot, typename L::F delta, typename L::F weighted, typename L::F mass) {
  const auto voice = elect == Elect::WEIGHTED ? weighted : delta;
  const auto up = L::not_le(voice, L::zero());
  const auto down = L::not_ge(voice, L::zero());
  if constexpr (elect == Elect::COUNT) {
    ballot.sum = L::add_where(L::add_where(ballot.sum, up, L::set(1.0f)), down, L::set(-1.0f));
  } else {
    ballot.sum = ballot.sum + voice;
  }
  if constexpr (elect == Elect::WEIGHTED && by == Mass::DIVISOR) {
    ballot.positive = ballot.positive + L::positive_part(weighted);
    ballot.negative = ballot.negative + L::negative_part(weighted);
  } else {
    ballot.positive = L::add_where(ballot.positive, up, weighted);
    ballot.negative = L::add_where(ballot.negative, down, weighted);
  }
  if constexpr (by != Mass::DIVISOR) {
    const auto some = L::either(up, down);
    ballot.mass_positive = L::add_where(ballot.mass_positive, by == Mass::CONTRIBUTORS ? some : up, mass);
    ballot.mass_negative = L::add_where(ballot.mass_negative, by == Mass::CONTRIBUTORS ? some : down, mass);
  }
}

// The sum of those who agree with the vote, and by how much it is to be divided. `least_positive` is 0 where a vote of
// zero elects +, else the smallest denormal: then zero elects nobody and the mean is 0.
template <class L, Mass by>
FASTMERGE_INLINE typename L::F elected(const Ballot<L>& ballot, typename L::F least_positive, typename L::F& mass) {
  const auto positive = L::ge(ballot.sum, least_positive);
  const auto negative = L::not_ge(ballot.sum, L::zero());
  const auto agreed = L::pick(positive, ballot.positive, L::where(negative, ballot.negative));
  if constexpr (by != Mass::DIVISOR) {
    mass = L::pick(positive, ballot.mass_positive, L::where(negative, ballot.mass_negative));
    mass = one_if_zero<L>(mass);
  }
  return agreed;
}

// base + merged: base's own bits, a negative zero's too, where there is nothing to add.
template <class L, bool has_base>
FASTMERGE_INLINE typename L::F combine(typename L::F base, typename L::F merged) {
  return has_base ? L::pick(L::eq(merged, L::zero()), base, base + merged) : merged;
}

}  // namespace
}  // namespace fastmerge
