"""What the Triton kernels of heads have in common: their parameters, the bias, and the module around their body."""

from bwla_compiler.codegen.triton_spec import Emitted, Int4Kernel, Int8Kernel
from bwla_compiler.codegen.triton_text import head, indented, product_function


def emit_end(
    spec: Int4Kernel | Int8Kernel,
    text: tuple[str, str],
    title: str,
    numbers: dict[str, int],
    *,
    codes: str,
    activations: str,
) -> Emitted:
    """Return the kernel of a head: x, codes, scale, bias where there is one, y, and tokens where a tile has several.

    text: the kernel's name, and its body with places for names, title and bias; `total` [rows] (or [rows, tokens]) is
    what it has summed. numbers: the module's constants. codes, activations: types of their pointers.
    """
    name, body = text
    one = spec.tile.tokens == 1
    parameters = [("x", activations), ("codes", codes), ("scale", "*fp32")]
    parameters += [("bias", "*fp32")] if spec.bias else []
    parameters += [("y", "*x")] + ([] if one else [("tokens", "i32")])
    bias = "total += tl.load(bias + row, mask=live_row, other=0.0)" + ("" if one else "[:, None]")
    names = ", ".join(parameter for parameter, _ in parameters)
    functions = "" if one else product_function(spec.precision, name="product", x="b")
    written = body.format(names=names, title=title, bias=indented([bias] if spec.bias else []))
    source = head(title, numbers) + functions + written
    return Emitted(name, title, source, tuple(parameters), spec.tile.warps, spec.tile.stages)
