// Floats, bfloat16 and vectors of eight of them, on GCC and clang.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;
constexpr i64 LANES = 8;     // floats in a vector
constexpr i64 WORTH = 1 << 15;  // operations below which threads cost more than they give

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));

struct Bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, Bf16& out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

inline V load(const float* p) {
    V out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline V load(const Bf16* p) {
    VH halves;
    std::memcpy(&halves, p, sizeof halves);
    const VU bits = __builtin_convertvector(halves, VU) << 16;
    V out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void store(V x, float* p) { std::memcpy(p, &x, sizeof x); }
inline void store(V x, Bf16* p) {
    VU bits;
    std::memcpy(&bits, &x, sizeof bits);
    const VU rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const VH halves = __builtin_convertvector(x == x ? rounded : VU{} + 0x7fc0, VH);
    std::memcpy(p, &halves, sizeof halves);
}

inline float sum(V v) {
#ifdef __AVX2__
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

template <typename A, typename B>
inline float dot(const A* a, const B* b, i64 n) {
    V acc = {};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) acc += load(a + i) * load(b + i);
    float out = sum(acc);
    for (; i < n; i++) out += widen(a[i]) * widen(b[i]);
    return out;
}

inline V all(float x) { return V{} + x; }

// e**x within 2 units of the last place, 0 below -87.3, e**88 above 88. After Cephes' expf.
inline V exponential(V x) {
    const VI tiny = x < -87.3f;
    x = x > 88.0f ? all(88.0f) : tiny ? all(-87.3f) : x;
    V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    VI power = (__builtin_convertvector(n, VI) + 127) << 23;
    V scale;
    std::memcpy(&scale, &power, sizeof(V));
    return tiny ? V{} : p * scale;
}

}  // namespace
