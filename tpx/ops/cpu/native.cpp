// The operations of tpx/ops on a CPU: their formulas are documented there, beside the references.
//
// Plain C++ (GCC or clang) without torch's headers. Values are float or bfloat16 (`is_bf16`), all
// arithmetic is in float, and a row's sums have one order, whatever rows and threads are beside it.

#include "lanes.h"
#include "products.h"

namespace {

inline V swiglu(V a, V b, float alpha, float limit) {
    V gate = {a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]};
    V up = {a[1], a[3], a[5], a[7], b[1], b[3], b[5], b[7]};
    gate = gate > limit ? all(limit) : gate;
    up = up > limit ? all(limit) : up < -limit ? all(-limit) : up;
    return gate / (1.0f + exponential(gate * -alpha)) * (up + 1.0f);
}

template <typename T>
void swiglu(const T* x, T* out, i64 n, float alpha, float limit, int threads) {
    const i64 whole = n / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1 && 8 * n > WORTH)
    for (i64 i = 0; i < whole; i += LANES)
        store(swiglu(load(x + 2 * i), load(x + 2 * i + LANES), alpha, limit), out + i);
    T rest[2 * LANES] = {};
    std::memcpy((void*)rest, x + 2 * whole, 2 * (n - whole) * sizeof(T));
    store(swiglu(load(rest), load(rest + LANES), alpha, limit), rest);
    std::memcpy((void*)(out + whole), rest, (n - whole) * sizeof(T));
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, i64 rows, i64 width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > WORTH)
    for (i64 r = 0; r < rows; r++) {
        const T* from = x + r * width;
        const float scale = 1.0f / std::sqrt(dot(from, from, width) / float(width) + eps);
        for (i64 i = 0; i < width; i++)
            narrow(widen(weight[i]) * (widen(from[i]) * scale), out[r * width + i]);
    }
}

template <typename T>
void rope(const T* x, const T* cos, const T* sin, T* out, i64 tokens, i64 heads, i64 half,
          int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * half > WORTH)
    for (i64 th = 0; th < tokens * heads; th++) {
        const T *c = cos + th / heads * half, *s = sin + th / heads * half;
        const T *first = x + th * 2 * half, *second = first + half;
        T *to = out + th * 2 * half, *too = to + half;
        for (i64 i = 0; i < half; i++) {
            const float a = widen(first[i]), b = widen(second[i]);
            narrow(a * widen(c[i]) - b * widen(s[i]), to[i]);
            narrow(b * widen(c[i]) + a * widen(s[i]), too[i]);
        }
    }
}

// NaN before all numbers, then the larger; of equals the one that was there first stays first.
inline bool before(float a, float b) { return b == b && (a != a || a > b); }

template <typename T>
void route(const T* logits, i64* ids, T* weights, i64 tokens, i64 experts, i64 top) {
    std::vector<float> best(top);
    for (i64 t = 0; t < tokens; t++, logits += experts, ids += top, weights += top) {
        i64 held = 0;
        for (i64 e = 0; e < experts; e++) {
            const float x = widen(logits[e]);
            if (held == top && !before(x, best[top - 1])) continue;
            i64 at = held < top ? held++ : top - 1;
            for (; at > 0 && before(x, best[at - 1]); at--)
                best[at] = best[at - 1], ids[at] = ids[at - 1];
            best[at] = x, ids[at] = e;
        }
        float total = 0;
        for (i64 i = top - 1; i >= 0; i--) total += best[i] = std::exp(best[i] - best[0]);
        for (i64 i = 0; i < top; i++) narrow(best[i] / total, weights[i]);
    }
}

struct Pages {
    const int32_t* table;  // of one sequence
    i64 page, heads, width;

    // do_this(position, where head 0 of its keys or values is) for low to stop.
    template <typename F>
    void each(i64 low, i64 stop, F do_this) const {
        while (low < stop) {
            const i64 index = low / page, next = (index + 1) * page;
            const i64 end = next < stop ? next : stop;
            const i64 base = (table[index] - index) * page;
            for (; low < end; low++) do_this(low, (base + low) * heads * width);
        }
    }
};

// Scores to weights, in place, n a multiple of LANES; the sink takes its share and gives nothing.
inline void softmax(float* scores, i64 n, float sink) {
    V most = all(sink), total = {};
    for (i64 i = 0; i < n; i += LANES) {
        const V x = load(scores + i);
        most = x > most ? x : most;
    }
    float top = most[0];
    for (i64 i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (i64 i = 0; i < n; i += LANES) {
        const V x = exponential(load(scores + i) - top);
        total += x;
        store(x, scores + i);
    }
    const float share = 1.0f / (sum(total) + std::exp(sink - top));
    for (i64 i = 0; i < n; i += LANES) store(load(scores + i) * share, scores + i);
}

// One token's query heads that share key head `head`.
template <typename T>
void attend(const T* q, const T* k, const T* v, const T* sinks, const Pages& pages, i64 low,
            i64 stop, i64 head, i64 shared, T* out, std::vector<float>& scratch) {
    const i64 padded = (stop - low + LANES - 1) / LANES * LANES, width = pages.width;
    scratch.assign(shared * (padded + width), 0.0f);
    float *scores = scratch.data(), *sums = scores + shared * padded;
    const float scale = 1.0f / std::sqrt(float(width));
    pages.each(low, stop, [&](i64 position, i64 at) {
        const T* key = k + at + head * width;
        for (i64 j = 0; j < shared; j++)
            scores[j * padded + position - low] = dot(q + j * width, key, width) * scale;
    });
    for (i64 j = 0; j < shared; j++) {
        for (i64 s = stop - low; s < padded; s++) scores[j * padded + s] = -INFINITY;
        softmax(scores + j * padded, padded, widen(sinks[j]));
    }
    pages.each(low, stop, [&](i64 position, i64 at) {
        const T* value = v + at + head * width;
        for (i64 j = 0; j < shared; j++) {
            const V weight = all(scores[j * padded + position - low]);
            float* to = sums + j * width;
            i64 d = 0;
            for (; d + LANES <= width; d += LANES)
                store(load(to + d) + weight * load(value + d), to + d);
            for (; d < width; d++) to[d] += weight[0] * widen(value[d]);
        }
    });
    for (i64 i = 0; i < shared * width; i++) narrow(sums[i], out[i]);
}

// The first sequence that would read a page it does not have; `sequences` if none would.
i64 first_without_page(const int32_t* tables, const int32_t* starts, const int32_t* lengths,
                       i64 sequences, i64 most_pages, i64 blocks, i64 page, i64 window) {
    for (i64 b = 0; b < sequences; b++) {
        const i64 first = lengths[b] - (starts[b + 1] - starts[b]) + 1;
        const i64 low = window && first > window ? first - window : 0;
        for (i64 i = low / page; i * page < lengths[b]; i++) {
            if (i >= most_pages) return b;
            const i64 place = tables[b * most_pages + i];
            if (place < 0 || place >= blocks) return b;
        }
    }
    return sequences;
}

template <typename T>
void attention(const T* q, const T* k, const T* v, const T* sinks, T* out, const int32_t* tables,
               const int32_t* starts, const int32_t* lengths, i64 sequences, i64 most_pages,
               i64 page, i64 heads, i64 kv_heads, i64 width, i64 window, int threads) {
    const i64 shared = heads / kv_heads;
    i64 operations = 0;
    for (i64 b = 0; b < sequences; b++)
        operations += i64(starts[b + 1] - starts[b]) * lengths[b] * heads * width;
#pragma omp parallel num_threads(threads) if (threads > 1 && operations > WORTH)
    {
        std::vector<float> scratch;
        for (i64 b = 0; b < sequences; b++) {
            const Pages pages = {tables + b * most_pages, page, kv_heads, width};
            const i64 past = lengths[b] - (starts[b + 1] - starts[b]);
#pragma omp for schedule(dynamic, 1) nowait
            for (i64 i = 0; i < (lengths[b] - past) * kv_heads; i++) {
                const i64 token = i / kv_heads, head = i % kv_heads, stop = past + token + 1;
                const i64 low = window && stop > window ? stop - window : 0;
                const i64 at = (starts[b] + token) * heads + head * shared;
                attend(q + at * width, k, v, sinks + head * shared, pages, low, stop, head, shared,
                       out + at * width, scratch);
            }
        }
    }
}

}  // namespace

#define EACH(name, ...)                          \
    if (is_bf16) {                               \
        using T = Bf16;                          \
        name(__VA_ARGS__);                       \
    } else {                                     \
        using T = float;                         \
        name(__VA_ARGS__);                       \
    }

extern "C" {

// Whether the processor multiplies bfloat16 itself.
i64 tpx_has_bf16() {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16)
    return 1;
#else
    return 0;
#endif
}

void tpx_grouped_mm(int is_bf16, int threads, const void* x, void* out, const void* bias,
                    const i64* counts, const uint8_t* blocks, const uint8_t* scales, i64 total,
                    i64 k, i64 n, i64 experts) {
    EACH(grouped_mm, (const T*)x, (T*)out, (const T*)bias, total, k, n, experts, counts, blocks,
         scales, threads)
}

void tpx_linear(int is_bf16, int threads, const void* x, void* out, const void* bias, const void* w,
                i64 rows, i64 k, i64 n) {
    EACH(linear, (const T*)x, (T*)out, (const T*)bias, (const T*)w, rows, k, n, threads)
}

void tpx_swiglu(int is_bf16, int threads, const void* x, void* out, i64 n, float alpha,
                float limit) {
    EACH(swiglu, (const T*)x, (T*)out, n, alpha, limit, threads)
}

void tpx_rms_norm(int is_bf16, int threads, const void* x, const void* weight, void* out, i64 rows,
                  i64 width, float eps) {
    EACH(rms_norm, (const T*)x, (const T*)weight, (T*)out, rows, width, eps, threads)
}

void tpx_rope(int is_bf16, int threads, const void* x, const void* cos, const void* sin, void* out,
              i64 tokens, i64 heads, i64 half) {
    EACH(rope, (const T*)x, (const T*)cos, (const T*)sin, (T*)out, tokens, heads, half, threads)
}

void tpx_route(int is_bf16, const void* logits, i64* ids, void* weights, i64 tokens, i64 experts,
               i64 top) {
    EACH(route, (const T*)logits, ids, (T*)weights, tokens, experts, top)
}

// A stable counting sort of pairs by expert; those of `experts`, elsewhere, come last. Which pair
// names no expert: nothing is sorted then; `pairs` if none.
i64 tpx_sort_by_expert(const i64* local, i64* order, i64* counts, i64 pairs, i64 experts) {
    std::vector<i64> next(experts + 1, 0);
    for (i64 i = 0; i < pairs; i++) {
        if (local[i] < 0 || local[i] > experts) return i;
        next[local[i]]++;
    }
    for (i64 e = 0, before = 0; e <= experts; e++) {
        if (e < experts) counts[e] = next[e];
        before += next[e];
        next[e] = before - next[e];
    }
    for (i64 i = 0; i < pairs; i++) order[next[local[i]]++] = i;
    return pairs;
}

void tpx_inverse(const i64* order, i64* places, i64 n) {
    for (i64 i = 0; i < n; i++) places[order[i]] = i;
}

// Slots and tokens are of `size` bytes. Which token has no slot of `capacity`; `tokens` if none.
i64 tpx_write_cache(const char* k, const char* v, char* keys, char* values, const i64* slots,
                    i64 tokens, i64 size, i64 capacity) {
    for (i64 t = 0; t < tokens; t++) {
        if (slots[t] < 0 || slots[t] >= capacity) return t;
        std::memcpy(keys + slots[t] * size, k + t * size, size);
        std::memcpy(values + slots[t] * size, v + t * size, size);
    }
    return tokens;
}

// Which sequence reads a page that it does not have: nothing is computed then; `sequences` if none.
i64 tpx_attention(int is_bf16, int threads, const void* q, const void* k, const void* v,
                   const void* sinks, void* out, const int32_t* tables, const int32_t* starts,
                   const int32_t* lengths, i64 sequences, i64 most_pages, i64 blocks, i64 page,
                  i64 heads, i64 kv_heads, i64 width, i64 window) {
    const i64 lost =
        first_without_page(tables, starts, lengths, sequences, most_pages, blocks, page, window);
    if (lost < sequences) return lost;
    EACH(attention, (const T*)q, (const T*)k, (const T*)v, (const T*)sinks, (T*)out, tables, starts,
         lengths, sequences, most_pages, page, heads, kv_heads, width, window, threads)
    return sequences;
}
}
