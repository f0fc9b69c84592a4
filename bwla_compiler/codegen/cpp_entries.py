"""C++ text of whole operators over the kernels, and the C entries that Python calls."""

LINEAR = r"""
// One linear of those that share an input. All pointers are to contiguous float32 or int8 arrays; null for "none".
struct Member {
  const Word* signs;        // packed [planes], each a Plane
  const float* scale;       // [planes, out], or packed [planes, blocks, groups, ROWS]
  const int8_t* rank_in;    // [rank, in]
  const int8_t* rank_out;   // packed [blocks, rank, ROWS]
  const float* rank_scale;  // [rank]
  const float* bias;        // [out]
  float* y;                 // [tokens, out]
  long out, planes, groups, rank;
  const float* residual;    // [tokens, out]
};

constexpr long TOKENS = 32;       // tokens whose sums of one panel stay in the second cache

template <class K>
struct Wave {  // some tokens, rounded
  long first, tokens, in, limit, threads;
  const float* scale;
  Tables<K> tables;

  bool is_few() const { return tokens <= FEW; }
  // What a thread reads for n tokens of it: of few all, with their tables kept.
  Wave part(long from, long n) const {
    if constexpr (is_tiled<K>) {
      return *this;
    } else {
      const Tables<K> its{tables.row(from), tables.words, tables.call};
      return {first + from, n, in, limit, threads, scale + from, is_few() ? its.keep(n) : its};
    }
  }
};

static inline float project(const int8_t* codes, const int8_t* row, long n) { return (float)dot(codes, row, n); }
static inline float project(const float* x, const int8_t* row, long n) {
  float sum;
  dots<1>(row, x, n, &sum);
  return sum;
}

// sums [T, ROWS] += projected [T, rank] codes [rank, ROWS], rows of the sums `stride` floats apart.
template <int T>
static inline void add_low_rank(const int8_t* codes, const float* projected, long rank, float* sums, long stride) {
  constexpr int V = std::min<long>(4 / T, ROWS / WIDTH);  // so many sums at once hide the latency of one
  for (long r = 0; r < ROWS; r += V * WIDTH) {
    Vec acc[T][V];
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int v = 0; v < V; v++) acc[t][v] = load(sums + t * stride + r + v * WIDTH);
    for (long k = 0; k < rank; k++)
      UNROLL for (int v = 0; v < V; v++) {
        const Vec line = load_codes(codes + k * ROWS + r + v * WIDTH);
        UNROLL for (int t = 0; t < T; t++) acc[t][v] = multiply_add(line, projected[t * rank + k], acc[t][v]);
      }
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int v = 0; v < V; v++) std::memcpy(sums + t * stride + r + v * WIDTH, &acc[t][v], sizeof(Vec));
  }
}

// Write y = (sum + low rank) * token scale + bias + residual for `rows` rows from `first` on and T tokens from m on;
// sums [T, stride] are spent.
template <int T, class K>
static void finish(const Member& member, const Wave<K>& wave, float* sums, const float* projected, long stride, long m,
                   long first, long rows) {
  const long rank = member.rank;
  for (long r = 0; rank && r < rows; r += ROWS)
    add_low_rank<T>(member.rank_out + (first + r) * rank, projected + m * rank, rank, sums + r, stride);
  for (int t = 0; t < T; t++, sums += stride) {
    const long token = wave.first + m + t;
    float* y = member.y + token * member.out + first;
    const float scale = wave.scale[m + t];
    if (member.bias)
      for (long r = 0; r < rows; r++) y[r] = sums[r] * scale + member.bias[first + r];
    else
      for (long r = 0; r < rows; r++) y[r] = sums[r] * scale;
    if (!member.residual) continue;
    const float* residual = member.residual + token * member.out + first;
    for (long r = 0; r < rows; r++) y[r] += residual[r];
  }
}

// Tokens that another thread may still be at preparing.
struct Preparation {
  std::atomic<bool> is_done{false};
  // Meanwhile have fetched what is read next: memory is idle then.
  void wait(const void* next, long n_bytes) const {
    for (long at = 0; !is_done.load(std::memory_order_acquire); at += 64) {
      if (at < n_bytes)
        __builtin_prefetch((const char*)next + at, 0, 2);
      else if (at > n_bytes + (1 << 16))
        std::this_thread::yield();
    }
  }
};

// Projections on low-rank pairs that other threads may still be at.
struct Projections {
  std::atomic<long> left{0};
  void wait() const {
    for (long spin = 0; left.load(std::memory_order_acquire); spin++)
      if (spin > 1000) std::this_thread::yield();
  }
};

// Compute `count` blocks of rows of one member for one wave.
template <class K>
static void panel(const Member& member, const Wave<K>& wave, const float* projected, const Projections& projections,
                  long first, long count) {
  using Sum = typename K::Sum;
  static thread_local Buffer<float> float_buffer;
  static thread_local Buffer<Sum> sum_buffer;
  const bool by_group = member.groups > 1;
  const long stride = count * ROWS, blocks = divide_up(member.out, ROWS), size = wave.tokens * stride;
  const long row = first * ROWS, rows = std::min(stride, member.out - row), words = wave.tables.words;
  float* floats = float_buffer.get(by_group ? size : TILE * stride);  // sums of all tokens, or of the tile at hand
  Sum* sums = sum_buffer.get(by_group ? 0 : member.planes * size);    // by plane
  if (by_group)
    std::fill(floats, floats + size, 0.0f);
  else
    std::fill(sums, sums + member.planes * size, Sum(0));
  for (long p = 0; p < member.planes; p++) {
    if (!by_group) fetch_ahead(member.scale + p * member.out + row, rows * (long)sizeof(float));
    const Plane plane{member.signs + p * Plane::n_words(words, blocks), words, blocks};
    if (by_group)
      sweep_groups<K>(plane, first, count, wave.tables, wave.tokens, member.scale + p * blocks * member.groups * ROWS,
                      floats);
    else
      sweep_rows<K>(plane, first, count, wave.tables, wave.tokens, wave.limit, sums + p * size);
  }
  projections.wait();
  for_tiles(wave.tokens, [&](auto width, long m) {
    constexpr int T = decltype(width)::value;
    float* total = by_group ? floats + m * stride : floats;
    for (long p = 0; !by_group && p < member.planes; p++) {
      const float* scale = member.scale + p * member.out + row;
      for (int t = 0; t < T; t++) {
        const Sum* from = sums + p * size + (m + t) * stride;
        float* to = total + t * stride;
        if (p)
          for (long r = 0; r < rows; r++) to[r] += (float)from[r] * scale[r];
        else
          for (long r = 0; r < rows; r++) to[r] = (float)from[r] * scale[r];
      }
    }
    finish<T>(member, wave, total, projected, stride, m, row, rows);
  });
}

// projected [tokens, rank] = (codes rank_in^T) * rank_scale, for components [begin, end).
template <class K>
static void project_on_pair(const Wave<K>& wave, const Member& member, float* projected, long begin, long end) {
  for (long r = begin; r < end; r++)
    for (long m = 0; m < wave.tokens; m++)
      projected[m * member.rank + r] =
          project(wave.tables.row(m), member.rank_in + r * wave.in, wave.in) * member.rank_scale[r];
}

// The same of all components, on some threads.
template <class K>
static void project_on_pair(const Wave<K>& wave, const Member& member, float* projected) {
  parallel(member.rank, member.rank * wave.in * wave.tokens < (1 << 20) ? 1 : wave.threads,
           [&](long r) { project_on_pair<K>(wave, member, projected, r, r + 1); });
}

// All members for one wave: prepare its tokens, project on the low-rank pairs, then take panels of rows, of all tokens
// or of some, in any order. Preparing a few is the first job (`is_brief`: where it is one thread's), so that the others
// have woken up when it is done; projections are the next, so that nobody waits for them before he adds them.
template <class K, class F>
static void run_wave(const Wave<K>& wave, const Member* members, long n_members, bool is_brief, const F& prepare) {
  static thread_local Buffer<float> buffer;
  long ranks = 0, blocks = 0;
  for (long i = 0; i < n_members; i++) ranks += members[i].rank, blocks += divide_up(members[i].out, ROWS);
  float* const projected = buffer.get(ranks * wave.tokens);
  const long share = divide_up(divide_up(wave.tokens, wave.threads), TILE) * TILE;
  const long some = is_tiled<K> || wave.is_few() ? wave.tokens : std::min(share, TOKENS);
  const long parts = divide_up(wave.tokens, some);
  // Under some tens of microseconds of work a second thread costs more than it saves.
  const long threads = blocks * ROWS * wave.in * wave.tokens < (1 << 20) ? 1 : wave.threads;
  // Few tokens wait for signs, which lie in bands; the more there are, the more rows are to share a table that is read.
  const long fair = std::clamp(blocks / (threads * 4), STACK, PANEL) / STACK * STACK;
  const long height = is_tiled<K>       ? std::clamp(blocks / (threads * 4), 1L, STACK)
                      : wave.tokens < 4 ? STACK
                      : wave.is_few()   ? fair
                                        : PANEL;
  long jobs = 0;
  for (long i = 0; i < n_members; i++) jobs += divide_up(divide_up(members[i].out, ROWS), height);
  Preparation preparation;
  Projections projections;
  const long first_jobs = !is_tiled<K> && is_brief && threads > 1;
  const long early = !is_tiled<K> && wave.is_few() ? n_members * threads : 0;
  const long signs = Plane::n_words(wave.tables.words, divide_up(members[0].out, ROWS)) * (long)sizeof(Word);
  if (!first_jobs) prepare();
  projections.left = early;
  float* at = projected;
  for (long i = 0; !early && i < n_members; at += members[i++].rank * wave.tokens)
    project_on_pair<K>(wave, members[i], at);
  auto job = [&](long j) {
    if (first_jobs && j == 0) {
      prepare();
      preparation.is_done.store(true, std::memory_order_release);
      return;
    }
    if (first_jobs) preparation.wait(members[0].signs, signs);
    j -= first_jobs;
    const Member* member = members;
    float* side = projected;
    auto next = [&] { side += member->rank * wave.tokens, member++; };
    if (j < early) {
      for (long left = j / threads; left > 0; left--) next();
      const long part = j % threads, rank = member->rank;
      project_on_pair<K>(wave, *member, side, rank * part / threads, rank * (part + 1) / threads);
      projections.left.fetch_sub(1, std::memory_order_release);
      return;
    }
    j -= early;
    const long from = j % parts * some;
    for (j /= parts;; next()) {
      const long panels = divide_up(divide_up(member->out, ROWS), height);
      if (j < panels) break;
      j -= panels;
    }
    const long first = j * height, count = std::min(height, divide_up(member->out, ROWS) - first);
    const Wave<K> its = wave.part(from, std::min(some, wave.tokens - from));
    panel<K>(*member, its, side + from * member->rank, projections, first, count);
  };
  parallel(first_jobs + early + jobs * parts, threads, job);
}

constexpr long FETCHED = 256 << 10;  // bytes that the second cache holds beside the tokens

// Have what a transform reads first fetched at once; the rest, and the first signs, while tokens are prepared.
static inline void fetch(const Prologue* prologue, const Member& member, long words) {
  Next& next = next_reads() = {};
  if (prologue) transform_of(*prologue).fetch(next);
  const long n = Plane::n_words(words, divide_up(member.out, ROWS)) * (long)sizeof(Word);
  next.then(member.signs, std::min(FETCHED, n));
}

template <class K>
static void linear(const float* x, const Prologue* prologue, const float* column_scale, long tokens, long in, int limit,
                   const Member* members, long n_members, long threads) {
  using Code = typename K::Code;
  static thread_local Buffer<float> scale_buffer;
  const long words = divide_up(in, COLUMNS), padded = words * COLUMNS;
  const long most = std::clamp((4L << 20) / (padded * (long)sizeof(Code)) / TOKENS * TOKENS, TOKENS, 16 * TOKENS);
  for (long first = 0; first < tokens; first += most) {
    const long n = std::min(most, tokens - first), helpers = n <= 4 ? 1 : threads;
    const auto tables = Tables<K>::room(n, words);
    float* scale = scale_buffer.get(n);
    auto prepare_all = [&] {
      if (tokens <= FEW) fetch(prologue, members[0], words);
      parallel(n, helpers, [&](long m) {
        if (tokens > FEW) next_reads() = m + helpers < n ? reads_of(prologue, x, first + m + helpers, in) : Next{};
        const float* token = prepare(prologue, x + (first + m) * in, first + m, in, helpers > 1 ? 1 : threads);
        scale[m] = quantize(token, column_scale, in, padded, limit, tables.row(m));
        tables.put(m);
      });
      next_reads() = {};
    };
    const bool is_brief = helpers == 1 && (!prologue || !transform_of(*prologue).is_shared(threads));
    run_wave<K>({first, n, in, limit, threads, scale, tables}, members, n_members, is_brief, prepare_all);
  }
}
"""

ENTRIES = r"""
// Call f(K{}) with the kernel for so many tokens of codes in [-limit, limit], or of floats where limit is 0.
// A kernel text that has a SmallKernel says up to which limit it serves; one that has a TileKernel, which tokens.
template <class F>
static void with_kernel(int limit, [[maybe_unused]] long tokens, const F& f) {
  if (!limit) return f(FloatKernel{});
#ifdef TILED
  if (TILED(tokens)) return f(TileKernel{});
#endif
#ifdef SMALL_CODES
  if (limit <= SMALL_CODES) return f(SmallKernel{});
#endif
  f(IntKernel{});
}

EXPORT long bwla_packed_bytes(long planes, long out, long in) {
  return planes * divide_up(out, ROWS) * ROWS * divide_up(in, COLUMNS) * (long)sizeof(Word);
}

// Canonical signs [planes, out, ceil(in / 8)] -> the planes of `Plane`; rows and columns padded with zero bits.
EXPORT void bwla_pack(const uint8_t* signs, Word* packed, long planes, long out, long in, long threads) {
  constexpr long EACH = sizeof(Word);
  const long blocks = divide_up(out, ROWS), words = divide_up(in, COLUMNS), bytes = divide_up(in, 8);
  parallel(planes * blocks, threads, [&](long job) {
    const long plane = job / blocks, block = job % blocks, first = block * ROWS;
    Word* const start = packed + plane * Plane::n_words(words, blocks);
    for (long word = 0; word < words; word++) {
      uint8_t* to = (uint8_t*)(start + Plane::offset(word, block, words, blocks));
      std::memset(to, 0, ROWS * EACH);
      for (long r = 0; r < std::min(ROWS, out - first); r++) {
        const uint8_t* row = signs + (plane * out + first + r) * bytes;
        for (long b = word * EACH; b < std::min((word + 1) * EACH, bytes); b++) to[byte_of(r, b % EACH)] = row[b];
      }
    }
  });
}

EXPORT long bwla_packed_scales(long planes, long out, long groups) {
  return planes * divide_up(out, ROWS) * ROWS * groups;
}

// Group scales [planes, out, groups] -> [planes, blocks, groups, ROWS].
EXPORT void bwla_pack_scale(const float* scale, float* packed, long planes, long out, long groups) {
  const long blocks = divide_up(out, ROWS);
  std::fill(packed, packed + bwla_packed_scales(planes, out, groups), 0.0f);
  for (long p = 0; p < planes; p++)
    for (long row = 0; row < out; row++)
      for (long g = 0; g < groups; g++)
        packed[((p * blocks + row / ROWS) * groups + g) * ROWS + row % ROWS] = scale[(p * out + row) * groups + g];
}

EXPORT long bwla_packed_pair(long out, long rank) { return divide_up(out, ROWS) * ROWS * rank; }

// Codes of a low-rank pair [out, rank] -> [blocks, rank, ROWS]; rows padded with zeros.
EXPORT void bwla_pack_pair(const int8_t* codes, int8_t* packed, long out, long rank) {
  std::memset(packed, 0, bwla_packed_pair(out, rank));
  for (long row = 0; row < out; row++)
    for (long k = 0; k < rank; k++) packed[(row / ROWS * rank + k) * ROWS + row % ROWS] = codes[row * rank + k];
}

// Linears that share x [tokens, in], each token after the prologue (null for none) rounded once to [-limit, limit],
// or left as it is where limit is 0.
EXPORT void bwla_fused_group(const float* x, const Prologue* prologue, const float* column_scale, long tokens, long in,
                             int limit, const Member* members, long n_members, long threads) {
  with_kernel(limit, tokens, [&](auto kernel) {
    linear<decltype(kernel)>(x, prologue, column_scale, tokens, in, limit, members, n_members, threads);
  });
}

EXPORT void bwla_linear(const float* x, const float* column_scale, long tokens, long in, int limit,
                        const Member* members, long n_members, long threads) {
  bwla_fused_group(x, nullptr, column_scale, tokens, in, limit, members, n_members, threads);
}

EXPORT void bwla_quantize(const float* x, const float* column_scale, long tokens, long in, int limit, int8_t* codes,
                          float* scale) {
  for (long m = 0; m < tokens; m++) scale[m] = quantize(x + m * in, column_scale, in, in, limit, codes + m * in);
}

template <class K>
static void accumulate(const int8_t* codes, const Word* signs, long tokens, long out, long in, int limit,
                       int32_t* acc) {
  const long words = divide_up(in, COLUMNS), padded = words * COLUMNS;
  Buffer<float> ones, sums;
  float *one = ones.get(std::max(tokens, out)), *sum = sums.get(tokens * out);
  const auto tables = Tables<K>::room(tokens, words);
  for (long m = 0; m < tokens; m++) {
    std::memcpy(tables.row(m), codes + m * in, in);
    std::memset(tables.row(m) + in, 0, padded - in);
    tables.put(m);
  }
  std::fill(one, one + std::max(tokens, out), 1.0f);
  const Member member{signs, one, nullptr, nullptr, nullptr, nullptr, sum, out, 1, 1, 0, nullptr};
  run_wave<K>({0, tokens, in, limit, 1, one, tables}, &member, 1, false, [] {});
  for (long i = 0; i < tokens * out; i++) acc[i] = (int32_t)sum[i];
}

// The integer sums of one plane, acc [tokens, out], below 2^24, for codes [tokens, in] in [-limit, limit], limit > 0;
// for tests.
EXPORT void bwla_accumulate(const int8_t* codes, const Word* signs, long tokens, long out, long in, int limit,
                            int32_t* acc) {
  with_kernel(limit, tokens, [&](auto kernel) {
    using K = decltype(kernel);
    if constexpr (std::is_same_v<typename K::Code, int8_t>)
      accumulate<K>(codes, signs, tokens, out, in, limit, acc);
  });
}
"""
