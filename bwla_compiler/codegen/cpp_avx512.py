"""C++ text of the AVX-512 kernels: sign sums looked up in registers (vpermw on int16, vpermps on float32).

Sixteen signs of a row are one 16-bit lane; 32 lanes fill a register, four registers make a block of 128 rows.
The table of one word of sixteen activations holds every signed sum of its parts (5 + 5 + 6 codes, or four
times 4 floats), so that adding sixteen products costs three (or four) permutations for 32 (or 16) rows.
Needs F, BW, VL and DQ alone. Source of the method: lookup-table GEMM as in T-MAC (EuroSys 2025), kept in registers.
"""

COMMON = r"""
#include <immintrin.h>

// Of a vector of floats the first n lanes; all where there are more, none below one.
static inline __mmask16 first_lanes(long n) { return n >= 16 ? 0xFFFF : n > 0 ? 0xFFFF >> (16 - n) : 0; }

static inline void add(int32_t* to, __m512i v) {
  _mm512_storeu_si512(to, _mm512_add_epi32(v, _mm512_loadu_si512(to)));
}
static inline void add(float* to, __m512 v) { _mm512_storeu_ps(to, _mm512_add_ps(v, _mm512_loadu_ps(to))); }
static inline void add_scaled(float* to, __m512 v, const float* scale) {
  _mm512_storeu_ps(to, _mm512_fmadd_ps(v, _mm512_loadu_ps(scale), _mm512_loadu_ps(to)));
}
static inline void add_scaled(float* to, __m512i v, const float* scale) {
  add_scaled(to, _mm512_cvtepi32_ps(v), scale);
}

static inline int32_t dot(const int8_t* a, const int8_t* b, long n) {
  __m512i acc = _mm512_setzero_si512();
  long i = 0;
#ifdef __AVX512VNNI__
  const __m512i offset = _mm512_set1_epi8((char)128);  // of a, to be unsigned
  __m512i added = acc;
  for (; i + 64 <= n; i += 64) {
    const __m512i line = _mm512_loadu_si512(b + i);
    acc = _mm512_dpbusd_epi32(acc, _mm512_xor_si512(_mm512_loadu_si512(a + i), offset), line);
    added = _mm512_dpbusd_epi32(added, offset, line);
  }
  acc = _mm512_sub_epi32(acc, added);
#endif
  for (; i + 32 <= n; i += 32)
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(a + i))),
                                                  _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(b + i)))));
  int32_t sum = _mm512_reduce_add_epi32(acc);
  for (; i < n; i++) sum += (int32_t)a[i] * b[i];
  return sum;
}
"""

KERNELS = r"""
using Word = uint16_t;
constexpr long ROWS = 128, COLUMNS = 16, CHUNK = 32, TILE = 4;
constexpr long HELD = 128;    // tables that the first cache holds
constexpr long AHEAD = 8192;  // bytes of weights fetched ahead of use, measured best

struct IntKernel {
  using Code = int8_t;
  using Entry = int16_t;
  using Sum = int32_t;
  static constexpr long TABLE = 128;

  // Words that int16 lanes can add up when codes lie in [-limit, limit].
  static long span(int limit) { return 32767 / (COLUMNS * limit); }

  // What multiplies two codes in each of 32 entries: bit i of the entry's number says + or -; ABSENT, MINUS and PLUS
  // are the same for all.
  enum { ABSENT = 5, MINUS, PLUS };
  struct Signs {
    alignas(64) int8_t of[64];
    constexpr Signs(int first, int second) : of() {
      for (int entry = 0; entry < 32; entry++) {
        of[2 * entry] = sign(entry, first);
        of[2 * entry + 1] = sign(entry, second);
      }
    }
    static constexpr int8_t sign(int entry, int code) {
      return code == ABSENT ? 0 : code == MINUS ? -1 : code == PLUS ? 1 : entry >> code & 1 ? 1 : -1;
    }
  };
  // What 128, added to each of five codes, and `more` other ones, adds to the entries.
  struct Excess {
    alignas(64) int16_t of[32];
    constexpr Excess(int more) : of() {
      for (int entry = 0; entry < 32; entry++) {
        of[entry] = (int16_t)(128 * more);
        for (int code = 0; code < 5; code++) of[entry] = (int16_t)(of[entry] + 128 * Signs::sign(entry, code));
      }
    }
  };

  // Bytes can only be multiplied without sign by signed ones: the codes, plus 128, by their signs, two at a time.
  static void build(const Code* q, Entry* table) {
    static constexpr Signs first(0, 1), second(2, 3), last(4, ABSENT), minus(4, MINUS), plus(4, PLUS);
    static constexpr Excess five(0), less(-1), more(1);
    const __m512i all = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)q)),
                                         _mm512_set1_epi8((char)0x80));
    auto times = [&](int at, const Signs& signs) {
      const __m512i two = _mm512_shuffle_epi8(all, _mm512_set1_epi16((int16_t)(at | (at + 1) << 8)));
      return _mm512_maddubs_epi16(two, _mm512_load_si512(signs.of));
    };
    auto store = [&](int at, const Signs& rest, const Excess& excess, Entry* to) {
      const __m512i sum = _mm512_add_epi16(times(at, first), times(at + 2, second));
      const __m512i tail = _mm512_sub_epi16(times(at + 4, rest), _mm512_load_si512(excess.of));
      _mm512_storeu_si512(to, _mm512_add_epi16(sum, tail));
    };
    store(0, last, five, table);
    store(5, last, five, table + 32);
    store(10, minus, less, table + 64);  // the sixth code picks the half of the table
    store(10, plus, more, table + 96);
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      __m512i acc[4][T];
      UNROLL for (int v = 0; v < 4; v++) UNROLL for (int t = 0; t < T; t++) acc[v][t] = _mm512_setzero_si512();
      for (long k = first; k < last; k++, w += ROWS) {
        __m512i low[4], middle[4], high[4];
        UNROLL for (int v = 0; v < 4; v++) {
          _mm_prefetch((const char*)(w + 32 * v) + AHEAD, _MM_HINT_T0);
          low[v] = _mm512_loadu_si512(w + 32 * v);
          middle[v] = _mm512_srli_epi16(low[v], 5);
          high[v] = _mm512_srli_epi16(low[v], 10);
        }
        UNROLL for (int t = 0; t < T; t++) {
          const Entry* entry = table + (k * T + t) * TABLE;
          __m512i a = _mm512_loadu_si512(entry), b = _mm512_loadu_si512(entry + 32);
          __m512i c = _mm512_loadu_si512(entry + 64), d = _mm512_loadu_si512(entry + 96);
          // Keep the tables in registers: left alone, the compiler reloads them for each permutation.
          asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
          UNROLL for (int v = 0; v < 4; v++) {
            __m512i s = _mm512_add_epi16(_mm512_permutexvar_epi16(low[v], a), _mm512_permutexvar_epi16(middle[v], b));
            s = _mm512_add_epi16(s, _mm512_permutex2var_epi16(c, high[v], d));
            acc[v][t] = _mm512_add_epi16(acc[v][t], s);
          }
        }
      }
      UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < 4; v++) {
        sink(first / span, t, 32 * v, _mm512_cvtepi16_epi32(_mm512_castsi512_si256(acc[v][t])));
        sink(first / span, t, 32 * v + 16, _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(acc[v][t], 1)));
      }
    }
  }
};

// Signs 8 o .. 8 o + 7 of rows 16 v .. 16 v + 15, a 32-bit lane each; what lies above them means nothing.
static inline __m512i octet(const Word* at, int v, int o) {
  return _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + 16 * v))), 8 * o);
}
"""

FLOAT = r"""
struct FloatKernel {
  using Code = float;
  using Entry = float;
  using Sum = float;
  static constexpr long TABLE = 64;

  // Two levels of addition bound the rounding error; nothing overflows.
  static long span(int) { return 16; }

  static void build(const Code* x, Entry* table) {
    const __mmask16 bit[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
    UNROLL for (int part = 0; part < 4; part++, x += 4) {
      __m512 sum = _mm512_set1_ps(-(x[0] + x[1] + x[2] + x[3]));
      UNROLL for (int i = 0; i < 4; i++) sum = _mm512_mask_add_ps(sum, bit[i], sum, _mm512_set1_ps(2 * x[i]));
      _mm512_storeu_ps(table + 16 * part, sum);
    }
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      for (int half = 0; half < 2; half++) {
        __m512 acc[4][T];
        UNROLL for (int v = 0; v < 4; v++) UNROLL for (int t = 0; t < T; t++) acc[v][t] = _mm512_setzero_ps();
        for (long k = first; k < last; k++) {
          const Word* at = w + k * ROWS + 64 * half;
          _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
          _mm_prefetch((const char*)at + AHEAD + 64, _MM_HINT_T0);
          __m512i index[4];
          UNROLL for (int part = 0; part < 4; part++) {
            UNROLL for (int v = 0; v < 4; v++)  // vpermps reads the low four bits of each lane
              index[v] = part % 2 ? _mm512_srli_epi32(index[v], 4) : octet(at, v, part / 2);
            UNROLL for (int t = 0; t < T; t++) {
              __m512 a = _mm512_loadu_ps(table + (k * T + t) * TABLE + 16 * part);
              UNROLL for (int v = 0; v < 4; v++)
                acc[v][t] = _mm512_add_ps(acc[v][t], _mm512_permutexvar_ps(index[v], a));
            }
          }
        }
        UNROLL for (int t = 0; t < T; t++)
          UNROLL for (int v = 0; v < 4; v++) sink(first / span, t, 64 * half + 16 * v, acc[v][t]);
      }
    }
  }
};
"""
