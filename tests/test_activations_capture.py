"""Every linear layer of every family is seen under its name on disk; its stored weight turns inputs into outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_quant_loading import NOT_TEXT_TO_TEXT
from tiny_models import MODELS, make_model, save_tiny

from vrscope.activations.capture import Site, find_sites, watching
from vrscope.arch.roles import roles_from_names
from vrscope.checkpoint.source import Checkpoint, open_checkpoint
from vrscope.quant.formats import get_format
from vrscope.quant.layers import quantized
from vrscope.quant.loading import LoadedModel, load_model
from vrscope.stages import read_roles

RUN = [case for case in MODELS if not case.startswith(tuple(NOT_TEXT_TO_TEXT))]
WINDOW = tuple(range(3, 43))
Calls = list[tuple[tuple[Site, ...], torch.Tensor, torch.Tensor]]


def opened(case: str, folder: Path, dtype: str = "float32") -> tuple[Checkpoint, LoadedModel]:
    checkpoint = open_checkpoint(save_tiny(case, folder))
    return checkpoint, load_model(checkpoint, "cpu", dtype)


def captured(loaded: LoadedModel, checkpoint: Checkpoint) -> tuple[Calls, set[Site]]:
    """Return what was seen, and the sites that were not; being watched must not change a bit."""
    before = loaded.run(WINDOW)
    roles = read_roles(checkpoint)[0]
    sites = find_sites(loaded, checkpoint, roles)
    assert all(roles[name].kind == "other" for name in sites.unmatched), "only heads that are not run"
    calls: Calls = []

    def keep(found: tuple[Site, ...], inputs: torch.Tensor, output: torch.Tensor) -> None:
        calls.append((found, inputs.clone(), output.clone()))  # models may go on to change them in place

    with watching(sites, keep) as seen:
        assert torch.equal(loaded.run(WINDOW), before)
    assert seen == {site for found, _, _ in calls for site in found}
    return calls, set(sites.sites) - seen


def biases(checkpoint: Checkpoint, site: Site) -> list[torch.Tensor]:
    """Return what the layer may add: nothing, or the bias beside the weight on disk."""
    stem = site.tensor.removesuffix(".weight")
    found = [torch.zeros(())]
    for name in (f"{stem}.bias", f"{stem}_bias"):
        if name in checkpoint.tensors:
            stored = checkpoint.read(name)
            found.append((stored[site.index] if stored.ndim > 1 else stored)[site.rows].double())
    return found


@pytest.mark.parametrize("case", RUN)
def test_every_linear_is_seen_and_its_stored_weight_gives_its_output(case: str, tmp_path: Path) -> None:
    checkpoint, loaded = opened(case, tmp_path)
    roles = read_roles(checkpoint)[0]
    calls, unseen = captured(loaded, checkpoint)
    linear = {name for name, role in roles.items() if role.kind == "linear"}
    used = {site.tensor for sites, _, _ in calls for site in sites}
    experts = {site.tensor for site in unseen if site.index or re.search(r"experts\.\d+\.", site.tensor)}
    assert linear <= used | experts
    for sites, inputs, output in calls:
        columns = torch.zeros(output.shape[1])
        for site in sites:
            weight = site.matrix(checkpoint.read(site.tensor), roles[site.tensor]).double()
            columns[site.outputs] += 1
            product = inputs.double() @ weight.T
            scale = float(inputs.double().norm(dim=1).max() * weight.norm(dim=1).max())
            errors = [
                (product + bias - output[:, site.outputs].double()).abs().max() for bias in biases(checkpoint, site)
            ]
            assert min(errors) < 1e-6 * scale, (site, errors, scale)
        assert columns.eq(1).all(), "each output belongs to one stored matrix"


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2", "falcon", "llama4", "jamba"])
def test_gradients_flow_through_what_is_shown(case: str, tmp_path: Path) -> None:
    checkpoint, loaded = opened(case, tmp_path)
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])
    calls: Calls = []

    def keep(found: tuple[Site, ...], inputs: torch.Tensor, output: torch.Tensor) -> None:
        inputs.retain_grad()
        output.retain_grad()
        calls.append((found, inputs, output))

    def loss(embedded: torch.Tensor) -> torch.Tensor:
        return loaded.model(inputs_embeds=embedded, use_cache=False).logits.square().mean()

    embedded = loaded.model.get_input_embeddings()(torch.tensor([WINDOW])).detach().requires_grad_()
    loss(embedded).backward()
    plain, embedded.grad = embedded.grad, None
    with watching(sites, keep):
        loss(embedded).backward()
    assert plain is not None and embedded.grad is not None
    torch.testing.assert_close(embedded.grad, plain, rtol=1e-4, atol=1e-6)
    flown = [call for call in calls if call[1].grad is not None and call[2].grad is not None]
    unused = {site.tensor for found, *_ in calls for site in found} - {
        site.tensor for found, *_ in flown for site in found
    }
    assert all("router" in name or "gate.weight" in name for name in unused), unused
    assert flown and all(bool(output.grad.any()) for _, _, output in flown)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "granitemoe", "qwen3_moe"])
def test_every_token_reaches_its_number_of_experts(case: str, tmp_path: Path) -> None:
    checkpoint, loaded = opened(case, tmp_path)
    calls, unseen = captured(loaded, checkpoint)
    rows: dict[tuple[str, int | None], int] = {}
    for sites, inputs, _ in calls:
        for site in sites:
            if site.index or ".experts." in site.tensor:
                key = re.sub(r"experts\.\d+\.", "", site.tensor), None
                rows[key] = rows.get(key, 0) + len(inputs)
    layers = {"mixtral": 2 * 3, "gpt_oss": 2 * 2, "granitemoe": 2 * 2, "qwen3_moe": 1 * 3}[case]
    assert list(rows.values()) == [2 * len(WINDOW)] * layers
    assert all(site.index or ".experts." in site.tensor for site in unseen)


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_names_are_the_same_in_bfloat16(case: str, tmp_path: Path) -> None:
    checkpoint, loaded = opened(case, tmp_path, "bfloat16")
    calls, _ = captured(loaded, checkpoint)
    found = {site.tensor for sites, _, _ in calls for site in sites}
    roles = read_roles(checkpoint)[0]
    assert {name for name, role in roles.items() if role.kind == "linear" and "experts." not in name} <= found


def test_routers_are_seen_but_kept_by_formats(tmp_path: Path) -> None:
    checkpoint, loaded = opened("mixtral", tmp_path)
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])
    assert sites.kept == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)}


def test_weights_that_are_replaced_and_put_back_stay_known(tmp_path: Path) -> None:
    checkpoint, loaded = opened("mixtral", tmp_path)
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])
    counts = []
    calls: Calls = []
    with watching(sites, lambda *call: calls.append(call)):
        for entry in (None, get_format("int4-g32"), None):
            if entry is None:
                loaded.run(WINDOW)
            else:
                with quantized(loaded.model, entry):
                    loaded.run(WINDOW)
            counts.append(sum(site.tensor.endswith("proj.weight") for call in calls for site in call[0]))
            calls.clear()
    assert counts == [8, 8, 8]


def test_layers_with_equal_weights_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.k_proj.weight.copy_(model.model.layers[0].self_attn.v_proj.weight)
            layer.self_attn.v_proj.weight.copy_(model.model.layers[0].self_attn.v_proj.weight)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    loaded = load_model(checkpoint, "cpu", "float32")
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])
    assert {site.tensor for _, own in sites.held for site in own} == {site.tensor for site in sites.sites}
    assert all(running.name == site.tensor for running, own in sites.held for site in own)


def test_a_weight_that_the_model_does_not_hold_is_named(tmp_path: Path) -> None:
    checkpoint, loaded = opened("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        loaded.model.get_parameter(name).add_(1)
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])
    assert sites.unmatched == (name,)
    assert name not in {site.tensor for site in sites.sites}


def test_stacked_experts_of_an_undeclared_architecture_are_named(tmp_path: Path) -> None:
    checkpoint, loaded = opened("gpt_oss", tmp_path)
    sites = find_sites(loaded, checkpoint, roles_from_names(checkpoint.tensors))
    assert set(sites.unmatched) == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    assert any("q_proj" in site.tensor for site in sites.sites)


def test_nothing_stays_installed_after_an_error(tmp_path: Path) -> None:
    from torch.overrides import _get_current_function_mode_stack

    checkpoint, loaded = opened("llama", tmp_path)
    sites = find_sites(loaded, checkpoint, read_roles(checkpoint)[0])

    def fail(*_: object) -> None:
        raise KeyError

    with pytest.raises(KeyError), watching(sites, fail):
        loaded.run(WINDOW)
    assert not _get_current_function_mode_stack()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
