"""C++ text of the int8 head on AVX-512 with VNNI: its input as two signed bytes a number, in exact integer products.

So the input is rounded to 16 bits a token, as that of an int4 head is (cpp_int4.py): what it loses is some hundredth of
what the codes have lost. Codes plus 128 are the unsigned side of the products of bytes, so that 64 of them cost three
instructions, where floats cost twelve; sums begin with what that adds. Sums are exact, and put together as those of
tiles (cpp_amx_ends.py) are: a token's results are the same bits beside any number of others.
Source of the instructions: Intel 64 and IA-32 Software Developer's Manual, volume 2 (VPDPBUSD).
"""

SPLIT = r"""
// Floats as integers of some signed bytes times a scale a token: of two, 16 bits of the largest value; of three, all
// that float32 holds of it.
template <long D>
constexpr float DIGIT_LIMIT = D == 2 ? 32639 : 8e6f;  // not above 127 * 256 + 127, and below 127.5 * 2^16
constexpr long DIGIT_COLUMNS = (1L << 17) - 1;  // whose products with codes an int32 can hold; on the way it may wrap

// Digits of four vectors of integers: with 128 added to all but the highest they are the bytes, of which 128 is taken
// again.
template <long D>
static inline void to_digits(const __m512i (&q)[4], __m512i (&digits)[D]) {
  struct Places {
    alignas(64) uint8_t of[2][64];  // the two lower bytes of the integers of two vectors; the third, twice
    constexpr Places() : of() {
      for (int i = 0; i < 64; i++) of[0][i] = (uint8_t)(i % 32 * 4 + i / 32), of[1][i] = (uint8_t)(i % 32 * 4 + 2);
    }
  };
  static constexpr Places places;
  const __m512i lower = _mm512_load_si512(places.of[0]), third = _mm512_load_si512(places.of[1]);
  const __m512i halves = _mm512_set1_epi32(D == 2 ? 0x80 : 0x8080);
  __m512i bytes[4];
  UNROLL for (int v = 0; v < 4; v++) bytes[v] = _mm512_xor_si512(_mm512_add_epi32(q[v], halves), halves);
  const __m512i first = _mm512_permutex2var_epi8(bytes[0], lower, bytes[1]);
  const __m512i second = _mm512_permutex2var_epi8(bytes[2], lower, bytes[3]);
  digits[0] = _mm512_shuffle_i64x2(first, second, 0x44), digits[1] = _mm512_shuffle_i64x2(first, second, 0xEE);
  if constexpr (D == 3)
    digits[2] = _mm512_mask_blend_epi64(0xF0, _mm512_permutex2var_epi8(bytes[0], third, bytes[1]),
                                        _mm512_permutex2var_epi8(bytes[2], third, bytes[3]));
}

// Write the digits of n values, and zeros up to `whole`, 64 at a time to to(digit, i), the lowest digit first, and
// return their scale: NaN where they are not finite.
template <long D, class To>
static inline float split_digits(const float* x, long n, long whole, const To& to) {
  constexpr long STEP = 64;
  __m512 peak = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    peak = _mm512_max_ps(peak, _mm512_abs_ps(v));
    poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
  }
  const float top = _mm512_reduce_max_ps(peak), sick = _mm512_reduce_add_ps(poison);
  const float factor = DIGIT_LIMIT<D> / top;  // infinite where all is next to nothing
  const long finite = sick == 0 && std::isfinite(factor) ? n : 0;
  const __m512 factors = _mm512_set1_ps(finite ? factor : 0.0f);
  for (long i = 0; i < whole; i += STEP) {
    __m512i q[4], digits[D];
    UNROLL for (long v = 0; v < 4; v++) {
      const long k = i + 16 * v;
      q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(finite - k), x + k), factors));
    }
    to_digits(q, digits);
    const __mmask64 inside = ~0ULL >> (STEP - std::min(STEP, whole - i));
    for (long digit = 0; digit < D; digit++) _mm512_mask_storeu_epi8(to(digit, i), inside, digits[digit]);
  }
  return sick != 0 ? std::numeric_limits<float>::quiet_NaN() : top / DIGIT_LIMIT<D>;
}
"""

DOTS = r"""
#define INTEGER_ROWS
constexpr long HEAD_DIGITS = 2;  // of the input

// Tokens for products with rows of codes: digits [tokens, HEAD_DIGITS, padded], zeros beyond `in`; begin [tokens,
// HEAD_DIGITS, 16], what sums begin with.
class IntegerRows {
  static constexpr long STEP_CODES = 64;
  static inline thread_local Buffer<int8_t> digit_buffer;
  static inline thread_local Buffer<int32_t> begin_buffer;
  static inline thread_local Buffer<float> scale_buffer;
  const long in, padded;
  int8_t* const digits;
  int32_t* const begin;
  float* const scale;

 public:
  static bool take(long columns) { return columns <= DIGIT_COLUMNS; }

  IntegerRows(const float* x, long tokens, long in)
      : in(in), padded(divide_up(in, STEP_CODES) * STEP_CODES), digits(digit_buffer.get(tokens * HEAD_DIGITS * padded)),
        begin(begin_buffer.get(tokens * HEAD_DIGITS * 16)), scale(scale_buffer.get(tokens)) {
    for (long m = 0; m < tokens; m++) {
      int8_t* const to = digits + m * HEAD_DIGITS * padded;
      for (long digit = 0; digit < HEAD_DIGITS; digit++)
        std::memset(to + (digit + 1) * padded - STEP_CODES, 0, STEP_CODES);
      scale[m] = split_digits<HEAD_DIGITS>(x + m * in, in, in,
                                           [&](long digit, long i) { return to + digit * padded + i; });
      for (long digit = 0; digit < HEAD_DIGITS; digit++) {
        __m512i added = _mm512_setzero_si512();
        for (long k = 0; k < padded; k += STEP_CODES)
          added = _mm512_dpbusd_epi32(added, _mm512_set1_epi8((char)128), _mm512_load_si512(to + digit * padded + k));
        _mm512_store_si512(begin + (m * HEAD_DIGITS + digit) * 16, _mm512_sub_epi32(_mm512_setzero_si512(), added));
      }
    }
  }

  // Rows that are multiplied by T tokens at once: four sums of each digit.
  template <int T>
  static constexpr int HEIGHT = 4 / T;

  // Products out [T, HEIGHT] of some rows of codes, one or more, with T tokens from m on.
  template <int T>
  void dots(const int8_t* codes, long rows, long m, float* out) const {
    constexpr int R = HEIGHT<T>;
    const int8_t* from = digits + m * HEAD_DIGITS * padded;
    const int8_t* row[R];
    __m512i sums[HEAD_DIGITS][T * R];
    UNROLL for (int r = 0; r < R; r++) row[r] = codes + std::min<long>(r, rows - 1) * in;
    UNROLL for (int d = 0; d < HEAD_DIGITS; d++) UNROLL for (int s = 0; s < T * R; s++)
      sums[d][s] = _mm512_load_si512(begin + ((m + s / R) * HEAD_DIGITS + d) * 16);
    auto add = [&](long k, __mmask64 inside) {
      __m512i code[R];
      UNROLL for (int r = 0; r < R; r++)
        code[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, row[r] + k), _mm512_set1_epi8((char)128));
      UNROLL for (int d = 0; d < HEAD_DIGITS; d++) UNROLL for (int t = 0; t < T; t++) {
        const __m512i digit = _mm512_load_si512(from + (t * HEAD_DIGITS + d) * padded + k);
        UNROLL for (int r = 0; r < R; r++)
          sums[d][t * R + r] = _mm512_dpbusd_epi32(sums[d][t * R + r], code[r], digit);
      }
    };
    long k = 0;
    for (; k + STEP_CODES <= in; k += STEP_CODES) {
      UNROLL for (int r = 0; r < R; r++) {
        _mm_prefetch((const char*)row[r] + k + AHEAD, _MM_HINT_T1);
        _mm_prefetch((const char*)row[r] + k + SOON, _MM_HINT_T0);
      }
      add(k, ~0ULL);
    }
    if (k < in) add(k, ~0ULL >> (STEP_CODES - (in - k)));
    auto digit = [&](int d) { return _mm_cvtepi32_ps(sums_of(sums[d][0], sums[d][1], sums[d][2], sums[d][3])); };
    const __m128 sum = _mm_fmadd_ps(digit(1), _mm_set1_ps(256), digit(0));
    _mm_storeu_ps(out, _mm_mul_ps(sum, T == 1 ? _mm_set1_ps(scale[m]) : _mm_loadu_ps(scale + m)));
  }

 private:
  // The sums of the lanes of each.
  static __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    a = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    c = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    a = _mm512_add_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};
"""
