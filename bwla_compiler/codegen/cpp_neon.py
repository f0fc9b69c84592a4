"""C++ text of the NEON kernels: tbl looks up signed sums of four codes for 16 rows at a time.

Baseline Armv8.0. Codes up to 31 in magnitude have sums of four that fit a byte: one lookup for four columns; larger
codes take two, for the low and the high byte of the sum.

Instructions of the inner loops for a byte of weights (eight) and a token, counted in the machine code of GCC 12 at -O3,
not timed: 0.91 with one token and 0.86 with two for codes up to 127, 0.66 and 0.52 for codes up to 31. Expanding each
bit to a mask over the codes and adding pairs up (tbl, cmtst, and, sadalp; four rows at a time) takes 4.4 and 2.5.
"""

KERNELS = r"""
#include <arm_neon.h>
#define USES_NEON

using Word = uint8_t;
constexpr long ROWS = 64, COLUMNS = 8, CHUNK = 128, TILE = 2;
constexpr long HELD = 256;   // tables that the first cache holds
constexpr long AHEAD = 2048;  // bytes of weights fetched ahead of use

static inline void add(int32_t* to, int32x4_t v) { vst1q_s32(to, vaddq_s32(vld1q_s32(to), v)); }
static inline void add(float* to, float32x4_t v) { vst1q_f32(to, vaddq_f32(vld1q_f32(to), v)); }
static inline void add_scaled(float* to, float32x4_t v, const float* scale) {
  vst1q_f32(to, vfmaq_f32(vld1q_f32(to), v, vld1q_f32(scale)));
}
static inline void add_scaled(float* to, int32x4_t v, const float* scale) { add_scaled(to, vcvtq_f32_s32(v), scale); }

// WIDE: codes in [-127, 127], whose sums of four take two bytes. Else codes in [-31, 31]: the sums lie in [-124, 124].
template <bool WIDE>
struct TableKernel {
  using Code = int8_t;
  using Entry = uint8_t;
  using Sum = int32_t;
  static constexpr long TABLE = WIDE ? 64 : 32;  // low bytes of both nibbles' sums, then high bytes

  // Words that 16-bit sums can add up: 32 * 8 * 127 = 32512 and 128 * 8 * 31 = 31744, both under 2^15. A high byte
  // of a sum of four lies in [-2, 1], so that the 64 of 32 words lie in [-128, 64].
  static long span(int) { return WIDE ? 32 : 128; }

  static void build(const Code* q, Entry* table) {
    const int16x8_t first{0, 2, 0, 2, 0, 2, 0, 2}, second{0, 0, 2, 2, 0, 0, 2, 2}, third{0, 0, 0, 0, 2, 2, 2, 2};
    UNROLL for (int nibble = 0; nibble < 2; nibble++, q += 4, table += 16) {
      int16x8_t sums = vdupq_n_s16((int16_t)-(q[0] + q[1] + q[2] + q[3]));
      sums = vmlaq_n_s16(sums, first, q[0]);
      sums = vmlaq_n_s16(sums, second, q[1]);
      sums = vmlaq_n_s16(sums, third, q[2]);
      const uint8x16_t without = vreinterpretq_u8_s16(sums);
      const uint8x16_t with = vreinterpretq_u8_s16(vaddq_s16(sums, vdupq_n_s16((int16_t)(2 * q[3]))));
      vst1q_u8(table, vuzp1q_u8(without, with));
      if constexpr (WIDE) vst1q_u8(table + 32, vuzp2q_u8(without, with));
    }
  }

  // Sums of 16 rows: the low bytes (or all) of rows 0 to 7 and 8 to 15 in 16 bits, modulo 2^16; the high bytes.
  struct Rows {
    int16x8_t front, back;
    int8x16_t high;
  };

  // Add the sums at the indices `low` and `high`, the nibbles of 16 words.
  static inline void look_up(Rows& rows, const uint8x16_t* table, uint8x16_t low, uint8x16_t high) {
    const uint8x16_t a = vqtbl1q_u8(table[0], low), b = vqtbl1q_u8(table[1], high);
    if constexpr (WIDE) {
      uint16x8_t front = vreinterpretq_u16_s16(rows.front), back = vreinterpretq_u16_s16(rows.back);
      front = vaddw_u8(vaddw_u8(front, vget_low_u8(a)), vget_low_u8(b));
      back = vaddw_high_u8(vaddw_high_u8(back, a), b);
      rows.front = vreinterpretq_s16_u16(front);
      rows.back = vreinterpretq_s16_u16(back);
      rows.high = vaddq_s8(rows.high, vreinterpretq_s8_u8(vqtbl1q_u8(table[2], low)));
      rows.high = vaddq_s8(rows.high, vreinterpretq_s8_u8(vqtbl1q_u8(table[3], high)));
    } else {
      const int8x16_t c = vreinterpretq_s8_u8(a), d = vreinterpretq_s8_u8(b);
      rows.front = vaddw_s8(vaddw_s8(rows.front, vget_low_s8(c)), vget_low_s8(d));
      rows.back = vaddw_high_s8(vaddw_high_s8(rows.back, c), d);
    }
  }

  template <class Sink>
  static inline void flush(Rows& rows, long span, int t, long row, const Sink& sink) {
    int16x8_t front = rows.front, back = rows.back;
    if constexpr (WIDE) {
      front = vaddq_s16(front, vshll_n_s8(vget_low_s8(rows.high), 8));
      back = vaddq_s16(back, vshll_high_n_s8(rows.high, 8));
    }
    sink(span, t, row, vmovl_s16(vget_low_s16(front)));
    sink(span, t, row + 4, vmovl_high_s16(front));
    sink(span, t, row + 8, vmovl_s16(vget_low_s16(back)));
    sink(span, t, row + 12, vmovl_high_s16(back));
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    constexpr int V = WIDE && T > 1 ? 2 : 4;  // sums, indices and tables fill the 32 registers
    constexpr int PARTS = TABLE / 16;
    const uint8x16_t nibble = vdupq_n_u8(15);
    for (long first = 0; first < words; first += span) {
      const long last = std::min(first + span, words);
      for (long row = 0; row < ROWS; row += 16 * V) {
        Rows rows[V][T];
        UNROLL for (int v = 0; v < V; v++)
          UNROLL for (int t = 0; t < T; t++) rows[v][t] = {vdupq_n_s16(0), vdupq_n_s16(0), vdupq_n_s8(0)};
        for (long k = first; k < last; k++) {
          const Word* at = w + k * ROWS + row;
          __builtin_prefetch(at + AHEAD);
          uint8x16_t part[T][PARTS];
          UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int i = 0; i < PARTS; i++) part[t][i] = vld1q_u8(table + (k * T + t) * TABLE + 16 * i);
          UNROLL for (int v = 0; v < V; v++) {
            const uint8x16_t word = vld1q_u8(at + 16 * v);
            const uint8x16_t low = vandq_u8(word, nibble), high = vshrq_n_u8(word, 4);
            UNROLL for (int t = 0; t < T; t++) look_up(rows[v][t], part[t], low, high);
          }
        }
        UNROLL for (int v = 0; v < V; v++)
          UNROLL for (int t = 0; t < T; t++) flush(rows[v][t], first / span, t, row + 16 * v, sink);
        // Left alone, the compiler holds the sink's totals in registers from span to span, and spills the sums.
        asm volatile("" ::: "memory");
      }
    }
  }
};
using IntKernel = TableKernel<true>;
using SmallKernel = TableKernel<false>;
#define SMALL_CODES 31  // up to this limit SmallKernel serves

struct FloatKernel {
  using Code = float;
  using Entry = float;
  using Sum = float;
  static constexpr long TABLE = 32;

  // Two levels of addition bound the rounding error; nothing overflows.
  static long span(int) { return 32; }

  static void build(const Code* x, Entry* table) {
    for (int nibble = 0; nibble < 2; nibble++, x += 4, table += 16) {
      table[0] = -x[0] - x[1] - x[2] - x[3];
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < 1 << i; e++) table[e + (1 << i)] = table[e] + 2 * x[i];
    }
  }

  static inline uint8x16x4_t load(const Entry* table) {
    const uint8_t* at = (const uint8_t*)table;
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
  }

  // A table of 16 sums is 64 bytes: a row whose nibble is n takes the bytes 4 n to 4 n + 3.
  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    const uint8x16_t byte{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}, offset = vdupq_n_u8(60);
    const uint8x16_t fours{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    for (long first = 0; first < words; first += span) {
      const long last = std::min(first + span, words);
      for (long row = 0; row < ROWS; row += 16) {
        float32x4_t acc[4][T];
        UNROLL for (int v = 0; v < 4; v++) UNROLL for (int t = 0; t < T; t++) acc[v][t] = vdupq_n_f32(0);
        for (long k = first; k < last; k++) {
          const Word* at = w + k * ROWS + row;
          __builtin_prefetch(at + AHEAD);
          const uint8x16_t word = vld1q_u8(at);
          const uint8x16_t nibbles[2] = {vandq_u8(vshlq_n_u8(word, 2), offset), vandq_u8(vshrq_n_u8(word, 2), offset)};
          UNROLL for (int half = 0; half < 2; half++) {
            uint8x16_t index[4];
            UNROLL for (int v = 0; v < 4; v++) {
              const uint8x16_t lanes = vaddq_u8(fours, vdupq_n_u8((uint8_t)(4 * v)));
              index[v] = vorrq_u8(vqtbl1q_u8(nibbles[half], lanes), byte);
            }
            UNROLL for (int t = 0; t < T; t++) {
              const uint8x16x4_t sums = load(table + (k * T + t) * TABLE + 16 * half);
              UNROLL for (int v = 0; v < 4; v++)
                acc[v][t] = vaddq_f32(acc[v][t], vreinterpretq_f32_u8(vqtbl4q_u8(sums, index[v])));
            }
          }
        }
        UNROLL for (int t = 0; t < T; t++)
          UNROLL for (int v = 0; v < 4; v++) sink(first / span, t, row + 4 * v, acc[v][t]);
      }
    }
  }
};

static inline int32_t dot(const int8_t* a, const int8_t* b, long n) {
  int32x4_t front = vdupq_n_s32(0), back = front;
  long i = 0;
  for (; i + 16 <= n; i += 16) {
    const int8x16_t c = vld1q_s8(a + i), d = vld1q_s8(b + i);
    front = vpadalq_s16(front, vmull_s8(vget_low_s8(c), vget_low_s8(d)));
    back = vpadalq_s16(back, vmull_high_s8(c, d));
  }
  int32_t sum = vaddvq_s32(vaddq_s32(front, back));
  for (; i < n; i++) sum += (int32_t)a[i] * b[i];
  return sum;
}
"""
