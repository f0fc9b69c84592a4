import torch
from torch import nn

from bwla_compiler.calibrate.stream import Call, TwinStream, residual_operand
from bwla_compiler.graph.basis import analyse
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.planner import site_modules
from tests import tiny


def open_stream(model: nn.Module, batches: list[torch.Tensor]) -> tuple[TwinStream, dict]:
    graph = capture(model, batch=batches[0].shape[0], length=batches[0].shape[1])
    sites = {name: calls[0] for name, calls in site_modules(model, analyse(graph)).items()}
    return TwinStream(graph, model, batches, [Call(s.node, s.source, n) for n, s in sites.items()]), sites


def test_the_fp_stream_reaches_what_the_model_computes() -> None:
    model = tiny.make("qwen3")
    batches = [tiny.ids(seed=1), tiny.ids(seed=2)]
    stream, sites = open_stream(model, batches)
    seen: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        hook.remove()
        stream.advance(sites["model.layers.1.mlp.down_proj"].node)
        pairs = list(stream.pairs(sites["model.layers.1.mlp.down_proj"].source))
    for (fp, q), expected in zip(pairs, seen, strict=True):
        # the same float32 operations in another order
        torch.testing.assert_close(fp, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
        assert torch.equal(fp, q)


def test_a_replaced_module_changes_the_quantized_stream_alone() -> None:
    model = tiny.make("llama")
    stream, sites = open_stream(model, [tiny.ids()])
    first, later = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
    with torch.no_grad():
        stream.advance(sites[first].node)
        fp_before = next(stream.pairs(sites[first].source))[0]
        replacement = nn.Linear(64, 64, bias=False)
        model.model.layers[0].self_attn.q_proj = replacement
        stream.replaced.add(first)
        stream.advance(sites[later].node)
        fp, q = next(stream.pairs(sites[later].source))
    assert fp_before.shape == (33, 64)
    assert not torch.allclose(fp, q)
    model = tiny.make("llama")
    whole, sites = open_stream(model, [tiny.ids()])
    with torch.no_grad():
        whole.advance(sites[later].node)
    torch.testing.assert_close(fp, next(whole.pairs(sites[later].source))[0])


def test_what_nobody_reads_again_is_freed() -> None:
    model = tiny.make("llama")
    stream, sites = open_stream(model, [tiny.ids()])
    with torch.no_grad():
        stream.advance(sites["model.layers.0.mlp.gate_proj"].node)
        live = len(stream._fp[0])
        stream.advance(sites["model.layers.1.mlp.gate_proj"].node)
    assert len(stream._fp[0]) == live  # the same place one block later holds as much


def test_the_residual_operand_of_writers() -> None:
    model = tiny.make("gpt2")
    _, sites = open_stream(model, [tiny.ids()])
    assert residual_operand(sites["transformer.h.0.attn.c_proj"].node) is not None
    assert residual_operand(sites["transformer.h.0.mlp.c_fc"].node) is None
