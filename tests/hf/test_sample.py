"""`dtron sample`: the tokens are those of transformers, the text comes whole, and the model stays as it was."""

import argparse
import io
import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dtron.__main__ import main
from dtron.data.tokenizer import TextEncoder, train_bpe
from dtron.errors import UserError
from dtron.hf import sample as command
from dtron.hf.generate import CachedAttention, CachedModel, SampleOptions, filter_logits, generate, options_of
from dtron.hf.prompts import Prompt
from dtron.hf.read import OpenedModel
from dtron.hf.sample import sample, stream_text
from dtron.models.attention import CausalAttention
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.rope import Llama3Scaling

ROOT = Path(__file__).resolve().parents[2]
BASE = LlamaConfig(
    vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, rope_theta=500.0, init_std=0.1
)
SCORES: dict[str, Any] = {"attention_scale": 0.7, "attention_softcap": 1.5, "attention_sinks": True}
VARIANTS = {
    "gqa": BASE,
    "mha, tied": replace(BASE, n_kv_heads=4, tie_embeddings=True),
    "rope scaling": replace(BASE, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16)),
    "one kv head, head size of its own": replace(BASE, n_kv_heads=1, head_dim=16),
}
GREEDY = {"max_new_tokens": 40, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "stop_ids": []}
DRAWN = GREEDY | {"temperature": 1.0}
TEXT = "naïve Æsop 🐍 says:  two spaces\n\n日本語のテキスト, and “quotes”.\n"


def hf_model(c: LlamaConfig) -> transformers.LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if s := c.rope_scaling:
        rope |= {"rope_type": s.rope_type, **vars(s)}
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.ffn_dim, head_dim=c.head_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, eos_token_id=None, bos_token_id=None,
        max_position_embeddings=131072, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def with_weights_of(hf: transformers.LlamaForCausalLM, c: LlamaConfig) -> Llama:
    model = Llama(c)
    model.load_state_dict({name.removeprefix("model."): p for name, p in hf.state_dict().items()})
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return with_weights_of(hf_model(BASE), BASE)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """Bytes and few merges, so that characters span tokens; it adds nothing to a text."""
    return train_bpe([TEXT] * 3, 290)


def with_bos(encoder: TextEncoder) -> TextEncoder:
    """As Llama 3's: a token begins every text."""
    tokenizer = Tokenizer.from_str(encoder.json)
    tokenizer.add_special_tokens(["<|begin|>"])
    specials = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, specials)
    return TextEncoder(tokenizer.to_str(), encoder.eos)


def sentencepiece() -> TextEncoder:
    """As Llama 2's: spaces are "▁", the first one is dropped; what is no token is spelt in bytes, as <0x0A>."""
    characters = ["▁", *"aeinosty", "ï"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *characters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    end = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return TextEncoder(tokenizer.to_str(), "</s>")


def prompt(length: int) -> list[int]:
    return torch.randint(0, BASE.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_that_of_transformers(variant: str):
    config = VARIANTS[variant]
    hf = hf_model(config)
    ours = with_weights_of(hf, config)
    for length in (1, 7, 40):
        ids = prompt(length)
        expected = hf.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, length:]
        assert len(set(expected.tolist())) > 5
        assert [*generate(ours, ids, **GREEDY)] == expected.tolist()


@pytest.mark.parametrize("parts", [(48,), (1, 47), (7, 1, 1, 39), (20, 20, 8), (1,) * 48])
def test_the_cache_gives_the_logits_of_the_whole_sequence(parts: tuple[int, ...], model: Llama):
    ids = prompt(48)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    reader, end = CachedModel(model, 48), 0
    for part in parts:
        logits = reader.read(ids[end : end + part])
        end += part
        assert logits.shape == (BASE.vocab_size,)
        torch.testing.assert_close(logits, expected[end - 1], rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="exceeds"):
        reader.read([0])  # full


@pytest.mark.parametrize("change", [{"windows": (5, None)}, {"windows": (None, 4), **SCORES}, SCORES])
def test_windows_soft_cap_and_sinks_are_those_of_the_whole_text(change: dict[str, Any]) -> None:
    """Read in parts that are shorter and longer than the windows; the model makes no mask meanwhile."""
    torch.manual_seed(0)
    model = Llama(replace(BASE, **change)).eval()
    ids = prompt(40)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    reader, end = CachedModel(model, 40), 0
    for part in (3, 1, 1, 9, 1, 20, 1, 4):
        logits = reader.read(ids[end : end + part])
        end += part
        torch.testing.assert_close(logits, expected[end - 1], rtol=0, atol=1e-5)
    assert end == 40 and model.config == replace(BASE, **change)


def test_buffers_are_made_once(model: Llama):
    reader = CachedModel(model, 20)
    reader.read(prompt(7))
    cache = reader.caches[0]
    keys = cache.keys
    assert keys.shape == cache.values.shape == (1, BASE.n_kv_heads, 20, BASE.head_size)
    for i in range(3):
        reader.read([i])
    assert cache.keys is keys and keys.data_ptr() == cache.keys.data_ptr() and cache.length == 10


def test_a_mask_of_documents_is_not_ignored():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="one document"):
        CachedAttention(2, CausalAttention())(q, q, q, torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_a_long_prompt_makes_no_logits_but_the_last(model: Llama):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.numel() // out.size(-1)))
    assert len([*generate(model, prompt(40), **GREEDY | {"max_new_tokens": 3})]) == 3
    hook.remove()
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (999, 1.0), (0, 0.9), (0, 1e-9), (40, 0.7)])
def test_kept_tokens_are_those_of_transformers(temperature: float, top_k: int, top_p: float):
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for seed in range(20):
        logits = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 2 + 7
        logits[seed] = logits[seed + 1]  # a tie
        expected = logits[None]
        for warper in warpers:
            expected = warper(torch.zeros(1, 1, dtype=torch.long), expected)
        ours = filter_logits(logits, temperature, top_k, top_p)
        assert torch.equal(ours.isinf(), expected[0].isinf())
        torch.testing.assert_close(ours.softmax(0), expected[0].softmax(0))
        assert (top_k in (0, 999) and top_p == 1) == bool(ours.isfinite().all())


def test_a_temperature_of_next_to_nothing_is_greedy(model: Llama):
    expected = [*generate(model, [1], **GREEDY)]
    for temperature in (1e-40, 1e-6):
        assert [*generate(model, [1], **GREEDY | {"temperature": temperature})] == expected


def test_tokens_are_drawn_as_often_as_they_are_probable(model: Llama):
    with torch.no_grad():
        probable = filter_logits(model(torch.tensor([[5]]))[0, -1], 1.0, 4, 1.0).softmax(0)
    options = DRAWN | {"top_k": 4, "max_new_tokens": 1}
    drawn = torch.tensor([next(generate(model, [5], **options | {"seed": seed})) for seed in range(2000)])
    counts = torch.bincount(drawn, minlength=BASE.vocab_size) / 2000
    assert (counts > 0).sum() == 4 and (counts - probable).abs().max() < 0.04  # 3.6 standard deviations at most


def test_a_seed_gives_the_same_text_whatever_else_draws(model: Llama):
    first = [*generate(model, [1, 2], **DRAWN)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert [*generate(model, [1, 2], **DRAWN)] == first
    assert torch.equal(torch.get_rng_state(), state)  # a generator of its own
    assert [*generate(model, [1, 2], **DRAWN | {"seed": 1})] != first
    assert len({*first}) > 10


def test_it_ends_before_a_stop_token(model: Llama):
    ids = [*generate(model, [1, 2], **DRAWN)]
    stop = ids[10]
    assert [*generate(model, [1, 2], **DRAWN | {"stop_ids": [stop, 300]})] == ids[: ids.index(stop)]


def members(model: Llama) -> list[tuple[str, int]]:
    """Its modules and parameters, in their order."""
    return [
        (name, id(part)) for name, part in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))
    ]


def test_the_model_stays_as_it_was():
    model = Llama(replace(BASE, tie_embeddings=True))
    tokens = torch.tensor([prompt(9)])
    before, logits = members(model), model(tokens)
    abandoned, other = generate(model, prompt(7), **GREEDY), generate(model, prompt(8), **DRAWN)
    for _ in range(3):  # in the middle of two at once
        next(abandoned), next(other)
        assert members(model) == before
        assert torch.equal(model(tokens), logits) and logits.requires_grad
    assert all(type(block.self_attn.core) is CausalAttention for block in model.layers.values())
    assert [*abandoned] == [*generate(model, prompt(7), **GREEDY)][3:]
    model.layers["1"].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(generate(model, [1], **GREEDY))
    assert members(model) == before and type(model.layers["0"].self_attn.core) is CausalAttention


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected 1 or more"),
        ({"temperature": -0.1}, r"temperature = -0.1: expected 0 \("),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, r"top_k = -1: expected 0 \(off\)"),
        ({"top_p": 0.0}, "top_p = 0.0: expected more than 0"),
        ({"top_p": 1.1}, "top_p = 1.1: .* at most 1"),
        ({"seed": 2**64}, "seed = 18446744073709551616: .*64 bits"),
    ],
)
def test_wrong_options_are_the_users_error(change: dict, said: str, model: Llama):
    with pytest.raises(UserError, match=said):
        generate(model, [1], **GREEDY | change)  # at once, not with the first token


def test_prompts_and_weights_that_cannot_be(model: Llama):
    for ids, said in (([], "no tokens"), ([3, 300], "ids from 3 to 300, but the model's end at 299"), ([-1], "-1")):
        with pytest.raises(UserError, match=said):
            generate(model, ids, **GREEDY)
    broken = Llama(BASE)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    for options in (GREEDY, DRAWN):
        with pytest.raises(UserError, match="not finite"):
            next(generate(broken, [1], **options))


@pytest.mark.parametrize("begins", [True, False])
def test_prompts_are_encoded_as_by_transformers(begins: bool, encoder: TextEncoder, tmp_path: Path):
    encoder = with_bos(encoder) if begins else encoder
    texts = [TEXT, "", "a<|endoftext|>b <|begin|>", " <|endoftext|>"]
    documents = [ids.tolist() for ids in encoder.encode(texts)]
    encoder.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = encoder.encode_prompt(text)
        assert ids == theirs(text)["input_ids"]
        assert (encoder.decode(ids[:1]) == "<|begin|>") == begins
        assert ids.count(encoder.eos_id) == text.count("<|endoftext|>")
    assert [ids.tolist() for ids in encoder.encode(texts)] == documents  # where they spell text
    assert all(ids.count(encoder.eos_id) == 1 for ids in documents)


def test_prompts_of_a_sentencepiece_tokenizer(tmp_path: Path):
    encoder = sentencepiece()
    encoder.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "", " a", "a</s>e"):
        assert encoder.encode_prompt(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "bos", "sentencepiece"])
@pytest.mark.parametrize("at", [0, 1, 7, 12, 40])
def test_streamed_text_is_the_text(kind: str, at: int, encoder: TextEncoder):
    encoder = {"bytes": encoder, "bos": with_bos(encoder), "sentencepiece": sentencepiece()}[kind]
    ids = encoder.encode_prompt("say " + TEXT)
    first, rest = ids[:at], ids[at:]
    while encoder.decode(first).endswith("\ufffd"):  # a prompt is whole characters
        first, rest = ids[: len(first) + 1], ids[len(first) + 1 :]
    pieces = [*stream_text(encoder, first, rest)]
    assert encoder.decode(first) + "".join(pieces) == encoder.decode(ids)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > len(rest) / 4  # no character has more than 4 bytes


def test_text_comes_with_its_token_and_broken_characters_at_the_end(encoder: TextEncoder):
    ids = encoder.encode_prompt("x🐍y")
    snake = ids[1:-1]
    assert len(snake) > 1
    seen = []

    def tokens():
        for token in (ids[-1], *snake, ids[-1], *snake[:-1]):
            yield token
            seen.append("".join(pieces))

    pieces: list[str] = []
    for piece in stream_text(encoder, ids[:1], tokens()):
        pieces.append(piece)
    assert seen[0] == "y" and seen[len(snake)] == "y🐍" and seen[len(snake) + 1] == "y🐍y" and seen[-1] == "y🐍y"
    assert set(seen[1 : len(snake)]) == {"y"}
    assert "".join(pieces) == encoder.decode([ids[-1], *snake, ids[-1], *snake[:-1]])  # at last, as it is


def test_streaming_costs_the_same_for_every_token(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    lengths = []
    decode = TextEncoder.decode
    monkeypatch.setattr(TextEncoder, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    ids = encoder.encode_prompt(TEXT * 20)
    assert "".join(stream_text(encoder, ids[:3], ids[3:])) == decode(encoder, ids[3:])
    assert len(ids) > 500 and max(lengths) < 20


def opened(model: Llama, encoder: TextEncoder | None, **change: object) -> OpenedModel:
    return replace(OpenedModel(model, encoder, [], None, None, "tiny"), **change)


def written(opened: OpenedModel, prompts: list, options: SampleOptions) -> tuple[str, str]:
    """What goes to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    sample(opened, [Prompt(p) if isinstance(p, str) else p for p in prompts], options, out, err)
    return out.getvalue(), err.getvalue()


SPEED = r"--- tiny: 30 tokens, the first after \d+\.\d{3} s, then [\d,]+\.\d tokens/s\n"


def test_what_is_printed(model: Llama, encoder: TextEncoder):
    options = SampleOptions(max_new_tokens=30, seed=5)
    ids = [*generate(model, encoder.encode_prompt("Ünder"), **vars(options), stop_ids=[])]
    expected = encoder.decode([*encoder.encode_prompt("Ünder"), *ids])
    out, err = written(opened(model, encoder), ["Ünder", "Ünder"], options)
    assert out == f"{expected}\n\n{expected}\n" and re.fullmatch(SPEED * 2, err)
    stop = replace(opened(model, encoder), stop_ids=[ids[1]])
    assert re.fullmatch(r"--- tiny: 1 token, after [\d.]+ s; the model ended the text\n",
                        written(stop, ["Ünder"], options)[1])  # fmt: skip
    stop = replace(stop, stop_ids=[ids[0]])
    assert written(stop, ["Ünder"], options) == ("Ünder\n", "--- tiny: 0 tokens; the model ended the text\n")


def test_an_empty_prompt_starts_where_a_text_does(model: Llama, encoder: TextEncoder):
    options = SampleOptions(30, temperature=0)
    for change, first in (({}, encoder.eos_id), ({"bos_id": 0}, 0), ({"bos_id": 7}, 7)):
        out, _ = written(opened(model, encoder, **change), [""], options)
        ids = [*generate(model, [first], **GREEDY | {"max_new_tokens": 30})]
        assert out == "".join(stream_text(encoder, [first], ids)) + "\n"
    begins = with_bos(encoder)
    bos = begins.encode_prompt("")
    assert len(bos) == 1 and written(opened(model, begins, bos_id=7), [""], options)[0] == (
        "".join(stream_text(begins, bos, generate(model, bos, **GREEDY | {"max_new_tokens": 30}))) + "\n"
    )


def test_more_positions_than_the_model_was_made_for_are_reported(model: Llama, encoder: TextEncoder):
    length = len(encoder.encode_prompt("abc")) + 30
    warning = f"warning: prompt and new tokens are up to {length}, the model was made for {length - 1}: "
    assert written(opened(model, encoder, max_positions=length - 1), ["abc"], SampleOptions(30))[1].startswith(warning)
    assert "warning" not in written(opened(model, encoder, max_positions=length), ["abc"], SampleOptions(30))[1]


def test_a_warning_of_the_opened_model_is_written_once(model: Llama, encoder: TextEncoder):
    err = written(opened(model, encoder, warning="warning: has dropout"), ["abc", "d"], SampleOptions(3))[1]
    assert err.startswith("warning: has dropout\n---") and err.count("warning") == 1


def test_no_tokenizer(model: Llama):
    with pytest.raises(UserError, match="tiny has no tokenizer: expected tokenizer.json"):
        written(opened(model, None), ["a"], SampleOptions())


@pytest.fixture
def reading(model: Llama, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `dtron sample` opens; the module that reads files is not under test."""
    calls: list[tuple] = []

    def open_model(*given: object) -> OpenedModel:
        calls.append(given)
        return opened(model, encoder)

    monkeypatch.setitem(sys.modules, "dtron.hf.read", types.SimpleNamespace(open_model=open_model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_the_command(
    reading: list, model: Llama, encoder: TextEncoder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin\n"))
    numbers = ["--max-new-tokens", "30", "--temperature", "0.5", "--top-k", "20", "--top-p", "0.8", "--seed", "3"]
    assert main(["sample", "some/model", *numbers, "--prompt", "Ü", "--prompt", "-"]) == 0
    output = capsys.readouterr()
    texts = []
    for prompt in ("Ü", "from\nstdin"):
        ids = encoder.encode_prompt(prompt)
        options = {"temperature": 0.5, "top_k": 20, "top_p": 0.8, "seed": 3, "max_new_tokens": 30}
        texts.append(encoder.decode([*ids, *generate(model, ids, **GREEDY | options)]) + "\n")
    assert output.out == "\n".join(texts) and re.fullmatch(SPEED * 2, output.err)
    assert reading == [("some/model", torch.device("cpu"), torch.float32)]
    assert main(["sample", "m", "--dtype", "bfloat16", "--max-new-tokens", "1"]) == 0
    assert reading[1] == ("m", torch.device("cpu"), torch.bfloat16)
    assert "tiny: 1 token, after" in capsys.readouterr().err


def test_devices(reading: list, monkeypatch: pytest.MonkeyPatch):
    assert main(["sample", "m", "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert reading.pop()[1:] == (torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, expected in (
        ([], (torch.device("cuda"), torch.bfloat16)),
        (["--dtype", "float32"], (torch.device("cuda"), torch.float32)),
        (["--device", "cpu"], (torch.device("cpu"), torch.float32)),
    ):
        assert main(["sample", "m", "--max-new-tokens", "1", *flags]) == 0
        assert reading.pop()[1:] == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cuda"], "error: --device cuda: torch finds no GPU here"),
        (["--top-p", "0"], "error: top_p = 0.0: expected more than 0"),
        (["--prompt", "\udcff"], "error: --prompt is not UTF-8"),
    ],
)
def test_wrong_command_lines(flags: list[str], said: str, reading: list, capsys: pytest.CaptureFixture):
    assert main(["sample", "m", *flags]) == 1
    assert capsys.readouterr().err.startswith(said) and reading == []


def test_stdin_is_read_once(reading: list, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["sample", "m", "--prompt", "-", "--prompt", "-"])
    assert "may be given once" in capsys.readouterr().err


def test_an_interrupt_promises_nothing(reading: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "sample", stop)
    assert main(["sample", "m"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_commands_start_fast_and_need_no_transformers(encoder: TextEncoder, tmp_path: Path):
    """--help imports no torch, whose import takes seconds; running imports no transformers."""
    encoder.save(tmp_path)
    script = """
import sys
sys.modules["transformers"] = None
from dtron.__main__ import main
for name in ("prepare", "sample"):
    try:
        main([name, "--help"])
    except SystemExit:
        pass
assert "torch" not in sys.modules
import types, torch
from dtron.data.tokenizer import read_tokenizer
from dtron.hf.prompts import Prompt
from dtron.hf.read import OpenedModel
from dtron.models.llama import Llama, LlamaConfig
def open_model(path, device, dtype):
    model = Llama(LlamaConfig(300, 32, 1, 4, 2, 64)).to(device, dtype)
    return OpenedModel(model, read_tokenizer(path, path, "MODEL"), [], None, None, path)
sys.modules["dtron.hf.read"] = types.SimpleNamespace(open_model=open_model)
sys.exit(main(["sample", sys.argv[1], "--prompt", "Ü", "--device", "cpu", "--max-new-tokens", "3"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert "--max-new-tokens" in result.stdout and f"--- {tmp_path}: 3 tokens" in result.stderr


def test_what_is_not_given_is_as_the_options_and_generation_config_say():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = vars(parser.parse_args(["m"]))
    assert vars(SampleOptions()) == command.DEFAULTS and all(given[name] is None for name in command.DEFAULTS)
    assert (given["prompt"], given["device"], given["dtype"]) == (None, "auto", None)
    assert options_of({}, {}, "") == SampleOptions()
    file = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 7, "do_sample": True, "eos_token_id": 2}
    assert options_of(file, {"top_p": 1.0, "seed": 3}, "") == SampleOptions(7, 0.6, 0, 1.0, 3)
    assert options_of(file | {"do_sample": False}, {}, "").temperature == 0
    assert options_of(file | {"do_sample": False}, {"temperature": 2.0}, "").temperature == 2
    for wrong in ({"temperature": "hot"}, {"top_k": 1.5}, {"max_new_tokens": True}, {"top_p": 0}):
        with pytest.raises(UserError, match=f"^x.json: {next(iter(wrong))} = .*: expected "):
            options_of(wrong, {}, "x.json")


def test_json_lines_go_in_and_out(
    reading: list, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    lines = [{"prompt": "a\u2028b", "id": 7}, {"prompt": "Ünder"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + '\r\n"bare"\n'
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    (tmp_path / "p.txt").write_text("from a file\n\n")
    options = ["--temperature", "0", "--max-new-tokens", "5"]
    assert main(["sample", "m", *options, "--prompt-file", str(tmp_path / "p.jsonl"), "--prompt", "Ü"]) == 0
    found = capsys.readouterr()
    answers = [json.loads(line) for line in found.out.split("\n")[:-1]]
    completions = [answer.pop("completion") for answer in answers]
    assert answers == [{"prompt": "Ü"}, *lines, {"prompt": "bare"}] and all(completions)
    assert found.err.count("--- tiny") == 4
    assert main(["sample", "m", *options, "--prompt", "Ünder"]) == 0
    assert capsys.readouterr().out == f"Ünder{completions[2]}\n"
    assert main(["sample", "m", *options, "--prompt-file", str(tmp_path / "p.txt")]) == 0
    assert capsys.readouterr().out.startswith("from a file\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    assert main(["sample", "m", *options, "--prompt-file", "-"]) == 0
    assert capsys.readouterr().out.startswith("from stdin")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "p.jsonl, line 3 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2: expected an object such as {"prompt"'),
        ("p.jsonl", b'{"prompt": 7}', "line 1: expected an object"),
        ("p.jsonl", b"[1]", "line 1: expected an object"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', "line 1 is not JSON"),
        ("p.jsonl", b'{"messages": []}', "line 1 holds messages: give --chat"),
        ("p.jsonl", b" \n", "is empty: expected a text, or JSON lines"),
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\xff", "is not UTF-8"),
        ("absent.txt", None, "cannot be read (No such file or directory)"),
    ],
)
def test_prompt_files_that_are_wrong(
    name: str, content: bytes | None, said: str, reading: list, tmp_path: Path, capsys: pytest.CaptureFixture
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["sample", "m", "--prompt-file", str(tmp_path / name)]) == 1
    assert said in capsys.readouterr().err and reading == []


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


def test_a_chat_is_put_into_the_models_form(
    model: Llama, encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    begins = with_bos(encoder)
    chat = opened(model, begins, assets={name: text.encode() for name, text in begins.files().items()})
    fake = types.SimpleNamespace(open_model=lambda *_: chat)
    monkeypatch.setitem(sys.modules, "dtron.hf.read", fake)
    options = ["--temperature", "0", "--max-new-tokens", "5", "--device", "cpu", "--chat"]
    assert main(["sample", "m", *options, "--prompt", "Hi"]) == 1
    assert "tiny has no chat template: expected chat_template.jinja" in capsys.readouterr().err
    chat.assets["chat_template.jinja"] = TEMPLATE.encode()
    ids = begins.encode_prompt("[user] Hi\n[assistant] ")
    answer = begins.decode([*generate(model, ids, **GREEDY | {"max_new_tokens": 5})])
    assert main(["sample", "m", *options, "--prompt", "Hi"]) == 0
    assert capsys.readouterr().out == answer + "\n"
    messages = [{"role": "user", "content": "Hi"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ({"prompt": "Hi"}, {"messages": messages}))))
    assert main(["sample", "m", *options, "--prompt-file", str(tmp_path / "p.jsonl")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"prompt": "Hi", "completion": answer}, {"messages": messages, "completion": answer}]
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "robot", "content": "Hi"}]}')
    assert main(["sample", "m", *options, "--prompt-file", str(tmp_path / "p.jsonl")]) == 1
    assert "--chat: the template of tiny refuses the messages: no robots" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", "m", "--chat"])
    assert "--chat needs a message" in capsys.readouterr().err
