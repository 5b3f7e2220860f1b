"""Every call that cannot be fused runs stock peft, exactly, and the report says why."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from models import (
    assert_equal_logits,
    assert_same_step,
    batch,
    fill_lora_b,
    lora_layers,
    lora_model,
    loss_and_gradients,
    patched_copy,
    states,
)


class TestStockRuns:
    """Every call that cannot be fused runs stock peft, exactly, and the report says why."""

    def check(self, change, reason: str, config: dict | None = None) -> None:
        stock = lora_model(**(config or {}))
        patched = patched_copy(stock)
        change(stock)
        change(patched)
        rows = peft_fast.report(patched).rows
        assert any(reason in row.reason for row in rows if row.state == "stock"), peft_fast.report(patched)
        expected, actual = loss_and_gradients(stock, batch()), loss_and_gradients(patched, batch())
        fused = any(row.state == "fused" for row in rows)
        for name, value in expected.items():
            same = torch.allclose(actual[name], value, atol=1e-6) if fused else torch.equal(actual[name], value)
            assert same, name

    def test_disabled(self):
        model = patched_copy(lora_model())
        with model.disable_adapter():
            assert all("disabled" in row.reason for row in peft_fast.report(model).rows)
            logits = model(**batch()).logits
        assert torch.equal(logits, model.unload()(**batch()).logits)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_casting_of_the_input_switched_off(self, autocast):
        """Under autocast stock then casts the input to its dtype alone, not to the factors' before."""
        stock = lora_layers(lora_model())[0]
        for factors in (stock.lora_A, stock.lora_B):
            factors.to(torch.bfloat16 if autocast else torch.float32)
        if not autocast:
            stock.base_layer.to(torch.bfloat16)
        stock.cast_input_dtype_enabled = False
        patched = patched_copy(stock)
        x = torch.randn(8, 32, dtype=torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            if autocast:
                assert torch.equal(patched(x), stock(x))
            else:  # the dtypes do not fit, in either
                for layer in (patched, stock):
                    with pytest.raises(RuntimeError, match="dtype"):
                        layer(x)
        assert peft_fast.report(patched).rows[0].reason == "last call: casting of the input is switched off"

    def test_merged(self):
        stock = lora_model()
        patched = patched_copy(stock)
        for model in (stock, patched):
            model.merge_adapter()
        assert {row.reason for row in peft_fast.report(patched).rows} == {"adapters are merged"}
        assert torch.equal(patched(**batch()).logits, stock(**batch()).logits)

    def test_unmerged_runs_fused_again(self):
        model = patched_copy(lora_model())
        before = model(**batch()).logits
        model.merge_adapter()
        assert torch.allclose(model(**batch()).logits, before, atol=1e-5)
        model.unmerge_adapter()
        assert states(model) == {"fused"}
        assert torch.allclose(model(**batch()).logits, before, atol=1e-5)

    def test_two_active_adapters(self):
        def add(model):
            torch.manual_seed(8)
            model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
            fill_lora_b(model)
            model.base_model.set_adapter(["default", "second"])

        self.check(add, "2 adapters are active")

    def test_mixed_batch(self):
        stock = lora_model()
        stock.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
        fill_lora_b(stock).eval()
        patched = patched_copy(stock)
        names = ["default", "second", "__base__", "default"]
        inputs = batch()
        assert torch.equal(patched(**inputs, adapter_names=names).logits, stock(**inputs, adapter_names=names).logits)

    @pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
    def test_variants(self, variant):
        reason = "DoraLinearVariant" if "use_dora" in variant else "lora_bias"
        self.check(lambda model: None, reason, variant)

    @pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
    @pytest.mark.parametrize(
        "kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
    )
    def test_hooks_inside_the_layer_fire(self, where, kind):
        fired = []

        def add(model):
            module = lora_layers(model)[-1]._modules[where]
            module = module if where == "base_layer" else module["default"]
            getattr(module, kind)(lambda *args: fired.append(model) and None)

        self.check(add, "has hooks")
        assert len(set(map(id, fired))) == 2  # in the stock model and in the patched one

    def test_hooks_on_the_layer_itself_keep_it_fused(self):
        stock = lora_model()
        patched = patched_copy(stock)
        for model in (stock, patched):
            lora_layers(model)[0].register_forward_hook(lambda module, args, output: output + 1)
        assert states(patched) == {"fused"}
        assert_same_step(stock, patched, batch())

    def test_global_hooks(self):
        patched, fired = patched_copy(lora_model()), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: fired.append(type(module)))
        try:
            assert "global module hooks" in peft_fast.report(patched).rows[0].reason
            patched(**batch())
        finally:
            handle.remove()
        assert fired.count(nn.Linear) >= 3 * len(lora_layers(patched))

    @pytest.mark.parametrize("where", ["layer", "base_layer"])
    def test_forward_set_on_the_instance(self, where):
        from accelerate.hooks import ModelHook, add_hook_to_module

        calls = []

        class Counting(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                calls.append(module)
                return args, kwargs

        def hook(model):
            layer = lora_layers(model)[0]
            add_hook_to_module(layer if where == "layer" else layer.base_layer, Counting())

        stock, patched = lora_model(), lora_model()
        hook(stock)
        hook(patched)
        peft_fast.patch(patched)
        assert any("forward is set on the instance" in row.reason for row in peft_fast.report(patched).rows)
        assert_equal_logits(stock, patched)
        assert len(calls) >= 2

    def test_parametrization(self):
        def parametrize(model):
            nn.utils.parametrizations.weight_norm(lora_layers(model)[0].lora_A["default"])

        self.check(parametrize, "not Linear")

    def test_subclassed_base_layer(self):
        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        stock, patched = lora_model(), lora_model()
        for model in (stock, patched):
            lora_layers(model)[0].base_layer.__class__ = Doubling
        peft_fast.patch(patched)
        assert "base layer is Doubling" in peft_fast.report(patched).rows[0].reason
        assert_equal_logits(stock, patched)

    def test_tensor_subclass_parameter(self):
        class Wrapped(nn.Parameter):
            pass

        patched = patched_copy(lora_model())
        layer = lora_layers(patched)[0]
        layer.base_layer.weight = Wrapped(layer.base_layer.weight.data, requires_grad=False)
        assert "Wrapped, not a plain Parameter" in peft_fast.report(patched).rows[0].reason

    def test_trainable_base_weight(self):
        def train_base(model):
            for layer in lora_layers(model):
                layer.base_layer.weight.requires_grad_(True)

        self.check(train_base, "base weight requires grad")

    def test_other_dtype_of_the_adapter(self):
        def to_bf16(model):
            layer = lora_layers(model)[0]
            layer.lora_A["default"].bfloat16()

        patched = patched_copy(lora_model())
        to_bf16(patched)
        assert "dtypes" in peft_fast.report(patched).rows[0].reason

    def test_sharded_parameter(self):
        patched = patched_copy(lora_model())
        layer = lora_layers(patched)[0]
        whole = layer.base_layer.weight.data
        layer.base_layer.weight.data = torch.empty(0)  # what ZeRO-3 leaves in place of a partitioned weight
        with pytest.raises(RuntimeError):  # stock's own error, never a wrong answer
            patched(**batch())
        layer.base_layer.weight.data = whole
        patched(**batch())

    @pytest.mark.parametrize(
        "scaling", [torch.tensor(1.5, requires_grad=True), torch.full((4,), 2.0)], ids=["learned", "vector"]
    )
    def test_scaling_that_is_no_number(self, scaling):
        patched = patched_copy(lora_model())
        lora_layers(patched)[0].scaling["default"] = scaling
        assert "the scaling is a Tensor" in peft_fast.report(patched).rows[0].reason

    @pytest.mark.parametrize("kind", ["inference", "nested", "sparse"])
    def test_inputs_that_are_not_plain(self, kind):
        stock = lora_model()
        x = torch.randn(6, 32)
        if kind == "inference":
            with torch.inference_mode():
                x = x * 1
        elif kind == "nested":
            x = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
        else:
            x = x.to_sparse()
        layer, patched = lora_layers(stock)[0], lora_layers(patched_copy(stock))[0]
        with torch.set_grad_enabled(kind == "inference"):
            for model in (layer, patched):
                model.lora_A["default"].requires_grad_(kind != "inference")
            expected, actual = layer(x), patched(x)
        if kind == "nested":
            expected, actual = expected.values(), actual.values()
        assert torch.equal(actual.detach(), expected.detach())

    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
    def test_jit_trace(self):
        model = patched_copy(lora_model())
        layer, x = lora_layers(model)[0].eval(), torch.randn(3, 32)
        graph = torch.jit.trace(layer, x, check_trace=False)
        assert torch.allclose(graph(x), layer(x), atol=1e-6)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.parametrize("strict", [False, True])
    def test_what_is_exported_has_torchs_calls_alone(self, strict):
        layer, x = lora_layers(patched_copy(lora_model()))[0], torch.randn(3, 32)
        exported = torch.export.export(layer, (x,), strict=strict)
        assert "peft_fast" not in exported.graph_module.code
        assert torch.allclose(exported.module()(x), layer(x), atol=1e-6)

    def test_sharded_tensors(self):
        layer = lora_layers(patched_copy(lora_model()))[0]
        x = torch.randn(3, 32)

        class DTensor(torch.Tensor):
            """Named as torch's, of which there is none without processes."""

        expected = layer(x).detach()
        weight = layer.base_layer.weight
        layer.base_layer._parameters["weight"] = weight.data.as_subclass(DTensor)
        assert peft_fast.report(layer).rows[0].state == "fused"  # FSDP2 makes it a plain one for the forward
        assert torch.allclose(layer(x).as_subclass(torch.Tensor), expected, atol=1e-6)
        assert "last call: a parameter is DTensor" in peft_fast.report(layer).rows[0].reason
