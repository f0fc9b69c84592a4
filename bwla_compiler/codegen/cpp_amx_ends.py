"""C++ text of the int8 head on processors with AMX: its input as two signed bytes a number, in exact integer
products."""

INT8 = r"""
using HeadDigits = Digits<HEAD_DIGITS>;
using HeadSums = DigitSums<HEAD_DIGITS>;

// Sums of codes of two tiles of rows, `apart` bytes from each other, times the digits of SIDE tokens from m on.
static inline void multiply_codes(const HeadDigits& x, long m, const int8_t* codes, long apart, HeadSums& sums) {
  const int8_t *low = x.at(m, 0, 0), *high = x.at(m, 1, 0);
  sums.begin();
  for (long at = 0; at < x.apart(); at += TILE_BYTES) {
    _tile_loadd(6, high + at, STEP);
    _tile_loadd(4, codes + at, STEP);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, low + at, STEP);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, codes + apart + at, STEP);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  sums.end();
}

// y [tokens, out] = sums of tile `half` of the rows, times the scales of tokens and rows, of which there are `n` and
// `rows`, plus bias.
static inline void put_sums(const HeadSums& sums, long half, const float* token_scale, const float* scale,
                            const float* bias, float* y, long n, long rows, long out) {
  const __mmask16 inside = first_lanes(rows);
  const __m512 token = _mm512_loadu_ps(token_scale);
  __m512i lines[SIDE];
  for (long r = 0; r < SIDE; r++)
    lines[r] = _mm512_castps_si512(
        _mm512_mul_ps(_mm512_mul_ps(sums.row(half * SIDE + r), token), _mm512_set1_ps(scale[r])));
  transpose(lines);
  const __m512 added = bias ? _mm512_maskz_loadu_ps(inside, bias) : _mm512_setzero_ps();
  for (long t = 0; t < std::min(SIDE, n); t++) {
    const __m512 line = _mm512_castsi512_ps(lines[t]);
    _mm512_mask_storeu_ps(y + t * out, inside, bias ? _mm512_add_ps(line, added) : line);
  }
}

// As `bwla_int8_linear`: some strips of rows at a time, as many as the second cache holds; so results of a token are
// written some lines at a time.
static void int8_tiles(const float* x, const int8_t* codes, const float* scale, const float* bias, float* y,
                       long tokens, long out, long in, long threads) {
  constexpr long HEIGHT = 16 * STRIP;
  const long height = std::clamp(out / (threads * 4) / STRIP * STRIP, STRIP, HEIGHT);
  const long most = std::max(SIDE, (1L << 20) / (HEAD_DIGITS * in) / SIDE * SIDE);  // whose digits stay there too
  for (long first = 0; first < tokens; first += most) {
    static thread_local Buffer<int8_t> digit_buffer;
    static thread_local Buffer<float> scale_buffer;
    const long n = std::min(most, tokens - first), strips = divide_up(n, SIDE);
    const HeadDigits digits = HeadDigits::of(digit_buffer, n, in);
    float* const token_scale = scale_buffer.get(strips * SIDE);
    parallel(strips, n * in < (1 << 16) ? 1 : threads, [&](long s) {
      digits.put_columns(s * SIDE, x + (first + s * SIDE) * in, in, n - s * SIDE, in, token_scale + s * SIDE);
    });
    parallel(divide_up(out, height), out * in * tokens < (1 << 20) ? 1 : threads, [&](long job) {
      static thread_local Buffer<int8_t> buffer;
      const long top = job * height, rows = std::min(height, out - top), strip = digits.apart();
      int8_t* const tiles = buffer.get(height / SIDE * strip);
      HeadSums sums;
      float factor[HEIGHT] = {};
      std::copy_n(scale + top, rows, factor);
      for (long r = 0; r < divide_up(rows, STRIP) * STRIP; r++)
        for (long k = 0; k < in; k += STEP) {
          const __mmask64 inside = r < rows ? ~0ULL >> (STEP - std::min(STEP, in - k)) : 0;
          _mm_prefetch((const char*)codes + (top + r) * in + k + AHEAD, _MM_HINT_T0);
          _mm512_store_si512(tiles + r / SIDE * strip + k / STEP * TILE_BYTES + r % SIDE * STEP,
                             _mm512_maskz_loadu_epi8(inside, codes + (top + r) * in + k));
        }
      const TileScope scope;
      for (long m = 0; m < n; m += SIDE)
        for (long r = 0; r < rows; r += STRIP) {
          multiply_codes(digits, m, tiles + r / SIDE * strip, strip, sums);
          for (long half = 0; half < 2; half++) {
            const long row = r + half * SIDE;
            put_sums(sums, half, token_scale + m, factor + row, bias ? bias + top + row : nullptr,
                     y + (first + m) * out + top + row, n - m, rows - row, out);
          }
        }
    });
  }
}
"""
