"""Patched models under DDP and FSDP2, on two processes: the gradients of stock. Prefixes at the input layer in one."""

import copy
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import batch
from prefix_rows import parameter, with_rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WORLD = 2


def worker(rank: int, store: str, wrapper: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import peft_fast
    from models import batch, lora_model

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # A file rather than a port: no rank has to outlive the others to serve them.
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=WORLD, rank=rank)
    try:
        inputs = {name: value[rank * 2 : rank * 2 + 2] for name, value in batch().items()}
        stock = lora_model()
        patched = copy.deepcopy(stock)
        peft_fast.patch(patched)
        gradients = []
        for model in (stock, patched):
            calls = count_fused_calls()
            if wrapper == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                for layer in model.base_model.model.bert.encoder.layer:
                    fully_shard(layer)
                wrapped = fully_shard(model)
            for _ in range(2):
                wrapped.zero_grad()
                wrapped(**inputs).loss.backward()
            gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
            assert len(calls) == (24 if model is patched else 0)
        # Outside of its forward a layer's parameters are DTensors under FSDP2; what counts is what calls ran.
        assert all(row.state == "fused" for row in peft_fast.patch(patched, strict=True).rows)
        expected, actual = gradients
        assert expected.keys() == actual.keys()
        assert len(actual) > 20
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item() + 1e-8), name
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_rows_at_the_input_layer_under_fsdp(tmp_path):
    """In one process: each layer's weights are gathered when it runs, and freed when its own backward is through."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", timedelta(seconds=60), world_size=1, rank=0)
    try:
        model = with_rows("llama").train()
        sharded = copy.deepcopy(model)
        for layer in sharded.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        for checkpointing in False, True:
            outputs = []
            for each in model, sharded:
                if checkpointing:
                    each.gradient_checkpointing_enable()
                each.zero_grad()
                output = each(**batch("llama"))
                output.loss.backward()
                outputs.append((output.logits, whole(parameter(each).grad)))
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)
        steps = []
        for each in model.eval(), sharded.eval():
            ids = batch("llama")["input_ids"]
            with torch.no_grad():
                past = each(input_ids=ids[:, :-1]).past_key_values
                steps.append(each(input_ids=ids[:, -1:], past_key_values=past).logits)
        torch.testing.assert_close(steps[1], steps[0])
        with pytest.raises(ValueError, match=r"^layers: 'input' goes on from a cache under FSDP only where gradients"):
            sharded(input_ids=ids[:, -1:], past_key_values=past)
        assert sharded(input_ids=ids).past_key_values is None  # the rows would be in it
    finally:
        dist.destroy_process_group()


def count_fused_calls() -> list:
    """A list that grows by one with every fused call from now on."""
    module, calls = sys.modules["peft_fast.patch"], []
    apply = sys.modules["peft_fast.ops.lora_linear"].apply_lora_linear
    module.apply_lora_linear = lambda *args: calls.append(1) or apply(*args)
    return calls


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_of_stock(wrapper, tmp_path):
    processes = mp.spawn(worker, (f"file://{tmp_path}/store", wrapper), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 180
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
