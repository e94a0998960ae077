"""Loading: what is read, what is refused, what is left alone."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Mamba2Config, Phi3Config

from forethought.config import Config, Method, Model, UserError, from_dict
from forethought.data.positions import ThoughtFormat, thought_format
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import check_context_length, device, load_model, load_tokenizer
from helpers.runs import options


@pytest.fixture
def start(tmp_path: Path) -> Config:
    """A config whose model is a small architecture with fresh weights."""
    return from_dict(options(tmp_path, "run"))


def form(overhead: int) -> ThoughtFormat:
    return ThoughtFormat(before=(), after=(), open=(3,), close=(4,) * (overhead - 1), bos=None, pad=0)


def test_fresh_weights_follow_from_the_seed_and_leave_the_global_generator_alone(start: Config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = load_model(start.model, 1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    same, other = load_model(start.model, 1).state_dict(), load_model(start.model, 2).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_a_model_is_ready_to_train_in_fp32_without_dropout(start: Config, tmp_path: Path):
    model = load_model(start.model, 0)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = load_model(Model(path=str(tmp_path / "half")), 0)
    assert not loaded.training
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, model.get_parameter(name).float())


def test_an_architecture_may_be_a_folder_or_its_config_file(start: Config):
    file = str(Path(start.model.path) / "config.json")
    one, other = load_model(start.model, 3), load_model(Model(path=file, init="random"), 3)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_tied_weights_stay_one_tensor_and_are_stored_once(start: Config, tmp_path: Path):
    model = load_model(start.model, 0)
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load_model(Model(path=str(tmp_path / "tied")), 0)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_tokenizer_may_come_from_elsewhere(start: Config, tmp_path: Path):
    embedded = load_tokenizer(Model())
    embedded.save_pretrained(tmp_path / "tokenizer")
    own = load_tokenizer(Model(path="nothing/at-all", tokenizer=str(tmp_path / "tokenizer")))
    assert own.get_vocab() == embedded.get_vocab()
    with pytest.raises(UserError, match=r"^model.tokenizer = './nothing' cannot be loaded: no such folder$"):
        load_tokenizer(Model(tokenizer="./nothing"))


def test_bf16_computes_in_bf16_near_fp32(start: Config):
    model, tokens = load_model(start.model, 0), torch.arange(1, 9)[None]
    plain = model(input_ids=tokens).logits.detach()
    assert compute_copy(model, "fp32") is model
    assert torch.equal(model(input_ids=tokens).logits, plain)
    half = compute_copy(model, "bf16")(input_ids=tokens).logits.detach()
    assert half.dtype == torch.bfloat16
    assert 0 < float((half.float() - plain).abs().max()) < 0.1 * float(plain.abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"^model.device = 'cuda': no CUDA device"):
        device(Model(device="cuda"))
    assert device(Model()) == torch.device("cpu")


def test_rows_that_fit_exactly_are_let_through_and_one_token_more_is_not(start: Config):
    def config(window: int, **method: Any) -> Config:
        return from_dict(options(Path(start.run).parent, "x", corpus={"window": window}, method=method))

    check_context_length(config(248), form(4))
    with pytest.raises(UserError, match=r"^corpus.window = 249 with 8 tokens .* takes 257 tokens, .* window has 256;"):
        check_context_length(config(249), form(4))
    check_context_length(config(256, name="cpt"), form(4))
    with pytest.raises(UserError, match=r"^corpus.window = 257 takes 257 tokens"):
        check_context_length(config(257, name="cpt"), form(4))


def test_rows_must_fit_before_longrope_changes_its_frequencies(start: Config, tmp_path: Path):
    """Beyond, the longest row of a batch would set the frequencies of all of them."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48}
    rope |= {"long_factor": [4.0] * 48}
    sizes: dict[str, Any] = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    Phi3Config(**sizes, rope_parameters=rope, pad_token_id=0).save_pretrained(tmp_path / "phi3")
    path = {"path": str(tmp_path / "phi3"), "init": "random"}

    def config(window: int) -> Config:
        return from_dict(options(Path(start.run).parent, "x", corpus={"window": window}, model=path))

    check_context_length(config(56), form(4))
    with pytest.raises(UserError, match=r"65 tokens, .* has 64 of its 256, since LongRoPE's .* there;"):
        check_context_length(config(57), form(4))


def write_gguf(file: Path, width: int = 32, heads: int = 2) -> dict[str, torch.Tensor]:
    """A one-layer llama of random weights with a tokenizer of single letters. Returns the weights by gguf name."""
    letters = ["<|endoftext|>", "<s>", "</s>", "<think>", "</think>", *"abcdefghi", "ab"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * 10)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(letters), width), "output": (len(letters), width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_opens_with_its_weights_and_tokenizer(tmp_path: Path):
    weights = write_gguf(tmp_path / "m.gguf")
    model = load_model(Model(path=str(tmp_path / "m.gguf")), 0)
    assert model.config.model_type == "llama"
    for name, ours in {"blk.0.ffn_up": "model.layers.0.mlp.up_proj", "output": "lm_head"}.items():
        parameter = model.get_parameter(f"{ours}.weight")
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, weights[f"{name}.weight"])
    tokenizer = load_tokenizer(Model(path=str(tmp_path / "m.gguf")))
    assert tokenizer.convert_tokens_to_ids(["c", "<think>"]) == [7, 3]


def test_what_a_model_folder_brings_along_is_never_run(start: Config, tmp_path: Path):
    folder = tmp_path / "model"
    load_model(start.model, 0).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "zork", "auto_map": {"AutoConfig": "x.A", "AutoModelForCausalLM": "x.B"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="contains custom code"):
        load_model(Model(path=str(folder)), 0)
    assert not (tmp_path / "ran").exists()


def test_a_saved_tokenizer_is_the_embedded_one(tmp_path: Path):
    load_tokenizer(Model()).save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        again("ball under red <think>")["input_ids"] == load_tokenizer(Model())("ball under red <think>")["input_ids"]
    )


def test_pickled_weights_are_not_read(start: Config, tmp_path: Path):
    model = load_model(start.model, 0)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(Model(path=str(tmp_path / "model")), 0)


def test_a_model_without_a_cache_for_its_state_is_refused(tmp_path: Path):
    Mamba2Config(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=1
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Mamba2ForCausalLM takes no .*past_key_values"):
        load_model(Model(path=str(tmp_path), init="random"), 0)


def test_a_model_whose_generation_options_are_at_odds_can_be_saved(start: Config, tmp_path: Path):
    load_model(start.model, 0).save_pretrained(tmp_path / "model")
    options = {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(options))
    load_model(Model(path=str(tmp_path / "model")), 0).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["temperature"] == 0.6


def saved(start: Config, folder: Path, added: Any = (), pad: str = "") -> Path:
    """A model and its tokenizer, to which tokens are added that have no embeddings."""
    load_model(start.model, 0).save_pretrained(folder)
    tokenizer = load_tokenizer(start.model)
    tokenizer.add_tokens(list(added))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_an_embedding_is_refused(start: Config, tmp_path: Path):
    size = start_size(start)
    folder = saved(start, tmp_path / "more", added=["river", "lake"])
    with pytest.raises(UserError) as refused:
        load_tokenizer(Model(path=str(folder)))
    assert str(refused.value) == (
        f"model.path = {str(folder)!r}: its tokenizer has {size + 2} tokens, but the model has {size} embeddings, none "
        f"for 'river' ({size}); use its own tokenizer, or resize the embeddings"
    )
    with pytest.raises(UserError, match=r"^model.tokenizer = .*none for 'river'"):
        load_tokenizer(Model(path=start.model.path, init="random", tokenizer=str(folder)))


def start_size(start: Config) -> int:
    return load_model(start.model, 0).get_input_embeddings().num_embeddings


def test_a_pad_token_without_an_embedding_is_replaced(start: Config, tmp_path: Path):
    tokenizer = load_tokenizer(Model(path=str(saved(start, tmp_path / "pad", pad="<other pad>"))))
    size = start_size(start)
    assert tokenizer.pad_token_id < size
    assert thought_format(tokenizer, Method()).pad < size


def test_an_end_token_without_an_embedding_is_refused_though_it_pads(start: Config, tmp_path: Path):
    folder = saved(start, tmp_path / "end")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<other end>", "pad_token": "<other end>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="none for '<other end>'"):
        load_tokenizer(Model(path=str(folder)))


def test_weights_that_are_not_finite_and_adapters_are_refused(start: Config, tmp_path: Path):
    model = load_model(start.model, 0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"not finite: model.layers.1.mlp.up_proj.weight holds NaN"):
        load_model(Model(path=str(tmp_path / "nan")), 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for load in (load_tokenizer, lambda options: load_model(options, 0)):
        with pytest.raises(UserError, match="it holds an adapter alone; give the model with the adapter merged"):
            load(Model(path=str(tmp_path / "adapter")))


def test_another_default_dtype_of_the_process_is_named(start: Config):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UserError, match=r"^torch's default dtype is torch.float64: set it back with torch.set_def"):
            load_model(start.model, 0)
    finally:
        torch.set_default_dtype(torch.float32)
