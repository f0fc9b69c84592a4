"""C++ text of the AVX2 kernels: vpshufb looks up signed sums of four codes for 32 rows at a time."""

from bwla_compiler.codegen.cpp_portable import DOT, NIBBLES

KERNELS = (
    r"""
#include <immintrin.h>

using Word = uint8_t;
constexpr long ROWS = 64, COLUMNS = 8, CHUNK = 128, TILE = 2;
constexpr long AHEAD = 4096;  // bytes of weights fetched ahead of use
constexpr long HELD = 256;  // tables that the first cache holds

static inline void add(int32_t* to, __m256i v) {
  _mm256_storeu_si256((__m256i*)to, _mm256_add_epi32(v, _mm256_loadu_si256((const __m256i*)to)));
}
static inline void add_scaled(float* to, __m256i v, const float* scale) {
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_loadu_ps(scale), _mm256_loadu_ps(to)));
}
"""
    + NIBBLES
    + r"""
struct IntKernel {
  using Code = int8_t;
  using Entry = uint8_t;
  using Sum = int32_t;
  static constexpr long TABLE = 64;  // low bytes, then high bytes, of the sums of each nibble

  // The high bytes of 30 words of 8-bit codes fit int8, and their sums int16, whatever the codes.
  static long span(int) { return 30; }

  static void build(const Code* q, Entry* table) {
    int16_t sums[32];
    NibbleKernel<int8_t, int16_t, int32_t>::build(q, sums);
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 16; i++) {
        table[32 * half + i] = (uint8_t)sums[16 * half + i];
        table[32 * half + 16 + i] = (uint8_t)(sums[16 * half + i] >> 8);
      }
  }

  static __m256i lookup(const Entry* table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), index);
  }

  // `both` adds pairs of rows in 16 bits (odd rows in the high byte), `odd` the odd rows alone, `high` the high bytes.
  template <class Sink>
  static void flush(__m256i both, __m256i odd, __m256i high, long span, int t, long row, const Sink& sink) {
    __m256i even = _mm256_sub_epi16(both, _mm256_slli_epi16(odd, 8));
    even = _mm256_add_epi16(even, _mm256_slli_epi16(high, 8));
    odd = _mm256_add_epi16(odd, _mm256_and_si256(high, _mm256_set1_epi16((int16_t)0xFF00)));
    const __m256i first = _mm256_unpacklo_epi16(even, odd), second = _mm256_unpackhi_epi16(even, odd);
    sink(span, t, row, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(first)));
    sink(span, t, row + 8, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(second)));
    sink(span, t, row + 16, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(first, 1)));
    sink(span, t, row + 24, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(second, 1)));
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      for (long row = 0; row < ROWS; row += 32) {
        __m256i both[T], odd[T], high[T];
        for (int t = 0; t < T; t++) both[t] = odd[t] = high[t] = _mm256_setzero_si256();
        for (long k = first; k < last; k++) {
          const Word* at = w + k * ROWS + row;
          _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
          const __m256i x = _mm256_loadu_si256((const __m256i*)at);
          const __m256i i0 = _mm256_and_si256(x, nibble), i1 = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
          for (int t = 0; t < T; t++) {
            const Entry* entry = table + (k * T + t) * TABLE;
            const __m256i a = lookup(entry, i0), b = lookup(entry + 32, i1);
            high[t] = _mm256_add_epi8(high[t], _mm256_add_epi8(lookup(entry + 16, i0), lookup(entry + 48, i1)));
            both[t] = _mm256_add_epi16(both[t], _mm256_add_epi16(a, b));
            odd[t] = _mm256_add_epi16(odd[t], _mm256_add_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
          }
        }
        for (int t = 0; t < T; t++) flush(both[t], odd[t], high[t], first / span, t, row, sink);
      }
    }
  }
};
"""
    + DOT
)
