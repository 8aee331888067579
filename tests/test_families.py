"""Every declared family on tiny transformers models: bit-equal logits, exact algebra, and wrong twins that show."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, inputs, outputs, save_tiny

from vrscope.arch.binding import bind
from vrscope.arch.families import families
from vrscope.arch.spaces import Space, Term
from vrscope.checkpoint.source import open_checkpoint
from vrscope.executors import Serial
from vrscope.progress import silent
from vrscope.rescale.apply import apply_plan
from vrscope.rescale.methods import MethodOptions
from vrscope.rescale.plan import PLAN_FILE, RescalePlan
from vrscope.rescale.planning import make_plan

METHOD_SETTINGS = {
    "random": ("random", {}),
    "wisca-tensor": ("wisca", {"granularity": "tensor"}),
    "wisca-head": ("wisca", {"granularity": "head", "norm": "l1"}),
    "wisca-channel": ("wisca", {"granularity": "channel", "norm": "max"}),
    "tvr": ("tvr", {"target_std": 0.03, "depth_scaled": True}),
}


def planned(folder, method="random", **options):
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    plan, _ = make_plan(checkpoint, binding, method, MethodOptions(**options), Serial(), silent)
    return checkpoint, binding, plan


def rescaled(folder, out, method="random", **options):
    checkpoint, binding, plan = planned(folder, method, **options)
    return apply_plan(checkpoint, binding, plan, out, force=False, progress=silent)


def test_every_family_and_every_model_type_has_a_tiny_model(tmp_path):
    checkpoints = [open_checkpoint(save_tiny(case, tmp_path / case)) for case in MODELS]
    tested = {(bind(checkpoint).family, checkpoint.config["model_type"]) for checkpoint in checkpoints}
    assert tested == {(family.name, kind) for family in families() for kind in family.model_types}


@pytest.mark.parametrize("case", MODELS)
def test_powers_of_two_leave_the_logits_bit_equal(case, tmp_path):
    """Random exponents on every space at once, in float32 and in bfloat16; and the inverse restores every byte."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = save_tiny(case, tmp_path / f"{dtype}", dtype)
        out = tmp_path / f"{dtype}-rescaled"
        plan = rescaled(folder, out)
        assert plan.changed > 0.5 * sum(len(values) for values in plan.spaces.values())
        assert torch.equal(outputs(folder, case, dtype), outputs(out, case, dtype))
        undone = RescalePlan.load(out / PLAN_FILE).inverse()
        back = open_checkpoint(out)
        apply_plan(back, bind(back), undone, tmp_path / f"{dtype}-back", force=False, progress=silent)
        assert (tmp_path / f"{dtype}-back" / "model.safetensors").read_bytes() == (
            folder / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("setting", METHOD_SETTINGS)
@pytest.mark.parametrize(
    "case",
    ["llama", "mixtral", "gpt2", "opt", "bert", "gemma3", "granitemoe", "deepseek_v3", "whisper", "jamba"],
)
def test_every_method_is_bit_equal(case, setting, tmp_path):
    folder = save_tiny(case, tmp_path / "model")
    method, options = METHOD_SETTINGS[setting]
    plan = rescaled(folder, tmp_path / "out", method, **options)
    assert plan.equivalent == "bit-equal"
    assert torch.equal(outputs(folder, case), outputs(tmp_path / "out", case))


class Float64Casts(torch.overrides.TorchFunctionMode):
    """Turns every cast in modeling code to a shorter float into one to float64, so that algebra shows no rounding."""

    SHORT = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is torch.Tensor.float and arguments[0].dtype == torch.float64:
            return arguments[0]
        arguments = (
            tuple(torch.float64 if a in self.SHORT else a for a in arguments) if self.casts(arguments) else arguments
        )
        if any(keywords.get("dtype") is short for short in self.SHORT):
            keywords["dtype"] = torch.float64
        return function(*arguments, **keywords)

    def casts(self, arguments):
        return any(isinstance(a, torch.dtype) for a in arguments) and isinstance(arguments[0], torch.Tensor)


def outputs64(folder, case):
    """Return the outputs of a float64 checkpoint with all arithmetic in float64."""
    import transformers

    model = getattr(transformers, MODELS[case][2]).from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad(), Float64Casts():
        found = model.eval()(**inputs(model, torch.float64))
    return found.last_hidden_state if getattr(found, "logits", None) is None else found.logits


@pytest.mark.parametrize("case", MODELS)
def test_free_scales_are_exact_up_to_rounding_in_float64(case, tmp_path):
    """The algebra itself, with 1+w gains included: real factors on every space, 1e-12 of the logits."""
    folder = save_tiny(case, tmp_path / "model", torch.float64)
    plan = rescaled(folder, tmp_path / "out", scales="free")
    assert plan.equivalent == "equal up to rounding" and plan.changed > 0
    before, after = outputs64(folder, case), outputs64(tmp_path / "out", case)
    assert before.dtype == torch.float64
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12


# ---- wrong twins: each rule, broken on purpose, must show in the logits ----


def broken(space: Space, change) -> Space:
    return dataclasses.replace(space, terms=tuple(change(term) for term in space.terms if change(term) is not None))


def without(part):
    return lambda term: None if part in term.tensor else term


def unpaired(term: Term) -> Term:
    """One scale per channel, as if there were no RoPE; the index is spread over twice as many scales."""
    flat = term.index.reshape(-1)
    return dataclasses.replace(term, index=(flat * 2 + np.arange(flat.size) % 16 // 8).reshape(term.index.shape))


def neighbours(term: Term) -> Term:
    """The pair layout of the other RoPE: channels 2j and 2j+1 share."""
    heads = term.index.reshape(-1, 16)
    wrong = np.repeat(heads[:, :8], 2, axis=1)
    return dataclasses.replace(term, index=wrong.reshape(term.index.shape))


def per_query_head(term: Term) -> Term:
    """A scale per query head instead of per KV group: only the first of each group matches k or v."""
    if not any(part in term.tensor for part in ("q_proj", "o_proj")):
        return term
    count = term.index.size
    shifted = term.index + np.where(np.arange(count) // 16 % 2 == 1, 1, 0).reshape(term.index.shape)
    return dataclasses.replace(term, index=shifted % (term.index.max() + 1))


def halves(term: Term) -> Term:
    """The other way round: channels j and j + 8 share where 2j and 2j+1 should."""
    heads = term.index.reshape(-1, 16)
    return dataclasses.replace(term, index=np.tile(heads[:, ::2], 2).reshape(term.index.shape))


def fully_rotated(term: Term) -> Term:
    """Partners half a head apart although only the first quarter of a head is rotated."""
    heads = term.index.reshape(-1, 16)
    return dataclasses.replace(
        term, index=(heads.min(axis=1, keepdims=True) + np.tile(np.arange(8), 2)).reshape(term.index.shape)
    )


def concatenated(term: Term) -> Term:
    """A fused q, k, v whose rows are read as three blocks instead of head by head."""
    if "query_key_value" not in term.tensor:
        return term
    rows = term.index.reshape(4, 3, 16).transpose(1, 0, 2)
    return dataclasses.replace(term, index=rows.reshape(term.index.shape))


def interleaved(term: Term) -> Term:
    """Stacked gate and up rows read as taking turns instead of one after the other."""
    if "input_linear" not in term.tensor:
        return term
    experts, rows, _ = term.index.shape
    turns = term.index.reshape(experts, 2, rows // 2).transpose(0, 2, 1)
    return dataclasses.replace(term, index=turns.reshape(term.index.shape))


def degree_one(term: Term) -> Term:
    return dataclasses.replace(term, power=-1) if term.power == -2 else term


def shifted_heads(term: Term) -> Term:
    """A scale per head for the rotated part of a key that all heads share: only the first head matches it."""
    if "q_b_proj" not in term.tensor:
        return term
    used = term.index.reshape(4, -1)
    return dataclasses.replace(
        term, index=np.where(used >= 0, (used + np.arange(4)[:, None]) % 4, -1).reshape(term.index.shape)
    )


TWINS = {
    "RoPE tie omitted": ("llama", "q.k", unpaired),
    "RoPE pair layout wrong": ("llama", "q.k", neighbours),
    "bias of q forgotten": ("llama", "q.k", without("q_proj.bias")),
    "bias of v forgotten": ("llama", "v.o", without("v_proj.bias")),
    "bias of up forgotten": ("llama", "up.down", without("up_proj.bias")),
    "q scale per query head": ("llama", "q.k", per_query_head),
    "o scale per query head": ("llama", "v.o", per_query_head),
    "reader of a norm forgotten": ("llama", "norm fold", without("k_proj.weight")),
    "router forgotten": ("mixtral", "norm fold", without("block_sparse_moe.gate")),
    "bias of fc1 forgotten": ("opt", "fc1.fc2", without("fc1.bias")),
    "bias of a layer norm forgotten": ("gpt2", "norm fold", without("ln_1.bias")),
    "interleaved RoPE read as half": ("cohere", "q.k", halves),
    "half RoPE read as interleaved": ("ministral", "q.k", neighbours),
    "partial rotation taken for a full one": ("stablelm", "q.k", fully_rotated),
    "fused q, k, v read as blocks": ("gpt_neox", "v.o", concatenated),
    "fused experts read as interleaved": ("granitemoe", "up.down", interleaved),
    "gate of the shared expert forgotten": ("qwen2_moe", "norm fold", without("shared_expert_gate")),
    "shared expert forgotten": ("qwen2_moe", "norm fold", without("shared_expert.up_proj")),
    "fused router forgotten": ("granitemoe", "norm fold", without("router.layer")),
    "parallel MLP forgotten": ("phi", "norm fold", without("mlp.fc1.weight")),
    "squared ReLU taken for a ReLU": ("arcee", "fc1.fc2", degree_one),
    "norm of one head forgotten": ("stablelm-qknorm", "q.k gains", without("q_layernorm.norms.3")),
    "rotated key scaled per head": ("deepseek_v3", "q.k", shifted_heads),
    "norm of the latent forgotten": ("deepseek_v3", "norm fold", without("kv_a_layernorm")),
    "one cross attention forgotten": ("t5", "norm fold", without("decoder.block.1.layer.1.EncDecAttention.k")),
    "bias of a cross value forgotten": ("whisper", "v.o", without("encoder_attn.v_proj.bias")),
    "convolution forgotten": ("mamba2", "linear", without("conv1d.weight")),
    "state gain forgotten": ("jamba", "q.k gains", without("c_layernorm")),
    "rows before a convolution forgotten": ("qwen3_next", "linear", without("in_proj_qkvz")),
    "bias of query forgotten": ("bert", "q.k", without("query.bias")),  # that of the key cancels in the softmax
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_rule_shows_in_the_logits(twin, tmp_path):
    case, rule, change = TWINS[twin]
    folder = save_tiny(case, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    binding = bind(checkpoint)
    spaces = tuple(broken(space, change) for space in binding.spaces if space.rule == rule)
    spaces = tuple(
        dataclasses.replace(space, size=max(space.size, 1 + max(int(term.index.max()) for term in space.terms)))
        for space in spaces
    )
    assert spaces
    wrong = dataclasses.replace(binding, spaces=spaces)
    generator = np.random.default_rng(0)
    exponents = {space.name: generator.integers(-3, 4, space.size) for space in spaces}
    plan = RescalePlan(binding.family, "twin", {}, "pow2", exponents, checkpoint.fingerprint())
    apply_plan(checkpoint, wrong, plan, tmp_path / "out", force=False, progress=silent)
    before, after = outputs(folder, case), outputs(tmp_path / "out", case)
    assert float((before - after).abs().max() / before.abs().max()) > 1e-3


def test_a_tied_head_folded_shows_in_the_logits(tmp_path):
    """The final gain of a tied model cannot be folded: doing it by hand changes the logits."""
    folder = save_tiny("llama-tied", tmp_path / "model")
    before = outputs(folder, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    scale = torch.exp2(torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(0)).float())
    tensors["model.norm.weight"] *= scale
    tensors["model.embed_tokens.weight"] /= scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = outputs(folder, "llama-tied")
    assert float((before - after).abs().max() / before.abs().max()) > 1e-2


def test_one_plus_w_taken_as_w_shows_in_the_logits(tmp_path):
    folder = save_tiny("gemma2", tmp_path / "model", torch.float64)
    checkpoint, binding, plan = planned(folder, scales="free")
    wrong = dataclasses.replace(
        binding,
        spaces=tuple(broken(space, lambda term: dataclasses.replace(term, stored="w")) for space in binding.spaces),
    )
    apply_plan(checkpoint, wrong, plan, tmp_path / "out", force=False, progress=silent)
    before, after = outputs(folder, "gemma2"), outputs(tmp_path / "out", "gemma2")
    assert float((before - after).abs().max() / before.abs().max()) > 1e-2


def test_sharded_checkpoints_keep_their_shards(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    rescaled(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    assert torch.equal(outputs(folder, "llama"), outputs(tmp_path / "out", "llama"))


def test_mixed_dtypes_are_kept_per_tensor(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rescaled(folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    assert torch.equal(outputs(folder, "llama"), outputs(tmp_path / "out", "llama"))
