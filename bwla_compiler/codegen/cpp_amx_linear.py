"""C++ text of a panel of packed linears on AMX: sums of signs and codes, low-rank pairs, scales and epilogues."""

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
      left.put_row<PARTS>(t, projected + t * member.rank, t < tokens ? member.rank : 0);
  }

  // Take the codes of a block of rows.
  void take(long block) {
    auto line = [&](long r, long row) {
      if (r >= member.rank) return _mm512_setzero_ps();
      return (__m512)load_codes(member.rank_out + (block * member.rank + r) * ROWS + row);
    };
    for (long row = 0; row < ROWS; row += SIDE)
      for (long step = 0; step < right.steps * WIDE; step += WIDE)
        for (long r = step; r < step + SIDE; r++) right.put<1>(right.lines(row, r), line(r, row), line(r + SIDE, row));
  }

  // sums = projections of the strip of tokens from m on times these codes of a strip of rows, four tiles.
  void multiply(long m, long row, float* sums) const { multiply_parts(left, right, {m, row, 2}, sums); }
};

// The sums of one block of rows for all tokens of a wave.
class BlockSums {
  const Member& member;
  const Wave<TileKernel>& wave;
  const long tokens, words, blocks;
  const bool by_group, scaled;  // scaled: of several planes or groups, sums are floats that their scales are in
  const bool far;
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
        far(is_far(member.y, tokens, member.out)),
        size(divide_up(tokens, STRIP) * STRIP * ROWS), integers(integer_buffer.get(size)),
        floats(float_buffer.get(scaled ? size : 0)) {}

  // What was streamed is in memory before anybody hears that it has been written.
  ~BlockSums() {
    if (far) _mm_sfence();
  }

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
      // Found while the pair is multiplied: rows of other tokens lie on other pages.
      for (long t = m; member.residual && t < std::min(m + STRIP, tokens); t++)
        for (long r = 0; r < rows; r += SIDE)
          __builtin_prefetch(member.residual + (wave.first + t) * member.out + row + r, 0, 2);
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
        if (far)
          _mm512_stream_ps(member.y + place + r, v);
        else
          _mm512_mask_storeu_ps(member.y + place + r, inside, v);
      }
    }
  }
};

// Compute `count` blocks of rows of one member.
template <>
void panel<TileKernel>(const Member& member, const Wave<TileKernel>& wave, const float* projected, const Projections&,
                       long first, long count) {
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
