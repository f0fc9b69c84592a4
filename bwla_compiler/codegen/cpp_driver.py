"""C++ text around the kernels, the same for every instruction set: threads, rounding, and sweeps over blocks."""

HEADER = r"""
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
static long process_id() { return (long)getpid(); }
#else
static long process_id() { return 0; }
#endif
static inline long divide_up(long a, long b) { return (a + b - 1) / b; }
#define EXPORT extern "C" __attribute__((visibility("default")))
"""

THREADS = r"""
// A grow-only buffer of one thread, from a cache line on; freed when the thread ends.
template <class T>
struct Buffer {
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, LINE); }
  };
  std::unique_ptr<T, Free> data;
  long size = 0;
  T* get(long n) {
    if (n > size) {
      data.reset();
      data.reset((T*)::operator new(n * sizeof(T), LINE));
      size = n;
    }
    return data.get();
  }
};

// Threads that sleep between calls and take the next job of a call from one counter, so that a stolen core delays
// one job and not a static share. Never destroyed: its threads may outlive static destructors.
class Pool {
 public:
  using Job = void (*)(void*, long);

  // Run job(context, i) for i in [0, n) on up to `threads` threads, the caller among them.
  static void run(long n, long threads, Job job, void* context) {
    static std::mutex gate;
    static Pool* pool = nullptr;
    std::unique_lock<std::mutex> lock(gate, std::defer_lock);
    threads = std::min(threads, n);
    if (threads <= 1 || !lock.try_lock()) {  // another caller holds the pool: it uses the cores already
      for (long i = 0; i < n; i++) job(context, i);
      return;
    }
    if (!pool || pool->process != process_id()) pool = new Pool;  // a forked child has no threads
    pool->call(n, threads - 1, job, context);
  }

 private:
  void call(long n, long wanted, Job job, void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (; workers < wanted; workers++) std::thread(&Pool::work, this, workers, generation.load()).detach();
      this->job = job;
      this->context = context;
      jobs = n;
      next = 0;
      helpers = wanted;
      running = wanted;
      generation++;
    }
    wake.notify_all();
    take();
    for (long spin = 0; running.load() && spin < 20000; spin++) std::atomic_signal_fence(std::memory_order_seq_cst);
    if (running.load()) {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, [&] { return running.load() == 0; });
    }
  }

  void take() {
    for (long i; (i = next.fetch_add(1)) < jobs;) job(context, i);
  }

  void work(long id, long seen) {
    for (;;) {
      // A decode step calls again within microseconds, sooner than a sleeper wakes.
      for (long spin = 0; generation.load() == seen && spin < 20000; spin++)
        std::atomic_signal_fence(std::memory_order_seq_cst);
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load() != seen; });
        seen = generation.load();
        if (id >= helpers) continue;
      }
      take();
      if (running.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  const long process = process_id();
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<long> generation{0}, next{0}, running{0};
  long workers = 0, helpers = 0, jobs = 0;
  Job job = nullptr;
  void* context = nullptr;
};

// Runs body(context) on up to `threads` threads of the host at once, at least on the caller's, until all are done.
// Two pools on the same cores only delay each other: the idle threads of one spin while the other has work.
using Team = void (*)(long threads, void (*body)(void*), void* context);
static std::atomic<Team> team{nullptr};
static std::atomic<long> team_process{0};

// Compute on the host's threads from now on; null: on the pool. A forked child, where they are gone, has its own pool.
EXPORT void bwla_use_team(Team host) {
  team_process = process_id();
  team = host;
}

// Run f(i) for i in [0, n) on up to `threads` threads, the caller's among them, in any order.
template <class F>
static void parallel(long n, long threads, F&& f) {
  if (std::min(n, threads) <= 1) {
    for (long i = 0; i < n; i++) f(i);
    return;
  }
  const Team host = team;
  if (!host || team_process != process_id()) {
    Pool::run(n, threads, [](void* context, long i) { (*(std::remove_reference_t<F>*)context)(i); }, (void*)&f);
    return;
  }
  struct Call {
    std::remove_reference_t<F>& f;
    const long n;
    std::atomic<long> next;
  } call{f, n, {0}};
  auto body = [](void* context) {
    Call& call = *(Call*)context;
    for (long i; (i = call.next.fetch_add(1, std::memory_order_relaxed)) < call.n;) call.f(i);
  };
  host(std::min(n, threads), body, &call);
}
"""

ROUNDING = r"""
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even

template <class Code>
static inline Code nearest_code(float ratio, int limit) {
  ratio = std::min(std::max(ratio, (float)-limit), (float)limit);
  return (Code)(int32_t)((ratio + MAGIC) - MAGIC);
}

// Round the first values as `round_to` does, whole vectors, and return how many. A product with the inverse is off by
// at most two units in the last place, and rounds as the quotient does except within as much of a tie: there, a vector
// is divided, which takes several times as long.
static long round_quickly(const float* x, long in, float scale, int limit, int8_t* codes) {
  if (!(scale > 0x1p-100f && scale < 0x1p100f)) return 0;  // the inverse is no normal number, or nearly so
  const float edge = 0.5f - (float)limit * 0x1p-22f, inverse = 1.0f / scale;
  long i = 0;
  for (; i + WIDTH <= in; i += WIDTH) {
    const Vec ratio = load(x + i) * inverse, shifted = ratio + MAGIC;  // within the limit, but for its last places
    if (any_beyond(edge, absolute(ratio - (shifted - MAGIC))))
      for (long j = 0; j < WIDTH; j++) codes[i + j] = nearest_code<int8_t>(x[i + j] / scale, limit);
    else
      store_low_bytes((Lanes)shifted, codes + i);  // the last bits are the integer's
  }
  return i;
}
template <class Code>
static long round_quickly(const float*, long, float, int, Code*) {
  return 0;  // codes of more bits are too often too near to ties
}

// Round values to symmetric integers: codes = round_half_even(x / scale), scale = max |x| / limit. Values that are not
// all finite get the scale NaN, so that what is computed with them is NaN.
template <class Code>
static float round_to(const float* x, long in, int limit, Code* codes) {
  constexpr int N = 4;  // so many at once hide the latency of one
  Vec peak[N] = {}, poison[N] = {};
  long i = 0;
  for (; i + N * WIDTH <= in; i += N * WIDTH)
    for (int j = 0; j < N; j++) {
      const Vec v = load(x + i + j * WIDTH), size = absolute(v);
      peak[j] = size > peak[j] ? size : peak[j];
      poison[j] += v * 0.0f;
    }
  float top = 0, sick = 0;
  for (int j = 1; j < N; j++) {
    peak[0] = peak[j] > peak[0] ? peak[j] : peak[0];
    poison[0] += poison[j];
  }
  for (long l = 0; l < WIDTH; l++) top = std::max(top, peak[0][l]), sick += poison[0][l];
  for (; i < in; i++) {
    top = std::max(top, std::abs(x[i]));
    sick += x[i] * 0.0f;
  }
  const float ratio = top / (float)limit, scale = ratio > 0 ? ratio : 1.0f;
  if (sick != 0) {
    std::fill(codes, codes + in, Code(0));
    return std::numeric_limits<float>::quiet_NaN();
  }
  for (i = round_quickly(x, in, scale, limit, codes); i < in; i++) codes[i] = nearest_code<Code>(x[i] / scale, limit);
  return scale;
}

// Round one token, times its column scales, to [-limit, limit]; `padded` - `in` codes are zero.
static float quantize(const float* x, const float* column_scale, long in, long padded, int limit, int8_t* codes) {
  static thread_local Buffer<float> scaled;
  if (column_scale) {
    float* product = scaled.get(in);
    for (long i = 0; i < in; i++) product[i] = x[i] * column_scale[i];
    x = product;
  }
  const float scale = round_to(x, in, limit, codes);
  std::memset(codes + in, 0, padded - in);
  return scale;
}

// Floats are not rounded: copy, padded with zeros.
static float quantize(const float* x, const float* column_scale, long in, long padded, int, float* values) {
  for (long i = 0; i < in; i++) values[i] = column_scale ? x[i] * column_scale[i] : x[i];
  std::fill(values + in, values + padded, 0.0f);
  return 1.0f;
}
"""

SWEEP = r"""
constexpr long GROUP = 128, GROUP_WORDS = GROUP / COLUMNS, STACK = 512 / ROWS, PANEL = 4096 / ROWS;
static_assert(CHUNK % GROUP_WORDS == 0 && HELD / TILE % GROUP_WORDS == 0, "a step holds whole groups");

template <int T>
using Int = std::integral_constant<int, T>;

template <class K>
constexpr bool is_tiled = false;  // whether kernel K multiplies tiles of tokens, and has no tables of sums

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
    if constexpr (std::is_invocable_v<decltype(K::build), const Code*, long, long, typename K::Entry*>) {
      for (int t = 0; t < T; t++) K::build(row(m + t) + word * COLUMNS, n, T * K::TABLE, to + t * K::TABLE);
    } else {
      for (long k = word; k < word + n; k++)
        for (int t = 0; t < T; t++, to += K::TABLE) K::build(row(m + t) + k * COLUMNS, to);
    }
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
