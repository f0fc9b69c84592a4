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
        scale[strip * SIDE + t] = split_digits(x + (strip * SIDE + t) * in, in, in, [&](long digit, long i) {
          return rows + (digit * SIDE + t) * in + i;
        });
      std::fill(scale + strip * SIDE + n, scale + (strip + 1) * SIDE, 0.0f);
      for (long digit = 0; digit < DIGITS; digit++)
        turn(rows + digit * SIDE * in, n, in, tiles + strip * bytes + digit * steps * TILE_BYTES);
    });
    return {tokens, in, steps, tiles, scale};
  }
};

// sums [2, DIGITS] tiles = codes of two tiles of rows, `apart` bytes from each other, times the digits of SIDE tokens
// from m on. Loading a tile takes half as long as multiplying by it where the first cache has it, so each is used for
// as many products as there are tiles for sums.
static inline void multiply_codes(const DigitTiles& x, long m, const int8_t* codes, long apart, int32_t* sums) {
  const int8_t *low = x.at(m, 0), *middle = x.at(m, 1), *high = x.at(m, 2);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (long at = 0; at < x.steps * TILE_BYTES; at += TILE_BYTES) {
    _tile_loadd(6, codes + at, STEP);
    _tile_loadd(7, low + at, STEP);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, middle + at, STEP);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, high + at, STEP);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(6, codes + apart + at, STEP);
    _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, middle + at, STEP);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, low + at, STEP);
    _tile_dpbssd(3, 6, 7);
  }
  _tile_stored(0, sums, STEP);
  _tile_stored(1, sums + TILE_SUMS, STEP);
  _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
  _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
  _tile_stored(4, sums + 4 * TILE_SUMS, STEP);
  _tile_stored(5, sums + 5 * TILE_SUMS, STEP);
  asm volatile("" ::: "memory");
}

// y [tokens, out] = sums of the digits of a tile put together, times the scales of tokens and rows, of which there are
// `n` and `rows`, plus bias.
static inline void put_digits(const int32_t* sums, const float* token_scale, const float* scale, const float* bias,
                              float* y, long n, long rows, long out) {
  const __mmask16 inside = first_lanes(rows);
  const __m512 byte = _mm512_set1_ps(256), token = _mm512_loadu_ps(token_scale);
  __m512i lines[SIDE];
  for (long r = 0; r < SIDE; r++) {
    auto digit = [&](long d) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums + d * TILE_SUMS + r * SIDE)); };
    const __m512 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(digit(2), byte, digit(1)), byte, digit(0));
    lines[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_mul_ps(sum, token), _mm512_set1_ps(scale[r])));
  }
  transpose(lines);
  const __m512 added = bias ? _mm512_maskz_loadu_ps(inside, bias) : _mm512_setzero_ps();
  for (long t = 0; t < std::min(SIDE, n); t++) {
    const __m512 line = _mm512_castsi512_ps(lines[t]);
    _mm512_mask_storeu_ps(y + t * out, inside, bias ? _mm512_add_ps(line, added) : line);
  }
}

// As `bwla_int8_linear`: some strips of rows at a time, whose codes stay in the second cache.
static void int8_tiles(const float* x, const int8_t* codes, const float* scale, const float* bias, float* y,
                       long tokens, long out, long in, long threads) {
  constexpr long HEIGHT = 8 * STRIP;
  const long most = std::max(SIDE, (1L << 20) / (DIGITS * in) / SIDE * SIDE);  // whose digits stay there too
  for (long first = 0; first < tokens; first += most) {
    const DigitTiles digits = DigitTiles::of(x + first * in, std::min(most, tokens - first), in, threads);
    parallel(divide_up(out, HEIGHT), out * in * tokens < (1 << 20) ? 1 : threads, [&](long job) {
      static thread_local Buffer<int8_t> buffer;
      const long top = job * HEIGHT, rows = std::min(HEIGHT, out - top), strip = digits.steps * TILE_BYTES;
      int8_t* const tiles = buffer.get(HEIGHT / SIDE * strip);
      alignas(64) int32_t sums[2][DIGITS * TILE_SUMS];
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
      for (long m = 0; m < digits.tokens; m += SIDE)
        for (long r = 0; r < rows; r += STRIP) {
          multiply_codes(digits, m, tiles + r / SIDE * strip, strip, sums[0]);
          for (long half = 0; half < 2; half++) {
            const long row = r + half * SIDE;
            put_digits(sums[half], digits.scale + m, factor + row, bias ? bias + top + row : nullptr,
                       y + (first + m) * out + top + row, digits.tokens - m, rows - row, out);
          }
        }
    });
  }
}
"""
