"""Shuffled parameter sharing against an independent float64 BERT, and as a transformers model."""

import json
import math
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.utils.output_capturing import OutputRecorder

from peakd_ds.sps import (
    SHARINGS,
    SPSBertConfig,
    SPSBertForSequenceClassification,
    execution_order,
    init_from_encoder,
)
from peakd_ds.sps.bert import SPSBertSelfAttention

# Stored layers from 1 in running order; ' marks the run that exchanges query and key when the exchange is on.
ORDERS = {
    ("none", 1): "1",
    ("none", 2): "1 2",
    ("none", 3): "1 2 3",
    ("none", 4): "1 2 3 4",
    ("none", 6): "1 2 3 4 5 6",
    ("sps", 1): "1 1'",
    ("sps", 2): "1 2 1' 2'",
    ("sps", 3): "1 2 3 1' 2' 3'",
    ("sps", 4): "1 2 3 4 1' 2' 3' 4'",
    ("sps", 6): "1 2 3 4 5 6 4' 5' 6'",
    ("cycle", 1): "1 1'",
    ("cycle", 2): "1 2 1' 2'",
    ("cycle", 3): "1 2 3 1' 2' 3'",
    ("cycle", 4): "1 2 3 4 1' 2' 3' 4'",
    ("cycle", 6): "1 2 3 4 5 6 4' 5' 6'",
    ("cycle_rev", 1): "1 1'",
    ("cycle_rev", 2): "1 2 2' 1'",
    ("cycle_rev", 3): "1 2 3 3' 2' 1'",
    ("cycle_rev", 4): "1 2 3 4 4' 3' 2' 1'",
    ("cycle_rev", 6): "1 2 3 4 5 6 6' 5' 4'",
    ("sequence", 1): "1 1'",
    ("sequence", 2): "1 1' 2 2'",
    ("sequence", 3): "1 1' 2 2' 3 3'",
    ("sequence", 4): "1 1' 2 2' 3 3' 4 4'",
    ("sequence", 6): "1 2 3 4 4' 5 5' 6 6'",
}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def expected_order(sharing, num_layers, exchange):
    runs = ORDERS[sharing, num_layers].split()
    return tuple((int(run.rstrip("'")) - 1, exchange and run.endswith("'")) for run in runs)


def randomise(model, seed=0):
    """Random values in every parameter, biases and norms too; BERT's own initial ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        parameter.data = 1 + noise if name.endswith("LayerNorm.weight") else noise
    return model


def make_student(num_layers=3, sharing="sps", shuffle_qk=None, attention="eager", **settings):
    config = SPSBertConfig(num_hidden_layers=num_layers, sharing=sharing, shuffle_qk=shuffle_qk, **(SIZES | settings))
    config._attn_implementation = attention
    return randomise(SPSBertForSequenceClassification(config)).eval()


def make_inputs(rows=3, tokens=7):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(rows, tokens, dtype=torch.long)
    attention_mask[1, 4:] = 0
    return {
        "input_ids": torch.randint(SIZES["vocab_size"], (rows, tokens), generator=generator),
        "attention_mask": attention_mask,
        "token_type_ids": torch.randint(2, (rows, tokens), generator=generator),
    }


# -- A BERT classifier from its definition (Devlin et al. 2018) on a state dict, without transformers --------


def affine(state, name, x):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def layer_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / deviation * state[name + ".weight"] + state[name + ".bias"]


def reference_layer(state, name, x, mask, transposed):
    rows, tokens, hidden = x.shape
    heads = SIZES["num_attention_heads"]

    def split(y):
        return y.reshape(rows, tokens, heads, hidden // heads).permute(0, 2, 1, 3)

    query, key, value = (split(affine(state, f"{name}.attention.self.{part}", x)) for part in ("query", "key", "value"))
    scores = query @ key.permute(0, 1, 3, 2) / math.sqrt(hidden // heads)
    if transposed:  # exchanging query and key is the same as transposing Q K^T, before the mask
        scores = scores.permute(0, 1, 3, 2)
    weights = torch.exp(scores) * mask[:, None, None, :]
    weights = weights / weights.sum(-1, keepdim=True)
    context = (weights @ value).permute(0, 2, 1, 3).reshape(rows, tokens, hidden)
    x = layer_norm(
        state,
        f"{name}.attention.output.LayerNorm",
        x + affine(state, f"{name}.attention.output.dense", context),
    )
    inner = affine(state, f"{name}.intermediate.dense", x)
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return layer_norm(state, f"{name}.output.LayerNorm", x + affine(state, f"{name}.output.dense", inner))


def reference_forward(state, inputs, order):
    """Hidden states (embeddings first) and logits."""
    table = {name: state[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    tokens = inputs["input_ids"].shape[1]
    x = table["word"][inputs["input_ids"]] + table["token_type"][inputs["token_type_ids"]] + table["position"][:tokens]
    hidden_states = [layer_norm(state, "bert.embeddings.LayerNorm", x)]
    for index, swapped in order:
        name = f"bert.encoder.layer.{index}"
        hidden_states.append(reference_layer(state, name, hidden_states[-1], inputs["attention_mask"], swapped))
    pooled = torch.tanh(affine(state, "bert.pooler.dense", hidden_states[-1][:, 0]))
    return hidden_states, affine(state, "classifier", pooled)


# -- Order and configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharing", "num_layers"), ORDERS)
def test_execution_order(sharing, num_layers):
    assert execution_order(num_layers, sharing, False) == expected_order(sharing, num_layers, False)
    assert execution_order(num_layers, sharing) == expected_order(sharing, num_layers, sharing == "sps")
    if sharing != "none":
        assert execution_order(num_layers, sharing, True) == expected_order(sharing, num_layers, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "sps", None), "num_layers is 0"),
        ((3, "albert", None), "sharing is 'albert'.*none, sps, cycle, cycle_rev, sequence"),
        ((3, "none", True), "shuffle_qk is True with sharing 'none'"),
    ],
)
def test_impossible_order_is_refused(arguments, message):
    num_layers, sharing, shuffle_qk = arguments
    with pytest.raises(ValueError, match=message):
        execution_order(num_layers, sharing, shuffle_qk)
    with pytest.raises(ValueError, match=message):
        SPSBertConfig(num_hidden_layers=num_layers, sharing=sharing, shuffle_qk=shuffle_qk)


@pytest.mark.parametrize("decoder", [{"is_decoder": True}, {"add_cross_attention": True}])
def test_decoder_is_refused(decoder):
    with pytest.raises(ValueError, match="SPS is an encoder"):
        SPSBertConfig(**decoder)


@pytest.mark.parametrize(
    ("sharing", "shuffle_qk"),
    [("none", None), ("none", False), *product(SHARINGS[1:], [None, False, True])],
)
def test_config_round_trip(sharing, shuffle_qk, tmp_path):
    config = SPSBertConfig(num_hidden_layers=6, sharing=sharing, shuffle_qk=shuffle_qk, num_labels=3)
    assert config.shuffle_qk is ((sharing == "sps") if shuffle_qk is None else shuffle_qk)
    assert config.num_effective_layers == (6 if sharing == "none" else 9)
    config.save_pretrained(tmp_path)
    again = [
        SPSBertConfig.from_dict(config.to_dict()),
        SPSBertConfig(**json.loads(config.to_json_string())),
        SPSBertConfig.from_pretrained(tmp_path),
    ]
    for other in again:
        assert (other.num_hidden_layers, other.sharing, other.num_labels) == (6, sharing, 3)
        assert other.shuffle_qk is config.shuffle_qk
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "num_effective_layers" not in saved
    assert SPSBertConfig(**saved, num_effective_layers=77).num_effective_layers == config.num_effective_layers


# -- Parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("num_layers", [1, 3, 6])
def test_parameters_are_those_of_a_plain_bert(num_layers, sharing):
    plain = BertForSequenceClassification(BertConfig(num_hidden_layers=num_layers, **SIZES))
    student = SPSBertForSequenceClassification(SPSBertConfig(num_hidden_layers=num_layers, sharing=sharing, **SIZES))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in plain.parameters())


def test_initial_values_have_the_scale_of_bert():
    student = SPSBertForSequenceClassification(SPSBertConfig(num_hidden_layers=2, **(SIZES | {"hidden_size": 64})))
    for name, parameter in student.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "LayerNorm" in name:
            assert torch.all(parameter == 1), name
        else:
            assert 0.01 < parameter.std() < 0.03, name


# -- Forward and backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("sharing", "num_layers"), ORDERS)
def test_forward_equals_reference(sharing, num_layers, attention):
    inputs = make_inputs()
    for exchange in [False] if sharing == "none" else [False, True]:
        student = make_student(num_layers, sharing, exchange, attention)
        with torch.no_grad():
            output = student(**inputs, output_hidden_states=True)
            hidden_states, logits = reference_forward(
                student.state_dict(), inputs, expected_order(sharing, num_layers, exchange)
            )
        assert len(output.hidden_states) == len(hidden_states) == student.config.num_effective_layers + 1
        for ours, reference in zip(output.hidden_states, hidden_states, strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
        torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-12)


def test_exchange_changes_the_output():
    inputs = make_inputs()
    with torch.no_grad():
        difference = make_student(3, "sps")(**inputs).logits - make_student(3, "cycle")(**inputs).logits
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("sharing", ["sps", "cycle_rev", "sequence"])
@pytest.mark.parametrize("num_layers", [2, 6])
def test_gradients_equal_reference(num_layers, sharing):
    inputs = make_inputs()
    student = make_student(num_layers, sharing, shuffle_qk=True, attention="sdpa")
    weights = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (student(**inputs).logits * weights).sum().backward()

    state = {name: tensor.clone().requires_grad_() for name, tensor in student.state_dict().items()}
    _, logits = reference_forward(state, inputs, expected_order(sharing, num_layers, True))
    (logits * weights).sum().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-10, atol=1e-11, msg=name)


def test_inputs_embeds_and_position_ids():
    student, inputs = make_student(), make_inputs()
    embeds = student.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(7).flip(0).expand(3, 7)
    rest = {"attention_mask": inputs["attention_mask"], "token_type_ids": inputs["token_type_ids"]}
    with torch.no_grad():
        from_embeds = student(inputs_embeds=embeds, position_ids=positions, **rest).logits
        from_ids = student(**inputs, position_ids=positions).logits
        assert torch.equal(from_embeds, from_ids)
        assert not torch.allclose(from_ids, student(**inputs).logits)


def test_attentions_of_every_run_are_returned():
    student, inputs = make_student(2, "sps"), make_inputs()
    with torch.no_grad():
        output = student(**inputs, output_attentions=True)
        hidden_states, _ = reference_forward(student.state_dict(), inputs, expected_order("sps", 2, True))
    assert [weights.shape for weights in output.attentions] == [(3, 2, 7, 7)] * 4
    # Without the mask the weights of the exchanged run are softmax((Q K^T)^T) of its input.
    layer = student.bert.encoder.layer[1].attention.self
    query, key = (linear(hidden_states[3]).view(3, 7, 2, 8).transpose(1, 2) for linear in (layer.query, layer.key))
    expected = ((query @ key.mT).mT / math.sqrt(8))[0].softmax(-1)
    torch.testing.assert_close(output.attentions[3][0], expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(
    not hasattr(OutputRecorder, "num_hidden_layers_key"), reason="this transformers takes no negative indices"
)
def test_negative_hidden_state_index_counts_from_the_effective_depth():
    student, inputs = make_student(3, "sps"), make_inputs()
    with torch.no_grad():
        every = student(**inputs, output_hidden_states=True).hidden_states
        selected = student(**inputs, output_hidden_states=[-2]).hidden_states
    assert [index for index, state in enumerate(selected) if state is not None] == [5]
    assert torch.equal(selected[5], every[5])


@pytest.mark.parametrize("return_dict", [True, False])
def test_losses(return_dict):
    inputs = make_inputs()
    cases = [
        (3, torch.tensor([0, 2, 1]), nn.functional.cross_entropy),
        (
            1,
            torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
            lambda x, y: nn.functional.mse_loss(x[:, 0], y),
        ),
        (
            2,
            torch.tensor([[0.0, 1], [1, 1], [1, 0]], dtype=torch.float64),
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ]
    for num_labels, labels, loss in cases:
        student = make_student(2, num_labels=num_labels)
        output = student(**inputs, labels=labels, return_dict=return_dict)
        assert output[1].shape == (3, num_labels)
        torch.testing.assert_close(output[0], loss(output[1], labels))


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_dropout_acts_in_training_only(dropout, attention):
    inputs = make_inputs()
    student = make_student(attention=attention, **({"classifier_dropout": 0.0} | NO_DROPOUT | {dropout: 0.5}))
    with torch.no_grad():
        plain = student(**inputs).logits
        assert torch.equal(student(**inputs).logits, plain)
        student.train()
        torch.manual_seed(0)
        first = student(**inputs).logits
        second = student(**inputs).logits
        torch.manual_seed(0)
        assert torch.equal(student(**inputs).logits, first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, plain)


# -- No module is written to ---------------------------------------------------------------------------------


def test_forward_writes_no_module_attribute(monkeypatch):
    student, inputs = make_student(), make_inputs()
    student(**inputs)

    def refuse(module, name, value):
        raise AssertionError(f"forward sets {type(module).__name__}.{name}")

    before = [dict(vars(module)) for module in student.modules()]
    children = [dict(module._modules) for module in student.modules()]
    monkeypatch.setattr(nn.Module, "__setattr__", refuse)
    student(**inputs).logits.sum().backward()
    monkeypatch.undo()
    assert [dict(vars(module)) for module in student.modules()] == before
    assert [dict(module._modules) for module in student.modules()] == children


def test_two_threads_get_the_same_results():
    student = make_student(attention="sdpa")
    batches = [make_inputs(tokens=tokens) for tokens in (5, 7)]
    with torch.no_grad():
        expected = [student(**batch, output_hidden_states=True) for batch in batches]
    results = [[], []]

    def work(number):
        with torch.no_grad():
            for _ in range(20):
                results[number].append(student(**batches[number], output_hidden_states=True))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, alone in zip(results, expected, strict=True):
        assert len(outputs) == 20
        for output in outputs:
            assert torch.equal(output.logits, alone.logits)
            assert len(output.hidden_states) == 7
            assert all(map(torch.equal, output.hidden_states, alone.hidden_states))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, monkeypatch):
    inputs = make_inputs()
    runs = []
    forward = SPSBertSelfAttention.forward

    def counted(self, *args, **kwargs):
        runs.append(kwargs["swap_qk"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SPSBertSelfAttention, "forward", counted)

    def gradients(checkpointing):
        student = make_student(num_layers=2, attention="sdpa").train()  # dropout on: its noise is to be replayed
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs.clear()
        torch.manual_seed(3)
        output = student(**inputs, output_hidden_states=True)
        assert runs == [False, False, True, True]
        (output.logits.sum() + sum(state.pow(2).mean() for state in output.hidden_states)).backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    expected = gradients(False)
    assert len(runs) == 4
    recomputed = gradients(True)
    assert runs[4:] == [True, True, False, False]  # backward runs every layer again, last first
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_compile_captures_one_graph():
    student, inputs = make_student(1, attention="sdpa"), make_inputs()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    compiled(**inputs).logits.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    output = student(**inputs)
    output.logits.sum().backward()
    torch.testing.assert_close(compiled(**inputs).logits, output.logits, rtol=0, atol=1e-12)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


# -- Saving, loading, initialising ---------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    student = make_student(2, attention="sdpa", id2label={0: "a", 1: "b", 2: "c"})
    inputs = make_inputs()
    student.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again, info = SPSBertForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.id2label == student.config.id2label
    assert type(again.bert.encoder.layer[0].attention.self) is SPSBertSelfAttention
    assert torch.equal(again(**inputs).logits, student(**inputs).logits)


def test_importing_sps_is_enough_to_load(tmp_path):
    student, inputs = make_student(2, attention="sdpa"), make_inputs()
    student.save_pretrained(tmp_path / "student")
    torch.save(inputs, tmp_path / "inputs.pt")
    script = f"""
import peakd_ds.sps, torch
from transformers import AutoConfig, AutoModelForSequenceClassification
folder = {str(tmp_path)!r}
assert AutoConfig.from_pretrained(folder + "/student").num_effective_layers == 4
model = AutoModelForSequenceClassification.from_pretrained(folder + "/student", dtype=torch.float64)
assert type(model) is peakd_ds.sps.SPSBertForSequenceClassification
torch.save(model(**torch.load(folder + "/inputs.pt")).logits, folder + "/logits.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    # Not to the bit: ZeRO-3, once used in this process, has put another matrix product into torch's linear layers.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), student(**inputs).logits, rtol=0, atol=1e-12)


def make_encoder(add_pooling_layer=True, **settings):
    config = BertConfig(num_hidden_layers=5, **(SIZES | settings))
    return randomise(BertModel(config, add_pooling_layer=add_pooling_layer), seed=9)


def test_init_from_encoder_copies_the_chosen_layers():
    student, encoder = make_student(3), make_encoder()
    head = {name: tensor.clone() for name, tensor in student.classifier.state_dict().items()}
    init_from_encoder(student, encoder, [5, 2, 2])
    source, ours = encoder.state_dict(), student.bert.state_dict()
    for stored, number in enumerate([5, 2, 2]):
        for name, tensor in student.bert.encoder.layer[stored].state_dict().items():
            assert torch.equal(tensor, source[f"encoder.layer.{number - 1}.{name}"])
    for name in (name for name in source if not name.startswith("encoder.layer.")):
        assert torch.equal(ours[name], source[name]), name
    assert all(torch.equal(student.classifier.state_dict()[name], tensor) for name, tensor in head.items())
    # copies: training the student must not change the encoder, nor one stored layer the other
    student.bert.encoder.layer[1].attention.self.query.weight.data.zero_()
    assert source["encoder.layer.1.attention.self.query.weight"].any()
    assert student.bert.encoder.layer[2].attention.self.query.weight.any()


def test_init_without_a_pooler_keeps_the_students():
    student = make_student(1)
    pooler = student.bert.pooler.dense.weight.clone()
    init_from_encoder(student, make_encoder(add_pooling_layer=False), [1])
    assert torch.equal(student.bert.pooler.dense.weight, pooler)


@pytest.mark.parametrize(
    ("init_layers", "settings", "message"),
    [
        ([1, 2], {}, r"\[1, 2\] names 2 layers, but the student stores 3"),
        ([0, 1, 2], {}, "init_layers has 0, but the encoder's layers are 1 to 5"),
        ([1, 2, 6], {}, "init_layers has 6"),
        ([1, 2, 3], {"hidden_size": 32}, "hidden_size is 16 in the student and 32 in the encoder"),
        ([1, 2, 3], {"num_attention_heads": 4}, "num_attention_heads is 2 in the student and 4"),
        ([1, 2, 3], {"vocab_size": 41}, "vocab_size is 40 in the student and 41"),
    ],
)
def test_init_refuses_what_does_not_fit(init_layers, settings, message):
    student = make_student(3)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        init_from_encoder(student, make_encoder(**settings), init_layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
