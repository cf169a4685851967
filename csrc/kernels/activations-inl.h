// tanh, sigmoid, relu on vectors, and their derivatives from the result.
//
// tanh and sigmoid stand on one core: with |r| <= ln2/2 and x = n ln2 + r, exp(x) = 2^n (1 + p(r)),
// p(r) = expm1(r) = r + r^2 q(r), and q a polynomial minimising the largest relative error of p
// (Remez). activate() prefers an ISA's own tanh, where it has one. Accuracy
// (tests/test_activations.py sweeps it): within 2.5 ulp for float and double; sigmoid is zero where
// exp is less than about the smallest normal number.
#pragma once

#include "rnn.h"
#include "vec-inl.h"

namespace charrnn_fast {
namespace {

template <typename scalar>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23;
  // 1.5 * 2^23 + 127: adding it rounds to an integer, and leaves the bits of the exponent of 2^n.
  static constexpr float kMagic = 12583039.0f;
  static constexpr float kLn2High = 0.693359375f;  // few bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kTanhSaturates = 9.1f;    // tanh rounds to 1 from here on
  static constexpr float kExpVanishes = 88.0f;     // n is -127 here, for which 2^n is taken as 0
  static constexpr float kExpUnderflows = 110.0f;  // exp(-x) is 0 from here on
  static constexpr int kTerms = 6;                 // relative error of p: 3.8e-10
  static constexpr float kQ[kTerms] = {0.5000000004f,   0.1666666631f,   0.0416664716f,
                                       0.008333416274f, 0.001393395312f, 0.0001982654532f};
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kMagic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kTanhSaturates = 19.1;
  static constexpr double kExpVanishes = 709.0;
  static constexpr double kExpUnderflows = 760.0;
  static constexpr int kTerms = 11;  // relative error of p: 2.7e-19
  static constexpr double kQ[kTerms] = {0.5,
                                        0.16666666666666676,
                                        0.0416666666666665559,
                                        0.00833333333332199971,
                                        0.00138888888889488709,
                                        0.00019841269885316173,
                                        0.0000248015871902529222,
                                        2.75572449358197115e-6,
                                        2.75573917523670097e-7,
                                        2.51088076548279416e-8,
                                        2.08778794590950664e-9};
};

// x = n ln2 + r split into p = expm1(r) and the bits of kMagic + n.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> reduced_expm1(Vec<scalar> x, Vec<scalar>& magic_plus_n) {
  using C = ExpConstants<scalar>;
  constexpr scalar kLog2E = static_cast<scalar>(1.44269504088896340736);
  const Vec<scalar> magic = broadcast(C::kMagic);
  magic_plus_n = multiply_add(x, broadcast(kLog2E), magic);
  const Vec<scalar> n = magic_plus_n - magic;
  Vec<scalar> r = multiply_add(n, broadcast(-C::kLn2High), x);
  r = multiply_add(n, broadcast(-C::kLn2Low), r);
  // Horner's scheme in r^2, over pairs of terms: the next step of a recurrence waits for the
  // result, and this takes half the time of going term by term.
  const Vec<scalar> square = r * r;
  Vec<scalar> q = broadcast(C::kQ[C::kTerms - 1]);
  if constexpr (C::kTerms % 2 == 0) q = multiply_add(q, r, broadcast(C::kQ[C::kTerms - 2]));
#pragma GCC unroll 16
  for (int i = (C::kTerms - 1) / 2 * 2 - 2; i >= 0; i -= 2) {
    q = multiply_add(q, square, multiply_add(broadcast(C::kQ[i + 1]), r, broadcast(C::kQ[i])));
  }
  return multiply_add(square, q, r);
}

// 2^n from the bits of kMagic + n, for n in the normal range; 0 for the n below it. All bits of
// kMagic but those of the exponent of one are shifted out.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> power_of_two(Vec<Bits<scalar>> magic_plus_n) {
  return bit_cast<Vec<scalar>>(magic_plus_n << ExpConstants<scalar>::kMantissaBits);
}

// A NaN stays, in both.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> at_most(Vec<scalar> x, scalar limit) {
#ifdef CHARRNN_FAST_MINIMUM
  return minimum(broadcast(limit), x);
#else
  return select<scalar>(x > broadcast(limit), broadcast(limit), x);
#endif
}
template <typename scalar>
ALWAYS_INLINE Vec<scalar> at_least(Vec<scalar> x, scalar limit) {
#ifdef CHARRNN_FAST_MINIMUM
  return maximum(broadcast(limit), x);
#else
  return select<scalar>(x < broadcast(limit), broadcast(limit), x);
#endif
}

template <typename scalar>
ALWAYS_INLINE Vec<Bits<scalar>> sign_bit(Vec<scalar> x) {
  return bit_cast<Vec<Bits<scalar>>>(x) & bit_cast<Vec<Bits<scalar>>>(broadcast(-scalar{0}));
}

template <typename scalar>
ALWAYS_INLINE Vec<scalar> magnitude(Vec<scalar> x) {
  return bit_cast<Vec<scalar>>(bit_cast<Vec<Bits<scalar>>>(x) ^ sign_bit<scalar>(x));
}
// -|x|: one operation, where the two signs take three.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> minus_magnitude(Vec<scalar> x) {
  return bit_cast<Vec<scalar>>(bit_cast<Vec<Bits<scalar>>>(x) |
                               bit_cast<Vec<Bits<scalar>>>(broadcast(-scalar{0})));
}

// tanh|x| = e / (e + 2) with e = expm1(2|x|): no cancellation anywhere, so small x keep their
// digits.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> tanh(Vec<scalar> x) {
  const Vec<scalar> z = at_most<scalar>(magnitude<scalar>(x), ExpConstants<scalar>::kTanhSaturates);
  Vec<scalar> magic_plus_n;
  const Vec<scalar> p = reduced_expm1<scalar>(z + z, magic_plus_n);
  const Vec<scalar> s = power_of_two<scalar>(bit_cast<Vec<Bits<scalar>>>(magic_plus_n));
  const Vec<scalar> e = multiply_add(s, p, s - broadcast(scalar{1}));
  const Vec<scalar> result = e / (e + broadcast(scalar{2}));
  return bit_cast<Vec<scalar>>(bit_cast<Vec<Bits<scalar>>>(result) | sign_bit<scalar>(x));
}

// exp(x) for x <= 0. A NaN stays.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> exp_of_nonpositive(Vec<scalar> x) {
  Vec<scalar> magic_plus_n;
  const Vec<scalar> p = reduced_expm1<scalar>(
      at_least<scalar>(x, -ExpConstants<scalar>::kExpUnderflows), magic_plus_n);
  // 2^n may be denormal: scale in two steps.
  const auto magic = bit_cast<Vec<Bits<scalar>>>(broadcast(ExpConstants<scalar>::kMagic));
  const auto n = bit_cast<Vec<Bits<scalar>>>(magic_plus_n) - magic;
  const auto half = n >> 1;
  return (broadcast(scalar{1}) + p) * power_of_two<scalar>(magic + half) *
         power_of_two<scalar>(magic + (n - half));
}

// exp(x) for x >= -kExpVanishes, where it is 0, and x <= kExpVanishes.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> exp_of_limited(Vec<scalar> x) {
  Vec<scalar> magic_plus_n;
  const Vec<scalar> p = reduced_expm1<scalar>(x, magic_plus_n);
  const Vec<scalar> s = power_of_two<scalar>(bit_cast<Vec<Bits<scalar>>>(magic_plus_n));
  return multiply_add(s, p, s);
}

template <typename scalar>
ALWAYS_INLINE Vec<scalar> exp_of_minus_magnitude(Vec<scalar> x) {
  return exp_of_limited<scalar>(
      at_least<scalar>(minus_magnitude<scalar>(x), -ExpConstants<scalar>::kExpVanishes));
}

// e / (1 + e) with e = exp(x): tiny results keep their digits.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> sigmoid(Vec<scalar> x) {
  constexpr scalar limit = ExpConstants<scalar>::kExpVanishes;
  const Vec<scalar> e = exp_of_limited<scalar>(at_least<scalar>(at_most<scalar>(x, limit), -limit));
  return e / (broadcast(scalar{1}) + e);
}

template <typename scalar>
ALWAYS_INLINE Vec<scalar> relu(Vec<scalar> x) {
  const Vec<scalar> zero = {};
  return select<scalar>(x < zero, zero, x);  // this way round a NaN stays
}

template <Cell cell, typename scalar>
ALWAYS_INLINE Vec<scalar> activate(Vec<scalar> x) {
  if constexpr (cell == Cell::kTanh) {
#ifdef CHARRNN_FAST_TANH
    if constexpr (sizeof(scalar) == 4) return tanh_by_pieces(x);
#endif
    return tanh<scalar>(x);
  }
  if constexpr (cell == Cell::kSigmoid) return sigmoid<scalar>(x);
  return relu<scalar>(x);
}

// g * act'(sum inside act), from y = act(that sum).
template <Cell cell, typename scalar>
ALWAYS_INLINE Vec<scalar> activate_backward(Vec<scalar> g, Vec<scalar> y) {
  const Vec<scalar> one = broadcast(scalar{1});
  if constexpr (cell == Cell::kTanh) return g * multiply_add(-y, y, one);
  if constexpr (cell == Cell::kSigmoid) return g * (y * (one - y));
  const Vec<scalar> zero = {};
  return select<scalar>(y <= zero, zero, g);
}

}  // namespace
}  // namespace charrnn_fast
