"""C++ text of float products on AMX: numbers as sums of three bfloat16 parts, which lose nothing of float32."""

PARTS = r"""
// Floats as sums of bfloat16 numbers, whose products tiles add up in float32: what three hold is the whole float.
using Half = uint16_t;
constexpr long PARTS = 3, WIDE = 32;  // WIDE: of a row of a tile

// One side of a product. Left: [n, depth] as tiles [parts, n / SIDE, steps, SIDE, WIDE]; right: [depth, n] as tiles
// [parts, n / SIDE, steps, WIDE / 2, SIDE, 2]. Zeros beyond.
struct Parts {
  long parts, tiles, steps;
  Half* data;

  static Parts room(Buffer<Half>& buffer, long parts, long n, long depth) {
    const long tiles = divide_up(n, STRIP) * 2, steps = divide_up(depth, WIDE);
    return {parts, tiles, steps, buffer.get(parts * tiles * steps * SIDE * WIDE)};
  }
  long whole() const { return tiles * SIDE; }
  long apart() const { return tiles * steps * SIDE * WIDE; }
  Half* at(long part, long n, long step) const {
    return data + ((part * tiles + n / SIDE) * steps + step) * SIDE * WIDE;
  }

  // Row `row` of the left side: n values.
  void put_row(long row, const float* values, long n) const {
    for (long k = 0; k < steps * WIDE; k += SIDE) {
      const __mmask16 inside = k < n ? 0xFFFF >> (SIDE - std::min(SIDE, n - k)) : 0;
      __m512 rest = _mm512_maskz_loadu_ps(inside, values + k);
      Half* to = at(0, row, k / WIDE) + row % SIDE * WIDE + k % WIDE;
      for (long part = 0; part < parts; part++, to += apart()) {
        const __m512i top = take_top(rest);
        _mm256_store_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16)));
      }
    }
  }

  // Columns n to n + SIDE of a step of the right side: as many rows of values, `stride` apart, of which `inside` are
  // there, with `depth` values from this step on.
  void put_block(long n, long step, const float* values, long stride, long inside, long depth) const {
    __m512 rest[SIDE][2];
    for (long r = 0; r < SIDE; r++)
      for (long half = 0; half < 2; half++) {
        const long k = r < inside ? std::clamp(depth - half * SIDE, 0L, SIDE) : 0;
        rest[r][half] = _mm512_maskz_loadu_ps(k ? 0xFFFF >> (SIDE - k) : 0, values + r * stride + half * SIDE);
      }
    Half* to = at(0, n, step);
    for (long part = 0; part < parts; part++, to += apart()) {
      __m512i lines[SIDE];
      for (long r = 0; r < SIDE; r++) {
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_top(rest[r][0]), 16));
        const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_top(rest[r][1]), 16));
        lines[r] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      transpose(lines);
      for (long k = 0; k < SIDE; k++) _mm512_store_si512(to + k * WIDE, lines[k]);
    }
  }

  // As few parts as hold all that was put: two where the floats were float16.
  Parts trimmed() const {
    Parts its = *this;
    auto is_zero = [&](const Half* part) { return std::all_of(part, part + apart(), [](Half v) { return v == 0; }); };
    while (its.parts > 1 && is_zero(data + (its.parts - 1) * apart())) its.parts--;
    return its;
  }

  // Lines k and k + 1 of the right side, columns from n on.
  void put_lines(long n, long k, __m512 even, __m512 odd) const {
    Half* to = at(0, n, k / WIDE) + k % WIDE * SIDE;
    for (long part = 0; part < parts; part++, to += apart()) {
      const __m512i low = _mm512_srli_epi32(take_top(even), 16);
      _mm512_store_si512(to, _mm512_or_si512(low, take_top(odd)));
    }
  }

 private:
  // The first eight bits of the values, as floats; `rest` keeps the others.
  static __m512i take_top(__m512& rest) {
    const __m512i top = _mm512_and_si512(_mm512_castps_si512(rest), _mm512_set1_epi32((int)0xFFFF0000));
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(top));
    return top;
  }
};

// sums = a strip of the left side times one of the right, from step `from` of that on, four tiles; the smallest
// products are added first.
static inline void multiply_parts(const Parts& left, long row, const Parts& right, long column, float* sums,
                                  long from = 0) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long order = PARTS - 1; order >= 0; order--)
    for (long part = std::max(0L, order - right.parts + 1); part <= std::min(order, left.parts - 1); part++)
      for (long s = 0; s < left.steps; s++) {
        const Half *a = left.at(part, row, s), *b = right.at(order - part, column, from + s);
        _tile_loadd(4, a, STEP);
        _tile_loadd(5, a + left.steps * SIDE * WIDE, STEP);
        _tile_loadd(6, b, STEP);
        _tile_loadd(7, b + right.steps * SIDE * WIDE, STEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
  _tile_stored(0, sums, STEP);
  _tile_stored(1, sums + TILE_SUMS, STEP);
  _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
  _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
  asm volatile("" ::: "memory");
}
"""
