"""C++ text of float products on AMX: numbers as sums of bfloat16 parts, of which three lose nothing of float32."""

PARTS = r"""
// Floats as sums of bfloat16 numbers, whose products tiles add up in float32: three hold the whole float, two all but
// 2^-16 of it.
using Half = uint16_t;
constexpr long PARTS = 3, WIDE = 32;  // WIDE: of a row of a tile

// One side of a product. Left: [n, depth] as tiles [parts, n / SIDE, steps, SIDE, SIDE, 2]; right: [depth, n] as tiles
// [parts, n / SIDE, steps, SIDE, SIDE, 2]. Zeros beyond. Of a step of WIDE, k and k + SIDE are neighbours: so two
// registers of floats become one without a permutation.
struct Parts {
  long parts, tiles, steps;
  Half* data;

  static Parts of(long parts, long n, long depth, Half* data) {
    return {parts, divide_up(n, STRIP) * 2, divide_up(depth, WIDE), data};
  }
  static Parts room(Buffer<Half>& buffer, long parts, long n, long depth) {
    return of(parts, n, depth, buffer.get(parts * of(1, n, depth, nullptr).apart()));
  }
  long whole() const { return tiles * SIDE; }
  long apart() const { return tiles * steps * SIDE * WIDE; }
  Half* at(long part, long n, long step) const {
    return data + ((part * tiles + n / SIDE) * steps + step) * SIDE * WIDE;
  }

  // Row `row` of the left side: n values as P parts.
  template <int P>
  void put_row(long row, const float* values, long n) const {
    Half* to = at(0, row, 0) + row % SIDE * WIDE;
    long k = 0;
    for (; k + WIDE <= n; k += WIDE, to += SIDE * WIDE)
      put<P>(to, _mm512_loadu_ps(values + k), _mm512_loadu_ps(values + k + SIDE));
    auto some = [&](long k) { return _mm512_maskz_loadu_ps(first_lanes(n - k), values + k); };
    for (; k < steps * WIDE; k += WIDE, to += SIDE * WIDE) put<P>(to, some(k), some(k + SIDE));
  }

  // Where lines k and k + SIDE of the right side, columns from n on, are to be put.
  Half* lines(long n, long k) const { return at(0, n, k / WIDE) + k % WIDE * WIDE; }

  // Put P parts of neighbours. All but the last are rounded; the last is cut off, so that NaN are never rounded away.
  template <int P>
  void put(Half* to, __m512 first, __m512 second) const {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000), half = _mm512_set1_epi32(0x8000);
    UNROLL for (int part = 0; part < P; part++, to += apart()) {
      __m512i low = _mm512_castps_si512(first), high = _mm512_castps_si512(second);
      if (part < P - 1) {
        low = _mm512_and_si512(_mm512_add_epi32(low, half), upper);
        high = _mm512_and_si512(_mm512_add_epi32(high, half), upper);
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(low));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(high));
      }
      // upper ? high : low
      _mm512_store_si512(to, _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, upper, 0xD8));
    }
  }
};

// Four tiles of a product: of two tiles of rows and two of columns, one after the other, or of one of rows and four (or
// as many as there are) of columns.
struct Block {
  long row, column, high;  // high: tiles of rows

  static Block at(long row, long column, long rows) { return {row, column, rows - row > SIDE ? 2 : 1}; }
  long wide() const { return 4 / high * SIDE; }  // columns
  // The first row and column of tile t.
  long row_of(long t) const { return row + (high == 2 ? t / 2 * SIDE : 0); }
  long column_of(long t) const { return column + (high == 2 ? t % 2 : t) * SIDE; }
};

static inline void store_tiles(float* sums) {
  _tile_stored(0, sums, STEP);
  _tile_stored(1, sums + TILE_SUMS, STEP);
  _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
  _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
}

// sums = a block of left times right, four tiles; the smallest products are added first, those beyond are left out.
static inline void multiply_parts(const Parts& left, const Parts& right, const Block& block, float* sums) {
  const long below = left.steps * SIDE * WIDE, next = right.steps * SIDE * WIDE;
  const long columns = right.tiles - block.column / SIDE;
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long order = std::max(left.parts, right.parts) - 1; order >= 0; order--)
    for (long part = std::max(0L, order - right.parts + 1); part <= std::min(order, left.parts - 1); part++)
      for (long s = 0; s < left.steps; s++) {
        const Half *a = left.at(part, block.row, s), *b = right.at(order - part, block.column, s);
        _tile_loadd(4, a, STEP);
        _tile_loadd(6, b, STEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + next, STEP);
        _tile_dpbf16ps(1, 4, 7);
        if (block.high == 2) {
          _tile_loadd(5, a + below, STEP);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else if (columns > 2) {
          _tile_loadd(6, b + 2 * next, STEP);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(7, b + 3 * next, STEP);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
  store_tiles(sums);
  asm volatile("" ::: "memory");
}
"""
