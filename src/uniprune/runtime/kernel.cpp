// Products with bitmask matrices: of each row the weights that are not zero, one after the other, and one bit a weight.
//
// A row's bits are read a word at a time, its values are put to their places in a vector register by the bits (an expand
// instruction or a table), and multiplied with the inputs there. So memory gives the kept values and one bit a weight, which
// is what a product with few tokens waits for; an inf or NaN among the inputs does what it does in the dense product.
//
// The rows are written once, as a template over a "lane" (how a path of instructions expands and multiplies one type), and
// compiled for each path: this file includes itself with PATH set. Which path runs is chosen when the library is loaded.

#ifndef PATH  // ------------------------------------------------------------------------- what all paths share

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int WORD = 64;         // weights whose bits are read together
constexpr int AHEAD = 2048;      // bytes of values that are asked for before they are needed: no hardware crosses a page
constexpr int64_t SHARE = 1 << 18;  // weights that are worth a thread: some 20 microseconds

enum Type { FLOAT32, BFLOAT16, FLOAT16, TYPES };
enum Path { PLAIN, AVX2, AVX512, AVX512_BF16, NEON, PATHS };

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class To, class From> To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float wide(float value) { return value; }
inline float wide(bfloat16 value) { return cast<float>(uint32_t(value.bits) << 16); }
inline float wide(float16 value) {
    uint32_t rest = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
    if (rest >= 0x7c00) return cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);   // infinity, NaN
    return cast<float>(sign | cast<uint32_t>(cast<float>(rest << 13) * 0x1p112f));       // also below the smallest normal one
}

// To the nearest, ties to even.
inline void narrow(float from, float& to) { to = from; }
inline void narrow(float from, bfloat16& to) {
    uint32_t bits = cast<uint32_t>(from);
    to.bits = from != from ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float from, float16& to) {
    uint32_t bits = cast<uint32_t>(from), rest = bits & 0x7fffffff, found;
    if (rest > 0x7f800000) found = 0x7e00;
    else if (rest >= 0x477ff000) found = 0x7c00;                                         // rounds to more than the largest
    else if (rest >= 0x38800000) found = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    else found = cast<uint32_t>(cast<float>(rest) + 0.5f) - 0x3f000000;                  // the addition rounds
    to.bits = uint16_t((bits >> 16 & 0x8000) | found);
}

}  // namespace

// As native.py has it. values: WORD more than there are may be read. bits: of each row whole bytes, the first
// weight in the lowest bit, those past the last column 0. offsets: of each row's first value, and their number. A dense matrix
// of whole words has neither bits nor offsets.
struct Matrix {
    const void* values;
    const uint8_t* bits;
    const int64_t* offsets;
    const void* bias;
    int64_t rows, columns;
    int32_t type, path;
};

namespace {

inline int64_t row_bytes(int64_t columns) { return (columns + 7) / 8; }

inline int64_t first_value(const Matrix& m, int64_t row) { return m.offsets ? m.offsets[row] : row * m.columns; }
inline const uint8_t* bits_of(const Matrix& m, int64_t row) { return m.bits ? m.bits + row * row_bytes(m.columns) : nullptr; }

// The bits of up to WORD weights from a column on.
inline uint64_t word_at(const uint8_t* bits, int64_t column, int64_t columns) {
    if (!bits) return ~uint64_t(0);
    uint64_t word = 0;
    int64_t left = columns - column;
    std::memcpy(&word, bits + column / 8, left >= WORD ? 8 : size_t(row_bytes(left)));
    return word;
}

// Tokens as a lane wants them: [batch, stride], 0 where there are none.
struct Tokens {
    const void* data;
    int64_t stride;
};
using Multiply = void (*)(const Matrix&, int64_t first, int64_t last, Tokens tokens, int batch, void* output);
using Unpack = void (*)(const Matrix&, int64_t first, int64_t last, void* output);

using Count = int64_t (*)(const void* weights, int64_t number, uint32_t exponent);
using Pack = int64_t (*)(const void* dense, int64_t rows, int64_t columns, uint8_t* bits, void* values, int64_t room);

constexpr int BATCHES[] = {1, 2, 4, 8};
struct Kernel {
    Multiply multiply[4];  // for as many tokens as BATCHES says
    Unpack unpack;
    bool wide_tokens;      // float32, whatever the type
    Count count;
    Pack pack;
};

// Whether the bits of a weight are those of another number than 0 or -0, which masks by multiplication leave behind.
template <class T> inline bool is_kept(T bits) { return T(bits << 1) != 0; }

// Where the values of 8 weights, or 4, go by their bits; of those that are 0 the highest bit is set.
struct Places {
    alignas(64) int8_t of8[256][8];     // in values
    alignas(64) uint8_t pairs[256][16];  // in bytes, of values of two
    alignas(64) uint8_t fours[16][16];   // in bytes, of 4 values of four
    Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int i = 0, next = 0; i < 8; next += bits >> i & 1, ++i) {
                bool kept = bits >> i & 1;
                of8[bits][i] = int8_t(kept ? next : -128);
                for (int byte = 0; byte < 2; ++byte) pairs[bits][2 * i + byte] = uint8_t(kept ? 2 * next + byte : 0x80);
                if (bits < 16 && i < 4)
                    for (int byte = 0; byte < 4; ++byte) fours[bits][4 * i + byte] = uint8_t(kept ? 4 * next + byte : 0x80);
            }
    }
};
const Places PLACES;

}  // namespace

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#if defined(__clang__)
#define BEGIN_TARGET(names) _Pragma(TEXT(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(names) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(names)))
#define END_TARGET _Pragma("GCC pop_options")
#endif
#define INLINE __attribute__((always_inline)) static inline

#define PATH plain
#define UNROLL
#include __FILE__
#undef UNROLL
#undef PATH

#define UNROLL _Pragma("GCC unroll 8")

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma,f16c,popcnt")
#define PATH avx2
#define HAS_AVX2
#include __FILE__
#undef HAS_AVX2
#undef PATH
END_TARGET
BEGIN_TARGET("avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2")
#define PATH avx512
#define HAS_AVX512
#include __FILE__
#undef PATH
END_TARGET
BEGIN_TARGET("avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")
#define PATH avx512_bf16
#define HAS_BF16
#include __FILE__
#undef HAS_BF16
#undef HAS_AVX512
#undef PATH
END_TARGET
#elif defined(__aarch64__)
#define PATH neon
#define HAS_NEON
#include __FILE__
#undef HAS_NEON
#undef PATH
#endif

namespace {

const Kernel* kernel(int path, int type) {
    switch (path) {
    case PLAIN: return &plain::KERNELS[type];
#if defined(__x86_64__)
    case AVX2: return &avx2::KERNELS[type];
    case AVX512: return &avx512::KERNELS[type];
    case AVX512_BF16: return &avx512_bf16::KERNELS[type];
#elif defined(__aarch64__)
    case NEON: return &neon::KERNELS[type];
#endif
    }
    return nullptr;
}

// Threads are those of the OpenMP runtime that PyTorch has loaded, so that the two never compete for the cores.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
using Number = int (*)();
Parallel parallel = nullptr;
Number thread_number = nullptr, thread_count = nullptr;

template <class Work> void in_parallel(int parts, const Work& work) {
    struct Job { const Work& work; int parts; } job{work, parts};
    auto run = [](void* data) {
        const Job& job = *static_cast<Job*>(data);
        for (int part = thread_number(); part < job.parts; part += thread_count()) job.work(part);
    };
    if (parts > 1) parallel(run, &job, unsigned(parts), 0);
    else work(0);
}

int parts_of(int64_t weights, int threads) {
    return parallel ? int(std::max<int64_t>(1, std::min<int64_t>(threads, weights / SHARE))) : 1;
}

// The first row of a part when rows `first` to `last` are shared out by their values, not their number.
int64_t part_start(const Matrix& m, int64_t first, int64_t last, int part, int parts) {
    if (part == parts) return last;
    if (!m.offsets) return first + (last - first) * part / parts;
    int64_t before = m.offsets[first], all = m.offsets[last] - before;
    int64_t row = std::lower_bound(m.offsets + first, m.offsets + last, before + all * part / parts) - m.offsets;
    return part ? row : first;
}

struct Scratch {  // of one thread, kept from call to call
    std::unique_ptr<char[]> memory;
    size_t size = 0;
    void* get(size_t bytes) {
        if (bytes + 64 > size) memory.reset(new char[size = bytes + 64]);
        return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    }
};

template <class To, class From> void convert(const From* from, int64_t count, To* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = wide(from[i]);
}

// Tokens [batch, columns], one after the other, made ready for a kernel that takes `room` of them.
Tokens prepare(const Matrix& m, const Kernel& kernel, const void* tokens, int batch, int room) {
    static thread_local Scratch scratch;
    int64_t stride = (m.columns + WORD - 1) / WORD * WORD;
    size_t own = m.type == FLOAT32 ? 4 : 2, size = kernel.wide_tokens ? 4 : own;
    char* to = static_cast<char*>(scratch.get(size_t(room) * stride * size));
    for (int b = 0; b < room; ++b, to += stride * size) {
        int64_t count = b < batch ? m.columns : 0;
        const void* from = static_cast<const char*>(tokens) + b * m.columns * own;
        if (size == own) std::memcpy(to, from, count * size);
        else if (m.type == BFLOAT16) convert(static_cast<const bfloat16*>(from), count, reinterpret_cast<float*>(to));
        else convert(static_cast<const float16*>(from), count, reinterpret_cast<float*>(to));
        std::memset(to + count * size, 0, (stride - count) * size);
    }
    return {to - int64_t(room) * stride * size, stride};
}

}  // namespace

extern "C" {

// The paths that this machine has, one bit each; GOMP_parallel, omp_get_thread_num and omp_get_num_threads, or null.
int bitmask_start(void* run, void* number, void* count) {
    if (run && number && count) {
        parallel = reinterpret_cast<Parallel>(run);
        thread_number = reinterpret_cast<Number>(number);
        thread_count = reinterpret_cast<Number>(count);
    }
    int paths = 1 << PLAIN;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")) {
        unsigned a = 1, b, c = 0, d;  // F16C has no name of its own in every compiler
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        if (c >> 29 & 1) paths |= 1 << AVX2;
    }
    if (paths >> AVX2 & 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2"))
        paths |= 1 << AVX512;
    if (paths >> AVX512 & 1 && __builtin_cpu_supports("avx512bf16")) paths |= 1 << AVX512_BF16;
#elif defined(__aarch64__)
    paths |= 1 << NEON;
#endif
    return paths;
}

// Offsets [rows + 1] from bits; their last is the number of values. -1 if a bit past the last column is set.
int64_t bitmask_offsets(const uint8_t* bits, int64_t rows, int64_t columns, int64_t* offsets) {
    int64_t count = 0;
    uint8_t past = uint8_t(columns % 8 ? 0xff << columns % 8 : 0);
    for (int64_t row = 0; row < rows; ++row, bits += row_bytes(columns)) {
        offsets[row] = count;
        for (int64_t column = 0; column < columns; column += WORD)
            count += __builtin_popcountll(word_at(bits, column, columns));
        if (columns && bits[row_bytes(columns) - 1] & past) return -1;
    }
    offsets[rows] = count;
    return count;
}

// How many of some weights are kept; that number's complement, which is negative, if any is NaN or infinite.
int64_t bitmask_count(const void* weights, int64_t number, int type, int path) {
    constexpr uint32_t EXPONENTS[TYPES] = {0x7f800000, 0x7f80, 0x7c00};  // all set in NaN and infinity
    return kernel(path, type)->count(weights, number, EXPONENTS[type]);
}

// A dense matrix's bits, and its values, for which and for WORD more there is room. Returns their number, or -1 if they are more
// than that: a file may change between counting and packing.
int64_t bitmask_pack(const void* dense, int64_t rows, int64_t columns, int type, int path, uint8_t* bits, void* values, int64_t room) {
    return kernel(path, type)->pack(dense, rows, columns, bits, values, room);
}

// Rows `first` to `last`, dense.
void bitmask_unpack(const Matrix* m, int64_t first, int64_t last, void* output, int threads) {
    int parts = parts_of((last - first) * m->columns, threads);
    int64_t size = (m->type == FLOAT32 ? 4 : 2) * m->columns;
    const Kernel* found = kernel(m->path, m->type);
    in_parallel(parts, [&](int part) {
        int64_t start = part_start(*m, first, last, part, parts), stop = part_start(*m, first, last, part + 1, parts);
        found->unpack(*m, start, stop, static_cast<char*>(output) + (start - first) * size);
    });
}

// output [batch, rows] = tokens [batch, columns] times the matrix, plus its bias; batch is 1 to 8.
void bitmask_multiply(const Matrix* m, const void* tokens, void* output, int batch, int threads) {
    const Kernel* found = kernel(m->path, m->type);
    int parts = parts_of(m->rows * m->columns, threads);
    int size = int(std::lower_bound(BATCHES, BATCHES + 4, batch) - BATCHES);
    Tokens ready = prepare(*m, *found, tokens, batch, BATCHES[size]);
    in_parallel(parts, [&](int part) {
        int64_t start = part_start(*m, 0, m->rows, part, parts), stop = part_start(*m, 0, m->rows, part + 1, parts);
        found->multiply[size](*m, start, stop, ready, batch, output);
    });
}

}  // extern "C"

#else  // ------------------------------------------------------------------------------- once for each path

namespace {
namespace PATH {

// A lane: Value is the type that is stored, Input that of the tokens. expand() puts the first values to their places among
// WIDTH weights, by the lowest bits of a mask; add() multiplies them with inputs and adds to partial sums.

#if defined(HAS_AVX512)

// Hidden from the compiler, so that it neither loads and expands in one instruction, which reads no more than it must but takes
// three times as long, nor zeroes within the expand, which then waits for what its target held before.
INLINE __m512i loaded(const void* values) {
    __m512i found = _mm512_loadu_si512(values);
    __asm__("" : "+v"(found));
    return found;
}
INLINE __m512i zero() {
    __m512i found = _mm512_setzero_si512();
    __asm__("" : "+v"(found));
    return found;
}

struct Float32 {
    using Value = float;
    using Input = float;
    using Weights = __m512i;
    using Sum = __m512;
    static constexpr int WIDTH = 16;
    INLINE Sum none() { return _mm512_setzero_ps(); }
    INLINE Weights expand(const Value* v, uint64_t mask) { return _mm512_mask_expand_epi32(zero(), __mmask16(mask), loaded(v)); }
    INLINE Sum add(Sum sum, Weights w, const Input* x) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_loadu_ps(x), sum);
    }
    INLINE Sum both(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    INLINE void store(Weights w, Value* out) { _mm512_storeu_si512(out, w); }
};

template <class T> struct Half {  // values of two bytes, inputs of four
    using Value = T;
    using Input = float;
    using Weights = __m512i;
    struct Sum { __m512 low, high; };
    static constexpr int WIDTH = 32;
    INLINE Sum none() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
    INLINE Weights expand(const Value* v, uint64_t mask) { return _mm512_mask_expand_epi16(zero(), __mmask32(mask), loaded(v)); }
    INLINE __m512 widened(__m256i w, bfloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16)); }
    INLINE __m512 widened(__m256i w, float16) { return _mm512_cvtph_ps(w); }
    INLINE Sum add(Sum sum, Weights w, const Input* x) {
        __m512 low = widened(_mm512_castsi512_si256(w), T()), high = widened(_mm512_extracti64x4_epi64(w, 1), T());
        return {_mm512_fmadd_ps(low, _mm512_loadu_ps(x), sum.low), _mm512_fmadd_ps(high, _mm512_loadu_ps(x + 16), sum.high)};
    }
    INLINE Sum both(Sum a, Sum b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
    INLINE float total(Sum sum) { return _mm512_reduce_add_ps(_mm512_add_ps(sum.low, sum.high)); }
    INLINE void store(Weights w, Value* out) { _mm512_storeu_si512(out, w); }
};

using Float16 = Half<float16>;

#if defined(HAS_BF16)
struct Bfloat16 {  // pairs of products in one instruction, summed in float32
    using Value = bfloat16;
    using Input = bfloat16;
    using Weights = __m512i;
    using Sum = __m512;
    static constexpr int WIDTH = 32;
    INLINE Sum none() { return _mm512_setzero_ps(); }
    INLINE Weights expand(const Value* v, uint64_t mask) { return _mm512_mask_expand_epi16(zero(), __mmask32(mask), loaded(v)); }
    INLINE Sum add(Sum sum, Weights w, const Input* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
    }
    INLINE Sum both(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    INLINE void store(Weights w, Value* out) { _mm512_storeu_si512(out, w); }
};
#else
using Bfloat16 = Half<bfloat16>;
#endif

#elif defined(HAS_AVX2)

struct Wide {  // eight sums
    using Input = float;
    using Sum = __m256;
    static constexpr int WIDTH = 8;
    INLINE Sum none() { return _mm256_setzero_ps(); }
    INLINE Sum both(Sum a, Sum b) { return _mm256_add_ps(a, b); }
    INLINE float total(Sum sum) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

struct Float32 : Wide {
    using Value = float;
    using Weights = __m256;
    INLINE Weights expand(const Value* v, uint64_t mask) {
        __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)PLACES.of8[mask & 0xff]));
        __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), places);
        return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(places));
    }
    INLINE Sum add(Sum sum, Weights w, const Input* x) { return _mm256_fmadd_ps(w, _mm256_loadu_ps(x), sum); }
    INLINE void store(Weights w, Value* out) { _mm256_storeu_ps(out, w); }
};

template <class T> struct Half : Wide {
    using Value = T;
    using Weights = __m128i;
    INLINE Weights expand(const Value* v, uint64_t mask) {
        return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)v), _mm_load_si128((const __m128i*)PLACES.pairs[mask & 0xff]));
    }
    INLINE __m256 widened(__m128i w, bfloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
    INLINE __m256 widened(__m128i w, float16) { return _mm256_cvtph_ps(w); }
    INLINE Sum add(Sum sum, Weights w, const Input* x) { return _mm256_fmadd_ps(widened(w, T()), _mm256_loadu_ps(x), sum); }
    INLINE void store(Weights w, Value* out) { _mm_storeu_si128((__m128i*)out, w); }
};

using Bfloat16 = Half<bfloat16>;
using Float16 = Half<float16>;

#elif defined(HAS_NEON)

struct Wide {
    using Input = float;
    struct Sum { float32x4_t low, high; };
    static constexpr int WIDTH = 8;
    INLINE Sum none() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
    INLINE Sum both(Sum a, Sum b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
    INLINE float total(Sum sum) { return vaddvq_f32(vaddq_f32(sum.low, sum.high)); }
    INLINE Sum fma(Sum sum, float32x4_t low, float32x4_t high, const Input* x) {
        return {vfmaq_f32(sum.low, low, vld1q_f32(x)), vfmaq_f32(sum.high, high, vld1q_f32(x + 4))};
    }
};

struct Float32 : Wide {
    using Value = float;
    struct Weights { float32x4_t low, high; };
    INLINE float32x4_t four(const Value* v, unsigned bits) {
        return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(v)), vld1q_u8(PLACES.fours[bits])));
    }
    INLINE Weights expand(const Value* v, uint64_t mask) {
        unsigned low = mask & 15, high = mask >> 4 & 15;
        return {four(v, low), four(v + __builtin_popcount(low), high)};
    }
    INLINE Sum add(Sum sum, Weights w, const Input* x) { return fma(sum, w.low, w.high, x); }
    INLINE void store(Weights w, Value* out) { vst1q_f32(out, w.low), vst1q_f32(out + 4, w.high); }
};

template <class T> struct Half : Wide {
    using Value = T;
    using Weights = uint16x8_t;
    INLINE Weights expand(const Value* v, uint64_t mask) {
        uint8x16_t values = vld1q_u8((const uint8_t*)v), places = vld1q_u8(PLACES.pairs[mask & 0xff]);
        return vreinterpretq_u16_u8(vqtbl1q_u8(values, places));
    }
    INLINE float32x4_t widened(uint16x4_t w, bfloat16) { return vreinterpretq_f32_u32(vshll_n_u16(w, 16)); }
    INLINE float32x4_t widened(uint16x4_t w, float16) { return vcvt_f32_f16(vreinterpret_f16_u16(w)); }
    INLINE Sum add(Sum sum, Weights w, const Input* x) {
        return Wide::fma(sum, widened(vget_low_u16(w), T()), widened(vget_high_u16(w), T()), x);
    }
    INLINE void store(Weights w, Value* out) { vst1q_u16((uint16_t*)out, w); }
};

using Bfloat16 = Half<bfloat16>;
using Float16 = Half<float16>;

#else

template <class T> struct Lane {
    using Value = T;
    using Input = float;
    struct Weights { T of[8]; };
    struct Sum { float of[8]; };
    static constexpr int WIDTH = 8;
    INLINE Sum none() { return {}; }
    INLINE Weights expand(const Value* v, uint64_t mask) {
        Weights w;
        for (int i = 0; i < 8; ++i) {
            bool kept = mask >> i & 1;
            w.of[i] = kept ? *v : T{};
            v += kept;
        }
        return w;
    }
    INLINE Sum add(Sum sum, Weights w, const Input* x) {
        for (int i = 0; i < 8; ++i) sum.of[i] += wide(w.of[i]) * x[i];
        return sum;
    }
    INLINE Sum both(Sum a, Sum b) {
        for (int i = 0; i < 8; ++i) a.of[i] += b.of[i];
        return a;
    }
    INLINE float total(Sum sum) {
        float found = 0;
        for (int i = 0; i < 8; ++i) found += sum.of[i];
        return found;
    }
    INLINE void store(Weights w, Value* out) { std::memcpy(out, &w, sizeof w); }
};

using Float32 = Lane<float>;
using Bfloat16 = Lane<bfloat16>;
using Float16 = Lane<float16>;

#endif

constexpr uint64_t low_bits(int width) { return (uint64_t(1) << width) - 1; }

// The weights of one word of bits times the inputs there; `v` is moved on. Several sums a token, as each waits for its last.
template <class L, int B, int SUMS>
INLINE void add_word(const typename L::Value*& v, uint64_t word, const typename L::Input* x, int64_t stride, typename L::Sum* sums) {
    for (size_t line = 0; line < sizeof(*v) * WORD / 2; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(v) + AHEAD + line);
    UNROLL for (int i = 0; i < WORD / L::WIDTH; ++i) {
        uint64_t mask = word >> (i * L::WIDTH) & low_bits(L::WIDTH);
        typename L::Weights weights = L::expand(v, mask);
        v += __builtin_popcountll(mask);
        UNROLL for (int b = 0; b < B; ++b) {
            typename L::Sum& sum = sums[b * SUMS + i % SUMS];
            sum = L::add(sum, weights, x + b * stride + i * L::WIDTH);
        }
    }
}

template <class L, int B> void multiply(const Matrix& m, int64_t first, int64_t last, Tokens tokens, int batch, void* output) {
    constexpr int SUMS = B >= 4 ? 1 : 4 / B;
    using Value = typename L::Value;
    const Value* bias = static_cast<const Value*>(m.bias);
    const typename L::Input* x = static_cast<const typename L::Input*>(tokens.data);
    Value* out = static_cast<Value*>(output);
    for (int64_t row = first; row < last; ++row) {
        const Value* v = static_cast<const Value*>(m.values) + first_value(m, row);
        const uint8_t* bits = bits_of(m, row);
        typename L::Sum sums[B * SUMS];
        UNROLL for (int i = 0; i < B * SUMS; ++i) sums[i] = L::none();
        int64_t column = 0;
        for (; column + WORD <= m.columns; column += WORD)
            add_word<L, B, SUMS>(v, word_at(bits, column, column + WORD), x + column, tokens.stride, sums);
        if (column < m.columns) add_word<L, B, SUMS>(v, word_at(bits, column, m.columns), x + column, tokens.stride, sums);
        UNROLL for (int b = 0; b < B; ++b) {
            UNROLL for (int i = 1; i < SUMS; ++i) sums[b * SUMS] = L::both(sums[b * SUMS], sums[b * SUMS + i]);
            if (b < batch) narrow(L::total(sums[b * SUMS]) + (bias ? wide(bias[row]) : 0), out[b * m.rows + row]);
        }
    }
}

template <class L> void unpack(const Matrix& m, int64_t first, int64_t last, void* output) {
    using Value = typename L::Value;
    Value* out = static_cast<Value*>(output);
    for (int64_t row = first; row < last; ++row, out += m.columns) {
        const Value* v = static_cast<const Value*>(m.values) + first_value(m, row);
        const uint8_t* bits = bits_of(m, row);
        for (int64_t column = 0; column < m.columns; column += WORD) {
            uint64_t word = word_at(bits, column, m.columns);
            Value part[WORD];
            bool whole = column + WORD <= m.columns;
            Value* to = whole ? out + column : part;
            UNROLL for (int i = 0; i < WORD / L::WIDTH; ++i) {
                uint64_t mask = word >> (i * L::WIDTH) & low_bits(L::WIDTH);
                L::store(L::expand(v, mask), to + i * L::WIDTH);
                v += __builtin_popcountll(mask);
            }
            if (!whole) std::memcpy(out + column, part, (m.columns - column) * sizeof(Value));
        }
    }
}

// The bits of a word of weights; those that are kept go to `to`, which is moved on.
#if defined(HAS_AVX512)
INLINE uint64_t packed_word(const uint32_t* from, uint32_t*& to) {
    uint64_t word = 0;
    UNROLL for (int i = 0; i < WORD; i += 16) {
        __m512i values = _mm512_loadu_si512(from + i);
        __mmask16 kept = _mm512_test_epi32_mask(values, _mm512_set1_epi32(0x7fffffff));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, values));
        to += __builtin_popcount(kept);
        word |= uint64_t(kept) << i;
    }
    return word;
}
INLINE uint64_t packed_word(const uint16_t* from, uint16_t*& to) {
    uint64_t word = 0;
    UNROLL for (int i = 0; i < WORD; i += 32) {
        __m512i values = _mm512_loadu_si512(from + i);
        __mmask32 kept = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7fff));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(kept, values));
        to += __builtin_popcount(kept);
        word |= uint64_t(kept) << i;
    }
    return word;
}
#else
template <class T> INLINE uint64_t packed_word(const T* from, T*& to) {
    uint64_t word = 0;
    for (int i = 0; i < WORD; ++i) {
        *to = from[i];  // overwritten by the next if this one is zero
        to += is_kept(from[i]);
        word |= uint64_t(is_kept(from[i])) << i;
    }
    return word;
}
#endif

template <class T> int64_t pack(const void* dense, int64_t rows, int64_t columns, uint8_t* bits, void* values, int64_t room) {
    const T* from = static_cast<const T*>(dense);
    T *to = static_cast<T*>(values), *full = to + room;  // from there on a word might not fit
    for (int64_t row = 0; row < rows; ++row, from += columns, bits += row_bytes(columns)) {
        int64_t column = 0;
        for (; column + WORD <= columns; column += WORD) {
            if (to > full) return -1;
            uint64_t word = packed_word(from + column, to);
            std::memcpy(bits + column / 8, &word, 8);
        }
        if (column < columns) {
            T last[WORD] = {};
            std::memcpy(last, from + column, (columns - column) * sizeof(T));
            if (to > full) return -1;
            uint64_t word = packed_word(static_cast<const T*>(last), to);
            std::memcpy(bits + column / 8, &word, row_bytes(columns - column));
        }
    }
    return to > full ? -1 : to - static_cast<T*>(values);
}

template <class T> int64_t count(const void* weights, int64_t number, uint32_t exponent) {
    int64_t found = 0;
    T highest = 0;
    for (int64_t i = 0; i < number; ++i) {
        T bits = static_cast<const T*>(weights)[i];
        found += is_kept(bits);
        highest = std::max(highest, T(bits & exponent));
    }
    return highest == T(exponent) ? ~found : found;
}

template <class L, class Bits> constexpr Kernel kernel_of() {
    constexpr bool widened = sizeof(typename L::Input) == 4;
    return {{multiply<L, 1>, multiply<L, 2>, multiply<L, 4>, multiply<L, 8>}, unpack<L>, widened, count<Bits>, pack<Bits>};
}
const Kernel KERNELS[TYPES] = {
    kernel_of<Float32, uint32_t>(), kernel_of<Bfloat16, uint16_t>(), kernel_of<Float16, uint16_t>()};

}  // namespace PATH
}  // namespace

#endif
