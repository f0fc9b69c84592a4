"""C++ text of what precedes the linears of a fused group: norm or activation function, then the transform.

exp(x) = 2^k e^r with |r| <= ln(2) / 2 and e^r by its Taylor polynomial of degree 7; erf by formula 7.1.26 of
Abramowitz and Stegun, within 1.5e-7. All arithmetic is float32.
"""

from bwla_compiler.spec import PROLOGUES

FUNCTIONS = r"""
typedef int32_t IntVec __attribute__((vector_size(sizeof(Vec))));

// e^x, at the ends of the range the smallest and largest normal powers of two; NaN stays NaN.
static inline Vec exponential(Vec x) {
  x = smaller(spread(88.0f), larger(spread(-87.0f), x));
  // 1.5 * 2^23: the low bits hold the nearest integer
  const Vec shifted = multiply_add(x, 1.44269504f, spread(12582912.0f));
  const Vec k = shifted - 12582912.0f;
  // ln 2 in two parts, the first with few bits
  const Vec r = multiply_add(k, 2.12194440e-4f, multiply_add(k, -0.693359375f, x));
  Vec p = multiply_add(r, 1.0f / 5040, spread(1.0f / 720));
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = multiply_add(p, r, spread(c));
  return p * (Vec)(((IntVec)shifted + 127) << 23);
}

static inline Vec relu(Vec x) { return x < 0.0f ? Vec{} : x; }
static inline Vec silu(Vec x) { return x / (exponential(-x) + 1.0f); }
static inline Vec gelu_tanh(Vec x) {
  return x / (exponential(x * -1.5957691216f * (x * x * 0.044715f + 1.0f)) + 1.0f);
}
static inline Vec gelu(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec p = t * 1.061405429f - 1.453152027f;
  for (float c : {1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
  const Vec tail = p * t * exponential(-(z * z)) * 0.5f;  // half of 1 - erf(z)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// y[i] = f(x[i], i) for all i < n, WIDTH at a time; what f gives beyond n is dropped.
template <class F>
static inline void map(const float* x, float* y, long n, const F& f) {
  Next& next = next_reads();  // found once
  long i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const Vec v = f(load(x + i), i);
    std::memcpy(y + i, &v, sizeof v);
    next.fetch(1);
  }
  if (i == n) return;
  Vec v{};
  std::memcpy(&v, x + i, (n - i) * sizeof(float));
  v = f(v, i);
  std::memcpy(y + i, &v, (n - i) * sizeof(float));
}

// The sum of f(x[i]) over n values; f(0) counts for nothing only where it is 0, hence the scalar tail.
template <class F>
static inline float sum_of(const float* x, long n, const F& f) {
  constexpr long STEP = 4 * WIDTH;
  Next& next = next_reads();
  Vec acc[4] = {};
  long i = 0;
  for (; i + STEP <= n; i += STEP) {
    for (int j = 0; j < 4; j++) acc[j] += f(load(x + i + j * WIDTH));
    next.fetch(2);
  }
  const Vec sums = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  float total = 0;
  for (int j = 0; j < WIDTH; j++) total += sums[j];
  for (; i < n; i++) total += f(spread(x[i]))[0];
  return total;
}
"""

_KINDS = ", ".join(kind.upper() for kind in PROLOGUES)

PROLOGUE = (
    f"enum Kind : long {{ {_KINDS} }};"
    + r"""
// What happens to a token before it is rounded; null pointers for what is absent. Mirrored by the operators.
struct Prologue {
  long kind;
  float eps;
  const float* gate;                 // [tokens, in]
  const float *gain, *shift;         // [in]
  const float *scale, *left, *right; // of the transform, on [n1, n2]; packed factors
  long n1, n2;
};

// y = (x - mean) * factor * gain + shift
static void normalize(const Prologue& p, const float* x, float* y, long n) {
  const bool centred = p.kind == LAYER_NORM;
  const float mean = centred ? sum_of(x, n, [](Vec v) { return v; }) / (float)n : 0.0f;
  const float square = sum_of(x, n, [&](Vec v) { return (v - mean) * (v - mean); }) / (float)n;
  const float factor = 1.0f / std::sqrt(square + p.eps);
  const float *gain = p.gain, *shift = p.shift;
  for (long i = 0; i < n; i++) {
    const float v = (x[i] - mean) * factor, scaled = gain ? v * gain[i] : v;
    y[i] = shift ? scaled + shift[i] : scaled;
  }
}

template <class F>
static inline void activate(const float* x, const float* gate, float* y, long n, const F& f) {
  map(x, y, n, [&](Vec v, long) { return f(v); });
  if (gate)
    for (long i = 0; i < n; i++) y[i] *= gate[i];
}

// Token m of the norm or activation function.
static void apply_kind(const Prologue& p, const float* x, long m, float* y, long n) {
  const float* gate = p.gate ? p.gate + m * n : nullptr;
  switch (p.kind) {
    case RMS_NORM: case LAYER_NORM: return normalize(p, x, y, n);
    case SILU: case SILU_MUL: return activate(x, gate, y, n, [](Vec v) { return silu(v); });
    case GELU: case GELU_MUL: return activate(x, gate, y, n, [](Vec v) { return gelu(v); });
    case GELU_TANH: case GELU_TANH_MUL: return activate(x, gate, y, n, [](Vec v) { return gelu_tanh(v); });
    case RELU: return activate(x, gate, y, n, [](Vec v) { return relu(v); });
  }
}

// What preparing token m reads.
static Next reads_of(const Prologue* p, const float* x, long m, long n) {
  const long n_bytes = n * (long)sizeof(float);
  Next next;
  next.then(x + m * n, n_bytes);
  if (p && p->gate) next.then(p->gate + m * n, n_bytes);
  return next;
}

static Transform transform_of(const Prologue& p) { return {p.scale, p.left, p.right, p.n1, p.n2}; }

// Token m after the prologue, valid until the next call on this thread; x itself where there is nothing to do.
static const float* prepare(const Prologue* p, const float* x, long m, long n, long threads) {
  if (!p) return x;
  static thread_local Buffer<float> buffer;
  float* y = buffer.get(n);
  if (p->kind != NONE) {
    apply_kind(*p, x, m, y, n);
    x = y;
  }
  if (!p->scale && !p->left && !p->right) return x;
  const Transform transform = transform_of(*p);
  transform.token(x, y, transform.useful(threads, 1));
  return y;
}

// Norms and activation functions alone, y [tokens, n]: bit for bit what precedes the linears of a fused group.
EXPORT void bwla_prologue(const float* x, const Prologue* p, float* y, long tokens, long n, long threads) {
  constexpr long FEW = 1 << 15;  // numbers that one thread has done before a second one has begun
  const long block = std::max(1L, FEW / std::max(1L, n));
  parallel(divide_up(tokens, block), threads, [&](long job) {
    for (long m = job * block; m < std::min(tokens, (job + 1) * block); m++) apply_kind(*p, x + m * n, m, y + m * n, n);
  });
}
"""
)
