// Reading a document and a decoding step, one function each: rows that read one token each, over documents that are in
// memory once. For Llama-style decoders (RMS norms, rotary embeddings, grouped-query attention, SiLU-gated MLPs) in fp32
// on a CPU; the matrices of weights may be in bf16, and documents with them.
//
// Every product multiplies few rows by a matrix whose columns are packed into panels of NR: panel p holds, for each of the
// k inputs, its NR columns side by side. Weights, the documents' keys (columns: keys) and values (columns: their entries)
// are all packed in advance, so that the same loop multiplies by all of them. Panels in bf16 are half as much to read from
// memory. With AVX512-BF16 the rows are rounded to bf16 as well, and one instruction multiplies pairs of inputs and adds
// them in fp32; the panels then hold the two inputs of a pair side by side. Elsewhere a panel of weights is widened to
// fp32 by the first rows that use it, and documents stay in fp32. Suffixes always do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
typedef uint16_t Half;  // what rows and documents are rounded to where matrices are in bf16
#else
typedef float Half;
#endif
constexpr int PAIR = sizeof(float) / sizeof(Half);  // inputs side by side in a panel in bf16

#if defined(__AVX512F__)
constexpr int W = 16, MR = 8;  // floats per vector; rows per tile, whose sums stay in registers
#elif defined(__AVX__)
constexpr int W = 8, MR = 4;
#else
constexpr int W = 4, MR = 4;
#endif
constexpr int NR = 2 * W;

typedef float Vector __attribute__((vector_size(W * 4)));
typedef int32_t Integers __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

// Mirrored in cpp.py.
struct Layer {
    const float *norm, *qkv_bias, *query_norm, *key_norm, *out_bias, *second_norm;
    void *qkv, *out, *gate_up, *down;  // as Call's `bf16` says
    void *prefix_keys, *prefix_values;  // (document, key head) panels, of Half where matrices are in bf16
    float *keys, *values;               // (row, key head, capacity, size)
};
struct Call {
    int64_t rows, hidden, heads, key_heads, size, inner, vocabulary, layers, threads;
    int64_t spans, column, capacity, length;  // `length`: keys of a document, padding included
    int64_t bf16;  // whether matrices of weights are in bf16
    double eps, scale;
    void *head;
    const float *norm, *cosines, *sines;  // cosines and sines: (row, size)
    const int64_t *span;                         // (document, visible keys, first row, end of rows)
    const int64_t *start;                        // first column of each row's suffix
    float *states, *logits;                      // (row, hidden), overwritten; (row, vocabulary)
    const Layer *layer;
};

namespace {

inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float *to, Vector v) { std::memcpy(to, &v, sizeof v); }

#ifdef __AVX512BF16__
inline void store(uint16_t *to, Vector v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif

// bf16 is the upper half of fp32
inline Vector widened(const uint16_t *from) {
    Halves some;
    std::memcpy(&some, from, sizeof some);
    const Integers bits = __builtin_convertvector(some, Integers) << 16;
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

inline float total(Vector v) {
    float some[W];  // a copy, so that v itself may stay in a register
    store(some, v);
    for (int half = W / 2; half >= 4; half /= 2)
        for (int i = 0; i < half; i++) some[i] += some[i + half];
    return some[0] + some[1] + some[2] + some[3];
}

inline float highest(const float *x, int64_t count) {
    float top = x[0];
    int64_t i = 0;
    if (count >= W) {
        Vector tops = load(x), others = tops;
        for (i = W; i + 2 * W <= count; i += 2 * W) {
            const Vector a = load(x + i), b = load(x + i + W);
            tops = a > tops ? a : tops;
            others = b > others ? b : others;
        }
        tops = others > tops ? others : tops;
        for (int j = 0; j < W; j++) top = std::max(top, tops[j]);
    }
    for (; i < count; i++) top = std::max(top, x[i]);
    return top;
}

// exp by 2^n exp(r), |r| <= ln 2 / 2, and a polynomial (Cephes); two units in the last place, 0 below e^-87
inline Vector exponential(Vector given) {
    const Vector zero = {};
    Vector x = given < -87.0f ? zero - 87.0f : given;
    x = x > 88.0f ? zero + 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vector whole = (x * 1.44269504f + magic) - magic;
    Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector p = zero + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    Vector y = p * r * r + r + 1.0f;
    Integers bits = (__builtin_convertvector(whole, Integers) + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return given < -87.0f ? zero : y * power;
}

// y = exp((x - top) factor), which may take the place of x, and its sum; into bf16 of whole vectors only
template <typename Y>
float exponentials(const float *x, int64_t count, float top, float factor, Y *y) {
    Vector sums = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const Vector e = exponential((load(x + i) - top) * factor);
        store(y + i, e);
        sums += e;
    }
    for (; i < count; i++) rest += y[i] = std::exp((x[i] - top) * factor);
    return total(sums) + rest;
}

enum Then { SET, ADD, GATE };  // y = xw; y += xw; y = silu(x gate) * (x up), whose panels hold W columns of each

template <int M, Then then>
void put(const Vector *low, const Vector *high, float *y, int64_t y_row, int columns) {
    for (int m = 0; m < M; m++, y += y_row) {
        const Vector first = then == GATE ? low[m] / (1.0f + exponential(-low[m])) * high[m] : low[m];
        if (columns == (then == GATE ? W : NR)) {
            store(y, then == ADD ? load(y) + first : first);
            if (then != GATE) store(y + W, then == ADD ? load(y + W) + high[m] : high[m]);
        } else {
            float some[NR];
            store(some, first);
            store(some + W, high[m]);
            for (int i = 0; i < columns; i++) y[i] = then == ADD ? y[i] + some[i] : some[i];
        }
    }
}

// With `narrow` the panel is read from there, in bf16, and left in w for the next tiles.
template <int M, Then then, bool widens>
void tile(const float *x, int64_t x_row, float *w, int64_t k, float *y, int64_t y_row, int columns, const float *bias,
          const float *ahead, int64_t ahead_step, const uint16_t *narrow) {
    Vector low[M], high[M];
    for (int m = 0; m < M; m++) {
        low[m] = bias ? load(bias) : Vector{};
        high[m] = bias ? load(bias + W) : Vector{};
    }
    for (int64_t i = 0; i < k; i++, w += NR) {
        if (widens) {
            store(w, widened(narrow + i * NR));
            store(w + W, widened(narrow + i * NR + W));
        }
        const Vector a = load(w), b = load(w + W);
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
        for (int m = 0; m < M; m++) {
            low[m] += x[m * x_row + i] * a;
            high[m] += x[m * x_row + i] * b;
        }
    }
    put<M, then>(low, high, y, y_row, columns);
}

#ifdef __AVX512BF16__
// The same of rows and a panel in bf16, both in pairs of inputs, of which there are k.
template <int M, Then then, bool>
void tile(const uint16_t *x, int64_t x_row, const uint16_t *w, int64_t k, float *y, int64_t y_row, int columns,
          const float *bias, const float *ahead, int64_t ahead_step, const uint16_t *) {
    Vector low[M], high[M];
    for (int m = 0; m < M; m++) {
        low[m] = bias ? load(bias) : Vector{};
        high[m] = bias ? load(bias + W) : Vector{};
    }
    for (int64_t i = 0; i < k; i++, w += 2 * NR) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(w), b = (__m512bh)_mm512_loadu_si512(w + NR);
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, x + m * x_row + 2 * i, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            low[m] = (Vector)_mm512_dpbf16_ps((__m512)low[m], both, a);
            high[m] = (Vector)_mm512_dpbf16_ps((__m512)high[m], both, b);
        }
    }
    put<M, then>(low, high, y, y_row, columns);
}

// A row to the nearest numbers of bf16.
void round_row(const float *x, int64_t k, uint16_t *y) {
    for (int64_t i = 0; i < k; i += W) {
        const auto some = __mmask16(k - i >= W ? 0xffff : (1 << (k - i)) - 1);
        _mm256_mask_storeu_epi16(y + i, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i)));
    }
}
#endif

// All rows by one panel. Each MR rows prefetch a share of the next panel, which begins at `ahead` and has `line` floats
// (or as many bytes of bf16) for each of the k inputs or pairs, so that memory is always busy.
template <Then then, typename X>
void tiles(int64_t rows, const X *x, int64_t x_row, X *w, int64_t k, float *y, int64_t y_row, int columns,
           const float *bias, const float *ahead, int64_t line, const uint16_t *narrow = nullptr) {
    const int64_t turns = (rows + MR - 1) / MR, step = line / turns;
    for (int64_t row = 0; row < rows; row += MR, x += MR * x_row, y += MR * y_row, ahead += k * step, narrow = nullptr) {
        switch (std::min<int64_t>(MR, rows - row)) {
#define CASE(M)                                                                                                  \
    case M:                                                                                                      \
        if (narrow) tile<M, then, sizeof(X) == 4>(x, x_row, w, k, y, y_row, columns, bias, ahead, step, narrow); \
        else tile<M, then, false>(x, x_row, w, k, y, y_row, columns, bias, ahead, step, nullptr);                \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}

// y (rows, n) = x (rows, k) times a packed matrix
template <Then then>
void product(const Call &s, const float *x, int64_t x_row, void *w, int64_t n, int64_t k, float *y, int64_t y_row,
             const float *bias = nullptr) {
    const int64_t width = then == GATE ? W : NR, panels = (n + width - 1) / width, line = s.bf16 ? NR / 2 : NR;
#ifdef __AVX512BF16__
    if (s.bf16) {
        const int64_t pairs = (k + 1) / 2;
        std::vector<uint16_t> rounded(s.rows * 2 * pairs);  // an odd input is paired with a zero
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1 && s.rows > 64)
        for (int64_t r = 0; r < s.rows; r++) round_row(x + r * x_row, k, &rounded[r * 2 * pairs]);
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
        for (int64_t p = 0; p < panels; p++) {
            uint16_t *own = static_cast<uint16_t *>(w) + p * pairs * 2 * NR;
            tiles<then>(s.rows, rounded.data(), 2 * pairs, own, pairs, y + p * width, y_row, std::min(width, n - p * width),
                        bias ? bias + p * NR : nullptr, reinterpret_cast<float *>(own + pairs * 2 * NR), NR);
        }
        return;
    }
#endif
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t p = 0; p < panels; p++) {
        static thread_local std::vector<float> kept;  // a panel of bf16 in fp32
        float *own = static_cast<float *>(w) + p * k * line, *panel = own;
        if (s.bf16) {
            kept.resize(std::max<int64_t>(kept.size(), k * NR));
            panel = kept.data();
        }
        tiles<then>(s.rows, x, x_row, panel, k, y + p * width, y_row, std::min(width, n - p * width),
                    bias ? bias + p * NR : nullptr, own + k * line, line,
                    s.bf16 ? reinterpret_cast<const uint16_t *>(own) : nullptr);
    }
}

void normalize(const float *x, const float *weight, int64_t size, double eps, float *y) {
    Vector squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + W <= size; i += W) squares += load(x + i) * load(x + i);
    for (; i < size; i++) rest += x[i] * x[i];
    const float factor = 1.0f / std::sqrt((total(squares) + rest) / size + float(eps));
    for (i = 0; i < size; i++) y[i] = weight[i] * (x[i] * factor);
}

void rotate(float *x, const float *cosines, const float *sines, int64_t size) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

// Norms and rotary embeddings of a row's queries and new key; stores key and value in column `column` of the cache.
void write_kv(const Call &s, const Layer &layer, float *row, int64_t r, int64_t column, float *keys, float *values) {
    const float *cosines = s.cosines + r * s.size, *sines = s.sines + r * s.size;
    for (int64_t h = 0; h < s.heads + s.key_heads; h++) {
        float *x = row + h * s.size;
        const float *weight = h < s.heads ? layer.query_norm : layer.key_norm;
        if (weight) normalize(x, weight, s.size, s.eps, x);
        rotate(x, cosines, sines, s.size);
    }
    const float *key = row + s.heads * s.size, *value = key + s.key_heads * s.size;
    for (int64_t h = 0; h < s.key_heads; h++) {
        const int64_t at = (h * s.capacity + column) * s.size;
        std::memcpy(keys + at, key + h * s.size, s.size * sizeof(float));
        std::memcpy(values + at, value + h * s.size, s.size * sizeof(float));
    }
}

// Keys of a document, with the zero that an odd one is paired with.
inline int64_t even(int64_t keys) { return keys + keys % 2; }

// y (C vectors) += the weighted sum of `count` rows of a matrix
template <int C>
void blend(const float *weight, const float *rows, int64_t row_size, int64_t count, float *y) {
    Vector sums[C];
    for (int c = 0; c < C; c++) sums[c] = load(y + c * W);
    for (int64_t j = 0; j < count; j++)
        for (int c = 0; c < C; c++) sums[c] += weight[j] * load(rows + j * row_size + c * W);
    for (int c = 0; c < C; c++) store(y + c * W, sums[c]);
}

// A query's scores of its row's own keys from `begun` on. Prefetches what is needed soon: the row's values, and the keys
// of the next row.
void score_suffix(const Call &s, const Layer &layer, int64_t r, int64_t head, int64_t begun, int64_t own,
                  const float *query, float *score) {
    const int64_t size = s.size, row = s.key_heads * s.capacity * size;
    const int64_t at = ((r * s.key_heads + head) * s.capacity + begun) * size;
    const float *keys = layer.keys + at, *values = layer.values + at;
    for (int64_t j = begun; j < own; j++, keys += size, values += size) {
        Vector products = {};
        for (int64_t i = 0; i < size; i += W) {
            products += load(keys + i) * load(query + i);
            __builtin_prefetch(keys + row + i, 0, 2);
            __builtin_prefetch(values + i, 0, 2);
        }
        score[j] = total(products) * float(s.scale);
    }
}

// One key head, rows `first` to `end`, which continue `stop` tokens of one document each: one softmax over the keys that a
// row sees of the document and its `own` columns of suffix. X: the numbers of the document's panels, to which queries
// and weights are rounded.
template <typename X>
void attend(const Call &s, const Layer &layer, int64_t document, const int64_t *stop, int64_t first, int64_t end,
            int64_t head, int64_t own, const float *qkv, int64_t row_size, float *out) {
    constexpr int64_t pair = sizeof(float) / sizeof(X);
    const int64_t fan = s.heads / s.key_heads, size = s.size, queries = (end - first) * fan;
    const int64_t seen = *std::max_element(stop + first, stop + end);
    const int64_t key_panels = (s.length + NR - 1) / NR, value_panels = (size + NR - 1) / NR, inputs = even(s.length);
    const int64_t panels = document * s.key_heads + head, width = (seen + NR - 1) / NR * NR;
    X *keys = static_cast<X *>(layer.prefix_keys) + panels * key_panels * size * NR;
    X *values = static_cast<X *>(layer.prefix_values) + panels * value_panels * inputs * NR;
    // an odd number of vectors, so that the same column of several rows is in different sets of the cache
    const int64_t line = (width + own + W - 1) / W * W | W;
    static thread_local std::vector<float> kept;
    kept.resize(queries * (2 * size + line + 1));
    float *sum = kept.data(), *score = sum + queries * size, *inverse = score + queries * line;
    X *query = reinterpret_cast<X *>(inverse + queries), *weight = reinterpret_cast<X *>(score);
    for (int64_t q = 0; q < queries; q++) {
        const float *from = qkv + (first + q / fan) * row_size + (head * fan + q % fan) * size;
        for (int64_t i = 0; i < size; i += W) store(query + q * size + i, load(from + i) * float(s.scale));
    }
    for (int64_t p = 0; p * NR < width; p++)
        tiles<SET>(queries, query, size, keys + p * size * NR, size / pair, score + p * NR, line, NR, nullptr,
                   reinterpret_cast<float *>(keys + (p + 1) * size * NR), NR);
    for (int64_t q = 0; q < queries; q++) {
        const int64_t r = first + q / fan, begun = own ? s.start[r] : 0;
        float *to = score + q * line;
        std::fill(to + stop[r], to + width + begun, -std::numeric_limits<float>::infinity());
        std::fill(to + width + own, to + line, -std::numeric_limits<float>::infinity());
        score_suffix(s, layer, r, head, begun, own, qkv + r * row_size + (head * fan + q % fan) * size, to + width);
        const float top = highest(to, line);
        const float all = exponentials(to, width, top, 1.0f, weight + q * line * pair);
        inverse[q] = 1.0f / (all + exponentials(to + width, line - width, top, 1.0f, to + width));
    }
    for (int64_t p = 0; p < value_panels; p++)
        tiles<SET>(queries, weight, line * pair, values + p * inputs * NR, (seen + pair - 1) / pair, sum + p * NR, size,
                   std::min<int64_t>(NR, size - p * NR), nullptr,
                   reinterpret_cast<float *>(values + (p + 1) * inputs * NR), NR);
    for (int64_t q = 0; q < queries; q++) {
        const int64_t r = first + q / fan, begun = own ? s.start[r] : 0;
        const float *mine = layer.values + ((r * s.key_heads + head) * s.capacity + begun) * size;
        const float *late = score + q * line + width + begun;
        float *to = sum + q * size, *y = out + (r * s.heads + head * fan + q % fan) * size;
        int64_t i = 0;
        for (; i + 4 * W <= size; i += 4 * W) blend<4>(late, mine + i, size, own - begun, to + i);
        for (; i < size; i += W) blend<1>(late, mine + i, size, own - begun, to + i);
        for (i = 0; i < size; i += W) store(y + i, load(to + i) * inverse[q]);
    }
}

struct Part {  // rows of one document that attend together
    int64_t document, first, end;
};

void cut(const Call &s, int64_t document, int64_t first, int64_t end, std::vector<Part> &parts) {
    const int64_t rows = std::max<int64_t>(1, 4 * MR * s.key_heads / s.heads);
    for (; first < end; first += rows) parts.push_back({document, first, std::min(first + rows, end)});
}

struct Scratch {  // intermediate results of a layer
    int64_t row_size;
    std::vector<float> normed, qkv, out, gated;
    explicit Scratch(const Call &s)
        : row_size((s.heads + 2 * s.key_heads) * s.size), normed(s.rows * s.hidden), qkv(s.rows * row_size),
          out(s.rows * s.heads * s.size), gated(s.rows * s.inner) {}
};

void normalize_rows(const Call &s, const float *weight, Scratch &buf) {
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1 && s.rows > 64)
    for (int64_t r = 0; r < s.rows; r++)
        normalize(s.states + r * s.hidden, weight, s.hidden, s.eps, &buf.normed[r * s.hidden]);
}

void project(const Call &s, const Layer &layer, Scratch &buf) {
    normalize_rows(s, layer.norm, buf);
    product<SET>(s, buf.normed.data(), s.hidden, layer.qkv, buf.row_size, s.hidden, buf.qkv.data(), buf.row_size,
                 layer.qkv_bias);
}

// A layer after the projections.
void finish(const Call &s, const Layer &layer, const std::vector<Part> &parts, const int64_t *stop, int64_t own,
            Scratch &buf) {
    const int64_t tasks = parts.size() * s.key_heads, out_size = s.heads * s.size;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic) if (s.threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const Part &part = parts[task / s.key_heads];
        (s.bf16 ? attend<Half> : attend<float>)(s, layer, part.document, stop, part.first, part.end, task % s.key_heads,
                                                own, buf.qkv.data(), buf.row_size, buf.out.data());
    }
    product<ADD>(s, buf.out.data(), out_size, layer.out, s.hidden, out_size, s.states, s.hidden, layer.out_bias);
    normalize_rows(s, layer.second_norm, buf);
    product<GATE>(s, buf.normed.data(), s.hidden, layer.gate_up, s.inner, s.hidden, buf.gated.data(), s.inner);
    product<ADD>(s, buf.gated.data(), s.inner, layer.down, s.hidden, s.inner, s.states, s.hidden);
}

// T: a number, or a pair of them, of which a row has k. An odd one, which is last, gets a zero beside it.
template <typename T, typename Number>
void arrange(const Number *w, int64_t n, int64_t k, int64_t share, int64_t offset, int64_t threads, T *to) {
    const int64_t panels = (n + share - 1) / share, size = sizeof(T) / sizeof(Number);
    const int64_t whole = k / size, lines = whole + k % size;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t j = 0; j < std::min(share, n - p * share); j++) {
            const Number *row = w + (p * share + j) * k;
            T *column = to + p * lines * NR + offset + j;
            for (int64_t i = 0; i < whole; i++) std::memcpy(column + i * NR, row + i * size, sizeof(T));
            if (whole < lines) column[whole * NR] = T(row[k - 1]);
        }
}

template <typename X>
void pack_heads(const float *keys, const float *values, int64_t count, int64_t length, int64_t size, int64_t threads,
                X *key_panels, X *value_panels) {
    constexpr int64_t pair = sizeof(float) / sizeof(X);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < count * length; token++) {
        const int64_t h = token / length, j = token % length;
        X *key = key_panels + (h * ((length + NR - 1) / NR) + j / NR) * size * NR + j % NR * pair;
        X *value = value_panels + (h * ((size + NR - 1) / NR) * even(length) + j / pair * pair) * NR + j % pair;
        for (int64_t from = 0; from < size; from += W) {
            X numbers[2][W];
            store(numbers[0], load(keys + token * size + from));
            store(numbers[1], load(values + token * size + from));
            for (int64_t i = from; i < from + W; i++) {
                key[i / pair * pair * NR + i % pair] = numbers[0][i - from];
                value[i / NR * even(length) * NR + i % NR * pair] = numbers[1][i - from];
            }
        }
    }
}

}  // namespace

extern "C" {

int64_t panel_width() { return NR; }

int64_t pair() { return PAIR; }

// Request huge pages before memory is written for the first time: weights that exceed the caches are then read faster.
void large_pages(void *from, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t page = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(from) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) / page * page;
    if (end > first) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);  // a hint, which may be ignored
#endif
}

// Pack w (n, k), whose rows are the columns of the product; `share` of each panel's NR columns, from `offset` on, are of
// this matrix.
void pack(const float *w, int64_t n, int64_t k, int64_t share, int64_t offset, int64_t threads, float *to) {
    arrange(w, n, k, share, offset, threads, to);
}

// The same of a matrix in bf16, in pairs of inputs where products take pairs.
void pack_bf16(const uint16_t *w, int64_t n, int64_t k, int64_t share, int64_t offset, int64_t threads, uint16_t *to) {
    if (PAIR == 2) arrange(w, n, k, share, offset, threads, reinterpret_cast<uint32_t *>(to));
    else arrange(w, n, k, share, offset, threads, to);
}

// Pack keys and values (document and key head, length, size) into panels of zeros: the columns of products are keys, and
// the entries of values.
void pack_documents(const float *keys, const float *values, int64_t count, int64_t length, int64_t size, int64_t bf16,
                    int64_t threads, void *key_panels, void *value_panels) {
    if (bf16) pack_heads(keys, values, count, length, size, threads, (Half *)key_panels, (Half *)value_panels);
    else pack_heads(keys, values, count, length, size, threads, (float *)key_panels, (float *)value_panels);
}

// y (rows, n) = x (rows, k) times a packed matrix, as a layer's products.
void multiply(const float *x, int64_t rows, void *w, int64_t n, int64_t k, int64_t bf16, int64_t threads, float *y) {
    Call s = {};
    s.rows = rows, s.bf16 = bf16, s.threads = threads;
    product<SET>(s, x, k, w, n, k, y, n);
}

// A token per row by inverting the cumulative distribution of softmax(logits / temperature) at a uniform number, and its
// log-probability. Sums over CELL tokens are float, over cells double.
void draw(const float *logits, int64_t rows, int64_t vocabulary, double temperature, const float *noise, int64_t threads,
          int64_t *tokens, float *logp) {
    constexpr int64_t CELL = 8 * W;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * vocabulary, factor = float(1 / temperature);
        std::vector<float> share(vocabulary);
        std::vector<double> before(1, 0.0);  // sum of the cells before each one
        const float top = highest(x, vocabulary);
        for (int64_t from = 0; from < vocabulary; from += CELL) {
            const int64_t count = std::min(CELL, vocabulary - from);
            before.push_back(before.back() + double(exponentials(x + from, count, top, factor, &share[from])));
        }
        const double point = noise[r] * before.back();
        int64_t cell = std::upper_bound(before.begin() + 1, before.end(), point) - before.begin() - 1;
        cell = std::min<int64_t>(cell, before.size() - 2);
        int64_t token = vocabulary - 1;  // if there is no weight at all, as for NaN logits
        double sum = before[cell];
        bool found = false;  // in its cell, the first token after the point, or the last with any weight
        for (int64_t i = cell * CELL; i < std::min((cell + 1) * CELL, vocabulary) && !(found && sum > point); i++) {
            sum += share[i];
            if (share[i] > 0) token = i, found = true;
        }
        tokens[r] = token;
        logp[r] = float((x[token] - top) * factor - std::log(before.back()));
    }
}

// A decoding step: rows read one token each, whose keys and values are stored in column `column` of the suffixes.
void step(const Call *given) {
    const Call &s = *given;
    std::vector<int64_t> stop(s.rows);
    std::vector<Part> parts;
    for (int64_t i = 0; i < s.spans; i++) {
        const int64_t *span = s.span + 4 * i;
        std::fill(stop.begin() + span[2], stop.begin() + span[3], span[1]);
        cut(s, span[0], span[2], span[3], parts);
    }
    Scratch buf(s);
    for (int64_t l = 0; l < s.layers; l++) {
        const Layer &layer = s.layer[l];
        project(s, layer, buf);
        const int64_t row = s.key_heads * s.capacity * s.size;
        for (int64_t r = 0; r < s.rows; r++)
            write_kv(s, layer, &buf.qkv[r * buf.row_size], r, s.column, layer.keys + r * row, layer.values + r * row);
        finish(s, layer, parts, stop.data(), s.column + 1, buf);
    }
    normalize_rows(s, s.norm, buf);
    product<SET>(s, buf.normed.data(), s.hidden, s.head, s.vocabulary, s.hidden, s.logits, s.vocabulary);
}

// Read a document, whose tokens are the rows, with causal attention: its keys and values, unpacked and packed, which is all
// that is needed of the last layer.
void read(const Call *given) {
    const Call &s = *given;
    std::vector<int64_t> stop(s.rows);
    for (int64_t r = 0; r < s.rows; r++) stop[r] = r + 1;
    std::vector<Part> parts;
    cut(s, 0, 0, s.rows, parts);
    Scratch buf(s);
    for (int64_t l = 0; l < s.layers; l++) {
        const Layer &layer = s.layer[l];
        project(s, layer, buf);
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
        for (int64_t r = 0; r < s.rows; r++)
            write_kv(s, layer, &buf.qkv[r * buf.row_size], r, r, layer.keys, layer.values);
        pack_documents(layer.keys, layer.values, s.key_heads, s.length, s.size, s.bf16, s.threads, layer.prefix_keys,
                       layer.prefix_values);  // length and capacity are the same
        if (l + 1 < s.layers) finish(s, layer, parts, stop.data(), 0, buf);
    }
}
}
