"""Tables of tokens in 8 bits: what they give, store and become again, tied to the head or not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.io.precision import saved_size
from weft.memory import lean
from weft.runs.loading import load_tokenizer
from weft.terms import SumLinear
from weft.terms.coded_embedding import CodedEmbedding, CodedHead, code_embeddings
from weft.terms.coverage import untrained
from weft.testing_adapters import tiny_gpt2
from weft.verbs.adapt import adapt
from weft.verbs.compress import run as compress
from weft.verbs.export import export
from weft.verbs.export import run as export_run
from weft.verbs.finetune import finetune
from weft.verbs.merge import merge
from weft.verbs.quantize import quantize
from weft.verbs.quantize import run as quantize_run

ROWS, DIM = 40, 16
IDS = torch.randint(ROWS, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = True, rows: int = ROWS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rounded(W: Tensor) -> Tensor:
    """Row by row, number by number."""
    rows = []
    for row in W.tolist():
        most = max(abs(w) for w in row)
        rows.append([round(w / most * 127) * most / 127 for w in row])
    return torch.tensor(rows)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS % 32).logits
    return found


def expected(model: nn.Module) -> nn.Module:
    """The same with tables that are rounded but dense."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for table in {id(t.weight): t for t in (other.get_input_embeddings(), other.get_output_embeddings())}.values():
            table.weight.copy_(rounded(table.weight))
    return other


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=False), tiny_gpt2], ids=["tied", "untied", "gpt2"])
def test_it_gives_what_rounded_tables_give_saved_and_loaded_and_merged(make, tmp_path: Path):
    model = make()
    plain, tied = expected(model), model.config.tie_word_embeddings
    wanted = logits(plain)
    code_embeddings(model)
    head = model.get_output_embeddings()
    assert type(model.get_input_embeddings()) is CodedEmbedding and type(head) is (CodedHead if tied else SumLinear)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(make())).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    base = AutoModel.from_pretrained(tmp_path / "model")
    assert type(base.get_input_embeddings()) is CodedEmbedding
    merge(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert again.config.tie_word_embeddings is tied and getattr(again.config, "quantization_config", None) is None
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(again))


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_a_code_a_number_and_a_scale_a_row_once(tied, tmp_path: Path):
    before, model = saved_size(llama(tied))[1], llama(tied)
    code_embeddings(model)
    tables = 1 if tied else 2
    assert saved_size(model)[1] == before - tables * ROWS * (4 * DIM - DIM - 4)
    model.save_pretrained(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert saved_size(model)[1] < files < saved_size(model)[1] + 4096  # a header


def test_a_copy_has_a_head_of_its_own_table_and_training_goes_through_both():
    model = llama()
    code_embeddings(model)
    quantize(model, "int8")
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().table[0] is twin.get_input_embeddings()
    assert twin.get_input_embeddings() is not model.get_input_embeddings()
    adapt(model, "lora", 2)
    losses = []
    for saver in (False, True):
        model.zero_grad()
        loss = (lean(model) if saver else model).train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_no_step_changes_is_counted(tied, capsys: pytest.CaptureFixture[str]):
    """Where all is to be trained, tables in codes are named as matrices in codes are."""
    model = llama(tied, rows=8192)
    code_embeddings(model)
    assert untrained(model) == [*([] if tied else ["lm_head"]), "model.embed_tokens"]
    finetune(model, load_tokenizer("pico"), "a b c d e f g " * 40, "full", steps=1, batch=1, window=32)
    assert f"{2 - tied} matrices are in codes that no step changes, such as " in capsys.readouterr().err


def test_adapters_on_it_are_saved_and_loaded(tmp_path: Path):
    model, other = llama(), llama()
    for one in (model, other):
        code_embeddings(one)
    adapt(model, "lora", 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.requires_grad)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), logits(model))


class Scaled(nn.Embedding):
    """Rows times a number."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_what_cannot_be_coded_is_refused_with_what_to_do():
    model = llama()
    model.model.embed_tokens = Scaled(ROWS, DIM)
    with pytest.raises(WeftError, match="is a Scaled, no plain table of rows.*leave --embeddings out"):
        code_embeddings(model)
    model = llama()
    model.model.extra = nn.Embedding(ROWS, DIM, _weight=model.model.embed_tokens.weight)
    model.model.extra.weight = model.model.embed_tokens.weight
    with pytest.raises(WeftError, match=r"the weight of model\.extra too"):
        code_embeddings(model)
    for verb, options in ((compress, {"method": "svd"}), (quantize_run, {})):
        with pytest.raises(WeftError, match="coded in 8bit, not in '4bit'"):
            verb("no such model", "nowhere", embeddings="4bit", **options)


def test_the_verbs_code_tables_beside_matrices(tmp_path: Path):
    tokenizer = load_tokenizer("pico")
    llama(rows=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("def f(a):\n    return a\n" * 50)
    text = {"calibration": tmp_path / "text.txt", "windows": 2, "window": 16}
    done = [
        quantize_run(str(tmp_path / "model"), tmp_path / "quantized", bits=4, embeddings="8bit"),
        compress(str(tmp_path / "model"), tmp_path / "compressed", method="svd", embeddings="8bit", **text),
    ]
    for told, name in zip(done, ("quantized", "compressed"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(model.get_output_embeddings()) is CodedHead and saved_size(model)[1] == told["bytes"]
        assert told["bytes"] < 0.4 * told["bytes_before"]
    with pytest.raises(WeftError, match="in codes, which no format holds"):
        export(model, tmp_path / "no", "hf")
    export_run(str(tmp_path / "compressed"), tmp_path / "served", format="hf", dtype="float32")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-4, atol=1e-4)


def test_an_embedding_that_the_model_has_not_is_a_checkpoint_s_fault(tmp_path: Path):
    model = llama()
    code_embeddings(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"rows": 40', '"rows": 41'))
    with pytest.raises(WeftError, match=r"coded embedding at model\.embed_tokens, where the model has none of"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_of_another_layout_keeps_its_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=DIM, n_layer=1, n_head=2, n_positions=32))
    code_embeddings(model)
    assert type(model.transformer.wpe) is nn.Embedding
