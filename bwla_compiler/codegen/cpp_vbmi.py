"""C++ text of the kernels of processors with VBMI: sign sums as bytes, looked up in registers (vpermb).

Six signs of a row are a byte lane's index; what it finds is the sum of the magnitudes of those codes whose product
with their sign is positive: at most 6 * 31 for codes of six bits, where signed sums would need nine bits. The sum of
products is twice the sum of these, less that of all magnitudes. So one permutation serves 64 rows where those of
int16 (cpp_avx512.py) serve 32, and takes one step of an Intel core where they take two or three.
Sixteen signs are 6 + 6 indices, whose upper bits a permutation ignores, and the 4 bits left over. Codes of more bits
have two tables, of the upper and the lower halves of what adds up.
"""

KERNELS = r"""
using Word = uint16_t;
constexpr long ROWS = 128, COLUMNS = 16, CHUNK = 32, TILE = 4;
constexpr long HELD = 64;     // tables that the first cache holds
constexpr long AHEAD = 16384;  // bytes of weights fetched to the second cache ahead of use, measured best
constexpr long SOON = 1024;   // to the first

// A word of a block is four lines: of 64 rows their first eight signs, then the other eight, and of the next 64 rows.
// In a line, rows 0 and 32 are neighbours, and so on: 16-bit lanes hold their sums in natural order.
#define OWN_ORDER
constexpr long LINE = 32;  // words of a line, and rows between neighbours
static inline long byte_of(long row, long octet) {
  return (row / 64 * 2 + octet) * 64 + row % LINE * 2 + row / LINE % 2;
}

template <int PLANES>
struct ByteKernel {
  using Code = int8_t;
  using Entry = uint8_t;
  using Sum = int32_t;
  static constexpr long QUADS = 128 * PLANES, TABLE = QUADS + 64;  // [2, planes, 64], [planes, 16], then the sum

  // Words that 16-bit lanes can add up.
  static long span(int) { return CHUNK; }

  // The sums of two magnitudes by the signs of their codes: dwords of four entries, first those of pairs 0-3 of four
  // words, then those of pairs 4-7.
  static void pairs(__m512i codes, __m512i& lo, __m512i& hi) {
    const __m512i size = _mm512_abs_epi8(codes), low = _mm512_set1_epi16(0x00FF);
    const __m512i plus = _mm512_max_epi8(codes, _mm512_setzero_si512()), minus = _mm512_sub_epi8(size, plus);
    const __m512i up = _mm512_srli_epi16(plus, 8), down = _mm512_srli_epi16(minus, 8);
    auto both = [&](__m512i other) {  // entries of a first code of sign -, +, the second one being as given
      return _mm512_or_si512(_mm512_and_si512(_mm512_add_epi8(minus, other), low),
                             _mm512_slli_epi16(_mm512_add_epi8(plus, other), 8));
    };
    const __m512i first = both(down), second = both(up);
    lo = _mm512_unpacklo_epi16(first, second);
    hi = _mm512_unpackhi_epi16(first, second);
  }

  // What a plane adds up of bytes: the lower or the upper four bits, or all where there is one plane.
  static __m512i half(__m512i v, int plane) {
    return PLANES == 1 ? v : _mm512_and_si512(plane ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
  }

  // Tables of one word of two pairs' dwords [8].
  static void put(const int32_t* lo, const int32_t* hi, int plane, Entry* table) {
    const __m512i fours = _mm512_broadcast_i32x4(_mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0));
    const __m512i sixteens = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(1), 1)),
        _mm256_inserti128_si256(_mm256_set1_epi8(2), _mm_set1_epi8(3), 1), 1);
    auto six = [&](const int32_t* four) {
      const __m512i a = _mm512_set1_epi32(four[0]), b = _mm512_shuffle_epi8(_mm512_set1_epi32(four[1]), fours);
      return _mm512_add_epi8(_mm512_add_epi8(a, b), _mm512_shuffle_epi8(_mm512_set1_epi32(four[2]), sixteens));
    };
    _mm512_storeu_si512(table + 64 * plane, six(lo));
    _mm512_storeu_si512(table + 64 * (PLANES + plane), six(hi));
    const __m128i a = _mm_set1_epi32(lo[3]), b = _mm_shuffle_epi8(_mm_set1_epi32(hi[3]), _mm512_castsi512_si128(fours));
    _mm_storeu_si128((__m128i*)(table + QUADS + 16 * plane), _mm_add_epi8(a, b));
  }
  static int32_t& total(Entry* table) { return *(int32_t*)(table + QUADS + 16 * PLANES); }
  static int32_t total(const Entry* table) { return *(const int32_t*)(table + QUADS + 16 * PLANES); }

  // Tables of `words` words of codes, each `apart` entries from the last.
  static void build(const Code* q, long words, long apart, Entry* table) {
    for (long k = 0; k < words; k += 4, q += 4 * COLUMNS) {
      const long n = std::min(4L, words - k);
      const __mmask64 inside = ~0ULL >> (64 - n * COLUMNS);
      const __m512i codes = _mm512_maskz_loadu_epi8(inside, q);
      alignas(64) int32_t fours[PLANES][2][16];
      __m512i lo, hi;
      pairs(codes, lo, hi);
      for (int p = 0; p < PLANES; p++) {
        _mm512_store_si512(fours[p][0], half(lo, p));
        _mm512_store_si512(fours[p][1], half(hi, p));
      }
      asm volatile("" : "+m"(fours));  // reads of four entries cost nothing, which taking them from registers does
      alignas(64) int64_t sums[8];
      _mm512_store_si512(sums, _mm512_sad_epu8(_mm512_abs_epi8(codes), _mm512_setzero_si512()));
      for (long j = 0; j < n; j++, table += apart) {
        UNROLL for (int p = 0; p < PLANES; p++) put(fours[p][0] + 4 * j, fours[p][1] + 4 * j, p, table);
        total(table) = (int32_t)(sums[2 * j] + sums[2 * j + 1]);
      }
    }
  }

  // Sums of bytes in 16-bit lanes: of both as one number, modulo 2^16, and of the upper ones alone.
  struct Bytes {
    __m512i all = _mm512_setzero_si512(), upper = _mm512_setzero_si512();
    void add(__m512i v) {
      all = _mm512_add_epi16(all, v);
      upper = _mm512_add_epi16(upper, _mm512_srli_epi16(v, 8));
    }
    __m512i lower() const { return _mm512_sub_epi16(all, _mm512_slli_epi16(upper, 8)); }
  };

  // What picks from a word's tables for 64 rows. Bits above the sixth are ignored; the last table is there four times.
  static void indices(const Word* w, __m512i* index) {
    const __m512i a = index[0] = _mm512_loadu_si512(w), b = index[1] = _mm512_loadu_si512(w + LINE);
    const __m512i upper = _mm512_srli_epi16(a, 6), next = _mm512_srli_epi16(b, 4);
    index[2] = _mm512_ternarylogic_epi32(upper, next, _mm512_set1_epi8(3), 0xE4);  // third ? first : second
  }

  static void fetch_block(const Word* w) {
    UNROLL for (int line = 0; line < 4; line++) {
      _mm_prefetch((const char*)(w + LINE * line) + AHEAD, _MM_HINT_T1);
      _mm_prefetch((const char*)(w + LINE * line) + SOON, _MM_HINT_T0);
    }
  }

  // Give the sums of 64 rows from `row` on to f(row, sums of 16 rows), less the total of magnitudes.
  template <class F>
  static void give(const Bytes* acc, int32_t total, long row, const F& f) {
    const __m512i less = _mm512_set1_epi32(total);
    UNROLL for (int upper = 0; upper < 2; upper++) {
      auto of = [&](int plane) { return upper ? acc[plane].upper : acc[plane].lower(); };
      const __m512i sum = PLANES == 1 ? of(0) : _mm512_add_epi16(of(0), _mm512_slli_epi16(of(PLANES - 1), 4));
      auto part = [&](long at, __m256i v) {
        f(row + LINE * upper + at, _mm512_sub_epi32(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 1), less));
      };
      part(0, _mm512_castsi512_si256(sum));
      part(16, _mm512_extracti64x4_epi64(sum, 1));
    }
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      Bytes acc[2][T][PLANES];
      int32_t totals[T] = {};
      for (long k = first; k < last; k++, w += ROWS) {
        fetch_block(w);
        __m512i index[2][3];
        UNROLL for (int h = 0; h < 2; h++) indices(w + 2 * LINE * h, index[h]);
        UNROLL for (int t = 0; t < T; t++) {
          const Entry* entry = table + (k * T + t) * TABLE;
          const int32_t size = total(entry);
          totals[t] += size;
          UNROLL for (int p = 0; p < PLANES; p++) {
            const __m512i a = _mm512_loadu_si512(entry + 64 * p), b = _mm512_loadu_si512(entry + 64 * (PLANES + p));
            const __m512i c = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(entry + QUADS + 16 * p)));
            UNROLL for (int h = 0; h < 2; h++) {
              const __m512i x = _mm512_permutexvar_epi8(index[h][0], a), y = _mm512_permutexvar_epi8(index[h][1], b);
              const __m512i z = _mm512_permutexvar_epi8(index[h][2], c);
              if (PLANES == 1 && __builtin_expect(size > 255, false)) {  // what a byte does not hold
                acc[h][t][p].add(x);
                acc[h][t][p].add(y);
                acc[h][t][p].add(z);
              } else {
                acc[h][t][p].add(_mm512_add_epi8(_mm512_add_epi8(x, y), z));
              }
            }
          }
        }
      }
      UNROLL for (int t = 0; t < T; t++) UNROLL for (int h = 0; h < 2; h++)
        give(acc[h][t], totals[t], 64 * h, [&](long row, __m512i v) { sink(first / span, t, row, v); });
    }
  }
};
using IntKernel = ByteKernel<2>;
using SmallKernel = ByteKernel<1>;
#define SMALL_CODES 31

// Signs 8 o .. 8 o + 7 of rows 16 v .. 16 v + 15, a 32-bit lane each; what lies above them means nothing.
static inline __m512i octet(const Word* at, int v, int o) {
  const __m256i both = _mm256_loadu_si256((const __m256i*)(at + LINE * o + 16 * (v % 2)));
  return _mm512_srli_epi32(_mm512_cvtepu16_epi32(both), 8 * (v / 2));
}
"""
