"""C++ text of the int8 head on processors with AMX: floats as three signed bytes each, in exact integer products."""

INT8 = r"""
// Digits of tokens as the right side of products.
struct DigitTiles {
  long tokens, in, steps;
  const int8_t* tiles;  // [tokens / SIDE, DIGITS, steps, STEP / 4, SIDE, 4]
  const float* scale;   // [tokens / SIDE * SIDE]; NaN where a token is not finite

  const int8_t* at(long token, long digit) const {
    return tiles + (token / SIDE * DIGITS + digit) * steps * TILE_BYTES;
  }

  static DigitTiles of(const float* x, long tokens, long in, long threads) {
    static thread_local Buffer<int8_t> tile_buffer;
    static thread_local Buffer<float> scale_buffer;
    const long steps = divide_up(in, STEP), strips = divide_up(tokens, SIDE), bytes = DIGITS * steps * TILE_BYTES;
    int8_t* const tiles = tile_buffer.get(strips * bytes);
    float* const scale = scale_buffer.get(strips * SIDE);
    parallel(strips, tokens * in < (1 << 16) ? 1 : threads, [&](long strip) {
      static thread_local Buffer<int8_t> row_buffer;
      int8_t* const rows = row_buffer.get(DIGITS * SIDE * in);
      const long n = std::min(SIDE, tokens - strip * SIDE);
      for (long t = 0; t < n; t++)
        scale[strip * SIDE + t] = split_digits(x + (strip * SIDE + t) * in, in, rows + t * in, SIDE * in);
      std::fill(scale + strip * SIDE + n, scale + (strip + 1) * SIDE, 0.0f);
      for (long digit = 0; digit < DIGITS; digit++)
        turn(rows + digit * SIDE * in, n, in, tiles + strip * bytes + digit * steps * TILE_BYTES);
    });
    return {tokens, in, steps, tiles, scale};
  }
};

// y [SIDE tokens, stride] = codes of SIDE rows, tiles [steps, SIDE, STEP], times the digits of tokens from m on.
static inline void multiply_codes(const DigitTiles& x, long m, const int8_t* codes, const float* scale, float* y,
                                  long stride) {
  alignas(64) int32_t sums[DIGITS][TILE_SUMS];
  const int8_t *low = x.at(m, 0), *middle = x.at(m, 1), *high = x.at(m, 2);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (long at = 0; at < x.steps * TILE_BYTES; at += TILE_BYTES) {
    _tile_loadd(3, codes + at, STEP);
    _tile_loadd(4, low + at, STEP);
    _tile_dpbssd(0, 3, 4);
    _tile_loadd(5, middle + at, STEP);
    _tile_dpbssd(1, 3, 5);
    _tile_loadd(6, high + at, STEP);
    _tile_dpbssd(2, 3, 6);
  }
  _tile_stored(0, sums[0], STEP);
  _tile_stored(1, sums[1], STEP);
  _tile_stored(2, sums[2], STEP);
  asm volatile("" ::: "memory");
  const __m512 byte = _mm512_set1_ps(256), token = _mm512_loadu_ps(x.scale + m);
  __m512i lines[SIDE];
  for (long r = 0; r < SIDE; r++) {
    auto digit = [&](long d) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums[d] + r * SIDE)); };
    const __m512 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(digit(2), byte, digit(1)), byte, digit(0));
    lines[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_mul_ps(sum, token), _mm512_set1_ps(scale[r])));
  }
  transpose(lines);
  for (long t = 0; t < SIDE; t++) _mm512_store_si512(y + t * stride, lines[t]);
}

// As `bwla_int8_linear`: some strips of rows at a time, whose codes stay in the second cache and whose results are
// written together, since each token's lie on other pages.
static void int8_tiles(const float* x, const int8_t* codes, const float* scale, const float* bias, float* y,
                       long tokens, long out, long in, long threads) {
  constexpr long HEIGHT = 16 * SIDE;
  const long most = std::max(SIDE, (1L << 20) / (DIGITS * in) / SIDE * SIDE);  // whose digits stay there too
  for (long first = 0; first < tokens; first += most) {
    const DigitTiles digits = DigitTiles::of(x + first * in, std::min(most, tokens - first), in, threads);
    parallel(divide_up(out, HEIGHT), out * in * tokens < (1 << 20) ? 1 : threads, [&](long job) {
      static thread_local Buffer<int8_t> buffer;
      const long top = job * HEIGHT, rows = std::min(HEIGHT, out - top), strip = digits.steps * TILE_BYTES;
      int8_t* const tiles = buffer.get(HEIGHT / SIDE * strip);
      alignas(64) float results[SIDE * HEIGHT], factor[HEIGHT] = {};
      std::copy_n(scale + top, rows, factor);
      for (long r = 0; r < divide_up(rows, SIDE) * SIDE; r++)
        for (long k = 0; k < in; k += STEP) {
          const __mmask64 inside = r < rows ? ~0ULL >> (STEP - std::min(STEP, in - k)) : 0;
          _mm_prefetch((const char*)codes + (top + r) * in + k + AHEAD, _MM_HINT_T0);
          _mm512_store_si512(tiles + r / SIDE * strip + k / STEP * TILE_BYTES + r % SIDE * STEP,
                             _mm512_maskz_loadu_epi8(inside, codes + (top + r) * in + k));
        }
      const TileScope scope;
      for (long m = 0; m < digits.tokens; m += SIDE) {
        for (long r = 0; r < rows; r += SIDE)
          multiply_codes(digits, m, tiles + r / SIDE * strip, factor + r, results + r, HEIGHT);
        for (long t = 0; t < std::min(SIDE, digits.tokens - m); t++) {
          float* to = y + (first + m + t) * out + top;
          const float* from = results + t * HEIGHT;
          for (long r = 0; r < rows; r++) to[r] = bias ? from[r] + bias[top + r] : from[r];
        }
      }
    });
  }
}
"""
