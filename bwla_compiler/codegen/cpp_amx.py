"""C++ text of the kernels of processors with AMX: many tokens by products of int8 tiles, few by the tables of AVX-512.

A tile of codes, 16 tokens of 64, is multiplied by a tile of signs, 64 of 16 rows, that is made from packed bits as it
is needed: 1024 signs in some 24 cycles, used once for each 16 tokens, in 16 cycles each. All sums are exact integers.
Source of the instructions: Intel 64 and IA-32 Software Developer's Manual, volume 1, chapter 18 (AMX).
"""

TILES = r"""
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether the operating system gives this process tile registers: it is asked once.
static bool has_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}

constexpr long SIDE = 16;                // rows of a tile, and 32-bit lanes of a row
constexpr long STEP = 64;                // codes of a row of a tile
constexpr long TILE_BYTES = SIDE * STEP;
constexpr long STRIP = 2 * SIDE;         // rows of signs, and tokens, multiplied at once: four tiles of sums
constexpr long DEPTH = CHUNK * COLUMNS;  // columns whose signs are made at once
constexpr long STEP_WORDS = STEP / COLUMNS, TILE_SUMS = SIDE * SIDE;
constexpr long TILED_TOKENS = 5;         // from so many on tiles are faster than tables
#define TILED(tokens) (tokens >= TILED_TOKENS && has_tiles())

// All tiles are of 16 rows of 64 bytes while this lives; afterwards as the thread had them, since libraries that
// multiply on the same thread remember how they left them.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Layout {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t width[16] = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP};
      uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
    };
    static const Layout layout;
    _tile_storeconfig(before);
    asm volatile("" : "+m"(before));  // not every compiler knows that it was written
    _tile_loadconfig(&layout);
  }
  ~TileScope() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }

 private:
  alignas(64) uint8_t before[64];
};

struct TileKernel {
  using Code = int8_t;
  using Sum = int32_t;
};
template <>
constexpr bool is_tiled<TileKernel> = true;

// Codes as tiles [tokens / SIDE, steps, SIDE, STEP], zeros beyond.
template <>
struct Tables<TileKernel> {
  int8_t* tiles;
  long words;

  long steps() const { return divide_up(words * COLUMNS, STEP); }
  int8_t* at(long token, long step) const { return tiles + (token / SIDE * steps() + step) * TILE_BYTES; }

  static Tables room(long tokens, long words) {
    static thread_local Buffer<int8_t> buffer;
    const Tables its{nullptr, words};
    const long whole = divide_up(tokens, SIDE) * SIDE, strip = its.steps() * TILE_BYTES;
    int8_t* tiles = buffer.get(whole / SIDE * strip);
    if (whole > tokens) std::memset(tiles + (whole / SIDE - 1) * strip, 0, strip);
    return {tiles, words};
  }
  // The calling thread's own, whichever the token.
  int8_t* row(long) const {
    static thread_local Buffer<int8_t> buffer;
    return buffer.get(words * COLUMNS);
  }
  void put(long token) const {
    const int8_t* from = row(token);
    int8_t* to = at(token, 0) + token % SIDE * STEP;
    for (long left = words * COLUMNS; left > 0; left -= STEP, from += STEP, to += TILE_BYTES) {
      const __mmask64 inside = ~0ULL >> (STEP - std::min(STEP, left));
      _mm512_store_si512(to, _mm512_maskz_loadu_epi8(inside, from));
    }
  }
};

// Signs of 32 rows and up to four words as bytes +-1, two tiles [STEP / 4, SIDE, 4]; the rest of both is not touched.
static inline void spread(const Word* w, long words, int8_t* to) {
  struct Places {
    alignas(64) uint8_t of[2][2][64];
    constexpr Places() : of() {
      for (int tile = 0; tile < 2; tile++)
        for (int half = 0; half < 2; half++)
          for (int i = 0; i < 64; i++) of[tile][half][i] = (uint8_t)(2 * (16 * tile + i / 4) + half);
    }
  };
  static constexpr Places places;
  const __m512i low = _mm512_set1_epi32(0x08040201), high = _mm512_set1_epi32((int)0x80402010);
  const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
  for (long j = 0; j < words; j++) {
    const __m512i word = _mm512_loadu_si512(w + j * ROWS);
    _mm_prefetch((const char*)(w + j * ROWS) + AHEAD, _MM_HINT_T0);
    UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int half = 0; half < 2; half++) {
      const __m512i byte = _mm512_permutexvar_epi8(_mm512_load_si512(places.of[tile][half]), word);
      int8_t* at = to + tile * TILE_BYTES + (2 * j + half) * 2 * STEP;
      _mm512_store_si512(at, _mm512_mask_blend_epi8(_mm512_test_epi8_mask(byte, low), minus, plus));
      _mm512_store_si512(at + STEP, _mm512_mask_blend_epi8(_mm512_test_epi8_mask(byte, high), minus, plus));
    }
  }
}

// Four tiles of sums, or two where R is 1, (+)= R strips of codes, `apart` bytes from each other, times two of signs.
template <int R>
static inline void multiply(const int8_t* codes, long apart, const int8_t* signs, long steps, bool fresh,
                            int32_t* sums) {
  // Not every compiler's tile instructions tell it that they read and write memory.
  asm volatile("" ::: "memory");
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, STEP);
    _tile_loadd(1, sums + TILE_SUMS, STEP);
    if (R > 1) {
      _tile_loadd(2, sums + 2 * TILE_SUMS, STEP);
      _tile_loadd(3, sums + 3 * TILE_SUMS, STEP);
    }
  }
  for (long s = 0; s < steps; s++, codes += TILE_BYTES, signs += 2 * TILE_BYTES) {
    _tile_loadd(6, signs, STEP);
    _tile_loadd(4, codes, STEP);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, signs + TILE_BYTES, STEP);
    _tile_dpbssd(1, 4, 7);
    if (R > 1) {
      _tile_loadd(5, codes + apart, STEP);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, STEP);
  _tile_stored(1, sums + TILE_SUMS, STEP);
  if (R > 1) {
    _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
    _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
  }
  asm volatile("" ::: "memory");
}

// Signs of 32 rows from `row` of a block on, of a chunk of words, as tiles [steps, 2, STEP / 4, SIDE, 4].
static inline long spread_strip(const Plane& plane, long block, long row, long word, int8_t* signs) {
  const long words = std::min(CHUNK, plane.words - word);
  const Word* from = plane.at(block, word) + row;
  for (long k = 0; k < words; k += STEP_WORDS)
    spread(from + k * ROWS, std::min(STEP_WORDS, words - k), signs + k / STEP_WORDS * 2 * TILE_BYTES);
  return divide_up(words, STEP_WORDS);
}

// Transpose 16 x 16 32-bit lanes.
static inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
    v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
  }
  UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
    w[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
    w[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xDD);
  }
  UNROLL for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0xDD);
  }
}
"""

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

// sums = a strip of the left side times one of the right, four tiles; the smallest products are added first.
static inline void multiply_parts(const Parts& left, long row, const Parts& right, long column, float* sums) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long order = PARTS - 1; order >= 0; order--)
    for (long part = std::max(0L, order - right.parts + 1); part <= std::min(order, left.parts - 1); part++)
      for (long s = 0; s < left.steps; s++) {
        const Half *a = left.at(part, row, s), *b = right.at(order - part, column, s);
        _tile_loadd(4, a, STEP);
        _tile_loadd(5, a + left.steps * SIDE * WIDE, STEP);
        _tile_loadd(6, b, STEP);
        _tile_loadd(7, b + left.steps * SIDE * WIDE, STEP);
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

PANEL = r"""
// Up to SIDE rows of codes int8 [n, in] as the right side of a product: tiles [steps, STEP / 4, SIDE, 4].
static void turn(const int8_t* codes, long n, long in, int8_t* tiles) {
  for (long k = 0; k < in; k += STEP, tiles += TILE_BYTES) {
    const __mmask64 inside = ~0ULL >> (STEP - std::min(STEP, in - k));
    __m512i lines[SIDE];
    for (long row = 0; row < SIDE; row++)
      lines[row] = _mm512_maskz_loadu_epi8(row < n ? inside : 0, codes + std::min(row, n - 1) * in + k);
    transpose(lines);
    for (long row = 0; row < SIDE; row++) _mm512_store_si512(tiles + row * STEP, lines[row]);
  }
}

// projected [tokens, rank] = (codes rank_in^T) * rank_scale, from exact integers.
template <>
void project_on_pair<TileKernel>(const Wave<TileKernel>& wave, const Member& member, float* projected) {
  const long rank = member.rank, steps = wave.tables.steps();
  parallel(divide_up(rank, SIDE), rank * wave.in * wave.tokens < (1 << 22) ? 1 : wave.threads, [&](long job) {
    static thread_local Buffer<int8_t> buffer;
    alignas(64) int32_t sums[TILE_SUMS];
    const long first = job * SIDE, n = std::min(SIDE, rank - first);
    int8_t* rows = buffer.get(steps * TILE_BYTES);
    turn(member.rank_in + first * wave.in, n, wave.in, rows);
    const TileScope scope;
    for (long m = 0; m < wave.tokens; m += SIDE) {
      asm volatile("" ::: "memory");
      _tile_zero(0);
      for (long s = 0; s < steps; s++) {
        _tile_loadd(4, wave.tables.at(m, s), STEP);
        _tile_loadd(6, rows + s * TILE_BYTES, STEP);
        _tile_dpbssd(0, 4, 6);
      }
      _tile_stored(0, sums, STEP);
      asm volatile("" ::: "memory");
      for (long t = 0; t < std::min(SIDE, wave.tokens - m); t++)
        for (long r = 0; r < n; r++)
          projected[(m + t) * rank + first + r] = (float)sums[t * SIDE + r] * member.rank_scale[first + r];
    }
  });
}

// The low-rank pair of a panel: projections of all tokens, and codes, which bfloat16 holds.
class Pair {
  static inline thread_local Buffer<Half> left_buffer, right_buffer;
  const Member& member;
  const Parts left, right;  // [tokens, rank], [rank, ROWS]

 public:
  Pair(const Member& member, const float* projected, long tokens)
      : member(member), left(Parts::room(left_buffer, PARTS, tokens, member.rank)),
        right(Parts::room(right_buffer, 1, ROWS, member.rank)) {
    for (long t = 0; t < left.whole(); t++)
      left.put_row(t, projected + t * member.rank, t < tokens ? member.rank : 0);
  }

  // Take the codes of a block of rows.
  void take(long block) {
    auto line = [&](long r, long row) {
      if (r >= member.rank) return _mm512_setzero_ps();
      return (__m512)load_codes(member.rank_out + (block * member.rank + r) * ROWS + row);
    };
    for (long row = 0; row < ROWS; row += SIDE)
      for (long r = 0; r < right.steps * WIDE; r += 2) right.put_lines(row, r, line(r, row), line(r + 1, row));
  }

  // sums = projections of the strip of tokens from m on times these codes of a strip of rows, four tiles.
  void multiply(long m, long row, float* sums) const { multiply_parts(left, m, right, row, sums); }
};

// The sums of one block of rows for all tokens of a wave.
class BlockSums {
  const Member& member;
  const Wave<TileKernel>& wave;
  const long tokens, words, blocks;
  const bool by_group, scaled;  // scaled: of several planes or groups, sums are floats that their scales are in
  const long size;
  int32_t* const integers;
  float* const floats;
  alignas(64) int8_t signs[STRIP * DEPTH];
  alignas(64) float scale[ROWS], side[STRIP * ROWS];
  static inline thread_local Buffer<int32_t> integer_buffer;
  static inline thread_local Buffer<float> float_buffer;

 public:
  BlockSums(const Member& member, const Wave<TileKernel>& wave)
      : member(member), wave(wave), tokens(wave.tokens), words(wave.tables.words),
        blocks(divide_up(member.out, ROWS)), by_group(member.groups > 1), scaled(by_group || member.planes > 1),
        size(divide_up(tokens, STRIP) * STRIP * ROWS), integers(integer_buffer.get(size)),
        floats(float_buffer.get(scaled ? size : 0)) {}

  void clear() {
    if (scaled) std::fill_n(floats, size, 0.0f);
  }

  // Add one plane, a chunk of columns at a time, so that what the second cache gives is its codes for all rows.
  void add(long block, long p) {
    const Plane plane{member.signs + p * Plane::n_words(words, blocks), words, blocks};
    const long rows = std::min(ROWS, member.out - block * ROWS);
    for (long word = 0; word < words; word += CHUNK)
      for (long row = 0; row < rows; row += STRIP) {
        const long steps = spread_strip(plane, block, row, word, signs), step = word / STEP_WORDS;
        for (long m = 0; m < tokens; m += STRIP)
          if (by_group)
            add_groups(member.scale + ((p * blocks + block) * member.groups + step / GROUP_STEPS) * ROWS + row, m, row,
                       step, steps);
          else
            product(m, step, steps, signs, word == 0, integers + at(m, row));
      }
    if (by_group) return;
    for (long r = 0; r < ROWS; r++) scale[r] = r < rows ? member.scale[p * member.out + block * ROWS + r] : 0.0f;
    const auto rounded = [](__m512 v, __m512 of, __m512 sum) { return _mm512_add_ps(sum, _mm512_mul_ps(v, of)); };
    for (long m = 0; m < tokens && scaled; m += STRIP)
      for (long row = 0; row < rows; row += STRIP) add_tiles(scale + row, m, row, integers + at(m, row), rounded);
  }

  // y = (sums + pair) * token scale + bias + residual.
  void write(long block, Pair& pair) {
    const long row = block * ROWS, rows = std::min(ROWS, member.out - row);
    if (member.rank) pair.take(block);
    for (long m = 0; m < tokens; m += STRIP) {
      for (long r = 0; member.rank && r < rows; r += STRIP) pair.multiply(m, r, side + at(0, r));
      if (scaled)
        write_strip(m, row, rows, [&](long at, long) { return _mm512_load_ps(floats + at); });
      else
        write_strip(m, row, rows, [&](long at, long r) {
          return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(integers + at)), _mm512_load_ps(scale + r));
        });
    }
  }

 private:
  static constexpr long GROUP_STEPS = GROUP / STEP;

  // Where one token's sum of a row is: tiles [tokens / STRIP, ROWS / STRIP, 2, 2, SIDE, SIDE].
  static long at(long token, long row) {
    const long strip = token / STRIP * (ROWS / STRIP) + row / STRIP;
    return (strip * 4 + token % STRIP / SIDE * 2 + row % STRIP / SIDE) * TILE_SUMS + token % SIDE * SIDE;
  }

  void product(long m, long step, long steps, const int8_t* with, bool fresh, int32_t* to) const {
    const long apart = wave.tables.steps() * TILE_BYTES;
    if (tokens - m > SIDE)
      multiply<2>(wave.tables.at(m, step), apart, with, steps, fresh, to);
    else
      multiply<1>(wave.tables.at(m, step), apart, with, steps, fresh, to);
  }

  // Each group of columns of the signs at hand, times its scale; `of` [groups, ROWS].
  void add_groups(const float* of, long m, long row, long step, long steps) {
    const auto fused = [](__m512 v, __m512 of, __m512 sum) { return _mm512_fmadd_ps(v, of, sum); };
    for (long s = 0; s < steps; s += GROUP_STEPS, of += ROWS) {
      product(m, step + s, std::min(GROUP_STEPS, steps - s), signs + s * 2 * TILE_BYTES, true, integers);
      add_tiles(of, m, row, integers, fused);
    }
  }

  // floats += four tiles of integers times scale [STRIP]; `add` as one token alone is added up.
  template <class Add>
  void add_tiles(const float* of, long m, long row, const int32_t* sums, const Add& add) {
    for (long half = 0; half < STRIP; half += SIDE) {
      const __m512 factor = _mm512_loadu_ps(of + half);
      for (long t = 0; t < std::min(STRIP, tokens - m); t++) {
        float* const to = floats + at(m + t, row + half);
        const __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(sums + at(t, half)));
        _mm512_store_ps(to, add(v, factor, _mm512_load_ps(to)));
      }
    }
  }

  // A strip of tokens, row after row of y, which lie on pages of their own.
  template <class Value>
  void write_strip(long m, long row, long rows, const Value& value) {
    for (long t = 0; t < std::min(STRIP, tokens - m); t++) {
      const long place = (wave.first + m + t) * member.out + row;
      const __m512 token = _mm512_set1_ps(wave.scale[m + t]);
      for (long r = 0; r < rows; r += SIDE) {
        const __mmask16 inside = 0xFFFF >> (SIDE - std::min(SIDE, rows - r));
        __m512 v = value(at(m + t, r), r);
        if (member.rank) v = _mm512_add_ps(v, _mm512_load_ps(side + at(t, r)));
        v = _mm512_mul_ps(v, token);
        if (member.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside, member.bias + row + r));
        if (member.residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside, member.residual + place + r));
        _mm512_mask_storeu_ps(member.y + place + r, inside, v);
      }
    }
  }
};

// Compute `count` blocks of rows of one member.
template <>
void panel<TileKernel>(const Member& member, const Wave<TileKernel>& wave, const float* projected, long first,
                       long count) {
  const TileScope scope;
  Pair pair(member, projected, wave.tokens);
  BlockSums sums(member, wave);
  for (long block = first; block < first + count; block++) {
    sums.clear();
    for (long p = 0; p < member.planes; p++) sums.add(block, p);
    sums.write(block, pair);
  }
}
"""
