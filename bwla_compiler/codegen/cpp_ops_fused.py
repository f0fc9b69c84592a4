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

// Whether the prologue has what it needs, and nothing else.
bool takes_prologue(const Tensor& x, std::string_view kind, const Maybe& gate, const Maybe& gain, const Maybe& shift) {
  const bool norm = kind.ends_with("_norm"), gated = kind.ends_with("_mul");
  if (std::find(KINDS.begin(), KINDS.end(), kind) == KINDS.end() || gated != gate.has_value()) return false;
  if (!norm && (gain || shift)) return false;
  if (gate && !(is_float(gate) && gate->sizes() == x.sizes())) return false;
  return is_channels(gain, x.size(-1)) && is_channels(shift, x.size(-1));
}

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
      takes(x, column_scale, column_exponent, bits) && members.fit && takes_prologue(x, kind, gate, gain, shift);
  const Factors f(good ? x.size(-1) : 0, transform_scale, left, right, transform_exponent, left_exponent,
                  right_exponent);
  if (!good || !f.fit)
    return FusedRoute::portable(x, gate, kind, eps, gain, shift, transform_scale, left, right, transform_exponent,
                                left_exponent, right_exponent, signs, scale, column_scale, rank_in, rank_out,
                                rank_scale, bias, residual, bits, scale_exponent, column_exponent, rank_exponent);
  const Tensor gates = gate ? plain(*gate) : Tensor(), gains = gain ? plain(*gain) : Tensor();
  const Tensor shifts = shift ? plain(*shift) : Tensor();
  const Prologue prologue{std::find(KINDS.begin(), KINDS.end(), kind) - KINDS.begin(), (float)eps, address(gates),
                          address(gains), address(shifts), address(f.scale), address(f.left), address(f.right),
                          f.n1, f.n2};
  return run_linears(x, members.linears, values_of(column_scale, column_exponent), bits, &prologue);
}

struct PrologueName { static constexpr const char* name = "bwla::prologue"; };
using PrologueRoute =
    Route<PrologueName, Tensor(const Tensor&, std::string_view, double, const Maybe&, const Maybe&)>;

// A norm or activation function alone.
Tensor prologue(const Tensor& x, std::string_view kind, double eps, const Maybe& gain, const Maybe& shift) {
  const bool good = x.dim() >= 1 && dense_cpu(x) && is_float(x) && kind != "none" &&
                    takes_prologue(x, kind, NOTHING, gain, shift);
  if (!good) return PrologueRoute::portable(x, kind, eps, gain, shift);
  const Tensor rows = plain(x), gains = gain ? plain(*gain) : Tensor(), shifts = shift ? plain(*shift) : Tensor();
  const Prologue prologue{std::find(KINDS.begin(), KINDS.end(), kind) - KINDS.begin(), (float)eps, nullptr,
                          address(gains), address(shifts), nullptr, nullptr, nullptr, 1, 1};
  Tensor y = result_of(x, x.size(-1));
  kernels.prologue(rows.const_data_ptr(), &prologue, y.mutable_data_ptr(), tokens_of(x), x.size(-1),
                   at::get_num_threads());
  return typed_like(std::move(y), x);
}

constexpr const char* BAD_PLAN =
    "bwla::fused_call: the plan does not fit; it is made by bwla_compiler.runtime.flat.flatten";

// The fused group with its operands in one list; plan: see runtime/flat.py.
std::vector<Tensor> fused_call(at::TensorList tensors, std::string_view plan, double eps) {
  constexpr size_t HEAD = 2, SINGLES = 12, LISTS = 9;
  const size_t word = std::min(plan.find(' '), plan.size());
  const std::string_view kind = plan.substr(0, word);
  c10::SmallVector<int64_t, 64> places;  // bits and members, then the places
  for (const char *at = plan.data() + word, *end = plan.data() + plan.size(); at < end;) {
    int64_t value = 0;
    const auto read = std::from_chars(at + 1, end, value);
    TORCH_CHECK(read.ec == std::errc(), BAD_PLAN);
    places.push_back(value), at = read.ptr;
  }
  TORCH_CHECK(places.size() >= HEAD + SINGLES && places[1] >= 0 && places[1] <= (int64_t)places.size() &&
              places.size() == HEAD + SINGLES + LISTS * places[1], BAD_PLAN);
  auto at = [&](size_t i) -> Maybe { return places[i] < 0 ? Maybe() : Maybe(tensors.at(places[i])); };
  std::array<Maybe, SINGLES> one;
  for (size_t i = 0; i < SINGLES; i++) one[i] = at(HEAD + i);
  TORCH_CHECK(one[0], BAD_PLAN);
  std::vector<Tensor> signs, scale;
  std::array<MaybeList, LISTS - 2> lists;
  for (int64_t m = 0; m < places[1]; m++) {
    const size_t first = HEAD + SINGLES + m * LISTS;
    signs.push_back(at(first).value()), scale.push_back(at(first + 1).value());
    for (size_t i = 0; i < lists.size(); i++) lists[i].push_back(at(first + 2 + i));
  }
  return FusedRoute::handle().call(*one[0], one[1], kind, eps, one[2], one[3], one[4], one[5], one[6],
                                   one[7], one[8], one[9], signs, scale, one[10], lists[0], lists[1], lists[2],
                                   lists[3], lists[4], places[0], lists[5], one[11], lists[6]);
}

template <size_t... I>
std::tuple<decltype((void)I, Tensor())...> as_tuple(std::vector<Tensor>&& ys, std::index_sequence<I...>) {
  return {std::move(ys[I])...};
}

// The same for N members: a result, or a tuple of N.
template <size_t N>
auto fused_call_of(at::TensorList tensors, std::string_view plan, double eps) {
  std::vector<Tensor> ys = fused_call(tensors, plan, eps);
  TORCH_CHECK(ys.size() == N, BAD_PLAN);
  if constexpr (N == 1)
    return Tensor(std::move(ys[0]));
  else
    return as_tuple(std::move(ys), std::make_index_sequence<N>());
}
"""
)
