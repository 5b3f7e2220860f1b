"""torch keeps what it traced on disk: under the code of this package that it traced, and no longer."""

import pytest
import torch
from torch._inductor.utils import fresh_cache

import peft_fast
from peft_fast.ops import _shared, bottleneck_adapter, lora_linear, prefix_attention

# Inductor imports modules that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

x, square, head = torch.randn(4, 6), torch.randn(6, 6), torch.randn(2, 3, 4, 6)
CALLS = {
    "lora_linear": lambda: lora_linear(x, square, square, square),
    "bottleneck_adapter": lambda: bottleneck_adapter(x, square, square),
    "prefix_attention": lambda: prefix_attention(head, head, head, head[0], head[0]),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_graph_names_the_code_that_it_calls(op):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with peft_fast.backend("eager"):
        torch.compile(CALLS[op], backend=keep, fullgraph=True)()
    (call,) = (node for node in graphs[0].graph.nodes if str(node.target).startswith(f"peft_fast.{op}"))
    assert call.args[-1] == _shared.CODE
    assert len(_shared.CODE) == 16


def test_another_code_is_traced_again(monkeypatch):
    module = __import__("sys").modules["peft_fast.ops.lora_linear"]

    def compiled():
        torch._dynamo.reset()
        with torch.no_grad(), peft_fast.backend("eager"):
            return torch.compile(CALLS["lora_linear"], fullgraph=True)()

    with fresh_cache():
        expected, launch = compiled(), module._launch_fwd
        monkeypatch.setattr(module, "_launch_fwd", lambda *args: tuple(2 * result for result in launch(*args)))
        kept = compiled()
        monkeypatch.setattr(module, "CODE", "of another version")
        traced = compiled()
    assert torch.equal(kept, expected)  # or this test shows nothing
    assert torch.equal(traced, 2 * expected)


def test_the_digest_is_of_every_source(monkeypatch, tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "eager.py").write_text("1")
    monkeypatch.setattr(_shared, "__file__", str(tmp_path / "ops" / "_shared.py"))
    before = _shared._digest()
    assert before == _shared._digest() != _shared.CODE
    (tmp_path / "eager.py").write_text("2")
    assert _shared._digest() != before
