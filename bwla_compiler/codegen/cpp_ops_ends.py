"""C++ text of the operators beside the linears: int8 and int4 heads and embeddings, transform."""

ENDS = r"""
long int8_tokens = 0, int4_tokens = 0;  // beyond, torch's float matrix product serves

struct Int8Name { static constexpr const char* name = "bwla::int8_linear"; };
using Int8Route =
    Route<Int8Name, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&)>;

Tensor int8_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Maybe& bias,
                   const Maybe& exponent) {
  const bool good = is_input(x) && dense_cpu(codes) && codes.dim() == 2 &&
                    codes.scalar_type() == at::kChar && codes.size(1) == x.size(-1) && are_values(scale, exponent) &&
                    scale.dim() == 1 && scale.size(0) == codes.size(0) && is_float(bias) &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == codes.size(0)));
  if (!good || tokens_of(x) > int8_tokens) return Int8Route::portable(x, codes, scale, bias, exponent);
  const Tensor rows = plain(x), table = codes.contiguous(), values = values_of(scale, exponent);
  const Tensor shift = bias ? plain(*bias) : Tensor();
  Tensor y = result_of(x, codes.size(0));
  kernels.int8_linear(rows.const_data_ptr(), table.const_data_ptr(), address(values), address(shift),
                      y.mutable_data_ptr(), tokens_of(x), codes.size(0), codes.size(1), at::get_num_threads());
  return typed_like(std::move(y), x);
}

struct EmbeddingName { static constexpr const char* name = "bwla::int8_embedding"; };
using EmbeddingRoute =
    Route<EmbeddingName, Tensor(const Tensor&, const Tensor&, const Tensor&, at::ScalarType, const Maybe&)>;

// Whether each id is a row of the table.
bool are_rows(const Tensor& ids, const Tensor& table) {
  if (!dense_cpu(ids) || ids.scalar_type() != at::kLong) return false;
  const Tensor rows = ids.contiguous();
  const auto* id = rows.const_data_ptr<int64_t>();
  return std::all_of(id, id + rows.numel(), [&](int64_t i) { return i >= 0 && i < table.size(0); });
}

Tensor rows_for(const Tensor& ids, int64_t width) {
  c10::SmallVector<int64_t, 5> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(width);
  return new_floats(sizes);
}

Tensor int8_embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale, at::ScalarType dtype,
                      const Maybe& exponent) {
  const bool good = dense_cpu(codes) && codes.dim() == 2 && codes.scalar_type() == at::kChar &&
                    are_values(scale, exponent) && scale.dim() == 1 && scale.size(0) == codes.size(0) &&
                    are_rows(ids, codes);
  if (!good) return EmbeddingRoute::portable(ids, codes, scale, dtype, exponent);
  const Tensor rows = ids.contiguous(), table = codes.contiguous(), values = values_of(scale, exponent);
  Tensor y = rows_for(ids, codes.size(1));
  kernels.int8_embedding(rows.const_data_ptr(), table.const_data_ptr(), address(values), y.mutable_data_ptr(),
                         ids.numel(), codes.size(1));
  return dtype == at::kFloat ? y : y.to(dtype);
}

// Whether these are 4-bit codes of rows of `columns`, two a byte, with float16 bits for each group of columns.
bool are_nibbles(const Tensor& codes, const Tensor& scale, const Maybe& exponent, int64_t columns, int64_t group) {
  return dense_cpu(codes) && codes.dim() == 2 && codes.scalar_type() == at::kByte && exponent &&
         are_values(scale, exponent) && scale.dim() == 2 && (group == 32 || group == 64 || group == 128) &&
         codes.size(1) == (columns + 1) / 2 && scale.size(0) == codes.size(0) &&
         scale.size(1) == (columns + group - 1) / group;
}

struct Int4Name { static constexpr const char* name = "bwla::int4_linear"; };
using Int4Route =
    Route<Int4Name, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, int64_t, const Maybe&)>;

Tensor int4_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Maybe& bias, int64_t group,
                   const Maybe& exponent) {
  const bool good = is_input(x) &&
                    are_nibbles(codes, scale, exponent, x.size(-1), group) && is_float(bias) &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == codes.size(0)));
  if (!good || tokens_of(x) > int4_tokens) return Int4Route::portable(x, codes, scale, bias, group, exponent);
  const Tensor rows = plain(x), table = codes.contiguous(), values = scale.contiguous();
  const Tensor shift = bias ? plain(*bias) : Tensor();
  Tensor y = result_of(x, codes.size(0));
  kernels.int4_linear(rows.const_data_ptr(), table.const_data_ptr(), address(values), address(shift),
                      y.mutable_data_ptr(), tokens_of(x), codes.size(0), x.size(-1), group, power_of(exponent),
                      at::get_num_threads());
  return typed_like(std::move(y), x);
}

struct NibblesName { static constexpr const char* name = "bwla::int4_embedding"; };
using NibblesRoute = Route<NibblesName, Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                                               at::ScalarType, const Maybe&)>;

Tensor int4_embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale, int64_t width, int64_t group,
                      at::ScalarType dtype, const Maybe& exponent) {
  if (!are_nibbles(codes, scale, exponent, width, group) || !are_rows(ids, codes))
    return NibblesRoute::portable(ids, codes, scale, width, group, dtype, exponent);
  const Tensor rows = ids.contiguous(), table = codes.contiguous(), values = scale.contiguous();
  Tensor y = rows_for(ids, width);
  kernels.int4_embedding(rows.const_data_ptr(), table.const_data_ptr(), address(values), y.mutable_data_ptr(),
                         ids.numel(), width, group, power_of(exponent));
  return dtype == at::kFloat ? y : y.to(dtype);
}

struct TransformName { static constexpr const char* name = "bwla::transform"; };
using TransformRoute = Route<TransformName, Tensor(const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                                                   const Maybe&, const Maybe&, const Maybe&)>;

// The factors of a transform as the kernels take them; `fit` where they fit n channels.
struct Factors {
  bool fit = false;
  Tensor scale, left, right;
  long n1 = 1, n2 = 1;

  Factors(int64_t n, const Maybe& scale, const Maybe& left, const Maybe& right, const Maybe& scale_exponent,
          const Maybe& left_exponent, const Maybe& right_exponent) {
    if (!are_values(scale, scale_exponent) || !are_values(left, left_exponent) || !are_values(right, right_exponent))
      return;
    const bool is_signed = right && are_signs(*right);
    if (!is_square(left) || !(is_signed || is_square(right))) return;
    if (scale && (scale->dim() != 1 || scale->size(0) != n)) return;
    n1 = left ? left->size(0) : right ? n / right->size(0) : 1;
    n2 = right ? right->size(0) : n / n1;
    fit = n1 * n2 == n;
    if (!fit) return;
    this->scale = packed_factor(scale, scale_exponent, SCALE);
    this->left = packed_factor(left, left_exponent, LEFT);
    this->right = packed_factor(right, right_exponent, is_signed ? SIGNS : RIGHT);
  }

  static bool are_signs(const Tensor& factor) {
    const long n = factor.numel();
    return factor.dim() == 1 && n > 0 && (n & (n - 1)) == 0;
  }
  static bool is_square(const Maybe& factor) {
    return !factor || (factor->dim() == 2 && factor->size(0) == factor->size(1) && factor->size(0) > 0);
  }
};

// A transform of the last channels, n1 times n2, for factors as the kernels take them.
Tensor run_transform(const Tensor& x, const void* scale, const void* left, const void* right, long n1, long n2) {
  const Tensor rows = plain(x);
  Tensor y = result_of(x, x.size(-1));
  kernels.transform(rows.const_data_ptr(), scale, left, right, y.mutable_data_ptr(), tokens_of(x), n1, n2,
                    at::get_num_threads());
  return typed_like(std::move(y), x);
}

Tensor transform(const Tensor& x, const Maybe& scale, const Maybe& left, const Maybe& right,
                 const Maybe& scale_exponent, const Maybe& left_exponent, const Maybe& right_exponent) {
  const bool good = is_input(x);
  const Factors f(good ? x.size(-1) : 0, scale, left, right, scale_exponent, left_exponent, right_exponent);
  if (!good || !f.fit)
    return TransformRoute::portable(x, scale, left, right, scale_exponent, left_exponent, right_exponent);
  return run_transform(x, address(f.scale), address(f.left), address(f.right), f.n1, f.n2);
}
"""
