"""C++ text of the operators linear and linear_group, and what the fused group shares with them."""

LINEAR = r"""
const Maybe NOTHING;

struct Linear {
  const Tensor &signs, &scale;
  const Maybe &rank_in, &rank_out, &rank_scale, &bias, &scale_exponent, &rank_scale_exponent;

  // Whether the tensors fit each other and x; the portable implementation says what does not.
  bool fits(int64_t columns) const {
    if (!dense_cpu(signs) || signs.scalar_type() != at::kByte || signs.dim() != 3) return false;
    if (signs.size(2) != (columns + 7) / 8 || scale.dim() != 3 || !are_values(scale, scale_exponent)) return false;
    const int64_t out = signs.size(1), groups = scale.size(2);
    if (scale.size(0) != signs.size(0) || scale.size(1) != out || (groups != 1 && groups != (columns + 127) / 128))
      return false;
    if (!is_float(bias) || (bias && (bias->dim() != 1 || bias->size(0) != out))) return false;
    if (!rank_in && !rank_out && !rank_scale) return !rank_scale_exponent;
    if (!rank_in || !rank_out || !rank_scale || !dense_cpu(*rank_in) || !dense_cpu(*rank_out)) return false;
    if (rank_in->scalar_type() != at::kChar || rank_out->scalar_type() != at::kChar) return false;
    if (rank_in->dim() != 2) return false;
    const int64_t rank = rank_in->size(0);
    return rank_in->size(1) == columns && rank_out->dim() == 2 && rank_out->size(0) == out &&
           rank_out->size(1) == rank && rank_scale->dim() == 1 && rank_scale->size(0) == rank &&
           are_values(*rank_scale, rank_scale_exponent);
  }
};

// Whether these, where they are given, are scales of n channels.
bool are_columns(const Maybe& scale, const Maybe& exponent, int64_t n) {
  return are_values(scale, exponent) && (!scale || (scale->dim() == 1 && scale->size(0) == n));
}

bool takes(const Tensor& x, const Maybe& column_scale, const Maybe& column_exponent, int64_t bits) {
  return is_input(x) && ((2 <= bits && bits <= 8) || bits >= 16) &&
         are_columns(column_scale, column_exponent, x.size(-1));
}

// Whether t, where there is one, has the shape of a result for x.
bool is_result(const Maybe& t, const Tensor& x, int64_t features) {
  return !t || (is_float(t) && t->dim() == x.dim() && t->size(-1) == features &&
                t->sizes().slice(0, t->dim() - 1) == x.sizes().slice(0, x.dim() - 1));
}

// An empty float32 result with the leading dimensions of x.
Tensor result_of(const Tensor& x, int64_t features) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  return new_floats(sizes);
}

int64_t tokens_of(const Tensor& x) { return c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1); }

Tensor typed_like(Tensor y, const Tensor& x) { return y.scalar_type() == x.scalar_type() ? y : y.to(x.scalar_type()); }

// Linears that share an input of n channels, with what is derived from their weights at hand. It is held here; the
// operands themselves are for the caller to keep alive. All fit.
struct Linears {
  std::vector<Tensor> held;
  std::vector<Member> members;
  const void* column_scale = nullptr;
  int limit = 0;

  Linears() = default;
  Linears(const std::vector<Linear>& linears, const Maybe& columns, const Maybe& exponent, int64_t n, int64_t bits)
      : column_scale(hold(values_of(columns, exponent), columns)), limit(bits >= 16 ? 0 : (1 << (bits - 1)) - 1) {
    for (const Linear& linear : linears) {
      Member member{};
      member.signs = hold(packed_signs(linear.signs, n), NOTHING);
      member.scale = hold(packed_scale(linear.scale, linear.scale_exponent), linear.scale);
      member.bias = linear.bias ? hold(plain(*linear.bias), linear.bias) : nullptr;
      member.planes = linear.signs.size(0), member.out = linear.signs.size(1), member.groups = linear.scale.size(2);
      if (linear.rank_in) {
        member.rank_in = hold(linear.rank_in->contiguous(), linear.rank_in);
        member.rank_out = hold(packed_pair(*linear.rank_out), NOTHING);
        member.rank_scale = hold(values_of(*linear.rank_scale, linear.rank_scale_exponent), linear.rank_scale);
        member.rank = linear.rank_in->size(0);
      }
      members.push_back(member);
    }
  }

  // The address of a tensor's values, kept alive unless it is the operand itself.
  const void* hold(const Tensor& t, const Maybe& operand) {
    if (t.defined() && !(operand && t.is_same(*operand))) held.push_back(t);
    return address(t);
  }

  // One result per linear. before: what precedes them, null for nothing; residuals: one per linear, where it has one.
  std::vector<Tensor> run(const Tensor& x, const Prologue* before, c10::ArrayRef<Maybe> residuals) const {
    const Tensor rows = plain(x);
    c10::SmallVector<Member, 4> all(members.begin(), members.end());
    c10::SmallVector<Tensor, 4> added;  // the addresses below are valid while these live
    std::vector<Tensor> results;
    for (size_t i = 0; i < all.size(); i++) {
      results.push_back(result_of(x, all[i].out));
      all[i].y = results.back().mutable_data_ptr<float>();
      if (i < residuals.size() && residuals[i]) {
        added.push_back(plain(*residuals[i]));
        all[i].residual = address(added.back());
      }
    }
    kernels.fused_group(rows.const_data_ptr(), before, column_scale, tokens_of(x), x.size(-1), limit, all.data(),
                        (long)all.size(), at::get_num_threads());
    for (Tensor& y : results) y = typed_like(std::move(y), x);
    return results;
  }
};

struct LinearName { static constexpr const char* name = "bwla::linear"; };
using LinearRoute =
    Route<LinearName, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                             const Maybe&, const Maybe&, int64_t, const Maybe&, const Maybe&, const Maybe&)>;

Tensor linear(const Tensor& x, const Tensor& signs, const Tensor& scale, const Maybe& column_scale,
              const Maybe& rank_in, const Maybe& rank_out, const Maybe& rank_scale, const Maybe& bias, int64_t bits,
              const Maybe& scale_exponent, const Maybe& column_exponent, const Maybe& rank_exponent) {
  const Linear member{signs, scale, rank_in, rank_out, rank_scale, bias, scale_exponent, rank_exponent};
  if (!takes(x, column_scale, column_exponent, bits) || !member.fits(x.size(-1)))
    return LinearRoute::portable(x, signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, bits,
                                 scale_exponent, column_exponent, rank_exponent);
  return Linears({member}, column_scale, column_exponent, x.size(-1), bits).run(x, nullptr, {})[0];
}

// The linears of a group, from one list per operand.
struct Members {
  std::vector<std::array<Maybe, 6>> parts;  // alive while the linears refer to them
  std::vector<Linear> linears;
  std::vector<Maybe> residuals;
  bool fit = true;

  Members(const Tensor& x, at::TensorList signs, at::TensorList scale, const MaybeList& rank_in,
          const MaybeList& rank_out, const MaybeList& rank_scale, const MaybeList& bias,
          const MaybeList& scale_exponent, const MaybeList& rank_exponent, const MaybeList* residual = nullptr) {
    fit = x.dim() >= 1 && scale.size() == signs.size();
    for (const MaybeList* list : {&rank_in, &rank_out, &rank_scale, &bias, &scale_exponent, &rank_exponent})
      fit = fit && list->size() == signs.size();
    if (!fit || (residual && residual->size() != signs.size())) {
      fit = false;
      return;
    }
    parts.reserve(signs.size()), linears.reserve(signs.size());
    for (size_t i = 0; i < signs.size(); i++) {
      parts.push_back({rank_in.get(i), rank_out.get(i), rank_scale.get(i), bias.get(i), scale_exponent.get(i),
                       rank_exponent.get(i)});
      const auto& p = parts.back();
      linears.push_back(Linear{signs[i], scale[i], p[0], p[1], p[2], p[3], p[4], p[5]});
      residuals.push_back(residual ? residual->get(i) : Maybe());
      fit = fit && linears.back().fits(x.size(-1)) && is_result(residuals.back(), x, signs[i].size(1));
    }
  }

};

struct GroupName { static constexpr const char* name = "bwla::linear_group"; };
using GroupRoute =
    Route<GroupName, std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList, const Maybe&, const MaybeList&,
                                         const MaybeList&, const MaybeList&, const MaybeList&, int64_t,
                                         const MaybeList&, const Maybe&, const MaybeList&)>;

std::vector<Tensor> linear_group(const Tensor& x, at::TensorList signs, at::TensorList scale,
                                 const Maybe& column_scale, const MaybeList& rank_in, const MaybeList& rank_out,
                                 const MaybeList& rank_scale, const MaybeList& bias, int64_t bits,
                                 const MaybeList& scale_exponent, const Maybe& column_exponent,
                                 const MaybeList& rank_exponent) {
  const Members members(x, signs, scale, rank_in, rank_out, rank_scale, bias, scale_exponent, rank_exponent);
  const bool good = takes(x, column_scale, column_exponent, bits) && members.fit;
  if (!good)
    return GroupRoute::portable(x, signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, bits,
                                scale_exponent, column_exponent, rank_exponent);
  return Linears(members.linears, column_scale, column_exponent, x.size(-1), bits).run(x, nullptr, {});
}
"""
