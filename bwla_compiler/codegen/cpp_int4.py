"""C++ text of products with a table of 4-bit codes, and of its rows; in vectors of any width.

The input is rounded to 16 bits a token: sums of a group are then of integers, exact, and take two thirds of the
instructions that floats would. With x = q * s, w = c * a and c + 8 in four bits, a group adds its scale a times
sum q (c + 8) - 8 sum q.
"""

INT4 = r"""
typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
typedef uint16_t Shorts __attribute__((vector_size(sizeof(Vec))));
constexpr long SPAN = 8 * WIDTH;  // columns of a vector of codes: eight in each 32-bit word

// sum_pairs: in each word the sum of the products of its two 16-bit halves. spread: lane l is v[from[l]].
#if defined(__AVX512F__)
static inline Ints sum_pairs(Words a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
static inline Vec spread(Vec v, Ints from) { return _mm512_permutexvar_ps((__m512i)from, v); }
#elif defined(__AVX2__) && defined(__FMA__)
static inline Ints sum_pairs(Words a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
static inline Vec spread(Vec v, Ints from) { return _mm256_permutevar8x32_ps(v, (__m256i)from); }
#else
static inline Ints sum_pairs(Words a, Ints b) {
  return (Ints)(a & 0xFFFF) * ((Ints)((Words)b << 16) >> 16) + (Ints)(a >> 16) * (b >> 16);
}
static inline Vec spread(Vec v, Ints from) {
  Vec found;
  for (int l = 0; l < WIDTH; l++) found[l] = v[from[l]];
  return found;
}
#endif

// The sum of N lanes, by halves.
template <int N>
static inline float sum_lanes(const float* lane) {
  if constexpr (N == 1)
    return *lane;
  else
    return sum_lanes<N / 2>(lane) + sum_lanes<N / 2>(lane + N / 2);
}

// One token for the product: for each vector of codes four of pairs (columns j and j + 4 of every word's eight), and
// one of -8 times each word's sum. Returns s.
static float fix_point(const float* x, long in, int32_t* to) {
  static thread_local Buffer<int32_t> buffer;
  const long padded = divide_up(in, SPAN) * SPAN;
  int32_t* q = buffer.get(padded);
  const float scale = round_to(x, in, 32767, q);
  std::fill(q + in, q + padded, 0);
  for (long word = 0; word < padded / 8; word++, q += 8) {
    int32_t* lane = to + word / WIDTH * 5 * WIDTH + word % WIDTH;
    int32_t sum = 0;
    for (int j = 0; j < 4; j++) {
      lane[j * WIDTH] = (int32_t)((uint32_t)q[j] & 0xFFFF) | (int32_t)((uint32_t)q[j + 4] << 16);
      sum += q[j] + q[j + 4];
    }
    lane[4 * WIDTH] = -8 * sum;
  }
  return scale;
}

struct Nibbles {  // a table of codes [out, bytes] and scales [out, groups]
  const uint8_t* codes;
  const uint16_t* scale;
  long out, in, group;
  const Ints* lanes;  // of each vector of codes under one vector of scales, which scale each word has

  const long bytes = divide_up(in, 2), groups = divide_up(in, group);  // of a row
  const long span = divide_up(in, SPAN) * (long)sizeof(Vec), scales = divide_up(groups, WIDTH) * WIDTH;  // read

  // sums [R, T]: products of R rows from `row` on with T tokens, `stride` words apart. Whole vectors are read, beyond
  // the end of a row what comes next; so the last rows are copied.
  template <int R, int T>
  void dots(long row, const int32_t* x, long stride, float* sums) const {
    const uint8_t* code = codes + row * bytes;
    const uint16_t* factor = scale + row * groups;
    const long rest = out - row - R + 1;
    if (span <= rest * bytes && scales <= rest * groups) return products<R, T>(code, factor, x, stride, sums);
    static thread_local Buffer<uint8_t> code_buffer;
    static thread_local Buffer<uint16_t> scale_buffer;
    uint8_t* own = code_buffer.get(span);
    uint16_t* own_factor = scale_buffer.get(scales);
    std::fill(own, own + span, 0);
    std::fill(own_factor, own_factor + scales, 0);
    for (int r = 0; r < R; r++, code += bytes, factor += groups) {
      std::memcpy(own, code, bytes);
      std::memcpy(own_factor, factor, groups * sizeof(uint16_t));
      products<1, T>(own, own_factor, x, stride, sums + r * T);
    }
  }

 private:
  template <int R, int T>
  void products(const uint8_t* code, const uint16_t* factor, const int32_t* x, long stride, float* sums) const {
    Vec total[R][T] = {}, factors[R];
    for (long first = 0; first < in; first += WIDTH * group, factor += WIDTH) {
      UNROLL for (int r = 0; r < R; r++) factors[r] = halves(factor + r * groups);
      const Ints* lane = lanes;
      for (long k = first; k < std::min(in, first + WIDTH * group); k += SPAN, code += sizeof(Vec), x += 5 * WIDTH) {
        const Ints from = *lane++;
        UNROLL for (int r = 0; r < R; r++) {
          __builtin_prefetch(code + r * bytes + 2048);
          const Words word = fetch<Words>(code + r * bytes);
          const Words part[4] = {word & 0x000F000F, word >> 4 & 0x000F000F, word >> 8 & 0x000F000F,
                                 (Words)((Shorts)word >> 12)};
          const Vec spreaded = spread(factors[r], from);
          UNROLL for (int t = 0; t < T; t++) {
            Ints sum = fetch<Ints>(x + t * stride + 4 * WIDTH);
            UNROLL for (int j = 0; j < 4; j++) sum += sum_pairs(part[j], fetch<Ints>(x + t * stride + j * WIDTH));
            total[r][t] = multiply_add(__builtin_convertvector(sum, Vec), spreaded, total[r][t]);
          }
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < T; t++) {
        float lane[WIDTH];
        std::memcpy(lane, &total[r][t], sizeof lane);
        sums[r * T + t] = sum_lanes<WIDTH>(lane);
      }
  }
};

// y [tokens, out] = x [tokens, in] W^T + bias [out], W = 2^power * scale * code: codes [out, ceil(in / 2)], of column
// 2k in the low half of byte k; scale [out, ceil(in / group)] float16.
EXPORT void bwla_int4_linear(const float* x, const uint8_t* codes, const uint16_t* scale, const float* bias, float* y,
                             long tokens, long out, long in, long group, long power, long threads) {
  static thread_local Buffer<int32_t> fixed_buffer;
  static thread_local Buffer<float> scale_buffer;
  const long stride = divide_up(in, SPAN) * 5 * WIDTH;
  int32_t* fixed = fixed_buffer.get(tokens * stride);
  float* factor = scale_buffer.get(tokens);
  for (long m = 0; m < tokens; m++)
    factor[m] = std::ldexp(fix_point(x + m * in, in, fixed + m * stride), (int)power);
  Ints lanes[128 / 8];
  for (long k = 0; k < group / 8; k++)
    for (long l = 0; l < WIDTH; l++) lanes[k][l] = (int32_t)((k * WIDTH + l) / (group / 8));
  const Nibbles table{codes, scale, out, in, group, lanes};
  const long height = piece_of(out, divide_up(in, 2), tokens, threads);
  parallel(divide_up(out, height), out * in * tokens < (1 << 20) ? 1 : threads, [&](long job) {
    const long last = std::min((job + 1) * height, out);
    auto take = [&](auto rows, auto wide, long row, long m) {
      constexpr int R = decltype(rows)::value, T = decltype(wide)::value;
      float sums[R * T];
      table.dots<R, T>(row, fixed + m * stride, stride, sums);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          y[(m + t) * out + row + r] = sums[r * T + t] * factor[m + t] + (bias ? bias[row + r] : 0);
    };
    long m = 0;
    for (; m + 4 <= tokens; m += 4)
      for (long row = job * height; row < last; row++) take(Int<1>{}, Int<4>{}, row, m);
    for (; m < tokens; m++) {
      long row = job * height;
      for (; row + 4 <= last; row += 4) take(Int<4>{}, Int<1>{}, row, m);
      for (; row < last; row++) take(Int<1>{}, Int<1>{}, row, m);
    }
  });
}

// y [tokens, width]: the rows `ids` of such a table.
EXPORT void bwla_int4_embedding(const int64_t* ids, const uint8_t* codes, const uint16_t* scale, float* y, long tokens,
                                long width, long group, long power) {
  const long bytes = divide_up(width, 2), groups = divide_up(width, group);
  for (long m = 0; m < tokens; m++, y += width) {
    const uint8_t* row = codes + ids[m] * bytes;
    for (long g = 0; g < groups; g++) {
      uint16_t padded[WIDTH] = {scale[ids[m] * groups + g]};
      const float factor = std::ldexp(halves(padded)[0], (int)power);
      for (long i = g * group; i < std::min(width, (g + 1) * group); i++)
        y[i] = (float)((row[i / 2] >> 4 * (i % 2) & 15) - 8) * factor;
    }
  }
}
"""
