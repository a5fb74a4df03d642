// Coefficients of the normal distribution's function Phi, for cpu.cpp and avx512.cpp.
//
//   t = |x|,  u = 1 / (1 + kScale t),  Phi(-t) = R(u) exp(-t^2 / 2),  Phi(t) = 1 - Phi(-t)
//
// with R a polynomial in u, and the exponential 2^n 2^f, n whole and |f| <= 1/2, 2^f a polynomial in f. Both polynomials
// are least in their largest relative error (Lawson's iteration), so the tails are as good as the middle: PyTorch's
// 1 + erf(x / sqrt(2)) is not. Lowest power first.
#pragma once

namespace pera::normal {

constexpr float kHalfLog2E = 0.72134752f; // log2(e) / 2
constexpr float kInverseSqrt2Pi = 0.39894228f;
constexpr float kLimit = 20.0f; // of t: the exponential is zero in float32 from 14.4 on
constexpr float kRound = 12582912.0f; // 1.5 * 2^23: a float added to it is rounded to a whole number

// Half types: R = u P(u), relative error 2e-6 for t <= 9; 2^f, 3e-6.
constexpr float kScaleHalf = 0.3f;
constexpr float kRHalf[] = {0.120327733f, 0.111210398f, 0.153751388f, -0.0340382941f, 0.230586722f, -0.0818374678f};
constexpr float kExp2Half[] = {0.999999285f, 0.693121791f, 0.240247443f, 0.0559178591f, 0.00957010128f};

// float32: R = 1/2 - t u P(u), which is exact at 0, relative error 6e-9 for t <= 13.2, without that of rounding; 2^f, 2e-9.
constexpr float kScaleSingle = 0.26f;
constexpr float kRSingle[] = {0.130001739f, 0.102988608f, 0.0765204951f, 0.04816157f, 0.0397291146f, -0.0116843572f,
                              0.0397527143f, -0.0352963172f, 0.00876883604f};
constexpr float kExp2Single[] = {1.0f, 0.693147182f, 0.240226462f, 0.0555032864f, 0.00961848907f, 0.00133999309f,
                                 0.000153458124f};

// Without the exponential, for half types: cubic polynomials of Phi(-t) around t = 0, kStep, 2 kStep, ... (tails() in cpu.cpp),
// the last one zero.
constexpr int kTails = 32;
constexpr float kStep = 0.2f;

} // namespace pera::normal
