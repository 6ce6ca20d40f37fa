// Rows times matrices, packed in MXFP4 (tpx/mxfp4.py) or plain.

#pragma once

#include "lanes.h"

namespace {

constexpr i64 BLOCK = 32;    // values that share a scale
constexpr i64 ROWS = 8;      // most rows of x that an unpacked block meets
constexpr i64 OUTPUTS = 64;  // in a piece of work

// Values of a block are unpacked in this order, and rows of x are put into it to meet them.
constexpr int ORDER[BLOCK] = {0,  4,  8,  12, 1,  5,  9,  13, 2,  6,  10, 14, 3,  7,  11, 15,
                              16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31};

struct Scales {
    float of[256];  // of each E8M0 byte: 2**(byte - 127), and 255 is NaN
    Scales() {
        for (int byte = 0; byte < 255; byte++) of[byte] = std::ldexp(1.0f, byte - 127);
        of[255] = std::nanf("");
    }
};
const Scales SCALES;

// The upper half of a code's float, by bytes; its lower half is 0.
alignas(16) constexpr uint8_t LOW[16] = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0,
                                         0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};
alignas(16) constexpr uint8_t HIGH[16] = {0,    0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                          0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};

// The 32 values of one block, exactly, in ORDER.
inline void unpack(const uint8_t* bytes, float scale, V out[4]) {
#ifdef __AVX2__
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)LOW));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)HIGH));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes));
    const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);  // low nibbles, high nibbles
    const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(both, shift), _mm256_set1_epi8(15));
    const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
    const __m256i uppers = _mm256_set1_epi32(0xffff0000);
    for (int i = 0; i < 2; i++) {
        const __m256i halves =
            i ? _mm256_unpackhi_epi8(lows, highs) : _mm256_unpacklo_epi8(lows, highs);
        out[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)) * scale;
        out[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(halves, uppers)) * scale;
    }
#else
    for (i64 i = 0; i < BLOCK; i++) {
        const int code = bytes[ORDER[i] / 2] >> ORDER[i] % 2 * 4 & 15;
        const uint32_t bits = uint32_t(HIGH[code]) << 24 | uint32_t(LOW[code]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        out[i / LANES][i % LANES] = value * scale;
    }
#endif
}

// Where a product's weights come from: unpacked(row, block, w) gives 32 of them as floats.
struct Packed {
    const uint8_t *blocks, *scales;
    i64 in_row;

    void unpacked(i64 row, i64 block, V w[4]) const {
        const i64 at = row * in_row + block;
        unpack(blocks + at * 16, SCALES.of[scales[at]], w);
    }
};

template <typename T>
struct Plain {
    const T* values;
    i64 in_row;

    void unpacked(i64 row, i64 block, V w[4]) const {
        const T* from = values + (row * in_row + block) * BLOCK;
        for (i64 i = 0; i < 4; i++) w[i] = load(from + i * LANES);
    }
};

// Rows of x times rows of weights. Each product is the sum over blocks, in them over four vectors,
// then over lanes.
template <typename T, typename Weights>
struct Product {
    const float* x;  // in the order of the weights
    T* out;
    const T* bias;  // or null
    Weights weights;
    i64 k, n;

    // R rows of x, from `row`, times O of expert's rows: nothing that is unpacked is stored.
    template <int R, int O>
    void multiply(i64 expert, i64 row, i64 first) const {
        const i64 from = expert * n + first;
        V acc[R][O] = {};
        for (i64 b = 0; b < k / BLOCK; b++) {
            for (int o = 0; o < O; o++) {
                V w[4];
                weights.unpacked(from + o, b, w);
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < 4; i++)
                        acc[r][o] += load(x + (row + r) * k + b * BLOCK + i * LANES) * w[i];
            }
        }
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) {
                const float add = bias ? widen(bias[from + o]) : 0.0f;
                narrow(sum(acc[r][o]) + add, out[(row + r) * n + first + o]);
            }
    }

    // O at once while there are as many, so that one row alone keeps several sums going.
    template <int R, int O = R == 1 ? 4 : R == 2 ? 2 : 1>
    void outputs(i64 expert, i64 row, i64 first, i64 stop) const {
        for (; first + O <= stop; first += O) multiply<R, O>(expert, row, first);
        for (; first < stop; first++) multiply<R, 1>(expert, row, first);
    }

    void rows(i64 count, i64 expert, i64 row, i64 first, i64 stop) const {
        switch (count) {
            case 1: return outputs<1>(expert, row, first, stop);
            case 2: return outputs<2>(expert, row, first, stop);
            case 3: return outputs<3>(expert, row, first, stop);
            case 4: return outputs<4>(expert, row, first, stop);
            case 5: return outputs<5>(expert, row, first, stop);
            case 6: return outputs<6>(expert, row, first, stop);
            case 7: return outputs<7>(expert, row, first, stop);
            case 8: return outputs<8>(expert, row, first, stop);
        }
    }

    struct Piece {
        i64 expert, row, rows, first;
    };

    // All experts' rows; an output is one thread's.
    void run(const i64* counts, i64 experts, int threads) const {
        std::vector<Piece> pieces;
        i64 used = 0;
        for (i64 e = 0; e < experts; e++)
            for (i64 left = counts[e]; left > 0;) {
                const i64 parts = (left + ROWS - 1) / ROWS, rows = (left + parts - 1) / parts;
                for (i64 first = 0; first < n; first += OUTPUTS)
                    pieces.push_back({e, used, rows, first});
                used += rows, left -= rows;
            }
        const i64 many = i64(pieces.size());
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (threads > 1 && many > 1 && used * k * n > WORTH)
        for (i64 i = 0; i < many; i++) {
            const Piece& p = pieces[i];
            rows(p.rows, p.expert, p.row, p.first, p.first + OUTPUTS < n ? p.first + OUTPUTS : n);
        }
    }
};

template <typename T>
void grouped_mm(const T* x, T* out, const T* bias, i64 total, i64 k, i64 n, i64 experts,
                const i64* counts, const uint8_t* blocks, const uint8_t* scales, int threads) {
    i64 used = 0;
    for (i64 e = 0; e < experts; e++) used += counts[e];
    std::memset((void*)(out + used * n), 0, (total - used) * n * sizeof(T));
    std::vector<float> ordered(used * k);
    for (i64 i = 0; i < used * k; i += BLOCK)
        for (i64 j = 0; j < BLOCK; j++) ordered[i + j] = widen(x[i + ORDER[j]]);
    const Product<T, Packed> product = {
        ordered.data(), out, bias, {blocks, scales, k / BLOCK}, k, n};
    product.run(counts, experts, threads);
}

inline void linear(const float* x, float* out, const float* bias, const float* w, i64 rows, i64 k,
                   i64 n, int threads) {
    const Product<float, Plain<float>> product = {x, out, bias, {w, k / BLOCK}, k, n};
    product.run(&rows, 1, threads);
}
inline void linear(const Bf16* x, Bf16* out, const Bf16* bias, const Bf16* w, i64 rows, i64 k,
                   i64 n, int threads) {
    std::vector<float> wide(rows * k);
    for (i64 i = 0; i < rows * k; i++) wide[i] = widen(x[i]);
    const Product<Bf16, Plain<Bf16>> product = {wide.data(), out, bias, {w, k / BLOCK}, k, n};
    product.run(&rows, 1, threads);
}

}  // namespace
