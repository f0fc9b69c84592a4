"""C++ text of attention of many tokens on processors with AMX: both products by tiles of bfloat16 parts, as exact as
float32, and of keys that no token of a strip sees, none (online softmax: Milakov and Gimelshein, 2018).

Results do not depend on how many hidden keys follow those that are seen, nor on whether a mask hides them or causality.
"""

TILED = r"""
// Rows are the queries of one head of keys: token by token, of each its group.
class TiledAttention {
  static inline thread_local Buffer<Half> query_buffer, key_buffer, value_buffer, chance_buffer;
  static inline thread_local Buffer<float> float_buffer;
  static constexpr long HEIGHT = 512, STRIPS = HEIGHT / STRIP;  // rows of a job: keys are split once for all of them

  struct Range {  // of keys
    long first, end;
    bool empty() const { return first >= end; }
  };

  const Attention& a;
  const long b, head, top, rows, padded;  // padded: floats of a row of sums
  const Parts queries, keys, values;
  float *peak, *total, *sums, *scores;

  TiledAttention(const Attention& a, long b, long head, long top, long rows)
      : a(a), b(b), head(head), top(top), rows(rows), padded(divide_up(a.size, STRIP) * STRIP),
        queries(Parts::room(query_buffer, PARTS, rows, a.size)),
        keys(Parts::room(key_buffer, PARTS, SPAN_KEYS, a.size)),
        values(Parts::room(value_buffer, PARTS, a.size, SPAN_KEYS)) {
    peak = float_buffer.get((2 + padded) * HEIGHT + std::max(STRIP * SPAN_KEYS, a.size));
    total = peak + HEIGHT, sums = total + HEIGHT, scores = sums + padded * HEIGHT;
    std::fill(peak, peak + HEIGHT, HIDDEN);
    std::fill(total, total + (1 + padded) * HEIGHT, 0.0f);
  }

  long token(long row) const { return (top + row) / a.group; }
  long query(long row) const { return head * a.group + (top + row) % a.group; }

  void split_queries() {
    float* const scaled = scores;
    const float scale = a.scale;
    for (long row = 0; row < queries.whole(); row++) {
      const long n = row < rows ? a.size : 0;
      const float* from = a.queries + b * a.query_batch + query(row) * a.query_head + token(row) * a.query_token;
      for (long i = 0; i < n; i++) scaled[i] = from[i] * scale;
      queries.put_row<PARTS>(row, scaled, n);
    }
  }

  // What row `row` of the queries is shown by the mask, from key `first` on.
  const void* mask(long row, long first) const {
    const long at = b * a.mask_batch + query(row) * a.mask_head + token(row) * a.mask_token + first;
    return (const char*)a.mask + at * a.mask_bytes;
  }

  // The keys of [first, end) between which all lie that some of the rows [row, last) see.
  Range seen(long row, long last, long first, long end) const {
    if (a.causal) return {first, std::min(end, token(last - 1) + 1)};
    if (!a.mask) return {first, end};
    Range range{end, first};
    for (; row < last; row += a.mask_head ? 1 : a.group - (top + row) % a.group) {
      long low = first, high = end;
      if (a.mask_bytes == 1) {
        const auto* bytes = (const uint8_t*)mask(row, 0);
        const auto* one = (const uint8_t*)std::memchr(bytes + first, 1, end - first);
        if (!one) continue;
        low = one - bytes;
        while (!bytes[high - 1]) high--;
      } else {
        const auto* added = (const float*)mask(row, 0);
        while (low < end && added[low] == HIDDEN) low++;
        while (high > low && added[high - 1] == HIDDEN) high--;
        if (low == end) continue;
      }
      range = {std::min(range.first, low), std::max(range.end, high)};
    }
    return range;
  }

  // Split the keys and values of a range that begins at `begin`, by whole steps.
  void split_keys(long begin, Range range) const {
    const Lines<float> key(a.keys, b, head, begin), value(a.values, b, head, begin);
    const long first = (range.first - begin) / STRIP * STRIP, end = range.end - begin;
    const long whole = divide_up(end, STRIP) * STRIP;  // zeros beyond the end: what lay there may be no number
    for (long l = first; l < whole; l += SIDE)
      for (long step = 0; step < keys.steps; step++)
        keys.put_columns(l, step, key.line(l) + step * WIDE, key.stride, end - l, a.size - step * WIDE);
    for (long l = first; l < whole; l += l % WIDE == SIDE - 1 ? SIDE + 1 : 1)
      for (long i = 0; i < values.whole(); i += SIDE) {
        auto line = [&](long l) {
          return l < end ? _mm512_maskz_loadu_ps(first_lanes(a.size - i), value.line(l) + i) : _mm512_setzero_ps();
        };
        values.put<PARTS>(values.lines(i, l), line(l), line(l + SIDE));
      }
  }

  // Hide scores [n] of the keys from `first` on that a row does not see, those from `end` on among them.
  void hide(long row, long first, long end, float* score, long n) const {
    if (a.causal) end = std::min(end, token(row) + 1);
    const long inside = std::clamp(end - first, 0L, n);
    if (a.mask && a.mask_bytes == 1) {
      const auto* shown = (const uint8_t*)mask(row, first);
      for (long l = 0; l < inside; l++) score[l] = shown[l] ? score[l] : HIDDEN;
    } else if (a.mask) {
      const auto* added = (const float*)mask(row, first);
      for (long l = 0; l < inside; l++) score[l] += added[l];
    }
    std::fill(score + inside, score + n, HIDDEN);
  }

  // Scores [n] of a row become chances against the largest so far; what was summed up is measured by that too.
  void soften_row(long row, float* score, long n) {
    const float before = peak[row], now = std::max(before, largest(score, n)), sum = weigh(score, n, now);
    if (before != now && total[row] != 0) {
      const float factor = std::exp(before - now);
      total[row] *= factor;
      for (long i = 0; i < padded; i++) sums[row * padded + i] *= factor;
    }
    peak[row] = now;
    total[row] += sum;
  }

  // Put four tiles of sums to or on rows `apart` floats from each other.
  template <bool ADDED>
  static void put_tiles(const float* tiles, float* to, long apart) {
    for (long r = 0; r < STRIP; r++, to += apart)
      for (long half = 0; half < 2; half++) {
        __m512 line = _mm512_load_ps(tiles + (r / SIDE * 2 + half) * TILE_SUMS + r % SIDE * SIDE);
        if (ADDED) line = _mm512_add_ps(line, _mm512_loadu_ps(to + half * SIDE));
        _mm512_storeu_ps(to + half * SIDE, line);
      }
  }

  // A strip of rows from `row` on, and the keys that it sees of the span that begins at `begin`.
  void see_strip(long row, long begin, Range range) {
    const long first = (range.first - begin) / STRIP * STRIP, n = divide_up(range.end - begin - first, STRIP) * STRIP;
    alignas(64) float tiles[4 * TILE_SUMS];
    for (long l = 0; l < n; l += STRIP) {
      multiply_parts(queries, keys, {row, first + l, 2}, tiles);
      put_tiles<false>(tiles, scores + l, SPAN_KEYS);
    }
    const Parts chances = Parts::room(chance_buffer, PARTS, STRIP, n);
    for (long r = 0; r < STRIP; r++) {
      float* score = scores + r * SPAN_KEYS;
      if (row + r < rows) {
        hide(row + r, begin + first, range.end, score, n);
        soften_row(row + r, score, n);
      }
      chances.put_row<PARTS>(r, score, row + r < rows ? n : 0);
    }
    for (long i = 0; i < padded; i += STRIP) {
      multiply_parts(chances, values, {0, i, 2}, tiles, first / WIDE);
      put_tiles<true>(tiles, sums + row * padded + i, padded);
    }
  }

  void write() const {
    for (long row = 0; row < rows; row++) {
      const float factor = total[row] == 0 ? 0.0f : 1.0f / total[row];
      float* y = a.y + ((b * a.tokens + token(row)) * a.heads * a.group + query(row)) * a.size;
      for (long i = 0; i < a.size; i++) y[i] = sums[row * padded + i] * factor;
    }
  }

  void run() {
    const TileScope scope;
    split_queries();
    for (long begin = 0; begin < a.length; begin += SPAN_KEYS) {
      const long end = std::min(a.length, begin + SPAN_KEYS);
      Range strips[STRIPS], all{end, begin};
      for (long row = 0; row < rows; row += STRIP) {
        const Range range = strips[row / STRIP] = seen(row, std::min(row + STRIP, rows), begin, end);
        if (!range.empty()) all = {std::min(all.first, range.first), std::max(all.end, range.end)};
      }
      if (all.empty()) continue;
      split_keys(begin, all);
      for (long row = 0; row < rows; row += STRIP)
        if (!strips[row / STRIP].empty()) see_strip(row, begin, strips[row / STRIP]);
    }
    write();
  }

 public:
  static void attend(const Attention& a, long threads) {
    const long rows = a.tokens * a.group, blocks = divide_up(rows, HEIGHT);
    parallel(a.batch * a.heads * blocks, threads, [&](long job) {
      const long top = (blocks - 1 - job % blocks) * HEIGHT;  // the last, which see most, first
      TiledAttention(a, job / blocks / a.heads, job / blocks % a.heads, top, std::min(HEIGHT, rows - top)).run();
    });
  }
};
"""
