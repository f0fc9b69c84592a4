"""C++ text around the kernels, the same for every instruction set: threads and rounding."""

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
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
static long process_id() { return (long)getpid(); }
#else
static long process_id() { return 0; }
#endif
static inline long divide_up(long a, long b) { return (a + b - 1) / b; }
#define EXPORT extern "C" __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 8")

// Have memory that will be read fetched to the second cache.
static inline void fetch_ahead(const void* from, long n_bytes) {
  for (long i = 0; from && i < n_bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// What this thread reads next, in its order, fetched a few cache lines at a time while it prepares a token: memory is
// idle then.
class Next {
  struct Range {
    const char *at = nullptr, *end = nullptr;
    bool is_empty() const { return at >= end; }
  };
  Range ranges[4];

 public:
  // At most four at a time; nothing where there are no bytes, or no memory.
  void then(const void* from, long n_bytes) {
    Range* range = ranges;
    while (!range->is_empty()) range++;
    if (from && n_bytes > 0) *range = {(const char*)from, (const char*)from + n_bytes};
  }
  void fetch(long lines) {
    Range& now = ranges[0];
    for (; lines > 0 && !now.is_empty(); lines--, now.at += 64) __builtin_prefetch(now.at, 0, 2);
    if (lines > 0 && !ranges[1].is_empty()) {
      for (int i = 0; i < 3; i++) ranges[i] = ranges[i + 1];
      ranges[3] = {};
      fetch(lines);
    }
  }
};
static thread_local Next thread_next;

// That of this thread. Of a reference alone compilers know what it stands for, and look it up anew in every turn of a
// loop, by a call that no register of vectors outlives.
static inline Next& next_reads() {
  Next* at = &thread_next;
  asm("" : "+r"(at));
  return *at;
}
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
// at most two units in the last place, and rounds as the quotient does except within as much of a tie: there, vectors
// are divided, which takes several times as long.
static long round_quickly(const float* x, long in, float scale, int limit, int8_t* codes) {
  if (!(scale > 0x1p-100f && scale < 0x1p100f)) return 0;  // the inverse is no normal number, or nearly so
  const float edge = 0.5f - (float)limit * 0x1p-22f, inverse = 1.0f / scale;
  constexpr long STEP = 4 * WIDTH;
  long i = 0;
  for (; i + STEP <= in; i += STEP) {
    Lanes rounded[4];
    Vec off{};
    UNROLL for (long j = 0; j < 4; j++) {
      const Vec ratio = load(x + i + j * WIDTH) * inverse, shifted = ratio + MAGIC;  // within the limit, but for its
      off = larger(absolute(ratio - (shifted - MAGIC)), off);                        // last places
      rounded[j] = (Lanes)shifted;  // the last bits are the integer's
    }
    if (any_beyond(edge, off))
      for (long j = i; j < i + STEP; j++) codes[j] = nearest_code<int8_t>(x[j] / scale, limit);
    else
      store_low_bytes(rounded, codes + i);
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
  Next& next = next_reads();
  Vec peak[N] = {}, poison[N] = {};
  long i = 0;
  for (; i + N * WIDTH <= in; i += N * WIDTH)
    UNROLL for (int j = 0; j < N; j++) {
      const Vec v = load(x + i + j * WIDTH), size = absolute(v);
      peak[j] = larger(size, peak[j]);
      poison[j] += v * 0.0f;
      if (j % 2) next.fetch(1);
    }
  float top = 0, sick = 0;
  for (int j = 1; j < N; j++) {
    peak[0] = larger(peak[j], peak[0]);
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
