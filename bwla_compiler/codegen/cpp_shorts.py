"""C++ text of the int8 head on AVX2: its input as 16-bit integers, in products of pairs of them.

So the input is rounded to 16 bits a token, as that of an int4 head is (cpp_int4.py): what it loses is some hundredth of
what the codes have lost. Two products of such integers, added up, take the time of one of floats, and codes become
integers in one instruction where floats take two for half as many. Sums are exact as far as 32 bits hold them: a
token's results are the same bits beside any number of others.
Source of the instructions: Intel 64 and IA-32 Software Developer's Manual, volume 2 (VPMADDWD, VPMOVSXBW).
"""

DOTS = r"""
#define INTEGER_ROWS
// Tokens for products with rows of codes, as 16-bit integers times a scale each: tiles of four tokens [padded / LINE,
// 4, LINE], then tokens one by one; zeros beyond `in`.
class IntegerRows {
  static constexpr long LINE = 16;           // integers of a vector
  static constexpr long EXACT = 256 * LINE;  // columns: 256 sums of two products with -128 are below 2^31
  static inline thread_local Buffer<int16_t> line_buffer;
  static inline thread_local Buffer<float> scale_buffer;
  const long in, padded;
  int16_t* const lines;
  float* const scale;

 public:
  static bool take(long) { return true; }

  IntegerRows(const float* x, long tokens, long in)
      : in(in), padded(divide_up(in, LINE) * LINE), lines(line_buffer.get(tokens * padded)),
        scale(scale_buffer.get(tokens)) {
    static thread_local Buffer<int16_t> buffer;
    int16_t* const token = buffer.get(padded);
    std::fill(token + in, token + padded, 0);
    by_four(tokens, [&](auto some, long first) {
      constexpr int T = decltype(some)::value;
      for (int t = 0; t < T; t++) {
        scale[first + t] = round_to(x + (first + t) * in, in, 32767, token);
        int16_t* to = lines + first * padded + t * LINE;
        for (long k = 0; k < padded; k += LINE, to += T * LINE) std::copy_n(token + k, LINE, to);
      }
    });
  }

  // Rows that are multiplied by T tokens at once, as the registers hold their sums; for one, memory is read in a row.
  template <int T>
  static constexpr int HEIGHT = T == 1 ? 1 : 3;

  // Products out [T, HEIGHT] of some rows of codes, one or more, with T tokens from m on.
  template <int T>
  void dots(const int8_t* codes, long rows, long m, float* out) const {
    constexpr int R = HEIGHT<T>;
    Vec total[T][R];
    for (long first = 0; first < padded; first += EXACT) {
      Lanes sums[T][R] = {};
      add_products<T, R>(codes + first, rows, first, m, sums);
      for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
          const Vec part = __builtin_convertvector(sums[t][r], Vec);
          total[t][r] = first ? total[t][r] + part : part;
        }
    }
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) out[t * R + r] = sum_of(total[t][r]) * scale[m + t];
  }

 private:
  // sums += products of up to EXACT columns from `first` on.
  template <int T, int R>
  void add_products(const int8_t* codes, long rows, long first, long m, Lanes (&sums)[T][R]) const {
    const long n = std::min(in - first, EXACT);
    const int16_t* const from = lines + m * padded + T * first;
    const int8_t* row[R];
    for (int r = 0; r < R; r++) row[r] = codes + std::min<long>(r, rows - 1) * in;
    __m256i code[R];
    auto add = [&](long k) {
      for (int t = 0; t < T; t++) {
        const __m256i line = fetch<__m256i>(from + T * k + t * LINE);
        for (int r = 0; r < R; r++) sums[t][r] += (Lanes)_mm256_madd_epi16(code[r], line);
      }
    };
    long k = 0;
    for (; k + LINE <= n; k += LINE) {
      for (int r = 0; r < R; r++) __builtin_prefetch(row[r] + k + AHEAD);
      for (int r = 0; r < R; r++) code[r] = _mm256_cvtepi8_epi16(fetch<__m128i>(row[r] + k));
      add(k);
    }
    if (k == n) return;
    for (int r = 0; r < R; r++) {
      __m128i rest{};
      std::memcpy(&rest, row[r] + k, n - k);
      code[r] = _mm256_cvtepi8_epi16(rest);
    }
    add(k);
  }
};
"""
