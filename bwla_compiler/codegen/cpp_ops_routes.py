"""C++ text of dispatch: direct calls below autograd, the refusal of gradients, the way to plain torch."""

ROUTES = r"""
// No backend has this key, so it leads to the implementation in plain torch (CompositeExplicitAutograd).
constexpr c10::DispatchKeySet PORTABLE(c10::DispatchKey::PrivateUse3);

// Runs an operator; its backward asks for a gradient that raises when it is computed, and not before.
struct Refusal : torch::autograd::Function<Refusal> {
  using Run = std::function<torch::autograd::variable_list()>;
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& x,
                                                const Run& run) {
    context->saved_data["shape"] = x.sym_sizes().vec();
    return run();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    static auto refuse = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bwla::refuse_gradient", "")
                             .typed<Tensor(const Tensor&, c10::SymIntArrayRef)>();
    const auto shape = context->saved_data["shape"].toSymIntVector();
    for (auto& gradient : gradients)
      if (gradient.defined()) return {refuse.call(gradient, shape), Tensor()};
    return {Tensor(), Tensor()};
  }
};

// The tensor, or the first of a list, that asks for a gradient; undefined where none does.
Tensor asking(const Tensor& t) { return t.defined() && t.requires_grad() ? t : Tensor(); }
Tensor asking(const Maybe& t) { return t ? asking(*t) : Tensor(); }
Tensor asking(const MaybeList& list) {
  for (size_t i = 0; i < list.size(); i++)
    if (Tensor found = asking(list.get(i)); found.defined()) return found;
  return Tensor();
}
template <class Other>
Tensor asking(const Other&) {
  return Tensor();
}
template <class... A>
Tensor first_asking(const A&... a) {
  Tensor found;
  ((found.defined() ? void() : void(found = asking(a))), ...);
  return found;
}

torch::autograd::variable_list listed(Tensor y) { return {std::move(y)}; }
torch::autograd::variable_list listed(std::vector<Tensor> ys) { return ys; }

// The implementations of operator Name::name; `direct` is the one for the CPU.
template <class Name, class F>
struct Route;

template <class Name, class R, class... A>
struct Route<Name, R(A...)> {
  template <R (*direct)(A...)>
  static R differentiable(c10::DispatchKeySet keys, A... a) {
    const Tensor asking = at::GradMode::is_enabled() ? first_asking(a...) : Tensor();
    const bool plain = (keys & c10::after_ADInplaceOrView_keyset).highestPriorityTypeId() == c10::DispatchKey::CPU;
    auto run = [&]() -> R {
      at::AutoDispatchBelowAutograd guard;
      return plain ? direct(a...) : handle().redispatch(keys & c10::after_autograd_keyset, a...);
    };
    if (!asking.defined()) return run();
    auto results = Refusal::apply(asking, Refusal::Run([&] { return listed(run()); }));
    if constexpr (std::is_same_v<R, Tensor>)
      return results[0];
    else
      return results;
  }

  static const c10::TypedOperatorHandle<R(A...)>& handle() {
    static auto found = c10::Dispatcher::singleton().findSchemaOrThrow(Name::name, "").template typed<R(A...)>();
    return found;
  }

  static R portable(A... a) { return handle().redispatch(PORTABLE, a...); }
};
"""
