"""C++ text of the online transform of many tokens on processors with AMX: the factors are split once a call."""

SPLIT = r"""
// y = left^T x right for x [n1, n2] by tiles of bfloat16 parts, as exact as in float32.
class SplitFactors {
  static inline thread_local Buffer<Half> left_factor, right_factor, left_buffer, right_buffer;
  const long n1, n2;
  const bool has_left, has_right;
  Parts left, right;  // left^T [n1, n1], right [n2, n2]

 public:
  // Below, splitting takes longer than what is saved.
  static bool pays(long tokens, long n1, long n2) { return TILED(tokens) && std::min(n1, n2) >= SIDE; }

  SplitFactors(const float* left, const float* right, long n1, long n2)
      : n1(n1), n2(n2), has_left(left), has_right(right),
        left(Parts::room(left_factor, PARTS, n1, n1)), right(Parts::room(right_factor, PARTS, n2, n2)) {
    if (has_left) {
      std::vector<float> row(n1);
      for (long i = 0; i < this->left.whole(); i++) {
        for (long k = 0; k < n1 && i < n1; k++) row[k] = left[k * n1 + i];
        this->left.put_row(i, row.data(), i < n1 ? n1 : 0);
      }
      this->left = this->left.trimmed();
    }
    if (has_right) {
      put_matrix(right, n2, n2, this->right);
      this->right = this->right.trimmed();
    }
  }

  // One token; `y` may be `x`.
  void token(const float* x, float* y) const {
    const TileScope scope;
    if (!has_left) return turn_right(x, [&](long row, long column, const float* sums) {
      write(sums, row, column, y);
    });
    const Parts half = Parts::room(right_buffer, PARTS, n2, n1);
    if (has_right)
      turn_right(x, [&](long row, long column, const float* sums) { put_tiles(sums, row, column, half); });
    else
      put_matrix(x, n1, n2, half);
    alignas(64) float sums[4 * TILE_SUMS];
    for (long row = 0; row < n1; row += STRIP)
      for (long column = 0; column < n2; column += STRIP) {
        multiply_parts(left, row, half, column, sums);
        write(sums, row, column, y);
      }
  }

 private:
  // Call f(row, column, four tiles) for all of x right.
  template <class F>
  void turn_right(const float* x, const F& f) const {
    const Parts rows = Parts::room(left_buffer, PARTS, n1, n2);
    for (long row = 0; row < rows.whole(); row++) rows.put_row(row, x + row * n2, row < n1 ? n2 : 0);
    alignas(64) float sums[4 * TILE_SUMS];
    for (long row = 0; row < n1; row += STRIP)
      for (long column = 0; column < n2; column += STRIP) {
        multiply_parts(rows, row, right, column, sums);
        f(row, column, sums);
      }
  }

  static __mmask16 first(long n) { return n >= SIDE ? 0xFFFF : n > 0 ? 0xFFFF >> (SIDE - n) : 0; }

  // values [depth, n] as a right side.
  static void put_matrix(const float* values, long depth, long n, const Parts& to) {
    for (long k = 0; k < to.steps * WIDE; k += 2)
      for (long column = 0; column < to.whole(); column += SIDE) {
        auto line = [&](long k) {
          return _mm512_maskz_loadu_ps(k < depth ? first(n - column) : 0, values + k * n + column);
        };
        to.put_lines(column, k, line(k), line(k + 1));
      }
  }

  // Four tiles of sums as part of a right side, which has whole steps: what is beyond the rows is zero in the tiles.
  static void put_tiles(const float* sums, long row, long column, const Parts& to) {
    for (long r = 0; r < STRIP && row + r < to.steps * WIDE; r += 2)
      for (long half = 0; half < 2; half++) {
        const float* from = sums + (r / SIDE * 2 + half) * TILE_SUMS + r % SIDE * SIDE;
        to.put_lines(column + half * SIDE, row + r, _mm512_load_ps(from), _mm512_load_ps(from + SIDE));
      }
  }

  void write(const float* sums, long row, long column, float* y) const {
    for (long r = 0; r < std::min(STRIP, n1 - row); r++)
      for (long half = 0; half < 2; half++) {
        const float* from = sums + (r / SIDE * 2 + half) * TILE_SUMS + r % SIDE * SIDE;
        const long at = column + half * SIDE;
        _mm512_mask_storeu_ps(y + (row + r) * n2 + at, first(n2 - at), _mm512_load_ps(from));
      }
  }
};
"""
