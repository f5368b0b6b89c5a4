"""Checkpoints that others quantised and that become plain weights: GPTQ, AWQ, compressed-tensors, torchao.

The packers are written here, number by number.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from helpers.finished import finished
from luthier.model.loading import load_model, locate
from luthier.model.packed_files import awq_weight, gptq_weight, unpacked
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.export import export

IDS = torch.tensor([[5, 9, 30, 7, 99]])
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs whose codes follow each other in a number


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "plain"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    tiny("llama", vocab_size=260, layers=2, eos_token_id=2, bos_token_id=0, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def joined(codes, bits, order=None):
    """[N, 32 / bits] codes -> [N] int32."""
    out = []
    for row in codes.tolist():
        number = sum(row[place] << (bits * i) for i, place in enumerate(order or range(len(row))))
        out.append(number - (1 << 32) if number >= 1 << 31 else number)
    return torch.tensor(out, dtype=torch.int32)


def by_outputs(codes, bits, order=None):
    """[N, out] -> [N, out * bits / 32]"""
    return joined(codes.reshape(-1, 32 // bits), bits, order).reshape(len(codes), -1)


def quantised(weight, bits, groups):
    """(codes [in, out], zeros [G, out], scales [G, out] float16, the weight that they stand for [out, in])."""
    turned, top = weight.float().T, 2**bits - 1
    members = [turned[groups == g] for g in range(int(groups.max()) + 1)]
    low, high = (torch.stack([f(m) for m in members]) for f in (lambda m: m.amin(0), lambda m: m.amax(0)))
    scales = ((high - low) / top).clamp_min(1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, top).long()
    codes = (turned / scales.float()[groups] + zeros[groups]).round().clamp(0, top).long()
    return codes, zeros, scales, ((codes - zeros[groups]) * scales.float()[groups]).T


def packed(plain, folder, method, bits=4, turned=False, second=False, mark=True):
    """A checkpoint in this layout. Returns the weights that it stands for."""
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    out, whole = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, t in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            out[name], whole[name] = t.half(), t.half().float()
            continue
        inputs = t.shape[1]
        groups = torch.arange(inputs) // GROUP
        groups = groups[torch.randperm(inputs, generator=generator)] if turned else groups
        codes, zeros, scales, whole[name] = quantised(t, bits, groups)
        layer, order = name.removesuffix(".weight"), AWQ_ORDER if method == "awq" else None
        stored = zeros if second or method == "awq" else zeros - 1
        out[f"{layer}.qzeros"], out[f"{layer}.scales"] = by_outputs(stored, bits, order), scales
        if method == "awq":
            out[f"{layer}.qweight"] = by_outputs(codes, bits, order)
        else:
            out[f"{layer}.qweight"] = by_outputs(codes.T, bits).T.contiguous()  # along the inputs
            out[f"{layer}.g_idx"] = groups.int()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": method, "bits": bits, "group_size": GROUP}
    said |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": turned, "sym": False}
    said |= {"checkpoint_format": "gptq_v2"} if second else {}
    if mark:
        edit(folder, quantization_config=said, dtype="float16")
    else:
        (folder / "quantize_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "quant_method"}))
    return whole


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_codes_lie_from_the_lowest_bits_up():
    assert unpacked(torch.tensor([0x76543210, -1]), 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [15] * 8]
    assert unpacked(torch.tensor([0x04030201]), 8).tolist() == [[1, 2, 3, 4]]


def test_a_weight_worked_by_hand():
    """Eight inputs, eight outputs, one group: code less zero, times the scale."""
    codes = torch.full((1, 8), 0x76543210, dtype=torch.int32)  # inputs 0 to 7 have the codes 0 to 7, for each output
    zeros, scales = torch.tensor([[0x22222222]], dtype=torch.int32), torch.full((1, 8), 0.5)
    first = gptq_weight(codes, zeros, scales, None, 4)  # the zero is stored less 1: it is 3
    assert first[0].tolist() == first[7].tolist() == [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert gptq_weight(codes, zeros, scales, None, 4, second=True)[0].tolist() == [x + 0.5 for x in first[0].tolist()]
    one = awq_weight(
        torch.full((8, 1), 0x76543210, dtype=torch.int32), zeros, scales
    )  # here, the outputs have codes 0 to 7
    assert one[:, 0].tolist() == [(code - 2) / 2 for code in (0, 4, 1, 5, 2, 6, 3, 7)]


@pytest.mark.parametrize(
    "how",
    [
        {"method": "gptq"}, {"method": "gptq", "bits": 8}, {"method": "gptq", "bits": 2}, {"method": "gptq", "turned": True},
        {"method": "gptq", "second": True}, {"method": "awq"}, {"method": "gptq", "mark": False},
    ],
)  # fmt: skip
def test_gptq_and_awq_become_the_weights_that_the_codes_stand_for(how, plain, tmp_path):
    whole = packed(plain, tmp_path / "q", **how)
    view = load_model(locate(str(tmp_path / "q")), device="cpu")
    assert view.dtype == torch.float32 and len(whole) == len(view.anatomy.parameters)
    assert all(torch.equal(view.weight(n), t) for n, t in whole.items())
    assert getattr(view.module.config, "quantization_config", None) is None
    assert view.module.config._name_or_path == str(tmp_path / "q")


def test_tensors_that_do_not_fit_cost_a_sentence(plain, tmp_path):
    packed(plain, tmp_path / "q", "gptq")
    file = tmp_path / "q/model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0.mlp.up_proj"
    save_file({**tensors, f"{layer}.scales": torch.ones(3, 128).half()}, file, metadata={"format": "pt"})
    with pytest.raises(
        RecipeError, match=r"cannot be loaded \(codes \(64, 128\), zeros .* and scales \(3, 128\) do not fit"
    ):
        load_model(locate(str(tmp_path / "q")), device="cpu")
    save_file({n: t for n, t in tensors.items() if n != f"{layer}.scales"}, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=f"{layer} has no qzeros or no scales"):
        load_model(locate(str(tmp_path / "q")), device="cpu")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_on_such_a_checkpoint_learns_and_exports_plain_weights(method, plain, tmp_path):
    packed(plain, tmp_path / "q", method)
    run = finished(tmp_path / "r", str(tmp_path / "q"), learning_rate=0.01)
    state = json.loads((run / "run.json").read_text())
    assert state["after"]["loss"]["value"] < state["before"]["loss"]["value"]
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "q")
    assert export(run, "hf", tmp_path / "hf")["difference"] < 1e-3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert getattr(again.config, "quantization_config", None) is None


# --- with the packages of others, where they are installed ---


def compressed(plain, folder, scheme):
    """A checkpoint that the package compressed-tensors packed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model, how = AutoModelForCausalLM.from_pretrained(plain), preset_name_to_scheme(scheme, ["Linear"])
    if how.weights.group_size:
        how.weights.group_size = GROUP
    groups = {"config_groups": {"group_0": how}, "ignore": ["lm_head"], "quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig(**groups))
    for module in model.modules():
        if (scheme_of := getattr(module, "quantization_scheme", None)) is not None:
            args, w = scheme_of.weights, module.weight.detach()
            w = w.view(len(w), -1, args.group_size) if args.group_size else w.unsqueeze(1)
            scale, zero = calculate_qparams(w.amin(-1), w.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    packer = ModelCompressor.from_pretrained_model(model)
    packer.compress_model(model)
    model.save_pretrained(folder)
    packer.update_config(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptqmodel_computes_the_same_in_its_own_layers(method, plain, tmp_path):
    """Its kernel on a CPU works in bfloat16, so logits of at most 0.5 differ by 2e-3; quantising itself moves them by 0.05."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    packed(plain, tmp_path / "q", method)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32, device_map={"": "cpu"})
    assert not isinstance(theirs.model.layers[0].mlp.up_proj, torch.nn.Linear)
    ours = load_model(locate(str(tmp_path / "q")), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(ours.module), logits(theirs), rtol=0, atol=5e-3)
    assert float((logits(theirs) - logits(AutoModelForCausalLM.from_pretrained(plain))).abs().max()) > 0.02


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_compressed_tensors_have_transformers_logits_and_train(scheme, plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    compressed(plain, tmp_path / "q", scheme)
    trains_as_transformers_opens(tmp_path, plain, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_torchao_has_transformers_logits_and_trains(plain, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "q")
    byte_tokenizer().save_pretrained(tmp_path / "q")
    trains_as_transformers_opens(tmp_path, plain)


def trains_as_transformers_opens(folder, plain, **how):
    """Logits equal to those of transformers, other than those of the plain model; a run with lora lowers the loss."""
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder / "q", dtype=torch.float32, **how))
    view = load_model(locate(str(folder / "q")), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(view.module), theirs, rtol=1e-5, atol=1e-5)
    assert float((theirs - logits(AutoModelForCausalLM.from_pretrained(plain))).abs().max()) > 1e-4
    assert all(type(p) is torch.nn.Parameter and p.is_floating_point() for p in view.module.parameters())
    run = finished(folder / "r", str(folder / "q"), learning_rate=0.01)
    state = json.loads((run / "run.json").read_text())
    assert state["after"]["loss"]["value"] < state["before"]["loss"]["value"]
    assert export(run, "hf", folder / "hf")["difference"] < 0.05
