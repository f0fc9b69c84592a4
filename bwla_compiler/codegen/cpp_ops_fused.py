"""C++ text of the operators fused_group, from norm or activation to residual, and prologue, its first step alone."""

from bwla_compiler.spec import PROLOGUES

_KINDS = ", ".join(f'"{kind}"' for kind in PROLOGUES)

FUSED = (
    f"""
constexpr std::array<std::string_view, {len(PROLOGUES)}> KINDS{{{_KINDS}}};
"""
    + r"""
struct FusedName { static constexpr const char* name = "bwla::fused_group"; };
using FusedRoute =
    Route<FusedName,
          std::vector<Tensor>(const Tensor&, const Maybe&, std::string_view, double, const Maybe&, const Maybe&,
                              const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
                              at::TensorList, at::TensorList, const Maybe&, const MaybeList&, const MaybeList&,
                              const MaybeList&, const MaybeList&, const MaybeList&, int64_t, const MaybeList&,
                              const Maybe&, const MaybeList&)>;

bool is_channels(const Maybe& t, int64_t n) { return !t || (is_float(t) && t->dim() == 1 && t->size(0) == n); }

// Whether a prologue for n channels has what it needs, and nothing else.
bool takes_prologue(int64_t n, std::string_view kind, bool gate, const Maybe& gain, const Maybe& shift) {
  const bool norm = kind.ends_with("_norm"), gated = kind.ends_with("_mul");
  if (std::find(KINDS.begin(), KINDS.end(), kind) == KINDS.end() || gated != gate) return false;
  if (!norm && (gain || shift)) return false;
  return is_channels(gain, n) && is_channels(shift, n);
}
bool is_gate(const Maybe& t, const Tensor& x) { return !t || (is_float(t) && t->sizes() == x.sizes()); }

// A norm or activation function with a transform behind it; what is derived for it is held here.
struct Before {
  std::vector<Tensor> held;
  Prologue prologue{};

  Before() = default;
  Before(std::string_view kind, double eps, const Maybe& gain, const Maybe& shift, const Factors& f) {
    const Tensor gains = gain ? plain(*gain) : Tensor(), shifts = shift ? plain(*shift) : Tensor();
    for (const Tensor& t : {gains, shifts, f.scale, f.left, f.right})
      if (t.defined() && !(gain && t.is_same(*gain)) && !(shift && t.is_same(*shift))) held.push_back(t);
    prologue = Prologue{std::find(KINDS.begin(), KINDS.end(), kind) - KINDS.begin(), (float)eps, nullptr,
                        address(gains), address(shifts), address(f.scale), address(f.left), address(f.right),
                        f.n1, f.n2};
  }
};

std::vector<Tensor> fused_group(const Tensor& x, const Maybe& gate, std::string_view kind, double eps,
                                const Maybe& gain, const Maybe& shift, const Maybe& transform_scale, const Maybe& left,
                                const Maybe& right, const Maybe& transform_exponent, const Maybe& left_exponent,
                                const Maybe& right_exponent, at::TensorList signs, at::TensorList scale,
                                const Maybe& column_scale, const MaybeList& rank_in, const MaybeList& rank_out,
                                const MaybeList& rank_scale, const MaybeList& bias, const MaybeList& residual,
                                int64_t bits, const MaybeList& scale_exponent, const Maybe& column_exponent,
                                const MaybeList& rank_exponent) {
  const Members members(x, signs, scale, rank_in, rank_out, rank_scale, bias, scale_exponent, rank_exponent, &residual);
  const bool good =
      takes(x, column_scale, column_exponent, bits) && members.fit && is_gate(gate, x) &&
      takes_prologue(x.size(-1), kind, gate.has_value(), gain, shift);
  const Factors f(good ? x.size(-1) : 0, transform_scale, left, right, transform_exponent, left_exponent,
                  right_exponent);
  if (!good || !f.fit)
    return FusedRoute::portable(x, gate, kind, eps, gain, shift, transform_scale, left, right, transform_exponent,
                                left_exponent, right_exponent, signs, scale, column_scale, rank_in, rank_out,
                                rank_scale, bias, residual, bits, scale_exponent, column_exponent, rank_exponent);
  const Before before(kind, eps, gain, shift, f);
  const Tensor gates = gate ? plain(*gate) : Tensor();
  Prologue prologue = before.prologue;
  prologue.gate = address(gates);
  const Linears linears(members.linears, column_scale, column_exponent, x.size(-1), bits);
  return linears.run(x, &prologue, members.residuals);
}

// A prologue of the last channels, for x [.., channels] that fits; or of heads of them beside each other, which the
// result has apart.
Tensor run_prologue(const Tensor& x, const Prologue& prologue, int64_t heads, int64_t channels) {
  const Tensor rows = plain(x);
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  if (heads > 1) sizes.back() = heads, sizes.push_back(channels);
  Tensor y = new_floats(sizes);
  kernels.prologue(rows.const_data_ptr(), &prologue, y.mutable_data_ptr(), x.numel() / channels, channels,
                   at::get_num_threads());
  return typed_like(std::move(y), x);
}

struct PrologueName { static constexpr const char* name = "bwla::prologue"; };
using PrologueRoute =
    Route<PrologueName, Tensor(const Tensor&, std::string_view, double, const Maybe&, const Maybe&)>;

// A norm or activation function alone.
Tensor prologue(const Tensor& x, std::string_view kind, double eps, const Maybe& gain, const Maybe& shift) {
  const bool good = is_input(x) && kind != "none" && x.size(-1) > 0 &&
                    takes_prologue(x.size(-1), kind, false, gain, shift);
  if (!good) return PrologueRoute::portable(x, kind, eps, gain, shift);
  const Factors none(1, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING);
  return run_prologue(x, Before(kind, eps, gain, shift, none).prologue, 1, x.size(-1));
}
"""
)
