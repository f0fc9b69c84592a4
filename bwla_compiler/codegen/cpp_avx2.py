"""C++ text of the AVX2 kernels: vpshufb looks up sums of four magnitudes for 32 rows at a time.

Four signs of a row are an index; what it finds is the sum of the magnitudes of those codes whose product with their
sign is positive, and the sum of products is twice that, less the sum of all magnitudes (as in cpp_vbmi.py). Magnitudes
up to 31 have sums of eight that fit a byte, so that the lookups of a word are added as bytes; those of two words as
well, wherever all such sums of a span's tokens fit, which nearly all do. Larger codes have two tables, of the lower
and the upper four bits of what adds up, of which four words fit.
Activations that stay floats are looked up by three signs (vpermps), for 8 rows at a time.
"""

KERNELS = r"""
#include <immintrin.h>

// Of codes a in [-127, 127] and any b: |b| times a with b's sign, two products in 16 bits, as 128 * 127 * 2 < 2^15.
static inline int32_t dot(const int8_t* a, const int8_t* b, long n) {
  __m256i acc = _mm256_setzero_si256();
  long i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i y = _mm256_loadu_si256((const __m256i*)(b + i));
    const __m256i x = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i*)(a + i)), y);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(y), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  int32_t total = _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
  for (; i < n; i++) total += (int32_t)a[i] * b[i];
  return total;
}

using Word = uint8_t;
constexpr long ROWS = 64, COLUMNS = 8, CHUNK = 128, TILE = 4;
constexpr long AHEAD = 4096;  // bytes of weights fetched ahead of use
constexpr long HELD = 512;  // tables that the first cache holds, nearly

static inline void add(int32_t* to, __m256i v) {
  _mm256_storeu_si256((__m256i*)to, _mm256_add_epi32(v, _mm256_loadu_si256((const __m256i*)to)));
}
static inline void add(float* to, __m256 v) { _mm256_storeu_ps(to, _mm256_add_ps(v, _mm256_loadu_ps(to))); }
static inline void add_scaled(float* to, __m256 v, const float* scale) {
  _mm256_storeu_ps(to, _mm256_fmadd_ps(v, _mm256_loadu_ps(scale), _mm256_loadu_ps(to)));
}
static inline void add_scaled(float* to, __m256i v, const float* scale) {
  add_scaled(to, _mm256_cvtepi32_ps(v), scale);
}

template <int PLANES>
struct ByteKernel {
  using Code = int8_t;
  using Entry = uint8_t;
  using Sum = int32_t;
  static constexpr long TABLE = 32 * PLANES + 16;  // [planes, 2 nibbles, 16], then the sum of the magnitudes
  static constexpr long STEP = PLANES == 1 ? 2 : 4;  // words added as bytes

  // Words whose sums of magnitudes 16 bits hold: 128 * 8 * 31 and 64 * 8 * 127 are below 2^16.
  static long span(int) { return PLANES == 1 ? 128 : 64; }

  // What lies behind the entries of a word's tables.
  struct Tail {
    int32_t total;   // of its magnitudes
    int32_t before;  // of those of the words before
    int32_t run;     // of the first token of some: steps from here on whose sums fit a byte, of all these tokens
  };
  static Tail& tail(Entry* table) { return *(Tail*)(table + 32 * PLANES); }
  static const Tail& tail(const Entry* table) { return *(const Tail*)(table + 32 * PLANES); }

  // What picks from a word's (minus, plus) magnitudes those of one code of each nibble, by entry: bit by bit.
  struct Picks {
    alignas(32) int8_t of[4][32];
    constexpr Picks() : of() {
      for (int code = 0; code < 4; code++)
        for (int i = 0; i < 32; i++) of[code][i] = (int8_t)(i / 16 * 8 + 2 * code + (i >> code & 1));
    }
  };
  static __m256i picks(int code) {
    static constexpr Picks all{};
    return _mm256_load_si256((const __m256i*)all.of[code]);
  }

  // Tables of one word, of its magnitudes where the sign is - and where it is +, in turn [8, 2].
  static void put(__m128i sizes, Entry* table) {
    const __m256i all = _mm256_broadcastsi128_si256(sizes), low = _mm256_set1_epi8(15);
    auto pair = [&](int code) {
      return _mm256_add_epi8(_mm256_shuffle_epi8(all, picks(code)), _mm256_shuffle_epi8(all, picks(code + 1)));
    };
    const __m256i a = pair(0), b = pair(2);
    auto keep = [&](int plane, __m256i v) { _mm256_storeu_si256((__m256i*)(table + 32 * plane), v); };
    if (PLANES == 1) return keep(0, _mm256_add_epi8(a, b));
    auto upper = [&](__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), low); };
    keep(0, _mm256_add_epi8(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
    keep(1, _mm256_add_epi8(upper(a), upper(b)));
  }

  // Tables of `words` words of codes, each `apart` entries from the last.
  static void build(const Code* q, long words, long apart, Entry* table) {
    for (long k = 0; k < words; k += 2, q += 2 * COLUMNS, table += 2 * apart) {
      const bool is_pair = k + 1 < words;
      const __m128i codes = is_pair ? _mm_loadu_si128((const __m128i*)q) : _mm_loadl_epi64((const __m128i*)q);
      const __m128i size = _mm_abs_epi8(codes), plus = _mm_max_epi8(codes, _mm_setzero_si128());
      const __m128i minus = _mm_sub_epi8(size, plus), totals = _mm_sad_epu8(size, _mm_setzero_si128());
      put(_mm_unpacklo_epi8(minus, plus), table);
      tail(table).total = _mm_cvtsi128_si32(totals);
      if (!is_pair) return;
      put(_mm_unpackhi_epi8(minus, plus), table + apart);
      tail(table + apart).total = _mm_extract_epi32(totals, 2);
    }
  }

  // Tell in the tables [n, tokens] of n words what is to be known of several words.
  static void link(Entry* table, long n, long tokens) {
    const long apart = tokens * TABLE;
    for (long t = 0; t < tokens; t++) {
      int32_t before = 0;
      for (long k = 0; k < n; k++) {
        Tail& its = tail(table + k * apart + t * TABLE);
        its.before = before;
        before += its.total;
      }
    }
    int32_t run = 0;
    for (long k = n / STEP * STEP - STEP; k >= 0; k -= STEP) {
      bool fits = true;
      for (long t = 0; t < tokens; t++) {
        int32_t sum = 0;
        for (long j = 0; j < STEP; j++) sum += tail(table + (k + j) * apart + t * TABLE).total;
        fits &= sum <= 255;
      }
      tail(table + k * apart).run = run = fits ? run + 1 : 0;
    }
  }

  // Sums of bytes in 16-bit lanes: of both as one number, modulo 2^16, and of the upper ones, of odd rows, alone.
  struct Bytes {
    __m256i all = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    void add(__m256i v) {
      all = _mm256_add_epi16(all, v);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(v, 8));
    }
    __m256i even() const { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
  };

  // Give sums of 32 rows from `row` on to f(row, sums of 8 rows), less the total of magnitudes.
  template <class F>
  static void give(const Bytes* acc, int32_t total, long row, const F& f) {
    auto whole = [](__m256i lower, __m256i upper) {
      return PLANES == 1 ? lower : _mm256_add_epi16(lower, _mm256_slli_epi16(upper, 4));
    };
    const __m256i even = whole(acc[0].even(), acc[PLANES - 1].even()), odd = whole(acc[0].odd, acc[PLANES - 1].odd);
    const __m256i less = _mm256_set1_epi32(total);
    auto part = [&](long at, __m128i v) {
      f(row + at, _mm256_sub_epi32(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 1), less));
    };
    const __m256i first = _mm256_unpacklo_epi16(even, odd), second = _mm256_unpackhi_epi16(even, odd);
    part(0, _mm256_castsi256_si128(first));
    part(8, _mm256_castsi256_si128(second));
    part(16, _mm256_extracti128_si256(first, 1));
    part(24, _mm256_extracti128_si256(second, 1));
  }

  static __m256i lookup(const Entry* table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), index);
  }

  // Add the sums of N words for 32 * HALVES rows and M of T tokens; as bytes they must not overflow. For several tokens
  // the indices of all words are kept, for one the sums of all halves: registers hold no more.
  template <int N, int HALVES, int T, int M>
  static void step(const Word* w, const Entry* table, Bytes (*acc)[M][PLANES]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[N][HALVES], high[N][HALVES], sum[HALVES][M][PLANES];
    auto index = [&](int j) {
      UNROLL for (int h = 0; h < HALVES; h++) {
        const __m256i x = _mm256_loadu_si256((const __m256i*)(w + j * ROWS + 32 * h));
        low[j][h] = _mm256_and_si256(x, nibble);
        high[j][h] = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
      }
    };
    auto look_up = [&](int j, int t) {
      UNROLL for (int p = 0; p < PLANES; p++) {
        const Entry* entry = table + (j * T + t) * TABLE + 32 * p;
        UNROLL for (int h = 0; h < HALVES; h++) {
          const __m256i v = _mm256_add_epi8(lookup(entry, low[j][h]), lookup(entry + 16, high[j][h]));
          sum[h][t][p] = j ? _mm256_add_epi8(sum[h][t][p], v) : v;
        }
      }
    };
    auto put = [&](int t) {
      UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int p = 0; p < PLANES; p++) acc[h][t][p].add(sum[h][t][p]);
    };
    if constexpr (HALVES == 1) {
      UNROLL for (int j = 0; j < N; j++) index(j);
      UNROLL for (int t = 0; t < M; t++) {
        UNROLL for (int j = 0; j < N; j++) look_up(j, t);
        put(t);
      }
    } else {
      UNROLL for (int j = 0; j < N; j++) {
        index(j);
        UNROLL for (int t = 0; t < M; t++) look_up(j, t);
      }
      UNROLL for (int t = 0; t < M; t++) put(t);
    }
  }

  // Give the sums of n words for 32 * HALVES rows from `row` on and M of T tokens to f(token, row, sums of 8 rows).
  template <int HALVES, int T, int M, class F>
  static void rows(const Word* w, const Entry* table, long n, long row, const F& f) {
    Bytes acc[HALVES][M][PLANES];
    int32_t totals[M];
    UNROLL for (int t = 0; t < M; t++) {
      const Tail &first = tail(table + t * TABLE), &last = tail(table + ((n - 1) * T + t) * TABLE);
      totals[t] = last.before + last.total - first.before;
    }
    const bool fits = PLANES > 1 || tail(table).run >= n / STEP;
    for (; fits && n >= STEP; n -= STEP, w += STEP * ROWS, table += STEP * T * TABLE) {
      UNROLL for (long j = 0; j < STEP; j++) _mm_prefetch((const char*)(w + j * ROWS) + AHEAD, _MM_HINT_T0);
      step<STEP, HALVES, T, M>(w, table, acc);
    }
    for (; n; n--, w += ROWS, table += T * TABLE) step<1, HALVES, T, M>(w, table, acc);
    UNROLL for (int t = 0; t < M; t++) UNROLL for (int h = 0; h < HALVES; h++)
      give(acc[h][t], totals[t], row + 32 * h, [&](long at, __m256i v) { f(t, at, v); });
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    constexpr int M = PLANES == 1 ? T : 1, HALVES = M <= 2 ? 2 : 1;  // registers hold no more
    for (long first = 0; first < words; first += span)
      for (long row = 0; row < ROWS; row += 32 * HALVES)
        for (int t = 0; t < T; t += M) {
          const long n = std::min(span, words - first);
          rows<HALVES, T, M>(w + first * ROWS + row, table + (first * T + t) * TABLE, n, row,
                             [&](int m, long at, __m256i v) { sink(first / span, t + m, at, v); });
        }
  }
};
using IntKernel = ByteKernel<2>;
using SmallKernel = ByteKernel<1>;
#define SMALL_CODES 31

struct FloatKernel {
  using Code = float;
  using Entry = float;
  using Sum = float;
  static constexpr long TABLE = 24;  // sums of the first three, the next three and the last two activations

  // Two levels of addition bound the rounding error of floats.
  static long span(int) { return 32; }

  static void build(const Code* x, Entry* table) {
    const __m256i entry = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    auto with_sign = [&](float v, int bit) {  // plus where the entry's bit is set
      const __m256i minus = _mm256_slli_epi32(_mm256_andnot_si256(entry, _mm256_set1_epi32(1 << bit)), 31 - bit);
      return _mm256_xor_ps(_mm256_set1_ps(v), _mm256_castsi256_ps(minus));
    };
    auto two = [&](const Code* at) { return _mm256_add_ps(with_sign(at[0], 0), with_sign(at[1], 1)); };
    _mm256_storeu_ps(table, _mm256_add_ps(two(x), with_sign(x[2], 2)));
    _mm256_storeu_ps(table + 8, _mm256_add_ps(two(x + 3), with_sign(x[5], 2)));
    _mm256_storeu_ps(table + 16, two(x + 6));
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    constexpr int V = T == 1 ? 8 : T == 2 ? 4 : 2;  // registers of 8 rows
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      for (long row = 0; row < ROWS; row += 8 * V) {
        __m256 acc[T][V];
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < V; v++) acc[t][v] = _mm256_setzero_ps();
        for (long k = first; k < last; k++) {
          const Word* at = w + k * ROWS + row;
          _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
          UNROLL for (int v = 0; v < V; v++) {
            const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8 * v)));
            const __m256i y = _mm256_srli_epi32(x, 3), z = _mm256_srli_epi32(x, 6);
            UNROLL for (int t = 0; t < T; t++) {
              const Entry* entry = table + (k * T + t) * TABLE;
              auto of = [&](long from, __m256i index) {
                return _mm256_permutevar8x32_ps(_mm256_loadu_ps(entry + from), index);
              };
              acc[t][v] = _mm256_add_ps(acc[t][v], _mm256_add_ps(_mm256_add_ps(of(0, x), of(8, y)), of(16, z)));
            }
          }
        }
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < V; v++)
          sink(first / span, t, row + 8 * v, acc[t][v]);
      }
    }
  }
};
"""
