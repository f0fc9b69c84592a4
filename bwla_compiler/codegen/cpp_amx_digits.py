"""C++ text of products of floats on AMX as signed bytes, two or three a number (cpp_digits.py).

With three on both sides they are as exact as float32: of the nine products of digits the three smallest are left out,
which are below 2^-22 of the largest of both rows. Six of bytes take half as long as six of bfloat16, which three parts
of floats take.
"""

DIGITS = r"""
// Rows of floats as D digits, each row with a scale: tiles [n / SIDE, D, steps, SIDE, STEP] of a left side, and of a
// right one, whose columns they are, [n / SIDE, D, steps, STEP / 4, SIDE, 4]. Zeros beyond.
template <long D>
struct Digits {
  long steps;
  int8_t* tiles;

  static Digits of(Buffer<int8_t>& buffer, long n, long depth) {
    const long steps = divide_up(depth, STEP);
    return {steps, buffer.get(divide_up(n, STRIP) * 2 * D * steps * TILE_BYTES)};
  }
  long apart() const { return steps * TILE_BYTES; }  // of digits
  int8_t* at(long n, long digit, long step) const {
    return tiles + (n / SIDE * D + digit) * apart() + step * TILE_BYTES;
  }

  // Put a row of the left side, as many steps as it takes, and return its scale.
  float put_row(long row, const float* values, long n) const {
    return split_digits<D>(values, n, divide_up(n, STEP) * STEP, [&](long digit, long i) {
      return at(row, digit, i / STEP) + row % SIDE * STEP + i % STEP;
    });
  }

  // Put SIDE columns of the right side from n on, as many rows of values `stride` apart, of which `inside` are there,
  // and write their scales.
  void put_columns(long n, const float* values, long stride, long inside, long depth, float* scale) const {
    const long whole = steps * STEP;
    int8_t* const rows = split_rows(SIDE, values, stride, inside, depth, whole, scale);
    for (long digit = 0; digit < D; digit++) turn(rows + digit * SIDE * whole, SIDE, whole, at(n, digit, 0));
  }

  // Put lines k to k + 4 of the right side, as many rows of values `stride` apart, of which `inside` are there, and
  // write their scales.
  void put_lines(long k, const float* values, long stride, long inside, long n, float* scale) const {
    const long whole = divide_up(n, STEP) * STEP;
    int8_t* const rows = split_rows(4, values, stride, inside, n, whole, scale);
    for (long digit = 0; digit < D; digit++)
      for (long i = 0; i < n; i += SIDE) {
        auto row = [&](long r) { return _mm_load_si128((const __m128i*)(rows + (digit * 4 + r) * whole + i)); };
        const __m128i low = _mm_unpacklo_epi8(row(0), row(1)), high = _mm_unpackhi_epi8(row(0), row(1));
        const __m128i next_low = _mm_unpacklo_epi8(row(2), row(3)), next_high = _mm_unpackhi_epi8(row(2), row(3));
        auto* to = (__m128i*)(at(i, digit, k / STEP) + k % STEP / 4 * STEP);
        _mm_store_si128(to, _mm_unpacklo_epi16(low, next_low));
        _mm_store_si128(to + 1, _mm_unpackhi_epi16(low, next_low));
        _mm_store_si128(to + 2, _mm_unpacklo_epi16(high, next_high));
        _mm_store_si128(to + 3, _mm_unpackhi_epi16(high, next_high));
      }
  }

 private:
  // Digits [D, height, whole] of rows, valid until the next call on this thread.
  static int8_t* split_rows(long height, const float* values, long stride, long inside, long n, long whole,
                            float* scale) {
    static thread_local Buffer<int8_t> buffer;
    int8_t* const rows = buffer.get(D * height * whole);
    for (long r = 0; r < height; r++)
      scale[r] = split_digits<D>(values + (r < inside ? r * stride : 0), r < inside ? n : 0, whole,
                                 [&](long digit, long i) { return rows + (digit * height + r) * whole + i; });
    return rows;
  }
};

// Sums of two tiles of rows and one of columns, of D orders of digits each, the highest first.
template <long D>
struct DigitSums {
  alignas(64) int32_t of[2][D][TILE_SUMS];

  // Between these 2 D tiles are summed up, those of one tile of rows after the other's.
  static void begin() {
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if constexpr (D == 3) {
      _tile_zero(4);
      _tile_zero(5);
    }
  }
  void end() {
    int32_t* const to = of[0][0];
    _tile_stored(0, to, STEP);
    _tile_stored(1, to + TILE_SUMS, STEP);
    _tile_stored(2, to + 2 * TILE_SUMS, STEP);
    _tile_stored(3, to + 3 * TILE_SUMS, STEP);
    if constexpr (D == 3) {
      _tile_stored(4, to + 4 * TILE_SUMS, STEP);
      _tile_stored(5, to + 5 * TILE_SUMS, STEP);
    }
    asm volatile("" ::: "memory");
  }

  // The sums of a row put together, in units of the low ones, of scales apart.
  __m512 row(long r) const {
    const __m512 byte = _mm512_set1_ps(256);
    auto part = [&](long order) {
      return _mm512_cvtepi32_ps(_mm512_load_si512(of[r / SIDE][order] + r % SIDE * SIDE));
    };
    __m512 sum = part(0);
    UNROLL for (long order = 1; order < D; order++) sum = _mm512_fmadd_ps(sum, byte, part(order));
    return sum;
  }
};

// Sums of the left side's strip from `row` on, and of the columns from `column` on, over `steps` steps of the left side
// and as many of the right one from step `from` on.
static void multiply_digits(const Digits<3>& left, long row, const Digits<3>& right, long column, long steps, long from,
                            DigitSums<3>& sums) {
  const int8_t *a = left.at(row, 0, 0), *b = left.at(row + SIDE, 0, 0), *c = right.at(column, 0, from);
  const long apart = left.apart(), beside = right.apart();
  sums.begin();
  // No product waits for the one before it, and sides are loaded as seldom as two tiles allow.
  for (long s = 0; s < steps; s++, a += TILE_BYTES, b += TILE_BYTES, c += TILE_BYTES) {
    _tile_loadd(6, a + 2 * apart, STEP);
    _tile_loadd(7, c + 2 * beside, STEP);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, c + beside, STEP);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, c, STEP);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(6, b + 2 * apart, STEP);
    _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, c + beside, STEP);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(6, a + apart, STEP);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(6, b + apart, STEP);
    _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, c + 2 * beside, STEP);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(6, b + 2 * apart, STEP);
    _tile_dpbssd(3, 6, 7);
    _tile_loadd(6, a + apart, STEP);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(6, a, STEP);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(6, b, STEP);
    _tile_dpbssd(5, 6, 7);
  }
  sums.end();
}
"""
