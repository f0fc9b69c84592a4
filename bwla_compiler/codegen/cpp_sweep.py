"""C++ text of sweeps: where packed signs lie, tables of tokens, and which are multiplied when."""

SWEEP = r"""
constexpr long GROUP = 128, GROUP_WORDS = GROUP / COLUMNS, STACK = 512 / ROWS, PANEL = 4096 / ROWS;
static_assert(CHUNK % GROUP_WORDS == 0 && HELD / TILE % GROUP_WORDS == 0, "a step holds whole groups");

template <int T>
using Int = std::integral_constant<int, T>;

// Call f(Int<K>, first) for tiles of 4 and of 1 of n.
template <class F>
static inline void by_four(long n, const F& f) {
  long i = 0;
  for (; i + 4 <= n; i += 4) f(Int<4>{}, i);
  for (; i < n; i++) f(Int<1>{}, i);
}

template <class K>
constexpr bool is_tiled = false;  // whether kernel K multiplies tiles of tokens, and has no tables of sums

// Whether kernel K tells in tables what is to be known of several words.
template <class K, class = void>
constexpr bool links = false;
template <class K>
constexpr bool links<K, std::void_t<decltype(&K::link)>> = true;

// Call f(Int<T>, first token) for tiles of 4, 2 and 1 tokens.
template <class F>
static void for_tiles(long tokens, const F& f) {
  long m = 0;
  if constexpr (TILE >= 4)
    for (; m + 4 <= tokens; m += 4) f(Int<4>{}, m);
  if constexpr (TILE >= 2)
    for (; m + 2 <= tokens; m += 2) f(Int<2>{}, m);
  for (; m < tokens; m++) f(Int<1>{}, m);
}

#ifndef OWN_ORDER
// Where in a word of a block eight signs of a row lie.
static inline long byte_of(long row, long octet) { return row * (long)sizeof(Word) + octet; }
#endif

// One plane of packed signs: bands of STACK blocks of rows, of a band its chunks of CHUNK words, of a chunk the blocks,
// of a block [words, ROWS]. So what a thread reads for few tokens, some bands, lies in one piece, and in the order in
// which it is read.
struct Plane {
  const Word* signs;
  long words, blocks;
  static long n_words(long words, long blocks) { return words * blocks * ROWS; }
  // Where word `word` of a block lies; the words up to the end of its chunk follow.
  const Word* at(long block, long word) const { return signs + offset(word, block, words, blocks); }
  static long offset(long word, long block, long words, long blocks) {
    const long band = block / STACK * STACK, height = std::min(STACK, blocks - band);
    const long chunk = word / CHUNK * CHUNK, n = std::min(CHUNK, words - chunk);
    return (band * words + chunk * height + (block - band) * n + word - chunk) * ROWS;
  }
};

template <class Sum>
struct RowSink {  // add up sums of the whole row
  Sum* acc;
  long stride;
  template <class V>
  void operator()(long, int t, long row, V v) const { add(acc + t * stride + row, v); }
};

struct GroupSink {  // add up the sums of groups of columns, each times its scale
  float* acc;
  long stride;
  const float* scale;
  template <class V>
  void operator()(long span, int t, long row, V v) const {
    add_scaled(acc + t * stride + row, v, scale + span * ROWS + row);
  }
};

constexpr long FEW = 2 * TILE;  // tokens all of whose tables a thread keeps during a call

// Tables of tokens whose codes are [tokens, words * COLUMNS]. Each thread has its own: building one takes less time
// than fetching it from another core's cache. Those of FEW tokens are built once a call and thread, tile by tile, word
// by word, token by token; those of more a step at a time.
template <class K>
struct Tables {
  typename K::Code* codes;
  long words;
  long call;                               // of no other wave of tokens
  const typename K::Entry* kept = nullptr;  // all of them

  // Room for codes of so many tokens, to be written row by row: `put` follows where a row is complete.
  static Tables room(long tokens, long words) {
    static thread_local Buffer<typename K::Code> buffer;
    static std::atomic<long> calls{0};
    return {buffer.get(tokens * words * COLUMNS), words, ++calls};
  }
  typename K::Code* row(long token) const { return codes + token * words * COLUMNS; }
  void put(long) const {}

  // These tables, all of which the calling thread has built.
  Tables keep(long tokens) const {
    static thread_local Buffer<typename K::Entry> own;
    static thread_local long whose = 0;
    typename K::Entry* room = own.get(tokens * words * K::TABLE);
    if (whose != call)
      for_tiles(tokens, [&](auto width, long m) {
        build<decltype(width)::value>(m, 0, words, room + m * words * K::TABLE);
      });
    whose = call;
    return {codes, words, call, room};
  }

  // Those of T tokens from m on for n words from `word` on.
  template <int T>
  const typename K::Entry* get(long m, long word, long n) const {
    if (kept) return kept + (m * words + word * T) * K::TABLE;
    static thread_local Buffer<typename K::Entry> own;
    typename K::Entry* tables = own.get(HELD * K::TABLE);
    build<T>(m, word, n, tables);
    return tables;
  }

  template <int T>
  void build(long m, long word, long n, typename K::Entry* to) const {
    using Code = typename K::Code;
    typename K::Entry* const tables = to;
    if constexpr (std::is_invocable_v<decltype(K::build), const Code*, long, long, typename K::Entry*>) {
      for (int t = 0; t < T; t++) K::build(row(m + t) + word * COLUMNS, n, T * K::TABLE, to + t * K::TABLE);
    } else {
      for (long k = word; k < word + n; k++)
        for (int t = 0; t < T; t++, to += K::TABLE) K::build(row(m + t) + k * COLUMNS, to);
    }
    if constexpr (links<K>) K::link(tables, n, T);
  }
};

// Visit `count` blocks of rows from `first` on with all tokens, so many words at a time that their tables stay in the
// first cache and the signs of these blocks in the second.
template <class K, class MakeSink>
static inline void sweep(const Plane& plane, long first, long count, const Tables<K>& tables, long tokens, long span,
                         const MakeSink& sink) {
  for (long chunk = 0; chunk < plane.words; chunk += CHUNK) {
    const long end = std::min(chunk + CHUNK, plane.words);
    for_tiles(tokens, [&](auto width, long m) {
      constexpr int T = decltype(width)::value;
      constexpr long STEP = std::min(CHUNK, HELD / T);
      for (long word = chunk; word < end; word += STEP) {
        const long n = std::min(STEP, end - word);
        const auto* table = tables.template get<T>(m, word, n);
        for (long b = 0; b < count; b++)
          K::template block<T>(plane.at(first + b, word), table, n, span, sink(m, b, word));
      }
    });
  }
}

// acc [tokens, count * ROWS] += sums over whole rows.
template <class K>
static void sweep_rows(const Plane& plane, long first, long count, const Tables<K>& tables, long tokens, int limit,
                       typename K::Sum* acc) {
  const long stride = count * ROWS;
  sweep<K>(plane, first, count, tables, tokens, K::span(limit), [&](long m, long b, long) {
    return RowSink<typename K::Sum>{acc + m * stride + b * ROWS, stride};
  });
}

// total [tokens, count * ROWS] += sums over groups of columns, times scale [blocks, groups, ROWS].
template <class K>
static void sweep_groups(const Plane& plane, long first, long count, const Tables<K>& tables, long tokens,
                         const float* scale, float* total) {
  const long stride = count * ROWS, groups = divide_up(plane.words, GROUP_WORDS);
  sweep<K>(plane, first, count, tables, tokens, GROUP_WORDS, [&](long m, long b, long word) {
    return GroupSink{total + m * stride + b * ROWS, stride, scale + ((first + b) * groups + word / GROUP_WORDS) * ROWS};
  });
}
"""
