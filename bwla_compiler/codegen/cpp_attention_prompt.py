"""C++ text of attention of several tokens: what its rows are and see, and how vectors of floats compute it.

softmax(q K^T * scale + mask) V by head, over keys and values in float32, of which those that no row of a strip sees are
not read (online softmax: Milakov and Gimelshein, 2018). Results do not depend on how many hidden keys follow those that
are seen, nor on whether a mask hides them or causality.
"""

ROWS = r"""
// The queries of one head of keys, token by token, of each its group: some rows of them, from `top` on.
struct HeadRows {
  struct Range {  // of keys
    long first, end;
    bool empty() const { return first >= end; }
  };

  const Attention& a;
  const long b, head, top, rows;

  long token(long row) const { return (top + row) / a.group; }
  long query(long row) const { return head * a.group + (top + row) % a.group; }
  const float* query_at(long row) const {
    return a.queries + b * a.query_batch + query(row) * a.query_head + token(row) * a.query_token;
  }
  float* result_at(long row) const {
    return a.y + ((b * a.tokens + token(row)) * a.heads * a.group + query(row)) * a.size;
  }

  // Write the query of a row [size], turned where that is asked, times the scale of scores.
  void put_query(long row, float* to) const {
    const float* from = query_at(row);
    if (a.cos) {
      const long at = b * a.turn_batch + token(row) * a.turn_token;
      turn(from, a.cos + at, a.sin + at, a.size, to);
      from = to;
    }
    const float scale = a.scale;
    for (long i = 0; i < a.size; i++) to[i] = from[i] * scale;
  }

  // What a row of the queries is shown by the mask, from key `first` on.
  const void* mask(long row, long first) const {
    const long at = b * a.mask_batch + query(row) * a.mask_head + token(row) * a.mask_token + first;
    return (const char*)a.mask + at * a.mask_bytes;
  }

  // The keys of [first, end) between which all lie that some of the rows [row, last) see.
  Range seen(long row, long last, long first, long end) const {
    if (a.causal) return {first, std::min(end, token(last - 1) + 1)};
    if (!a.mask) return {first, end};
    Range range{end, first};
    // The last rows see most as a rule, and only what others see beyond them is looked for.
    for (long r = last - 1; r >= row; r -= a.mask_head ? 1 : (top + r) % a.group + 1) {
      long low = first, high = end;
      if (a.mask_bytes == 1) {
        const auto* bytes = (const uint8_t*)mask(r, 0);
        const auto* one = (const uint8_t*)std::memchr(bytes + first, 1, end - first);
        if (!one) continue;
        low = one - bytes;
        while (high > range.end && !bytes[high - 1]) high--;
      } else {
        const auto* added = (const float*)mask(r, 0);
        while (low < end && added[low] == HIDDEN) low++;
        if (low == end) continue;
        while (high > range.end && added[high - 1] == HIDDEN) high--;
      }
      range = {std::min(range.first, low), high};
    }
    return range;
  }
};

// Run rows of Attend, at most HEIGHT at a time, on some threads: the last, which see most, first.
template <class Attend>
static void attend_rows(const Attention& a, long threads) {
  const long rows = a.tokens * a.group, blocks = divide_up(rows, Attend::HEIGHT);
  parallel(a.batch * a.heads * blocks, threads, [&](long job) {
    const long top = (blocks - 1 - job % blocks) * Attend::HEIGHT;
    const HeadRows part{a, job / blocks / a.heads, job / blocks % a.heads, top, std::min(Attend::HEIGHT, rows - top)};
    Attend(part).run();
  });
}
"""

VECTORS = r"""
// A lane is a row: scores and chances of a strip of rows lie key by key, [SPAN_KEYS, STRIP].
class VectorAttention : HeadRows {
  static inline thread_local Buffer<float> buffer;
  static constexpr long STRIP = 3 * WIDTH;  // as many rows as tiles of 4 keys, and of 6 rows, take whole: 12 sums each
  static constexpr long KEYS = 32;  // whose values stay in the first cache, beside the sums of a strip

  // Of whole strips of rows: [rows], [rows], [strips, size, STRIP], [rows, size]; of one strip, or a query: scores.
  float *peak, *total, *queries, *sums, *scores;

 public:
  static constexpr long HEIGHT = 5 * STRIP;

  explicit VectorAttention(const HeadRows& part) : HeadRows(part) {
    const long whole = divide_up(rows, STRIP) * STRIP;
    peak = buffer.get(whole * (2 + 2 * a.size) + std::max(SPAN_KEYS * STRIP, a.size));
    total = peak + whole, queries = total + whole, sums = queries + whole * a.size, scores = sums + whole * a.size;
    std::fill(peak, total, HIDDEN);
    std::fill(total, scores, 0.0f);
  }

  void run() {
    turn_queries();
    for (long begin = 0; begin < a.length; begin += SPAN_KEYS) {
      const long end = std::min(a.length, begin + SPAN_KEYS);
      for (long row = 0; row < rows; row += STRIP) {
        const Range range = seen(row, std::min(row + STRIP, rows), begin, end);
        if (!range.empty()) see_strip(row, range);
      }
    }
    for (long row = 0; row < rows; row++) {
      const float factor = total[row] == 0 ? 0.0f : 1.0f / total[row], *sum = sums + row * a.size;
      float* const y = result_at(row);
      for (long i = 0; i < a.size; i++) y[i] = sum[i] * factor;
    }
  }

 private:
  void turn_queries() {
    float* const one = scores;  // not yet used
    for (long row = 0; row < rows; row++) {
      put_query(row, one);
      float* const to = queries + row / STRIP * STRIP * a.size + row % STRIP;
      for (long i = 0; i < a.size; i++) to[i * STRIP] = one[i];
    }
  }

  // A strip of rows from `row` on, and the keys of a span that some of them see.
  void see_strip(long row, Range range) {
    const Lines<float> keys(a.keys, b, head, range.first);
    const long n = range.end - range.first;
    product_columns<3, false, 4>({keys.data, keys.stride}, {queries + row * a.size, STRIP}, {scores, STRIP}, n, a.size);
    bool some_hidden = false;
    for (long r = row; r < std::min(row + STRIP, rows); r++) some_hidden |= hide(r, range, scores + r - row);
    for (long r = row; r < row + STRIP; r += WIDTH) soften(r, scores + r - row, n);
    add_values(row, range, some_hidden);
  }

  // Hide from a row what it does not see of a range, its scores STRIP floats apart; whether there is any.
  bool hide(long row, Range range, float* score) const {
    const long last = a.causal ? std::min(range.end, token(row) + 1) : range.end, n = std::max(0L, last - range.first);
    bool any = last < range.end;
    for (long l = n; l < range.end - range.first; l++) score[l * STRIP] = HIDDEN;
    if (a.mask && a.mask_bytes == 1) {
      const auto* shown = (const uint8_t*)mask(row, range.first);
      const auto* hidden = (const uint8_t*)std::memchr(shown, 0, n);
      any |= hidden != nullptr;
      for (long l = hidden ? hidden - shown : n; l < n; l++)
        if (!shown[l]) score[l * STRIP] = HIDDEN;
    } else if (a.mask) {
      const auto* added = (const float*)mask(row, range.first);
      for (long l = 0; l < n; l++) score[l * STRIP] += added[l], any |= added[l] == HIDDEN;
    }
    return any;
  }

  // Scores [n] of WIDTH rows become chances against the largest so far; what was summed up is measured by that too.
  void soften(long row, float* score, long n) {
    const Vec before = load(peak + row);
    Vec now = before, sum{};
    for (long l = 0; l < n; l++) now = larger(load(score + l * STRIP), now);
    const Vec from = now == HIDDEN ? Vec{} : now;
    for (long l = 0; l < n; l++) {
      const Vec v = load(score + l * STRIP) - from, e = v < -87.0f ? Vec{} : exponential(v);
      std::memcpy(score + l * STRIP, &e, sizeof e);
      sum += e;
    }
    const Vec change = before - from, old = load(total + row);
    const Vec factor = before == now ? spread(1.0f) : change < -87.0f ? Vec{} : exponential(change);
    for (long r = 0; r < WIDTH; r++)
      if (factor[r] != 1.0f && old[r] != 0)
        for (long i = 0; i < a.size; i++) sums[(row + r) * a.size + i] *= factor[r];
    sum += old * factor;
    std::memcpy(peak + row, &now, sizeof now);
    std::memcpy(total + row, &sum, sizeof sum);
  }

  // sums [STRIP, size] += chances of a range of keys times their values.
  void add_values(long row, Range range, bool some_hidden) {
    const Lines<float> values(a.values, b, head, range.first);
    const long n = range.end - range.first;
    if (some_hidden && !are_finite(values, n)) return add_values_seen(row, values, n);
    for (long l = 0; l < n; l += KEYS) {
      const Input chances{scores + l * STRIP, 1, STRIP}, lines{values.line(l), values.stride};
      add_product<6>(chances, lines, {sums + row * a.size, a.size}, STRIP, std::min(KEYS, n - l), a.size);
    }
  }

  // The same where a chance of 0 times a value that is no number is to count for nothing.
  void add_values_seen(long row, const Lines<float>& values, long n) {
    for (long r = 0; r < STRIP; r++)
      for (long l = 0; l < n; l++)
        if (const float chance = scores[l * STRIP + r]; chance != 0) {
          const Output sum{sums + (row + r) * a.size, a.size};
          add_product<1>({&chance, 1}, {values.line(l), values.stride}, sum, 1, 1, a.size);
        }
  }

  bool are_finite(const Lines<float>& lines, long n) const {
    for (long l = 0; l < n; l++) {
      const float* line = lines.line(l);
      Vec poison{};
      long i = 0;
      for (; i + WIDTH <= a.size; i += WIDTH) poison += load(line + i) * 0.0f;
      float sum = sum_of(poison);
      for (; i < a.size; i++) sum += line[i] * 0.0f;
      if (sum != 0) return false;
    }
    return true;
  }
};
"""
