"""C++ text of the online transform on processors with AMX, whose factors are split once, when they are packed."""

SPLIT = r"""
// Products with a packed factor, [n, n] floats and behind them its parts: of the transposed one as a left side, or of
// itself as a right one. All numbers are two parts: of x, 2^-16 is lost, where rounding to codes of a few bits follows;
// of factors that were float16, nothing.
#define OWN_FACTORS
constexpr long SPLIT = 2;
struct SplitFactor {
  static constexpr long LINE = 64 / sizeof(float);
  static long behind(long n) { return divide_up(n * n, LINE) * LINE; }
  static long room(long n) {
    return behind(n) + Parts::of(SPLIT, n, n, nullptr).apart() * SPLIT / (long)(sizeof(float) / sizeof(Half));
  }

  static void pack(const float* factor, long n, bool is_left, float* packed) {
    std::memcpy(packed, factor, n * n * sizeof(float));
    const Parts to = parts(packed, n);
    if (is_left) {
      std::vector<float> row(n);
      for (long i = 0; i < to.whole(); i++) {
        for (long k = 0; k < n && i < n; k++) row[k] = factor[k * n + i];
        to.put_row<SPLIT>(i, row.data(), i < n ? n : 0);
      }
    } else {
      put_matrix(factor, n, n, to);
    }
  }

  static Parts parts(const float* packed, long n) {
    return Parts::of(SPLIT, n, n, (Half*)(packed + behind(n)));
  }

  // Have what a product reads fetched.
  static void fetch(const float* packed, long n) {
    for (long part = 0; packed && part < SPLIT; part++)
      fetch_ahead(parts(packed, n).at(part, 0, 0), divide_up(n, SIDE) * parts(packed, n).steps * TILE_BYTES);
  }

  // values [depth, n] as a right side.
  static void put_matrix(const float* values, long depth, long n, const Parts& to) {
    for (long step = 0; step < to.steps * WIDE; step += WIDE)
      for (long column = 0; column < to.whole(); column += SIDE) {
        const __mmask16 inside = first_lanes(n - column);
        const float* from = values + step * n + column;
        Half* line = to.lines(column, step);
        for (long k = step; k < step + SIDE; k++, from += n, line += WIDE)
          to.put<SPLIT>(line, _mm512_maskz_loadu_ps(k < depth ? inside : 0, from),
                        _mm512_maskz_loadu_ps(k + SIDE < depth ? inside : 0, from + SIDE * n));
      }
  }
};

// y = left^T x right for x [n1, n2] and packed factors, null for none; `y` may be `x`.
class TiledTransform {
  static inline thread_local Buffer<Half> row_buffer, line_buffer;
  const float *const left, *const right;
  const long n1, n2;

 public:
  // Less than this float products do as soon; smaller sides would leave most of a tile empty. How many
  // tokens there are does not matter: a token's bits do not depend on those beside it.
  static bool serves(long n1, long n2, long work) {
    return std::min(n1, n2) >= SIDE && work >= (1 << 18) && has_tiles();
  }

  TiledTransform(const float* left, const float* right, long n1, long n2) : left(left), right(right), n1(n1), n2(n2) {}

  void fetch() const {
    SplitFactor::fetch(right, n2);
    SplitFactor::fetch(left, n1);
  }

  void token(const float* x, float* y) const {
    const TileScope scope;
    auto write_to = [&](const Block& block, const float* sums) { write(block, sums, y); };
    if (!left) return turn_right(x, write_to);
    const Parts half = Parts::room(line_buffer, SPLIT, n2, n1), turned = SplitFactor::parts(left, n1);
    if (right)
      turn_right(x, [&](const Block& block, const float* sums) { put_block(block, sums, half); });
    else
      SplitFactor::put_matrix(x, n1, n2, half);
    const auto nothing = [](long) {};
    in_blocks(turned, half, nothing, write_to);
  }

 private:
  // Call f(block, four tiles) for all of a product of n1 rows and n2 columns, and before(row) at each strip of rows. A
  // block is only looked at when the next one is under way, which takes tiles as long as vectors take for this.
  template <class Before, class F>
  void in_blocks(const Parts& a, const Parts& b, const Before& before, const F& f) const {
    alignas(64) float sums[2][4 * TILE_SUMS];
    Block last{};
    long turn = 0;
    for (long row = 0; row < n1; row += STRIP) {
      before(row);
      for (long column = 0; column < n2;) {
        const Block block = Block::at(row, column, n1);
        multiply_parts(a, b, block, sums[turn % 2]);
        if (turn++) f(last, sums[turn % 2]);
        last = block, column += block.wide();
      }
    }
    f(last, sums[(turn + 1) % 2]);
  }

  // The same for x right.
  template <class F>
  void turn_right(const float* x, const F& f) const {
    const Parts rows = Parts::room(row_buffer, SPLIT, n1, n2);
    const auto before = [&](long first) {
      const long whole = divide_up(std::min(n1, first + STRIP), SIDE) * SIDE;
      for (long r = first; r < whole; r++) rows.put_row<SPLIT>(r, x + std::min(r, n1 - 1) * n2, r < n1 ? n2 : 0);
    };
    in_blocks(rows, SplitFactor::parts(right, n2), before, f);
  }

  // A block, which has the rows of a step or the upper half of them, as part of a right side. What is beyond the rows
  // is zero in the tiles.
  void put_block(const Block& block, const float* sums, const Parts& to) const {
    for (long t = 0; t < 4 / block.high && block.column_of(t) < n2; t++) {
      const float* from = sums + t * TILE_SUMS;
      Half* line = to.lines(block.column_of(t), block.row);
      for (long r = 0; r < SIDE; r++, from += SIDE, line += WIDE)
        to.put<SPLIT>(line, _mm512_load_ps(from),
                      block.high == 2 ? _mm512_load_ps(from + 2 * TILE_SUMS) : _mm512_setzero_ps());
    }
  }

  void write(const Block& block, const float* sums, float* y) const {
    for (long t = 0; t < 4; t++) {
      const long row = block.row_of(t), column = block.column_of(t);
      const __mmask16 inside = first_lanes(n2 - column);
      const float* from = sums + t * TILE_SUMS;
      float* to = y + row * n2 + column;
      for (long r = 0; inside && r < std::min(SIDE, n1 - row); r++, from += SIDE, to += n2)
        _mm512_mask_storeu_ps(to, inside, _mm512_load_ps(from));
    }
  }
};
"""
