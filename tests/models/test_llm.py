"""P(match) from a decoder, against transformers' plain forward pass; prompts, labels, truncation, what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.cascade_prefixes import computed_tokens
from flipkd.errors import ConfigError, ModelError
from flipkd.models import llm as llm_module
from flipkd.models.adapter import FAMILIES, load_student, new_student, save_student
from flipkd.models.llm import load_llm, load_prompts, read_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.models.llm_prompt import TRAINED_PROMPTS, PairPrompt, pair_prompt, read_prompt
from flipkd.models.options import StudentOptions
from tests.models.test_packed import CLASSES, WINDOWED, shaken
from tests.small_models import make_base

Pairs = tuple[list[str], list[str]]
MakePrompt = Callable[..., LlmOptions]
CHAT = (
    "{% for message in messages %}[CLS] {{ message['role'] }}: {{ message['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llm_dir(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    return make_base(tmp_path_factory.mktemp("llm"), minilm_dir, seed=3, initializer_range=0.5)


@pytest.fixture(scope="module")
def pairs(icd9: list[tuple[str, str, str]]) -> Pairs:
    """Grouped by their left text, as candidates are; some left texts stand alone."""
    rows = icd9[:: len(icd9) // 40][:40]
    left = [rows[0][1]] * 12 + [rows[1][1]] * 8 + [long for _, long, _ in rows[20:]]
    return left, [short for _, _, short in rows]


@pytest.fixture
def make_prompt(llm_dir: Path, tmp_path: Path) -> MakePrompt:
    """make_prompt("Is {left} {right}? ", ("yes", "no")) -> options with such a prompt file."""

    def make(text: str, labels: tuple[str, str] = ("yes", "no"), folder: Path = llm_dir, **more: Any) -> LlmOptions:
        (tmp_path / "prompt.txt").write_text(text)
        return LlmOptions(str(folder), prompt_file=str(tmp_path / "prompt.txt"), labels=labels, device="cpu", **more)

    return make


def plain(folder: Path, prompt: list[int], labels: tuple[tuple[int, ...], ...]) -> float:
    """P(match) by one plain forward pass per label."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    sums = []
    for label in labels:
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1)
        sums.append(sum(float(logs[len(prompt) - 1 + step, token]) for step, token in enumerate(label)))
    return float(1 / (1 + np.exp(sums[0] - sums[1])))


@pytest.mark.parametrize("share", [True, False])
def test_it_is_the_plain_forward_pass(llm_dir: Path, pairs: Pairs, share: bool) -> None:
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu", share_prefixes=share), threads=2)
    found = llm.score_pairs(*pairs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(llm_dir))
    for place in (0, 3, 15, 30):
        words = TRAINED_PROMPTS[2]
        pieces = [words.before, pairs[0][place], words.between, pairs[1][place], words.after]
        ids = [number for piece in pieces for number in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        prompt = [tokenizer.cls_token_id, *ids]
        labels = tuple(tuple(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in words.labels)
        assert found.probabilities[place] == pytest.approx(plain(llm_dir, prompt, labels), abs=1e-5)
        assert found.tokens[place] == len(prompt)
    assert found.probabilities.std() > 0.05  # else all this says nothing


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {}),
        ("Qwen2", {}),  # its tokenizer makes several tokens of a label
        ("Mistral", {"sliding_window": 8}),
        ("Gemma2", {"sliding_window": 8, "final_logit_softcapping": 5.0}),
    ],
)
def test_sharing_prefixes_changes_nothing(
    family: str, settings: dict[str, Any], pairs: Pairs, minilm_dir: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", minilm_dir, 0, family, initializer_range=0.5, **settings)
    options = LlmOptions(str(base), device="cpu", max_tokens=300)
    llms = [load_llm(replace(options, share_prefixes=share), threads=2) for share in (True, False)]
    shared, apart = (llm.score_pairs(*pairs).probabilities for llm in llms)
    np.testing.assert_allclose(shared, apart, atol=1e-5)
    # First texts of several lengths came together in batches.
    engine: Any = llms[0].engine
    prompts = llms[0].tokenizer.tokenize(list(zip(*pairs, strict=True)))
    assert any(len({len(prefix) for prefix in task.prefixes}) > 1 for task in engine._tasks(prompts))
    # Where a label has several tokens probabilities are near 0; their logarithms tell more.
    shared, apart = (llm.engine.label_log_probabilities(prompts) for llm in llms)
    np.testing.assert_allclose(shared, apart, atol=1e-4)
    assert (shared.std(axis=0) > 0.1).all()


def test_what_sharing_saves_can_be_counted(llm_dir: Path) -> None:
    """Instruction and first text once, then what follows; a first text that stands alone is no prefix."""
    options = LlmOptions(str(llm_dir), device="cpu")
    shared, apart = (load_llm(replace(options, share_prefixes=share), threads=1) for share in (True, False))
    pairs = (["knee"] * 3 + ["hip joint"], ["hip", "toe", "ankle joint", "toe"])
    prompts = shared.tokenizer.tokenize(list(zip(*pairs, strict=True)))
    prompt = shared.tokenizer.prompt
    around = len(prompt.between) + len(prompt.after)
    engines: list[Any] = [apart.engine, shared.engine]
    assert computed_tokens(engines[0], prompts) == 4 * (len(prompt.before) + around) + 3 + 4 + 2 + 1
    assert computed_tokens(engines[1], prompts) == len(prompt.before) + 1 + 4 * around + 4 + 2 + 1


@pytest.mark.parametrize("max_tokens", [1, 150, 10_000])
def test_neighbours_in_a_batch_change_nothing(llm_dir: Path, pairs: Pairs, max_tokens: int) -> None:
    """A short and a long prompt together: transformers#34055, transformers#35909."""
    whole = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1).score_pairs(*pairs).probabilities
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu", max_tokens=max_tokens), threads=2)
    order = np.random.default_rng(0).permutation(len(pairs[0]))
    mixed = llm.score_pairs(*([side[place] for place in order] for side in pairs)).probabilities
    np.testing.assert_allclose(mixed, whole[order], atol=1e-5)
    alone = llm.score_pairs([pairs[0][5]], [pairs[1][5]]).probabilities
    np.testing.assert_allclose(alone, whole[5:6], atol=1e-5)


def test_the_same_call_gives_the_same_bytes(llm_dir: Path, pairs: Pairs) -> None:
    found = [
        load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=threads).score_pairs(*pairs).probabilities
        for threads in (1, 2)
    ]
    assert found[0].tobytes() == found[1].tobytes()


def test_a_pair_is_asked_once_and_no_pair_is_no_work(llm_dir: Path, pairs: Pairs) -> None:
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1)
    found = llm.score_pairs([*pairs[0], *pairs[0]], [*pairs[1], *pairs[1]])
    assert (found.distinct, len(found.probabilities)) == (40, 80)
    assert found.probabilities[:40].tobytes() == found.probabilities[40:].tobytes()
    assert llm.score_pairs([], []).probabilities.shape == (0,)


def test_both_orders_are_averaged(llm_dir: Path, pairs: Pairs) -> None:
    options = LlmOptions(str(llm_dir), device="cpu")
    one = load_llm(options, threads=1)
    forward, backward = one.score_pairs(*pairs).probabilities, one.score_pairs(*pairs[::-1]).probabilities
    assert np.abs(forward - backward).max() > 0.05
    both = load_llm(replace(options, both_orders=True), threads=1).score_pairs(*pairs).probabilities
    np.testing.assert_allclose(both, (forward + backward) / 2, atol=1e-5)


@pytest.mark.parametrize("labels", [("match", "mismatch"), ("yes indeed", "yes and no"), ("yes", "no way at all")])
def test_labels_of_several_tokens(
    make_prompt: MakePrompt, llm_dir: Path, pairs: Pairs, labels: tuple[str, str]
) -> None:
    """ "yes indeed" and "yes and no" share their first token."""
    llm = load_llm(make_prompt("{left} and {right} ?", labels), threads=1)
    tokens = llm.tokenizer.prompt.labels
    assert max(map(len, tokens)) > 1
    found = llm.score_pairs(*pairs).probabilities
    prompts = llm.tokenizer.tokenize(list(zip(*pairs, strict=True)))
    for place in (0, 20):
        wanted = plain(llm_dir, [*prompts.shared[place], *prompts.own[place]], tokens)
        assert found[place] == pytest.approx(wanted, abs=1e-5)


def test_labels_that_begin_one_another_are_refused(make_prompt: MakePrompt) -> None:
    with pytest.raises(ModelError, match="one begins the other"):
        load_prompts(make_prompt("{left} {right} ?", ("yes", "yes and no")))


def test_swapped_prompts_and_braces(make_prompt: MakePrompt) -> None:
    prompts = load_prompts(make_prompt("a {{b}} {right} c {left} d\n", ("yes", "no")))
    found = prompts.tokenize([("knee", "hip")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(read_llm(make_prompt("x {left} {right} y")).base))
    assert tokenizer.decode([*found.shared[0], *found.own[0]]) == "[CLS] a { b } hip c knee d"


@pytest.mark.parametrize(
    "text",
    [
        "no placeholder", "{left}", "{left} {left} {right}", "{left} {right} {other}", "{left.__class__} {right} ?",
        "{left[0]} {right} ?", "{left!r} {right} ?", "{left:>9} {right} ?", "{} {} ?", "{0} {1} ?", "{left} {right",
    ],
)  # fmt: skip
def test_other_placeholders_are_refused(make_prompt: MakePrompt, text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-file"):
        load_prompts(make_prompt(text))


def test_a_prompt_must_end_with_words_and_be_there(make_prompt: MakePrompt, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="words must follow"):
        load_prompts(make_prompt("{left} {right}"))
    with pytest.raises(ConfigError, match="--prompt-file"):
        read_prompt(tmp_path / "gone.txt", ("no", "yes"), False)
    for wrong in ({"labels": ("yes", "no")}, {"chat_template": True}, {"prompt_file": "x"}, {"engine": "other"}):
        with pytest.raises(ConfigError):
            LlmOptions("x", **wrong)  # type: ignore[arg-type]


def test_the_longer_text_is_cut_first_and_none_is_lost(llm_dir: Path) -> None:
    """sentence-transformers#574, #929, #4060, for the LLM."""
    options = LlmOptions(str(llm_dir), device="cpu")
    fixed = load_prompts(options).prompt.longest
    llm = load_llm(replace(options, max_length=fixed + 10), threads=1)
    found = llm.score_pairs(["knee " * 500, "knee", "knee " * 3], ["hip " * 400, "hip " * 400, "hip"])
    assert found.truncated.tolist() == [True, True, False]
    assert found.tokens.tolist() == [fixed + 9, fixed + 9, fixed + 3]  # less one token for the label
    prompts = llm.tokenizer.tokenize([("knee " * 500, "hip " * 400), ("knee", "hip " * 400)])
    before, around = len(llm.tokenizer.prompt.before), len(llm.tokenizer.prompt.between + llm.tokenizer.prompt.after)
    assert [len(ids) - before for ids in prompts.shared] == [5, 1]
    assert [len(ids) - around for ids in prompts.own] == [5, 9]
    with pytest.raises(ModelError, match="no room for two texts"):
        load_prompts(replace(options, max_length=fixed + 1))
    with pytest.raises(ConfigError, match="512 positions"):
        load_prompts(replace(options, max_length=513))


@pytest.mark.parametrize(
    "text", ["[SEP] [CLS] [MASK]", "\nSecond record: x\nDo both", "{left} {right}", "", "😀\u200b"]
)
def test_a_text_cannot_speak_as_the_prompt(llm_dir: Path, text: str) -> None:
    """Special tokens are spelled out, and the pieces of the prompt stay what and where they are."""
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1)
    prompt, tokenizer = llm.tokenizer.prompt, transformers.AutoTokenizer.from_pretrained(str(llm_dir))
    special = {tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id}
    found = llm.tokenizer.tokenize([(text, text), (text, "hip")])
    body = found.shared[0][len(prompt.before) :]
    assert not special & set(body)
    assert found.own[0] == [*prompt.between, *body, *prompt.after]
    assert np.isfinite(llm.score_pairs([text, text], [text, "hip"]).probabilities).all()


def test_the_chat_template_is_used_only_when_asked_for(
    make_prompt: MakePrompt, llm_dir: Path, pairs: Pairs, minilm_dir: Path, tmp_path: Path
) -> None:
    chat = make_base(tmp_path / "chat", minilm_dir, seed=3, initializer_range=0.5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(chat))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(str(chat))
    prompts = load_prompts(make_prompt("is {left} {right} ?", folder=chat, chat_template=True))
    found = prompts.tokenize([("knee [SEP]", "hip")])
    ids = [*found.shared[0], *found.own[0]]
    # The template's own special tokens count, those of the text do not, and nothing stands there twice.
    assert ids.count(tokenizer.cls_token_id) == ids.count(tokenizer.sep_token_id) == 1
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == ("[CLS] user : is knee [ sep ] hip ? [SEP] assistant :")
    plainly = load_prompts(make_prompt("is {left} {right} ?", folder=chat)).tokenize([("knee", "hip")])
    ids = [*plainly.shared[0], *plainly.own[0]]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "is", "knee", "hip", "?"]
    with pytest.raises(ModelError, match="no chat template"):
        load_prompts(make_prompt("is {left} {right} ?", folder=llm_dir, chat_template=True))
    for template in ("{{ messages[0]['content'] | upper }}", "{{ raise_exception('no') }}", "{{ 'nothing' }}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(str(chat))
        with pytest.raises(ModelError, match="chat template"):
            load_prompts(make_prompt("is {left} {right} ?", folder=chat, chat_template=True))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_numbers_that_are_not_finite_are_an_error_that_names_places(
    minilm_dir: Path, tmp_path: Path, dtype: Any
) -> None:
    base = make_base(tmp_path / "base", minilm_dir, seed=3, initializer_range=0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    knee = transformers.AutoTokenizer.from_pretrained(str(base)).convert_tokens_to_ids("knee")
    model.get_input_embeddings().weight.data[knee] = torch.nan
    model.save_pretrained(str(base))
    llm = load_llm(LlmOptions(str(base), device="cpu", dtype=dtype), threads=1)
    with pytest.raises(ModelError, match=r"1 of the pairs \(places 1\)") as error:
        llm.score_pairs(["hip", "knee", "hip"], ["toe", "toe", "toe"])
    assert "knee" not in str(error.value)
    assert np.isfinite(llm.score_pairs(["hip"], ["toe"]).probabilities).all()


def test_what_overflows_in_bf16_is_asked_again_in_float32(llm_dir: Path, pairs: Pairs) -> None:
    """transformers#31035, transformers#45491."""
    exact = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1).score_pairs(*pairs).probabilities
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu", dtype="bf16"), threads=1)
    near = llm.score_pairs(*pairs).probabilities
    assert 0 < np.abs(near - exact).max() < 0.3
    engine: Any = llm.engine
    inner = engine._run
    engine._run = lambda prompts: np.where(np.arange(len(prompts.own))[:, None] % 2, np.inf, inner(prompts))
    found = llm.score_pairs(*pairs).probabilities
    np.testing.assert_allclose(found[1::2], exact[1::2], atol=1e-5)
    assert found[::2].tobytes() == near[::2].tobytes()


@pytest.mark.parametrize("whole", [False, True])
def test_a_trained_adapter_answers_with_the_whole_base(
    llm_dir: Path, pairs: Pairs, tmp_path: Path, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Against PEFT's own forward pass, unmerged, on the whole base; the blocks above k are there."""
    from flipkd.distill.language_model import answer_logits

    options = StudentOptions(str(llm_dir), layer=1, dimension=8, rank=4, alpha=8.0, max_length=20, whole_tower=whole)
    save_student(shaken(new_student(options)), tmp_path / "run" / "adapter")
    llm = load_llm(LlmOptions(str(tmp_path / "run"), device="cpu"), threads=1)
    assert ("expect poor answers" in caplog.text) is not whole
    assert llm.tokenizer.max_length == llm.tokenizer.prompt.longest + 40
    found = llm.score_pairs(*pairs).probabilities
    base = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1).score_pairs(*pairs).probabilities
    assert np.abs(found - base).max() > 0.01
    if whole:  # what training itself computes
        student = load_student(tmp_path / "run" / "adapter").eval()
        prompts = llm.tokenizer.tokenize(list(zip(*pairs, strict=True)))
        with torch.no_grad():
            logits = answer_logits(
                student, [[*shared, *own] for shared, own in zip(prompts.shared, prompts.own, strict=True)]
            )
        no, yes = (label[0] for label in llm.tokenizer.prompt.labels)
        np.testing.assert_allclose(found, torch.sigmoid(logits[:, yes] - logits[:, no]).numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_every_family_answers_as_it_was_trained(
    family: str, pairs: Pairs, minilm_dir: Path, tmp_path: Path
) -> None:
    """Soft caps of attention and of logits, and windows, are where training has them."""
    from flipkd.distill.language_model import answer_log_odds

    settings: dict[str, Any] = {"sliding_window": 7} if family in WINDOWED else {}
    if family == "gemma2":
        settings |= {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5}
    base = make_base(tmp_path / "base", minilm_dir, 0, CLASSES[family], initializer_range=0.5, **settings)
    options = StudentOptions(str(base), layer=1, dimension=8, rank=4, max_length=200, whole_tower=True)
    student = shaken(new_student(options))
    save_student(student, tmp_path / "adapter")
    ids = [[student.body(text) for text in student.tokenize(list(pair)).ids] for pair in zip(*pairs, strict=True)]
    prompt = pair_prompt(TRAINED_PROMPTS[options.prompt_version], student.tokenizer)
    trained = answer_log_odds(student, prompt, [(left, right) for left, right in ids], 4096)
    llm = load_llm(LlmOptions(str(tmp_path / "adapter"), device="cpu"), threads=1)
    engine: Any = llm.engine
    attention = engine._model.config._attn_implementation
    assert attention == ("eager" if family == "gemma2" else "sdpa")
    logs = engine.label_log_probabilities(llm.tokenizer.tokenize(list(zip(*pairs, strict=True))))
    np.testing.assert_allclose(logs[:, 1] - logs[:, 0], trained, atol=1e-3)
    assert trained.std() > 0.01  # else all this says nothing


def test_folders_that_cannot_answer(llm_dir: Path, minilm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "student.json").write_text("{}")
    for folder, message in (
        (tmp_path / "run", "not finished"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "broken", "no whole student"),
        (minilm_dir, "does not predict tokens"),
    ):
        with pytest.raises(ModelError, match=message):
            read_llm(LlmOptions(str(folder)))
    base = make_base(tmp_path / "base", minilm_dir, seed=1)
    save_student(new_student(StudentOptions(str(base), layer=1, dimension=8, rank=4)), tmp_path / "adapter")
    assert read_llm(LlmOptions(str(tmp_path / "adapter"))).adapter == tmp_path / "adapter"
    before = read_llm(LlmOptions(str(tmp_path / "adapter"))).fingerprint()
    make_base(base, minilm_dir, seed=2)
    with pytest.raises(ModelError, match="another base"):
        read_llm(LlmOptions(str(tmp_path / "adapter")))
    assert len(before) == 64


@pytest.mark.parametrize("version", TRAINED_PROMPTS)
def test_training_asks_the_same_prompt(llm_dir: Path, version: int, tmp_path: Path) -> None:
    """The prompt of training, piece by piece as a student tokenises texts; a run keeps its own."""
    options = StudentOptions(str(llm_dir), layer=1, dimension=8, rank=4, whole_tower=True, prompt_version=version)
    student = new_student(options)
    words = TRAINED_PROMPTS[version]
    prompt: PairPrompt = pair_prompt(words, student.tokenizer)
    pieces = student.tokenize([words.before, words.between, words.after, *words.labels]).ids
    bodies = [student.body(ids) for ids in pieces]
    assert prompt.before == [*student.frame[0], *bodies[0]]
    assert [prompt.between, prompt.after, *map(list, prompt.labels)] == bodies[1:]
    save_student(student, tmp_path)
    assert load_prompts(LlmOptions(str(tmp_path))).prompt == prompt


def test_a_run_from_before_there_were_versions_keeps_its_prompt(llm_dir: Path, tmp_path: Path) -> None:
    student = new_student(StudentOptions(str(llm_dir), layer=1, dimension=8, rank=4, prompt_version=1))
    save_student(student, tmp_path)
    facts = json.loads((tmp_path / "student.json").read_text())
    del facts["options"]["prompt_version"]
    (tmp_path / "student.json").write_text(json.dumps(facts))
    old = load_prompts(LlmOptions(str(tmp_path))).prompt
    assert old == pair_prompt(TRAINED_PROMPTS[1], student.tokenizer)
    assert old != load_prompts(LlmOptions(str(llm_dir))).prompt
    assert load_student(tmp_path).options.prompt_version == 1
    facts["options"]["prompt_version"] = 9
    (tmp_path / "student.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="prompt 9"):
        load_prompts(LlmOptions(str(tmp_path)))
    with pytest.raises(ConfigError, match="--prompt-version"):
        StudentOptions(str(llm_dir), prompt_version=9)


def test_vllm_is_never_replaced(llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engine vllm: vLLM cannot be imported"):
        load_llm(LlmOptions(str(llm_dir), engine="vllm"))


def test_reading_a_prompt_needs_no_torch() -> None:
    names = ("torch", "peft", "ray", "sklearn", "vllm")
    code = f"import sys, {llm_module.__name__}, flipkd.cli; sys.exit(any(name in sys.modules for name in {names}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
