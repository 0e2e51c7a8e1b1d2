"""Models that compute with packed matrices: what they say is what the dense model with its zeros says."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from magnitude import prune
from transformers import AutoModelForCausalLM

import uniprune
from conftest import tiny_model
from small_models import FAMILIES, tiny
from uniprune import Loaded, accelerate
from uniprune.errors import InputError
from uniprune.models.matrices import find_matrices
from uniprune.runtime import layout, native
from uniprune.runtime.linear import BitmaskLinear, KernelLinear, unsupported
from uniprune.runtime.packed import Packed, pack

pytestmark = pytest.mark.usefixtures("compiled")

TOKENS = torch.arange(40).reshape(2, 20)
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(found, expected):
    tolerance = EPSILON[expected.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def sparse_layers(model):
    return [module for module in model.modules() if isinstance(module, BitmaskLinear)]


@torch.no_grad()
def same_logits(found, expected):
    """One token at a time, few, and many."""
    for tokens in (TOKENS[:1, :1], TOKENS[:1, :8], TOKENS[:, :4], TOKENS):
        close(found(input_ids=tokens).logits, expected(input_ids=tokens).logits)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_memory(family, dtype):
    expected = prune(tiny_model(family), "0.5").to(dtype)
    model = accelerate(copy.deepcopy(expected))
    assert len(sparse_layers(model)) == len(find_matrices(expected))
    same_logits(model, expected)


def test_a_model_that_was_trained_computes_without_dropout():
    """``Trainer`` leaves it in training mode."""
    expected = prune(tiny_model("gpt2"), "0.5")
    same_logits(accelerate(copy.deepcopy(expected).train()), expected)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("runtime", [False, True])
def test_a_folder(tmp_path, family, dtype, runtime):
    expected = prune(tiny_model(family), "2:4").to(dtype)
    expected.save_pretrained(tmp_path / "pruned")
    if runtime:
        layout.pack(tmp_path / "pruned", tmp_path / "out")
    model = accelerate(tmp_path / ("out" if runtime else "pruned"))
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert len(sparse_layers(model)) == len(find_matrices(expected))
    same_logits(model, expected)


def test_a_folder_in_another_type(tmp_path):
    prune(tiny_model(), "0.5").bfloat16().save_pretrained(tmp_path / "pruned")
    layout.pack(tmp_path / "pruned", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    for folder in ("pruned", "out"):
        model = accelerate(tmp_path / folder, dtype="float32")
        assert next(model.parameters()).dtype == torch.float32
        same_logits(model, expected)


def test_loaded_models_and_their_text(loaded):
    prune(loaded.model, "0.5")
    expected = copy.deepcopy(loaded.model)
    model = accelerate(loaded)
    assert model is loaded.model
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **settings), expected.generate(TOKENS, **settings))
    assert uniprune.load.__name__ == "load"


def test_biases_and_single_vectors():
    torch.manual_seed(0)
    model = prune(tiny_model(attention_bias=True, mlp_bias=True), "0.5")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape))
    expected, found = model, accelerate(copy.deepcopy(model))
    same_logits(found, expected)
    layer, dense = found.model.layers[0].mlp.up_proj, expected.model.layers[0].mlp.up_proj
    x = torch.randn(32)
    close(layer(x), dense(x))
    assert layer(torch.empty(0, 32)).shape == (0, 64)
    assert layer(torch.empty(2, 0, 32)).shape == (2, 0, 64)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_inputs_of_another_width_are_errors_as_of_a_dense_layer(dtype):
    """Also where their weights are as many as those of tokens of the right width."""
    dense = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
    kernel = copy.deepcopy(dense)
    kernel.__class__ = KernelLinear
    for layer in (BitmaskLinear(pack(dense.weight)), BitmaskLinear(pack(dense.weight), torch.zeros(16, dtype=dtype)), kernel):
        for shape in ((), (1, 64), (64,), (3, 256), (24, 64), (24, 256), (2, 3, 64), (0, 64)):
            x = torch.ones(shape, dtype=dtype)
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(RuntimeError) as found:
                    layer(x.requires_grad_(mode is torch.enable_grad))
                with mode(), pytest.raises(RuntimeError) as expected:
                    torch.nn.functional.linear(x, dense.weight, layer.bias)
                assert str(found.value) == str(expected.value)


def test_opening_unpacks_nothing(tmp_path, monkeypatch):
    prune(tiny_model(), "0.5").save_pretrained(tmp_path / "pruned")
    layout.pack(tmp_path / "pruned", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "rows", lambda *arguments, **options: pytest.fail("a matrix was unpacked"))
        model = accelerate(tmp_path / "out")
        model(input_ids=TOKENS[:1, :4])
    assert len(sparse_layers(model)) == 21


def test_memory_falls():
    def weights(model):
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return sum(tensor.nbytes for name, tensor in tensors.items() if "layers" in name)

    for spec, share in (("0.5", 0.6), ("0.7", 0.42)):
        model = prune(tiny_model(hidden_size=128, intermediate_size=256, num_hidden_layers=1), spec).bfloat16()
        before = weights(model)
        assert weights(accelerate(model)) <= share * before


def test_a_weight_that_modules_share_is_packed_once():
    model = prune(tiny_model(), "0.5")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    expected, found = copy.deepcopy(model), accelerate(model)
    same_logits(found, expected)
    first, second, third = (found.model.layers[i].mlp.up_proj for i in range(3))
    assert third is first
    assert second.values.data_ptr() == first.values.data_ptr()


def test_layers_of_another_kind_and_with_few_zeros_stay(caplog):
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = prune(tiny_model(), "0.5")
    model.model.layers[0].mlp.up_proj.__class__ = Odd
    model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    expected = copy.deepcopy(model)
    with caplog.at_level("INFO"):
        found = accelerate(model)
    assert type(found.model.layers[0].mlp.up_proj) is Odd
    assert type(found.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert "1 of 20 matrices stay dense" in caplog.text  # the odd one is none
    same_logits(found, expected)


def test_a_dense_model_is_refused_and_left_as_it_is(folder):
    model = tiny_model()
    with pytest.raises(InputError, match="none of 21 matrices can be packed"):
        accelerate(model)
    assert not sparse_layers(model)
    with pytest.raises(InputError, match="none of 21 matrices can be packed"):
        accelerate(folder)


@pytest.fixture
def no_compiler(monkeypatch):
    def forget():
        monkeypatch.setenv("CXX", "no-such-compiler")
        native.library.cache_clear()

    yield forget
    native.library.cache_clear()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_compiler_a_warning_says_so_and_it_computes_densely(family, tmp_path, caplog, no_compiler):
    expected = prune(tiny_model(family), "0.5")
    expected.save_pretrained(tmp_path / "pruned")
    layout.pack(tmp_path / "pruned", tmp_path / "out")
    no_compiler()
    for source in (copy.deepcopy(expected), tmp_path / "pruned", tmp_path / "out"):
        caplog.clear()
        found = accelerate(source)
        assert "no-such-compiler" in caplog.text
        assert "computes densely" in caplog.text
        assert not sparse_layers(found)
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)
        same_logits(found, expected)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler once, and CXX names 'no-such-compiler'"):
        layout.pack(tmp_path / "pruned", tmp_path / "again")


def test_a_type_is_for_models_on_disk():
    with pytest.raises(InputError, match=r"convert the one in memory before: model.to\(torch.bfloat16\)"):
        accelerate(tiny_model(), "bfloat16")


def test_threads_of_python_may_use_one_model():
    model = accelerate(prune(tiny_model(), "0.5"))
    inputs = [torch.arange(i, i + 1 + i % 8)[None] for i in range(32)]

    @torch.inference_mode()
    def run(tokens):
        return model(input_ids=tokens).logits

    alone = [run(tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, logits in zip(pool.map(run, inputs), alone, strict=True):
            assert torch.equal(found, logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_it_is_the_dense_checkpoint_with_its_zeros(tmp_path, family):
    expected = prune(tiny_model(family), "0.5").bfloat16()
    accelerate(copy.deepcopy(expected)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_by_themselves(again):
    expected = prune(tiny_model(), "0.5")
    model = accelerate(copy.deepcopy(expected))
    same_logits(model, expected)
    copied = again(model)
    for module in sparse_layers(model):
        module.values.zero_()
    same_logits(copied, expected)


def test_moved_to_another_type_it_computes_in_that():
    expected = prune(tiny_model(), "0.5")
    model = accelerate(copy.deepcopy(expected))
    same_logits(model, expected)
    same_logits(model.to(torch.bfloat16), expected.to(torch.bfloat16))


def test_moved_to_a_type_without_a_kernel_it_says_so():
    expected = prune(tiny_model(), "0.5")
    model = accelerate(copy.deepcopy(expected)).to(torch.float64)
    for tokens in (TOKENS[:1, :1], TOKENS):
        with pytest.raises(InputError, match="compute in float32, bfloat16, float16, not in float64; convert this one"):
            model(input_ids=tokens)
    same_logits(model.to(torch.float32), expected)


def test_an_accelerated_model_is_not_pruned_or_accelerated_again(loaded):
    prune(loaded.model, "0.5")
    accelerate(loaded)
    match = (
        r"LlamaForCausalLM is accelerated .*: model.layers.0.self_attn.q_proj is a BitmaskLinear.*; give the pruned checkpoint"
    )
    for include in ((), (".",)):
        recipe = uniprune.Recipe(sparsity=0.5, controller="none", metric="magnitude", windows=2, length=8, include=include)
        with pytest.raises(InputError, match=match):
            uniprune.prune_in_place(loaded, recipe)
    with pytest.raises(InputError, match=match):
        accelerate(loaded)
    with pytest.raises(InputError, match=match):
        uniprune.to_semi_structured(loaded.model)
    with pytest.raises(InputError, match=match):
        uniprune.KeepZeros().on_train_begin(SimpleNamespace(fsdp=None, deepspeed=None), None, None, model=loaded.model)


def test_a_layer_that_only_multiplies_by_the_kernel_is_refused_too():
    model = tiny_model(hidden_size=64, vocab_size=1 << 15)
    KernelLinear.convert(model)
    with pytest.raises(InputError, match="lm_head is a KernelLinear"):
        find_matrices(model)


def test_gradients_reach_the_inputs():
    model = prune(tiny_model(), "0.5")
    dense = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    layer = accelerate(model).model.layers[0].mlp.up_proj
    for batch in (1, 20):
        gradients = []
        for module in (layer, dense):
            x = torch.linspace(-1, 1, batch * 32).reshape(batch, 32).requires_grad_()
            module(x).square().sum().backward()
            gradients.append(x.grad)
        close(*gradients)


def test_large_layers_that_are_not_pruned_use_the_kernel_and_stay_what_they_are():
    model = prune(tiny_model(hidden_size=64, vocab_size=1 << 15), "0.5")
    expected, found = copy.deepcopy(model), accelerate(model)
    head = found.lm_head
    assert type(head) is KernelLinear
    assert head.weight is found.model.embed_tokens.weight
    same_logits(found, expected)
    head.weight.data = head.weight.data.clone().mul_(2)  # elsewhere in memory
    expected.lm_head.weight.data.mul_(2)
    same_logits(found, expected)
    same_logits(copy.deepcopy(found).bfloat16(), expected.bfloat16())


def test_compiled_before_its_first_call():
    weight = prune(tiny_model(), "0.5").model.layers[0].mlp.up_proj.weight
    first, second = BitmaskLinear(pack(weight)), torch.nn.Linear(64, 16, bias=False)
    expected = copy.deepcopy(second)
    second.__class__ = KernelLinear
    model = torch.compile(torch.nn.Sequential(first, torch.nn.ReLU(), second), backend="eager")
    with torch.no_grad():
        for x in (torch.randn(2, 32), torch.randn(20, 32)):
            close(model(x), expected((x @ weight.T).relu()))


@torch.no_grad()
def test_a_graph_without_the_kernel_is_refused():
    """torch.jit.trace would record room for the product, and not the product."""
    weight, x = prune(tiny_model(), "0.5").model.layers[0].mlp.up_proj.weight, torch.ones(2, 32)
    kernel = torch.nn.Linear(64, 16, bias=False)
    kernel.__class__ = KernelLinear
    for layer, inputs in (
        (BitmaskLinear(pack(weight)), x),
        (BitmaskLinear(pack(weight)), x.repeat(9, 1)),
        (kernel, x.repeat(1, 2)),
    ):
        with pytest.raises(InputError, match="cannot be traced or exported; take the pruned checkpoint"):
            torch.jit.trace(layer, inputs)
        with pytest.raises(InputError, match="cannot be traced or exported"):
            torch.export.export(layer, (inputs,), strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_families_in_the_runtime_layout(family, tmp_path):
    """Renamed keys, fused experts (which stay dense), shared weights, odd heads."""
    expected = prune(tiny(family), "0.5")
    expected.save_pretrained(tmp_path / "pruned")
    expected = type(expected).from_pretrained(tmp_path / "pruned")
    layout.pack(tmp_path / "pruned", tmp_path / "out")
    tokens = TOKENS % 64
    model = accelerate(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    saved = type(expected).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        logits = expected(input_ids=tokens).logits
        for found in (model, saved, accelerate(expected)):
            close(found(input_ids=tokens).logits, logits)


def test_linear_layers_of_a_familys_own_class_are_packed(tmp_path):
    """Those that compute what nn.Linear does, which nothing else is pruned for."""
    prune(tiny("falcon"), "0.5").save_pretrained(tmp_path / "pruned")
    assert layout.pack(tmp_path / "pruned", tmp_path / "out").left_dense == {}


def test_a_linear_layer_that_has_parts_of_its_own_stays_dense():
    class Adapted(torch.nn.Linear):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.more = torch.nn.Identity()

    layer = Adapted(8, 8)
    matrix = SimpleNamespace(modules=[layer])
    assert "it is in a Adapted, which is more than an nn.Linear" in unsupported(matrix, torch.float32)


@pytest.mark.slow
def test_the_real_model_writes_the_same_text(smollm2):
    loaded = uniprune.load(smollm2, dtype="float32", device="cpu")
    prune(loaded.model, "0.5")
    ids = loaded.tokenizer(["The capital of France is", "def add(a, b):"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = loaded.model.generate(**ids, **settings)
    with torch.no_grad():
        logits = loaded.model(**ids).logits
        model = accelerate(Loaded(loaded.model, loaded.tokenizer))
        close(model(**ids).logits, logits)
    assert torch.equal(model.generate(**ids, **settings), expected)
